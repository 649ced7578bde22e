"""Turns the pictures of a source, with their texts and labels, into a set of pairs.

mmkd ingest webdataset --input DATA/*.tar --out PAIRS
mmkd ingest folders --input ROOT --out PAIRS --split test=0.2 --option "group='(patient[0-9]+)'"
mmkd ingest pathmnist --input FOLDER --out PAIRS            # a set that `mmkd sets list` names
mmkd ingest ROOT/set.json --out PAIRS                       # a set that describes itself, see mmkd_jax/evals/sets.py
"""

import argparse
import ast
import json
from typing import Any

HELP = "turn pictures with texts or labels (WebDataset, CSV, folders, ...) into a set of pairs"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="webdataset, jsonl, csv, folders, named, parquet, medmnist, tfds, sample, mmkd_release, a module, "
        "or a described set",
    )
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
        "--split", nargs="+", default=[], metavar="NAME=F",
        help="make splits by group, e.g. test=0.2 val=0.1, instead of taking the source's",
    )  # fmt: skip
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the source, e.g. name=busi"
    )


def run(args: argparse.Namespace) -> None:
    """Ingests, and prints what is in the set."""
    from mmkd_jax.data import ingest
    from mmkd_jax.errors import InputError

    if args.max_side is not None and args.max_side < 1:
        raise InputError(f"--max-side {args.max_side} is not a size in px")
    if args.features and args.source != "mmkd_release":
        raise InputError(f"{args.source} brings no features along; leave --features out, and run mmkd emit")
    source = _source(args.source, args.input, dict(map(_option, args.option)))
    pairs = ingest.ingest(
        source, args.out, name=args.name, shards=args.shards, max_side=args.max_side, max_bad=args.max_bad,
        split=dict(map(_option, args.split)),
    )  # fmt: skip
    print(json.dumps(ingest.summary(pairs), indent=2, ensure_ascii=False))
    if args.features:
        from mmkd_jax.data import released
        from teachers import specs

        published = {specs.find(name).published_as: specs.find(name).spec.license for name in specs.TEACHERS}
        print("\n".join(released.told(released.import_features(args.input, pairs, args.features, published))))


def _source(name: str, inputs: list[str], options: dict[str, Any]):
    """The source of that name, or of the described set of that name or file."""
    from mmkd_jax import io
    from mmkd_jax.data.sources import TABLE, open_source
    from mmkd_jax.errors import InputError
    from mmkd_jax.evals import sets

    if name in TABLE or not (name.endswith(".json") or name in sets.known()):
        return open_source(name, inputs, **options)
    if options:
        raise InputError(f"{name} says how it is read; leave --option out, or change its file")
    if len(inputs) > 1 or not (inputs or name.endswith(".json")):
        raise InputError(f"{name} needs --input: the folder that holds it")
    root = inputs[0] if inputs else str(io.as_path(name).parent)
    return sets.open_set(sets.find(name, root), root)


def _option(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is a Python literal, or else text."""
    from mmkd_jax.errors import InputError

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise InputError(f"--option {text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
