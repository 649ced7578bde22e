"""mmkd features: look at stored features of teachers, and measure which teacher to believe for which modality.

mmkd features show features/biomedclip
mmkd features verify features --pairs sets/pairs
mmkd features route features --pairs sets/pairs --rows dev --out routing.json
mmkd features stats features --pairs sets/pairs --out stats
mmkd features select features --pairs sets/pairs --by rank --out selection.npz
mmkd features map features --kind phi_s --out maps
"""

import argparse
import json
from typing import Any

from mmkd_jax.errors import InputError, near

PAIRS = ("stats", "select", "route")  # what cannot be told from the features by themselves
MAPS = ("identity", "unit", "centre", "standardise", "phi_s", "whiten", "autoencoder")
TWO_SPACES = "*/*/manifest.json"  # native/TEACHER and projected/TEACHER, as imported
HELP = "look at stored features of teachers; select, route and map them for stage 2"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|verify|stats|select|route|map")
    for name, does in {
        "show": "print the manifest",
        "verify": "read everything and compare it with the manifest",
        "stats": "compare teachers: lengths, spread, where each finds its captions, how far they agree",
        "select": "decide which teachers each pair keeps, for --config.selection of stage 2",
        "route": "measure weights by modality and teacher, for --config.routing of stage 2",
        "map": "fit each teacher's target map, one file a teacher",
    }.items():
        action = actions.add_parser(name, help=does, description=does)
        action.add_argument("path", metavar="DIR", help="a feature set, or a folder of several")
        action.add_argument(
            "--pairs",
            metavar="DIR",
            required=name in PAIRS,
            help="the set of pairs that they must belong to",
        )
        if name == "route":
            _configure_route(action)
        if name == "stats":
            action.add_argument("--out", metavar="DIR", help="folder for stats.html and stats.json")
            action.add_argument("--sample", type=int, default=2048, metavar="N", help="pairs to look at, at most")
            action.add_argument("--seed", type=int, default=0, help="of the sample")
        if name == "select":
            _configure_select(action)
        if name == "map":
            action.add_argument("--kind", required=True, metavar="KIND", help=f"of {', '.join(MAPS)}")
            action.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
            action.add_argument("--width", type=int, default=512, metavar="N", help="of an autoencoder's targets")
            action.add_argument("--seed", type=int, default=0, help="of an autoencoder's training")


def _configure_route(action: argparse.ArgumentParser) -> None:
    action.add_argument("--rows", required=True, metavar="NAME", help="held-out row index of the set, such as dev")
    action.add_argument("--out", required=True, metavar="FILE.json", help="where to write the table")
    action.add_argument("--teachers", nargs="+", metavar="NAME", help="only these (default: all that are there)")
    action.add_argument(
        "--by", default="modality", metavar="WHAT", help="modality (default), or teacher: all modalities weigh alike"
    )
    action.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 (default) believes the strongest teacher alone; else weights are softmax(strength / T)",
    )


def _configure_select(action: argparse.ArgumentParser) -> None:
    action.add_argument("--out", required=True, metavar="FILE.npz", help="where to write the selection")
    action.add_argument("--by", default="all", metavar="TEST", help="all, cosine, quantile, rank, modality or outline")
    action.add_argument("--threshold", type=float, default=0.0, metavar="T", help="of cosine, quantile or rank")
    action.add_argument("--pool", type=int, default=64, metavar="N", help="pairs that a caption is ranked among")
    action.add_argument("--seed", type=int, default=0, help="of the pools")


def run(args: argparse.Namespace) -> None:
    """Prints one JSON object a feature set; `select`, `route` and `map` write what they find and print a table."""
    from mmkd_jax import io
    from mmkd_jax.data.features import FeatureSet
    from mmkd_jax.data.pairs import PairsSet

    pairs = PairsSet.open(args.pairs) if args.pairs else None
    root = io.as_path(args.path)
    inside = (
        [] if (root / "manifest.json").exists() else sorted([*root.glob("*/manifest.json"), *root.glob(TWO_SPACES)])
    )
    found = (FeatureSet.open(path, pairs) for path in [file.parent for file in inside] or [root])
    if args.action == "route":
        _route(args, pairs, {features.teacher: features for features in found})
        return
    if args.action == "select":
        _select(args, pairs, {features.teacher: features for features in found})
        return
    if args.action == "map":
        _map(args, {features.teacher: features for features in found})
        return
    if args.action == "stats":
        _stats(args, pairs, {str(features.path.relative_to(root)): features for features in found})
        return
    found = list(found)
    if args.action == "verify":
        _check_together(found)
    for features in found:
        print(json.dumps({"show": _show, "verify": _verify}[args.action](features), indent=2))


