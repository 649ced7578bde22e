"""`mmkd teachers`: the published models that can be teachers: list them, show what is known, convert, verify.

mmkd teachers list
mmkd teachers show BiomedCLIP
mmkd teachers convert BiomedCLIP --weights open_clip_pytorch_model.bin --out teachers/biomedclip
mmkd teachers verify BiomedCLIP --weights open_clip_pytorch_model.bin
mmkd teachers verify BiomedCLIP --weights open_clip_pytorch_model.bin --samples MMKD-CLIP/MMKDCLIP_DATA

verify runs the weights by this project's towers and by the libraries that they were trained with (torch, open_clip,
timm, transformers), and compares features in float32. It leaves with 1 where they differ by more than rounding, as cmp
and diff do. With --samples it compares with features that the authors published, which needs no torch.
"""

import argparse

HELP = "list known teachers, show what is known of one, convert or verify its weights"
DIFFERENT = 1  # exit code


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list | show | convert | verify")
    verbs.add_parser("list", help="one line a teacher")
    show = verbs.add_parser("show", help="the record of one teacher")
    show.add_argument("name", metavar="NAME", help="from the list, or a dotted path to one of your own")
    convert = verbs.add_parser("convert", help="published weights to a checkpoint that describes itself")
    convert.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    verify = verbs.add_parser("verify", help="this project's features of a teacher against the reference libraries'")
    for does in (convert, verify):
        does.add_argument("name", metavar="NAME", help="as in show; any name where the weights describe themselves")
        does.add_argument(
            "--weights",
            required=True,
            metavar="FILE",
            help="safetensors or torch's file with the vocabulary beside it, or the folder of both",
        )
    verify.add_argument(
        "--images", nargs="+", default=[], metavar="PATH", help="pictures or folders of them (default: embedded ones)"
    )
    verify.add_argument(
        "--texts", nargs="+", default=[], metavar="TEXT|FILE", help="captions, or .txt files of them (default: theirs)"
    )
    verify.add_argument("--samples", metavar="DIR", help="compare with the authors' published features in this folder")


def run(args: argparse.Namespace) -> None:
    """Prints the list or the record, converts, or verifies."""
    from teachers import specs

    if args.verb == "convert":
        from teachers.convert import convert

        out = convert(args.name, args.weights, args.out)
        print(f"converted to {out}; it is a teacher ({args.name}={out}) and loads with mmkd_jax.load")
    elif args.verb == "verify":
        _verify(args)
    else:
        print(specs.table() if args.verb == "list" else specs.page(args.name))


def _verify(args: argparse.Namespace) -> None:
    from mmkd_jax import api
    from mmkd_jax.commands import encode
    from mmkd_jax.errors import InputError

    if args.samples:
        if args.images or args.texts:
            raise InputError("--samples brings its own pictures and texts; leave out --images and --texts")
        from teachers import samples

        print(samples.page(args.name, args.weights, args.samples))
        return
    from teachers.verify import verify

    images = [api.open_picture(path) for place in args.images for path in encode.pictures(place)]
    texts = [line for text in args.texts for line in encode.lines(text)]
    comparison = verify(args.name, args.weights, images, texts)
    print(comparison)
    if not comparison.agrees:
        raise SystemExit(DIFFERENT)
