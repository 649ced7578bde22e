"""`mmkd teachers`: the published models that can be teachers, what is known of each, and conversion of their weights.

mmkd teachers list
mmkd teachers show BiomedCLIP
mmkd teachers convert BiomedCLIP --weights open_clip_pytorch_model.bin --out teachers/biomedclip
"""

import argparse

HELP = "list known teachers, show what is known of one, convert its weights"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list | show | convert")
    verbs.add_parser("list", help="one line a teacher")
    show = verbs.add_parser("show", help="the record of one teacher")
    show.add_argument("name", metavar="NAME", help="from the list, or a dotted path to one of your own")
    convert = verbs.add_parser("convert", help="published weights to a checkpoint that describes itself")
    convert.add_argument("name", metavar="NAME", help="as in show; any name where the weights describe themselves")
    convert.add_argument(
        "--weights",
        required=True,
        metavar="FILE",
        help="safetensors or torch's file with the vocabulary beside it, or the folder of both",
    )
    convert.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")


def run(args: argparse.Namespace) -> None:
    """Prints the list or the record, or converts."""
    from teachers import specs

    if args.verb == "convert":
        from teachers.convert import convert

        out = convert(args.name, args.weights, args.out)
        print(f"converted to {out}; it is a teacher ({args.name}={out}) and loads with mmkd_jax.load")
    else:
        print(specs.table() if args.verb == "list" else specs.page(args.name))
