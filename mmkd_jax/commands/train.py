"""`mmkd train`: stage 1, stage 2, or any task that a config names."""

import argparse

from mmkd_jax import cli

HELP = "train a student: configs/stage1_clip.py, configs/stage2_mmkd.py, or a config of your own"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    cli.add_config(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder; the same again continues it")
    parser.add_argument(
        "--profile", metavar="FIRST[:LAST]", help="trace these steps into DIR/profile, for xprof --logdir DIR/profile"
    )


def run(args: argparse.Namespace) -> None:
    """Trains, or goes on where an earlier run in the same folder stopped."""
    from mmkd_jax import config as configs
    from mmkd_jax.train import distributed, loop, profile

    traced = profile.steps(args.profile) if args.profile else None
    distributed.start()
    workdir = loop.run(configs.load(args.config, args.overrides), args.workdir, traced=traced)
    print(f"done: {workdir}")
