"""`mmkd bench`: how fast parts of this project are, beside what others use for the same.

mmkd bench encode
mmkd bench encode --teachers BiomedCLIP PMC-CLIP --batch 16
mmkd bench encode --small
mmkd bench loss --losses softmax affinity --once

encode runs towers of teachers with random weights by this project (flax) and by the libraries that the teachers were
trained with (torch, open_clip, timm, transformers), turn by turn, in float32, on the accelerator where there is one.
loss compares the forms of global losses (plain, rows, ring) on eight fake devices of the CPU: the compiler's memory a
device by global batch, and time.
"""

import argparse

HELP = "measure speed: encode (teachers' towers, flax beside torch), loss (forms of global losses)"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="encode|loss")
    encode = verbs.add_parser("encode", help="pictures and texts a second of teachers' towers, flax beside torch")
    encode.add_argument("--teachers", nargs="+", default=[], metavar="NAME", help="default: one of each family")
    encode.add_argument("--batch", type=int, default=8, metavar="N", help="pictures or texts at a time (default: 8)")
    encode.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each (default: 5)")
    encode.add_argument("--small", action="store_true", help="towers of the same kinds that run in milliseconds")
    does = "memory and time of the forms of global losses on eight fake devices"
    loss = verbs.add_parser("loss", help=does, description=does)
    loss.add_argument("--losses", nargs="+", default=["softmax"], metavar="NAME", help="default: softmax")
    loss.add_argument("--batches", nargs="+", type=int, default=[], metavar="N", help="default: 1024 to 32768")
    loss.add_argument("--timed", type=int, default=8192, metavar="N", help="largest batch that runs (default: 8192)")
    loss.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements of each (default: 3)")
    loss.add_argument("--once", action="store_true", help="then run the ring once at the largest batch")


def run(args: argparse.Namespace) -> None:
    """Prints a line a tower or a loss."""
    from mmkd_jax.errors import InputError

    if args.verb == "loss":
        from mmkd_jax.losses import bench

        bench.report(args.losses, args.batches, args.timed, args.rounds, once=args.once)
        return
    from teachers import speed

    for option in ("batch", "rounds"):
        if getattr(args, option) < 1:
            raise InputError(f"--{option} must be at least 1, not {getattr(args, option)}")
    print(speed.setting(args.batch, args.rounds))
    print(speed.HEADER)
    for one in speed.measure(args.teachers, batch=args.batch, rounds=args.rounds, small=args.small):
        print(one, flush=True)
