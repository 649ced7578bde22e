"""Builds report.html of a demo or evaluation folder from what lies in it (report_data.json, or results.json)."""

import argparse

HELP = "(re)build the one-page report of a demo or evaluation folder"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("folder", metavar="DIR", help="folder with report_data.json or results.json")


def run(args: argparse.Namespace) -> None:
    """Writes DIR/report.html and says where it is."""
    from mmkd_jax import report

    print(report.rebuild(args.folder))
