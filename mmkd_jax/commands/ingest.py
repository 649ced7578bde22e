"""mmkd ingest: from a source of image-text pairs to a set."""

import argparse
import ast
import json
from typing import Any

from mmkd_jax.errors import InputError

HELP = "turn image-text pairs (WebDataset, JSONL, ...) into a set"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("source", metavar="SOURCE", help="webdataset, jsonl, sample, mmkd_release, or a module")
    parser.add_argument("--input", nargs="+", default=[], action="extend", metavar="PATH", help="what the source reads")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the new set")
    parser.add_argument(
        "--features", metavar="DIR", help="mmkd_release only: where its teachers' features and selection go"
    )
    parser.add_argument("--name", help="name of the data set (default: the folder's)")
    parser.add_argument("--shards", type=int, metavar="N", help="number of shards (default: one for every 256 MiB)")
    parser.add_argument(
        "--max-side", type=int, metavar="PX", help="re-encode pictures to this longer side (default: keep their bytes)"
    )
    parser.add_argument(
        "--max-bad", type=float, default=0.05, metavar="F", help="largest fraction of unusable records (default: 0.05)"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the source, e.g. name=busi"
    )


def run(args: argparse.Namespace) -> None:
    """Ingests, and prints what is in the set."""
    from mmkd_jax.data import ingest
    from mmkd_jax.data.sources import open_source

    if args.max_side is not None and args.max_side < 1:
        raise InputError(f"--max-side {args.max_side} is not a size in px")
    if args.features and args.source != "mmkd_release":
        raise InputError(f"{args.source} brings no features along; leave --features out, and run mmkd emit")
    source = open_source(args.source, args.input, **dict(map(_option, args.option)))
    pairs = ingest.ingest(
        source, args.out, name=args.name, shards=args.shards, max_side=args.max_side, max_bad=args.max_bad
    )
    print(json.dumps(ingest.summary(pairs), indent=2, ensure_ascii=False))
    if args.features:
        from mmkd_jax.data import released
        from teachers import specs

        published = {specs.find(name).published_as: specs.find(name).spec.license for name in specs.TEACHERS}
        print("\n".join(released.told(released.import_features(args.input, pairs, args.features, published))))


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is a Python literal, or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise InputError(f"--option {text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
