"""Looks for evaluated pictures among those that a model was trained on: same file, pixels, near copy, article, group.

Writes OUT/leakage.json, OUT/leakage.html with pictures side by side, and for each part of either side the index of the
rows that do not leak, OUT/SIDE/SET.ROWS.clean.npz. With --install it also lies with its set, where training takes it
as --config.data.rows=ROWS.clean.

  mmkd leakage --train sets/pairs:train --eval sets/pairs:test --out runs/leakage
  mmkd leakage --train sets/pmc sets/own:train --eval sets/busi:test --out runs/leakage --install train
"""

import argparse

HELP = "find evaluated pictures among training pictures: exact and near copies, articles"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    what = "sets of pairs, from mmkd ingest, or rows of them by the name of a row index"
    parser.add_argument("--train", nargs="+", required=True, metavar="PAIRS[:ROWS]", help=what)
    parser.add_argument("--eval", nargs="+", required=True, metavar="PAIRS[:ROWS]", help=what)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the findings")
    parser.add_argument(
        "--distance", type=int, metavar="BITS", help="in which hashes of near copies may differ (default: 10 of 64)"
    )
    parser.add_argument(
        "--similarity", type=float, metavar="S", help="least similarity of near copies (default: 0.85; 1 is the same)"
    )
    parser.add_argument("--install", choices=("train", "eval"), help="write the clean rows into this side's sets too")


def run(args: argparse.Namespace) -> None:
    """Searches, writes the findings and prints a line a part."""
    from mmkd_jax import io
    from mmkd_jax.data import leakage, leakage_page, perceptual_hash
    from mmkd_jax.errors import InputError

    settings = {
        "distance": perceptual_hash.DISTANCE if args.distance is None else args.distance,
        "similarity": perceptual_hash.SIMILARITY if args.similarity is None else args.similarity,
    }
    if not 0 <= settings["distance"] <= 15 or not 0 < settings["similarity"] <= 1:
        raise InputError("--distance must be 0 to 15 and --similarity above 0 and at most 1")
    sides = {"train": args.train, "evaluation": args.eval}
    sides = {side: [leakage.Part.open(one) for one in given] for side, given in sides.items()}
    out = io.make_workdir(args.out)
    found = {side: leakage.prints(parts) for side, parts in sides.items()}
    matches = leakage.find(**found, **settings)
    record = leakage.record(sides, found, matches, settings)
    io.write_json(out / "leakage.json", record)
    io.write_text(out / "leakage.html", leakage_page.page(record, leakage_page.examples(sides, found, matches)))
    for side, parts in sides.items():
        reasons = leakage.first_reasons(matches, side, len(found[side]))
        for number, part in enumerate(parts):
            rows = leakage.clean(part, number, found[side], reasons)
            rows.save(out / side / f"{part.pairs.path.name}.{rows.name}.npz")
            if args.install and side.startswith(args.install):
                rows.save(part.pairs.path / "rows" / f"{rows.name}.npz")
    print("\n".join(leakage_page.lines(record)))
    print(out / "leakage.html")
