"""`mmkd emit`: encode a pairs set with teachers, once, and store their features for stage 2.

A teacher is NAME=WEIGHTS: the name that its features go under (and, for a weights file, the name of its spec in
`mmkd teachers list`), and an open_clip folder, a safetensors file, or a checkpoint of this project.
"""

import argparse

HELP = "store teachers' features of a pairs set"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--teacher", action="append", required=True, metavar="NAME=WEIGHTS", help="may be repeated")
    parser.add_argument("--pairs", required=True, metavar="DIR", help="the pairs set")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the feature sets go, one folder a teacher")
    parser.add_argument("--views", type=int, default=1, help="views of each picture (default: 1)")
    parser.add_argument("--scale", type=float, nargs=2, default=(0.9, 1.0), metavar=("LOW", "HIGH"), help="crop area")
    parser.add_argument("--seed", type=int, default=0, help="of the views (default: 0)")
    parser.add_argument("--rows", metavar="NAME", help="only the rows of this row index, such as train")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of what is stored")


def run(args: argparse.Namespace) -> None:
    """Emits the features."""
    import teachers
    from mmkd_jax.data.pairs import PairsSet
    from mmkd_jax.data.views import ViewPolicy
    from teachers.emit import emit

    pairs = PairsSet.open(args.pairs)
    loaded = {name: teachers.load(name, weights=path) for name, path in teachers.parse(args.teacher).items()}
    emit(
        loaded,
        pairs,
        args.out,
        policy=ViewPolicy(scale=tuple(args.scale), seed=args.seed),
        views=args.views,
        rows=pairs.rows(args.rows) if args.rows else None,
        dtype=args.dtype,
    )
    print(f"done: {', '.join(loaded)} -> {args.out}")
