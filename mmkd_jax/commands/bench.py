"""`mmkd bench`: how fast parts of this project are, beside what others use for the same.

mmkd bench encode
mmkd bench encode --teachers BiomedCLIP PMC-CLIP --batch 16
mmkd bench emit --small
mmkd bench emit --teachers BiomedCLIP=biomedclip.safetensors
mmkd bench host
mmkd bench distill
mmkd bench loss --losses softmax affinity --once

encode runs towers of teachers with random weights by this project (flax) and by the libraries that the teachers were
trained with (torch, open_clip, timm, transformers), turn by turn, in float32, on the accelerator where there is one.
emit does so with whole emissions: decoding, preprocessing, encoding, and the rest of the host's work, told apart.
host measures what emission costs beside those three, with nine teachers that answer at once, and what reading nine
feature sets adds to training's input: milliseconds of the processor.
distill counts what nine stored teachers add to a step of stage 1: FLOPs of the model at the paper's size, and
milliseconds of the processor in a loop whose step takes no time.
loss compares the forms of global losses (plain, rows, ring) on eight fake devices of the CPU: the compiler's memory a
device by global batch, and time.
"""

import argparse

HELP = "measure: encode, emit (flax beside torch), host (storing), distill (what teachers add), loss"
BOTH = {
    "encode": "pictures and texts a second of teachers' towers, flax beside torch",
    "emit": "pairs a second of whole emissions, flax beside torch, and where the time goes",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="encode|emit|host|distill|loss")
    for name, does in BOTH.items():
        verb = verbs.add_parser(name, help=does, description=does)
        what = "NAME" if name == "encode" else "NAME[=WEIGHTS]"
        verb.add_argument("--teachers", nargs="+", default=[], metavar=what, help="default: one of each family")
        verb.add_argument("--batch", type=int, default=8, metavar="N", help="pictures or texts at a time (default: 8)")
        verb.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each (default: 5)")
        verb.add_argument("--small", action="store_true", help="towers of the same kinds that run in milliseconds")
        if name == "emit":
            verb.add_argument("--rows", type=int, default=64, metavar="N", help="pairs to emit (default: 64)")
    for name, does in {
        "host": "processor's milliseconds of storing and of reading nine teachers' features",
        "distill": "FLOPs and processor's milliseconds that nine stored teachers add to a step of stage 1",
    }.items():
        verb = verbs.add_parser(name, help=does, description=does)
        verb.add_argument("--rows", type=int, default=4096, metavar="N", help="pairs (default: 4096; at least 1024)")
        verb.add_argument("--rounds", type=int, default=5, metavar="N", help="measurements of each (default: 5)")
    does = "memory and time of the forms of global losses on eight fake devices"
    loss = verbs.add_parser("loss", help=does, description=does)
    loss.add_argument("--losses", nargs="+", default=["softmax"], metavar="NAME", help="default: softmax")
    loss.add_argument("--batches", nargs="+", type=int, default=[], metavar="N", help="default: 1024 to 32768")
    loss.add_argument("--timed", type=int, default=8192, metavar="N", help="largest batch that runs (default: 8192)")
    loss.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements of each (default: 3)")
    loss.add_argument("--once", action="store_true", help="then run the ring once at the largest batch")


def run(args: argparse.Namespace) -> None:
    """Prints a line a tower, a teacher or a loss."""
    from mmkd_jax.errors import InputError

    if args.verb == "loss":
        from mmkd_jax.losses import bench

        bench.report(args.losses, args.batches, args.timed, args.rounds, once=args.once)
        return
    from teachers import costs, emit_speed, overhead, speed

    for option, least in {
        "batch": 1,
        "rounds": 1,
        "rows": costs.BATCH if args.verb in ("host", "distill") else 1,
    }.items():
        if getattr(args, option, least) < least:
            raise InputError(f"--{option} must be at least {least}, not {getattr(args, option)}")
    if args.verb == "host":
        print(costs.measure(args.rows, args.rounds))
        return
    if args.verb == "distill":
        for line in overhead.report(args.rows, args.rounds):
            print(line, flush=True)
        return
    module, more = (emit_speed, {"rows": args.rows}) if args.verb == "emit" else (speed, {})
    print(speed.setting(args.batch, args.rounds))
    print(module.HEADER)
    for one in module.measure(args.teachers, batch=args.batch, rounds=args.rounds, small=args.small, **more):
        print(one, flush=True)
