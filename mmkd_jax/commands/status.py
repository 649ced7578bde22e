"""A run at a glance, while it trains or afterwards: how far, how fast, what its time goes into, loss, checkpoints.

mmkd status runs/stage1
"""

import argparse

HELP = "show a training run at a glance: progress, speed, use of the machine, loss, checkpoints"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("run", metavar="RUN", help="the folder of mmkd train")


def run(args: argparse.Namespace) -> None:
    """Prints it."""
    from mmkd_jax.report import telemetry

    print("\n".join(telemetry.lines(telemetry.gather(args.run))))
