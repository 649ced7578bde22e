"""Scores students and teachers on the labelled and captioned parts of a set of pairs.

Writes OUT/results.json and results.csv (merged with what is there, set by set), OUT/predictions/ and OUT/report.html.
Sources with classes are classified without and with a linear probe, sources with captions only are retrieved. Features
are kept in OUT/features/ and computed once; an evaluation that was interrupted goes on with the sets that are not done.

  mmkd eval --checkpoint runs/student --pairs sets/pairs --out runs/eval
  mmkd eval --teacher biomedclip=weights/biomedclip --pairs sets/pairs --out runs/eval --sets busi --tasks zeroshot
  mmkd eval --checkpoint runs/a exported/b --torch pmcclip=weights/pmcclip --features emitted/biomedclip \\
      --pairs sets/pairs --out runs/eval
  mmkd eval --checkpoint runs/student --set pathmnist=data/medmnist lesions=data/lesions --out runs/eval

With --suite a named list of sets (mmkd_jax/evals/suites), and the means that it defines, in OUT/suites/NAME.json. Sets
lie in folders of their names below --sets-root; what is absent is said, and no mean is taken without it.

  mmkd eval --suite medmnist12 --sets-root data --checkpoint runs/student --out runs/medmnist

With --config a study that takes more than a set of pairs: survival of patients, diagnosis of slides. It writes the same
results and predictions, and a page of its own, OUT/NAME.html.

  mmkd eval --config configs/survival.py:genes --config.root=data/tcga_survival --out runs/survival
  mmkd eval --config configs/diagnosis.py --config.root=data/slides --checkpoint runs/student --out runs/slides
"""

import argparse

from mmkd_jax import cli

