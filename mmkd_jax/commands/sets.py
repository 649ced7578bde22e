"""Data sets for evaluation: which are known, and whether one that lies here is as it should be.

  mmkd sets list
  mmkd sets suites                                      # named lists of them, for mmkd eval --suite
  mmkd sets show pathmnist
  mmkd sets check pathmnist --root data/medmnist
  mmkd sets check lesions --root data/lesions           # with a set.json in the folder, see mmkd_jax/evals/sets.py

`check` reads every picture, question, patient or slide's path and tells counts by split and class, examples, and
problems, one a line; it leaves with exit code 2 if the set cannot be evaluated.
"""

import argparse

from mmkd_jax.errors import EXIT_WRONG_INPUT

HELP = "data sets for evaluation: list, suites, show, check"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list|suites|show|check")
    verbs.add_parser("list", help="the sets that are known")
    verbs.add_parser("suites", help="named lists of sets, for mmkd eval --suite")
    show = verbs.add_parser("show", help="all that is known of a set, and how its classes are asked for")
    check = verbs.add_parser("check", help="read a set and say what is wrong with it")
    for one in (show, check):
        one.add_argument("set", metavar="SET", help="name of a set, or a JSON file that describes one")
    show.add_argument("--root", default="", metavar="DIR", help="folder of the set, if its set.json describes it")
    check.add_argument("--root", required=True, metavar="DIR", help="folder of the set")


def run(args: argparse.Namespace) -> None:
    """Prints what is asked for."""
    {"list": _list, "suites": _suites, "show": _show, "check": _check}[args.verb](args)


def _list(args: argparse.Namespace) -> None:
    from mmkd_jax.evals import sets

    del args
    print(f"{'name':24} {'modality':15} {'task':15} {'classes':>7} {'size':>9}  {'layout':11} licence")
    for one in sets.known().values():
        classes = len(one.classes.names) if one.classes else 0
        size = sum(one.about.get("size", {}).values()) or "?"
        layout = one.layout["source"]
        print(f"{one.name:24} {one.modality:15} {one.task:15} {classes:7} {size:>9}  {layout:11} {one.license}")


def _suites(args: argparse.Namespace) -> None:
    from mmkd_jax.evals import suites

    del args
    for suite in suites.known().values():
        print(f"{suite.name:16} {len(suite.sets):3} sets  {suite.title}")
        for mean in suite.means:
            print(f"{'':16} mean of {mean.name}, {len(mean.sets)} sets")


def _show(args: argparse.Namespace) -> None:
    import json

    from mmkd_jax.evals import prompts, sets

    one = sets.find(args.set, args.root)
    fields = {
        "name": one.name, "task": one.task, "for": ", ".join(one.types), "modality": one.modality, **one.about,
        "license": one.license, "layout": dict(one.layout), "split": one.split or "as the layout has it",
    }  # fmt: skip
    for field, value in fields.items():
        evidence = one.seen(field)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        told = f"   [{evidence}]" if evidence and field not in ("name", "task", "for", "note") else ""
        print(f"{field + ':':10} {text or '?'}{told}")
    if one.classes is None or one.task not in ("classification", "multilabel"):
        return
    asked = prompts.default(one.classes.names, one.modality, name=one.name, own=one.prompts)
    print(f"prompts:   {sum(map(len, asked.sentences))} sentences, {asked.profile}, hash {asked.hash[:16]}")
    for name, sentences in zip(one.classes.names, asked.sentences):
        words = [word for word, meant in one.classes.words.items() if meant == name and word != name]
        print(f"  {name}" + (f" ({', '.join(words)} in the files)" if words else "") + f": {sentences[0]!r}, ...")


def _check(args: argparse.Namespace) -> None:
    from mmkd_jax.evals import set_check, sets, table_check

    record = sets.find(args.set, args.root)
    if record.task in sets.TABLES:
        found = table_check.check(record, args.root)
        lines = found.lines
    else:
        found = set_check.check(record, sets.open_set(record, args.root))
        lines = [*set_check.table(found), *(f"sample: {line}" for line in set_check.samples(found))]
        lines = lines if found.cases else []
    print("".join(f"{line}\n" for line in lines), end="")
    for line in found.problems:
        print(f"problem: {line}")
    for line in found.fatal:
        print(f"cannot be evaluated: {line}")
    if found.fatal:
        raise SystemExit(EXIT_WRONG_INPUT)
    print(f"{record.name} can be evaluated; {len(found.problems) or 'no'} problems")
