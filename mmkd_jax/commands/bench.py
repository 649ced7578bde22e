"""`mmkd bench`: how fast parts of this project are, beside what others use for the same.

mmkd bench encode
mmkd bench encode --teachers BiomedCLIP PMC-CLIP --batch 16
mmkd bench encode --small

encode runs towers of teachers with random weights by this project (flax) and by the libraries that the teachers were
trained with (torch, open_clip, timm, transformers), turn by turn, in float32, on the accelerator where there is one.
"""

import argparse

HELP = "measure speed: encode (teachers' towers, flax beside torch)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="encode")
    encode = verbs.add_parser("encode", help="pictures and texts a second of teachers' towers, flax beside torch")
    encode.add_argument("--teachers", nargs="+", default=[], metavar="NAME", help="default: one of each family")
    encode.add_argument("--batch", type=int, default=8, metavar="N", help="pictures or texts at a time (default: 8)")
    encode.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each (default: 5)")
    encode.add_argument("--small", action="store_true", help="towers of the same kinds that run in milliseconds")


def run(args: argparse.Namespace) -> None:
    """Prints a line a tower."""
    from mmkd_jax.errors import InputError
    from teachers import speed

    for option in ("batch", "rounds"):
        if getattr(args, option) < 1:
            raise InputError(f"--{option} must be at least 1, not {getattr(args, option)}")
    print(speed.setting(args.batch, args.rounds))
    print(speed.HEADER)
    for one in speed.measure(args.teachers, batch=args.batch, rounds=args.rounds, small=args.small):
        print(one, flush=True)
