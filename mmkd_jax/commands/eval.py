"""Scores students and teachers on the labelled and captioned parts of a set of pairs.

Writes OUT/results.json (merged with what is there, model by model) and OUT/predictions/. Sources with classes are
classified without and with a linear probe, sources with captions only are retrieved.

  mmkd eval --checkpoint runs/student --pairs sets/pairs --out runs/eval
  mmkd eval --teacher biomedclip=weights/biomedclip --pairs sets/pairs --out runs/eval --sets busi --tasks zeroshot
"""

import argparse

from mmkd_jax import cli

HELP = "score checkpoints and teachers: zero-shot, retrieval, linear probe, with intervals"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "--checkpoint", nargs="+", default=[], metavar="[NAME=]DIR", help="run folders or checkpoints of students"
    )
    cli.add_teachers(parser)
    parser.add_argument("--pairs", required=True, metavar="DIR", help="set of pairs, from mmkd ingest")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for results.json and predictions/")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="only these sources of the set (default: all)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="zeroshot, retrieval, linear_probe (default: these three), retrieval_all, knn, label_efficiency, "
        "calibration; zeroshot_ with mmkd, unimed, clip_benchmark, open_clip, conch or medmnist, as they count",
    )
    parser.add_argument(
        "--prompts",
        default="ensemble",
        metavar="PROFILE",
        help="ensemble (templates by modality), names, or a JSON file with templates, synonyms or sentences by set",
    )
    parser.add_argument("--probe-layer", default="embedding", metavar="LAYER", help="embedding or pooled (students)")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples of the intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples and the probe's held-out part")


def run(args: argparse.Namespace) -> None:
    """Evaluates every model and prints one line a set and task."""
    from mmkd_jax import io
    from mmkd_jax.data.pairs import PairsSet
    from mmkd_jax.errors import InputError
    from mmkd_jax.evals import base, results
    from mmkd_jax.train import distributed

    if not args.checkpoint and not args.teacher:
        raise InputError("nothing to evaluate; give --checkpoint DIR or --teacher NAME=WEIGHTS")
    if args.bootstrap < 1 or args.seed < 0:
        raise InputError("--bootstrap must be at least 1 and --seed not negative")
    distributed.start()
    tasks = tuple(args.tasks or base.TASKS)
    pairs = PairsSet.open(args.pairs)
    sets = chosen(base.sets_of(pairs, args.prompts), args.sets)
    out = io.make_workdir(args.out)
    if (out / "results.json").exists():
        results.load(out / "results.json")  # refused now rather than after the work
    with distributed.failing_at_once(()):
        _score(args, tasks, pairs, sets, out)


def _score(args: argparse.Namespace, tasks: tuple[str, ...], pairs, sets: list, out) -> None:
    """Every model in turn; of several processes, which have the same numbers, the first writes and prints."""
    import jax

    from mmkd_jax.errors import InputError
    from mmkd_jax.evals import base, results

    seen = set()
    for encoder in _encoders(args.checkpoint, cli.named_weights(args.teacher)):
        if encoder.name in seen:
            raise InputError(f"two models are called {encoder.name!r}; name one with --checkpoint NAME=DIR")
        seen.add(encoder.name)
        rows = base.run(
            encoder, pairs, sets, out,
            tasks=tasks, seed=args.seed, bootstrap=args.bootstrap, probe_layer=args.probe_layer,
        )  # fmt: skip
        if jax.process_index() == 0:
            results.update(out / "results.json", rows)
            _print(rows)
    if jax.process_index() == 0:
        print(f"{out / 'results.json'}: {len(results.load(out / 'results.json'))} numbers")


def chosen(sets: list, names: list[str] | None) -> list:
    """The sets of these names, or all.

    Raises:
      InputError: an unknown name, or nothing to evaluate on.
    """
    from mmkd_jax.errors import InputError, near

    known = {one.name: one for one in sets}
    for name in names or ():
        if name not in known:
            raise InputError(f"there is no evaluation set {name!r}; {near(name, known)}")
    if not known:
        raise InputError("the set of pairs has no test rows with classes and no val or test rows with captions")
    return [known[name] for name in dict.fromkeys(names)] if names else sets


def _encoders(checkpoints: list[str], weights: dict[str, str]):
    """The models one after the other, so that one at a time is in memory."""
    from mmkd_jax import api

    for entry in checkpoints:
        name, equals, path = entry.partition("=")
        yield api.load(path, name=name) if equals else api.load(entry)
    for name, path in weights.items():
        import teachers

        yield teachers.as_encoder(teachers.load(name, weights=path))


def _print(rows: list[dict]) -> None:
    shown = {"zeroshot": "balanced_accuracy", "linear_probe": "balanced_accuracy", "retrieval": "i2t_R@5_of_"}
    for row in rows:
        if row["metric"].startswith(shown.get(row["task"], "")) and not row["metric"].endswith("_strict"):
            interval = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            print(f"{row['model']:24} {row['dataset']:16} {row['task']:12} {row['metric']:24} {interval} n={row['n']}")