def _stats(args: argparse.Namespace, pairs, features: dict[str, Any]) -> None:
    from mmkd_jax import io
    from mmkd_jax.data import agreement
    from mmkd_jax.report import features as report

    if args.sample < 2:
        raise InputError(f"--sample {args.sample} pairs tell nothing; give at least 2")
    record = agreement.measure(pairs, features, sample=args.sample, seed=args.seed)
    print("\n".join(report.lines(record)))
    if args.out:
        folder = io.make_workdir(args.out)
        io.write_json(folder / "stats.json", record)
        io.write_text(folder / "stats.html", report.page(record))
        print(f"page: {folder / 'stats.html'}")


def _route(args: argparse.Namespace, pairs, features: dict[str, Any]) -> None:
    from mmkd_jax import io
    from mmkd_jax.tasks import routing
    from teachers import specs

    out = io.as_path(args.out)
    for name in args.teachers or ():
        if name not in features:
            raise InputError(f"{args.path} has no features of teacher {name!r}; {near(name, features)}")
    features = {name: one for name, one in features.items() if name in (args.teachers or features)}
    declared = {name: specs.find(name).spec.modalities for name in features if name in specs.TEACHERS}
    rows = pairs.rows(args.rows)
    record = routing.measure(pairs, features, rows, temperature=args.temperature, by=args.by, declared=declared)
    if out.exists() and io.read_json(out) != routing.stored(record):
        raise InputError(f"{out} exists and holds something else; choose another --out")
    routing.save(out, record)
    for modality, count in record["pairs"].items():
        print(
            f"{modality:20} {count:6} pairs  {_told(record['weights'].get(modality), record['strength'].get(modality))}"
        )


def _select(args: argparse.Namespace, pairs, features: dict[str, Any]) -> None:
    from mmkd_jax import io
    from mmkd_jax.data.select import select

    out = io.as_path(args.out)
    if out.exists():
        raise InputError(f"{out} exists; choose another --out")
    selection = select(pairs, features, args.by, threshold=args.threshold, pool=args.pool, seed=args.seed)
    selection.save(out)
    print(f"{'kept pairs':20} {'  '.join(f'{name:>12}' for name in selection.teachers)}")
    for modality, counts in selection.counts(pairs).items():
        print(f"{modality:20} {'  '.join(f'{counts[name]:12}' for name in selection.teachers)}")
    print(f"{'all':20} {'  '.join(f'{n:12}' for n in selection.kept.sum(axis=0))}")
    print(f"{selection.kept.sum(axis=1).mean():.2f} of {len(selection.teachers)} teachers a pair; {args.by}, {out}")


def _map(args: argparse.Namespace, features: dict[str, Any]) -> None:
    from mmkd_jax import io
    from mmkd_jax.tasks import autoencoder, maps

    if args.kind not in MAPS:
        raise InputError(f"unknown target map {args.kind!r}; {near(args.kind, MAPS)}")
    with io.new_folder(args.out) as folder:
        if args.kind == "autoencoder":
            fitted = autoencoder.fit(features, latent=args.width, seed=args.seed)
        else:
            fitted = {name: maps.fit(args.kind, of_teacher) for name, of_teacher in features.items()}
        for name, one in fitted.items():
            one.save(folder / f"{name}.npz")
    for name, one in fitted.items():
        print(f"{name:24} {one.kind} {one.width} -> {one.out}  {one.hash[:12]}")


def _told(weights: dict[str, float] | None, strength: dict[str, float] | None) -> str:
    """One modality's line of a routing table."""
    if weights is None:
        return "not measurable: all teachers alike"
    if strength is None:
        return f"not measurable: those made for it ({', '.join(name for name in weights if weights[name])})"
    return ", ".join(f"{name} {weights[name]:.3f} (strength {strength[name]:.3f})" for name in weights)


def _show(features) -> dict[str, Any]:
    hidden = ("edges", "shards")
    return {k: v for k, v in features.manifest.items() if k not in hidden} | {
        "shards": len(features.manifest["shards"])
    }


def _check_together(found) -> None:
    """Refuses sets that cannot be trained on together: their views are not those of the others."""
    for features in found[1:]:
        first, views = found[0], (features.policy, features.views)
        if views != (first.policy, first.views):
            raise InputError(
                f"{features.path} has {features.views} views of the view policy {features.policy.to_dict()}, "
                f"{first.path} {first.views} of {first.policy.to_dict()}; emit one of them again, or verify each alone"
            )


def _verify(features) -> dict[str, Any]:
    features.verify()
    return {"teacher": features.teacher, "hash": features.hash, "present": features.manifest["present"], "whole": True}
