"""`mmkd export`: write a checkpoint in a form that other software loads, with a model card.

`open_clip` is a folder for open_clip's `local-dir:` (and, once uploaded, `hf-hub:`) names.
"""

import argparse

HELP = "write a checkpoint as an open_clip folder"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's folder or one of its checkpoints")
    parser.add_argument("--format", default="open_clip", choices=("open_clip",), help="default: open_clip")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--results", metavar="FILE", help="results.json whose rows go into the model card")
    parser.add_argument("--hub", default="", metavar="NAME", help="the name that the folder will have on a hub")


def run(args: argparse.Namespace) -> None:
    """Exports and says where."""
    from mmkd_jax import export
    from mmkd_jax.evals import results

    rows = results.load(args.results) if args.results else None
    out = export.export_checkpoint(args.checkpoint, args.out, results=rows, hub=args.hub)
    print(f"exported to {out}; its README.md says how to load it")
