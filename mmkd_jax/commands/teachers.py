"""`mmkd teachers`: the published models that can be teachers, and what is known of each.

mmkd teachers list
mmkd teachers show BiomedCLIP
"""

import argparse

HELP = "list known teachers, or show what is known of one"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="list | show")
    verbs.add_parser("list", help="one line a teacher")
    show = verbs.add_parser("show", help="the record of one teacher")
    show.add_argument("name", metavar="NAME", help="from the list, or a dotted path to one of your own")


def run(args: argparse.Namespace) -> None:
    """Prints the list or the record."""
    import json

    from teachers import specs

    if args.verb == "list":
        for name in specs.TEACHERS:
            spec = specs.find(name).spec
            towers = f"{spec.image.layout} ViT /{spec.image.patch} + {spec.text.kind}"
            print(f"{name:20} {towers:22} {spec.embed:4} {spec.license:14} {spec.source}")
        return
    facts = specs.find(args.name)
    print(json.dumps(facts.spec.to_dict(), indent=2))
    print(f"weights: {facts.weights}")
    print(f"verified: {facts.verified}")
    print(f"not verified: {facts.unverified or 'nothing'}")
