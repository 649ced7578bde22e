"""Builds report.html of a demo, an evaluation or a training run, or a study's page, from what lies in its folder."""

import argparse

HELP = "(re)build the one-page report of a demo, an evaluation or a training run"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("folder", metavar="DIR", help="folder with report_data.json, results.json or telemetry.jsonl")


def run(args: argparse.Namespace) -> None:
    """Writes DIR/report.html, or the pages of the studies in it, and says where they are."""
    from mmkd_jax import report

    for page in report.pages(args.folder):
        print(page)
