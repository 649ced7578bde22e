"""`mmkd emit`: encode a pairs set with teachers, once, and store their features for stage 2.

A teacher is NAME=WEIGHTS: the name that its features go under (and, for a weights file, the name of its spec in
`mmkd teachers list`), and an open_clip folder, a safetensors file, or a checkpoint of this project.
"""

import argparse

from mmkd_jax import cli

HELP = "store teachers' features of a pairs set"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    cli.add_teachers(parser, required=True)
    parser.add_argument("--pairs", required=True, metavar="DIR", help="the pairs set")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the feature sets go, one folder a teacher")
    parser.add_argument(
        "--backend",
        default="flax",
        choices=("flax", "torch"),
        help="what runs the towers: this project's (default), or the reference libraries' with published weights",
    )
    parser.add_argument("--views", type=int, default=1, help="views of each picture (default: 1)")
    parser.add_argument("--scale", type=float, nargs=2, default=(0.9, 1.0), metavar=("LOW", "HIGH"), help="crop area")
    parser.add_argument("--seed", type=int, default=0, help="of the views (default: 0)")
    parser.add_argument("--center", action="store_true", help="one view, cut as evaluation does")
    parser.add_argument("--rows", metavar="NAME", help="only the rows of this row index, such as train")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of what is stored")


def run(args: argparse.Namespace) -> None:
    """Emits the features."""
    import teachers
    from mmkd_jax.data.pairs import PairsSet
    from mmkd_jax.data.views import ViewPolicy
    from mmkd_jax.errors import InputError
    from mmkd_jax.train import distributed
    from teachers.emit import emit

    weights = cli.named_weights(args.teacher)  # what is quick to check comes before what is slow to load
    policy = ViewPolicy("center") if args.center else ViewPolicy(scale=tuple(args.scale), seed=args.seed)
    if args.views < 1:
        raise InputError(f"--views must be at least 1, not {args.views}")
    if args.center and args.views > 1:
        raise InputError(f"--center is one view, --views {args.views} would store it more than once; leave one out")
    distributed.start()
    pairs = PairsSet.open(args.pairs)
    rows = pairs.rows(args.rows) if args.rows else None
    with distributed.failing_at_once(()):
        emit(
            {name: teachers.load(name, weights=path, backend=args.backend) for name, path in weights.items()},
            pairs,
            args.out,
            policy=policy,
            views=args.views,
            rows=rows,
            dtype=args.dtype,
        )
    print(f"done: {', '.join(weights)} -> {args.out}")