HELP = "score checkpoints and teachers: zero-shot, retrieval, linear probe, with intervals"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR",
        help="students: run folders, checkpoints, or model folders (of open_clip, Hugging Face or mmkd export)",
    )
    cli.add_teachers(parser)
    parser.add_argument(
        "--torch",
        nargs="+",
        default=[],
        metavar="NAME=WEIGHTS",
        help="teachers with published weights, run as they are by the libraries of the torch backend",
    )
    parser.add_argument(
        "--features",
        nargs="+",
        default=[],
        metavar="[NAME=]DIR",
        help="features of this set of pairs, from mmkd emit: for tasks without prompts (retrieval, linear_probe, knn)",
    )
    parser.add_argument("--floor", action="store_true", help="also probe raw pixels, and say who is below them")
    cli.add_config(parser, required=False)
    parser.add_argument("--pairs", metavar="DIR", help="set of pairs, from mmkd ingest")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=ROOT",
        help="instead of --pairs: sets as they lie (mmkd sets list, or a set.json in ROOT), ingested once, to OUT/sets",
    )
    parser.add_argument("--suite", metavar="NAME", help="the sets of a suite: medmnist12, unimed21, six-tasks, ...")
    parser.add_argument("--sets-root", default="", metavar="DIR", help="folder of the sets of --suite, by their names")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for results, predictions/ and report.html")
    parser.add_argument("--cache", metavar="DIR", help="where features are kept (default: OUT/features)")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="only these sources of the set (default: all)")
    parser.add_argument(
        "--split", default="", metavar="NAME", help="for choices: rows SOURCE.NAME, such as val, in the place of test"
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="zeroshot, retrieval, linear_probe, multilabel, vqa, vqa_zeroshot (default: these six), retrieval_all, "
        "knn, label_efficiency, calibration, vqa_pubmedclip, vqa_fusion[:seeds=N], vqa_fusion_unfrozen; zeroshot_ with "
        "mmkd, unimed, clip_benchmark, open_clip, conch or medmnist, as they count",
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
    from mmkd_jax.errors import InputError
    from mmkd_jax.evals import asked, base, results
    from mmkd_jax.train import distributed

    if args.suite:
        return _suite(args)
    if args.sets_root:
        raise InputError("--sets-root goes with --suite; name single sets with --set NAME=ROOT")
    if args.config:
        return _study(args)
    models = _models(args)
    if args.bootstrap < 1 or args.seed < 0:
        raise InputError("--bootstrap must be at least 1 and --seed not negative")
    distributed.start()
    tasks = tuple(args.tasks or base.TASKS)
    pairs = _pairs(args)
    sets = asked.chosen(base.sets_of(pairs, args.prompts, args.split), args.sets)
    asked.check(sets, tasks, named=bool(args.sets))
    with io.workdir(args.out) as out, distributed.failing_at_once(()):
        if (out / "results.json").exists():
            results.load(out / "results.json")  # refused now rather than after the work
        _score(args, models, tasks, pairs, sets, out)


def _suite(args: argparse.Namespace) -> None:
    """The sets of a suite that are there, and its means."""
    from mmkd_jax import io
    from mmkd_jax.errors import InputError
    from mmkd_jax.evals import given, results, sets, suites
    from mmkd_jax.evals.suites import studies

    if wrong := [name for name in ("pairs", "sets", "config") if getattr(args, name)]:
        raise InputError(f"--{wrong[0]} does not go with --suite; give --sets-root DIR, or --set NAME=ROOT for each")
    suite = suites.find(args.suite)
    there, absent = suite.located(args.sets_root, given.roots(args.set))
    print(
        f"{suite.name}: {len(there)} of {len(suite.sets)} sets" + (f"; absent: {', '.join(absent)}" if absent else "")
    )
    tables = {name: root for name, root in there.items() if sets.known()[name].task in sets.TABLES}
    pictures = [f"{name}={root}" for name, root in there.items() if name not in tables]
    if pictures:
        asked = {"suite": "", "sets_root": "", "set": pictures, "tasks": args.tasks or suite.tasks}
        run(argparse.Namespace(**vars(args) | asked))
    with io.workdir(args.out) as out:
        studies.run(tables, out, lambda: _models(args), resamples=args.bootstrap, seed=args.seed)
        rows = [row for row in results.load(out / "results.json") if row["seed"] == args.seed]
        found = suites.means(suite, rows)
        told = {"suite": suite.name, "absent": list(absent), "means": found}
        io.write_json(out / "suites" / f"{suite.name}.json", told)
    print("\n".join(suites.lines(suite, found)))


def _study(args: argparse.Namespace) -> None:
    """What a config describes, with the models that are named, if any."""
    from mmkd_jax import config as configs
    from mmkd_jax import io
    from mmkd_jax.errors import InputError
    from mmkd_jax.evals import results, studies

    if args.bootstrap < 1 or args.seed < 0:
        raise InputError("--bootstrap must be at least 1 and --seed not negative")
    if given := [name for name in ("pairs", "set", "sets", "tasks", "features") if getattr(args, name)]:
        raise InputError(f"--{given[0]} does not go with --config, whose fields say what is evaluated")
    named = args.checkpoint or args.teacher or args.torch
    page = studies.run(
        configs.load(args.config, args.overrides), args.out, _models(args) if named else (),
        resamples=args.bootstrap, seed=args.seed,
    )  # fmt: skip
    print(page)
    print(
        f"{io.as_path(args.out) / 'results.json'}: {len(results.load(io.as_path(args.out) / 'results.json'))} numbers"
    )


def _pairs(args: argparse.Namespace):
    """The set of pairs, or the one that the given sets become.

    Raises:
      InputError: neither is named, or both, or they are not there.
    """
    import jax

    from mmkd_jax import io
    from mmkd_jax.data.pairs import PairsSet
    from mmkd_jax.errors import InputError
    from mmkd_jax.evals import given

    if bool(args.pairs) == bool(args.set):
        raise InputError("what to evaluate on: give --pairs DIR, or --set NAME=ROOT, and not both")
    if args.pairs:
        return PairsSet.open(args.pairs)
    if jax.process_count() > 1:
        raise InputError("several processes need --pairs; make them of NAME=ROOT with: mmkd ingest NAME --input ROOT")
    return given.pairs_of(given.roots(args.set), io.as_path(args.out) / "sets")


def _score(args: argparse.Namespace, models, tasks: tuple[str, ...], pairs, sets: list, out) -> None:
    """Every model in turn; of several processes, which have the same numbers, the first writes and prints."""
    import jax

    from mmkd_jax import report
    from mmkd_jax.errors import InputError
    from mmkd_jax.evals import base, results
    from mmkd_jax.evals.unfinished import Unfinished
    from mmkd_jax.report import evaluation

    options = {"tasks": tasks, "seed": args.seed, "bootstrap": args.bootstrap, "probe_layer": args.probe_layer}
    unfinished = Unfinished(out, {**options, "pairs": pairs.hash})
    seen = set()
    for encoder in models:
        if encoder.name in seen:
            raise InputError(f"two models are called {encoder.name!r}; name one with --checkpoint NAME=DIR")
        seen.add(encoder.name)
        left = unfinished.left(encoder, sets)
        if jax.process_index() == 0:
            print("".join(f"{line}\n" for line in _sayings(encoder, sets, left, tasks)), end="")
        for one, rows in base.one_by_one(encoder, pairs, left, out, cache=args.cache or out / "features", **options):
            if jax.process_index() == 0:
                results.update(out / "results.json", rows)
                unfinished.add(encoder, one)
                _print(rows)
    if jax.process_index() == 0:
        evaluation.keep_examples(out, pairs, sets)
        print(report.rebuild(out))
        unfinished.clear()
        print(f"{out / 'results.json'}: {len(results.load(out / 'results.json'))} numbers")


def _sayings(encoder, sets: list, left: list, tasks: tuple[str, ...]) -> list[str]:
    """What a reader of the results could take for an oversight."""
    from mmkd_jax.evals import base
    from mmkd_jax.evals.stored import FeatureFolder

    said = []
    if len(left) < len(sets):
        said.append(f"{len(sets) - len(left)} of {len(sets)} sets are done already; going on with the others")
    if isinstance(encoder, FeatureFolder):
        for task, module in base.find(tasks).items():
            asked = zip(sets, base.unprompted(sets))
            names = [one.name for one, bare in asked if module.applies(one) and not module.applies(bare)]
            if names:
                said.append(f"stored features have no prompts, no {task} on {', '.join(names)}")
    return [f"{encoder.name}: {text}" for text in said]


def _models(args: argparse.Namespace):
    """The models one after the other, so that one at a time is in memory; what is malformed is refused at once.

    Raises:
      InputError: there is none, or an entry is malformed.
    """
    from mmkd_jax.errors import InputError

    teachers, torch = cli.named_weights(args.teacher), cli.named_weights(args.torch)
    if not (args.checkpoint or teachers or torch or args.features or args.floor):
        raise InputError("nothing to evaluate; give --checkpoint DIR, --teacher NAME=WEIGHTS or --features DIR")
    return _loaded(args.checkpoint, teachers, torch, args.features, args.floor)


def _loaded(checkpoints: list[str], weights: dict[str, str], torch: dict[str, str], features: list[str], floor: bool):
    from mmkd_jax.evals.floor import PixelFloor
    from mmkd_jax.evals.stored import FeatureFolder
    from mmkd_jax.train import commits

    if floor:
        yield PixelFloor()
    several = sum("=" not in entry for entry in checkpoints) > 1  # their specs are likely to have one name
    for entry in checkpoints:
        name, equals, path = entry.partition("=")
        yield _student(path, name) if equals else _student(entry, commits.called(entry) if several else "")
    for backend, entries in (("flax", weights), ("torch", torch)):
        for name, path in entries.items():
            import teachers

            called = f"{name}.torch" if backend == "torch" else name
            yield teachers.as_encoder(teachers.load(name, weights=path, backend=backend), called)
    for entry in features:
        name, equals, path = entry.partition("=")
        yield FeatureFolder(path, name) if equals else FeatureFolder(entry)


def _student(path: str, name: str):
    """A run, a checkpoint, or a folder that describes its model as open_clip or Hugging Face do."""
    from mmkd_jax import api, io
    from mmkd_jax.evals.teachers import TeacherEncoder
    from mmkd_jax.models import folders

    folder = io.as_path(path)
    if not folders.describes_itself(folder):
        return api.load(path, name=name or None)
    import teachers

    teacher = teachers.load(name or folder.name, weights=path)
    return TeacherEncoder(teacher.name, teacher.checkpoint, teacher, role="")


def _print(rows: list[dict]) -> None:
    shown = {"zeroshot": "balanced_accuracy", "linear_probe": "balanced_accuracy", "retrieval": "i2t_R@5_of_"}
    shown |= {"vqa": ("accuracy", "closed_accuracy", "open_accuracy"), "vqa_zeroshot": ("yes_no",)}
    for row in rows:
        if row["metric"].startswith(shown.get(row["task"], "")) and not row["metric"].endswith("_strict"):
            interval = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            print(f"{row['model']:24} {row['dataset']:16} {row['task']:23} {row['metric']:28} {interval} n={row['n']}")
