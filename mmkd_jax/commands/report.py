"""Builds report.html of a demo, an evaluation or a training run from what lies in its folder."""

import argparse

HELP = "(re)build the one-page report of a demo, an evaluation or a training run"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("folder", metavar="DIR", help="folder with report_data.json, results.json or telemetry.jsonl")


def run(args: argparse.Namespace) -> None:
    """Writes DIR/report.html and says where it is."""
    from mmkd_jax import report

    print(report.rebuild(args.folder))
