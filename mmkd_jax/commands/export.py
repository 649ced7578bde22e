"""`mmkd export`: write a checkpoint in a form that other software loads, with a model card.

`open_clip` is a folder for open_clip's `local-dir:` (and, once uploaded, `hf-hub:`) names; `hf` one for transformers'
`CLIPModel`, which has no BERT; `unimed` one for the code of UniMed-CLIP and MMKD-CLIP. Licences of teachers and data
that forbid passing the model on, or the stated use of it, are told and stop the export.
"""

import argparse

HELP = "write a checkpoint for open_clip, transformers or UniMed-CLIP's code"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run's folder or one of its checkpoints")
    forms = ("open_clip", "hf", "unimed")
    parser.add_argument("--format", default="open_clip", choices=forms, help="default: open_clip")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--results", metavar="FILE", help="results.json whose rows go into the model card")
    parser.add_argument("--hub", default="", metavar="NAME", help="the name that the folder will have on a hub")
    uses = ("research", "commercial")
    parser.add_argument("--use", default="research", choices=uses, help="what it is meant for; default: research")
    parser.add_argument(
        "--accept-licences", action="store_true", help="export although licences forbid it; the card says so"
    )


def run(args: argparse.Namespace) -> None:
    """Exports and says where."""
    from mmkd_jax import export
    from mmkd_jax.evals import results

    out = export.export_checkpoint(
        args.checkpoint,
        args.out,
        form=args.format,
        results=results.load(args.results) if args.results else None,
        hub=args.hub,
        use=args.use,
        accept_licences=args.accept_licences,
    )
    print(f"exported to {out}; its README.md says how to load it")
