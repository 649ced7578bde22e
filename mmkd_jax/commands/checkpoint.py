"""mmkd checkpoint: list, describe, compare and average checkpoints.

mmkd checkpoint ls runs/stage1
mmkd checkpoint show runs/stage1                                # its latest; or runs/stage1/checkpoints/STEP
mmkd checkpoint diff runs/stage1/checkpoints/1000 runs/stage1
mmkd checkpoint average runs/seed0 runs/seed1 runs/seed2 --out runs/mean
"""

import argparse
import json

HELP = "list, describe, compare or average checkpoints"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|show|diff|average")
    add = {
        name: actions.add_parser(name, help=does, description=does)
        for name, does in {
            "ls": "print a line a checkpoint: step, size, time, loss, and which is latest, best, temporary, not whole",
            "show": "print what a checkpoint says of itself: config, spec, data, parameters",
            "diff": "print how two checkpoints differ: records, names, and each parameter's relative change",
            "average": "write a checkpoint whose parameters are the mean over several of one model",
        }.items()
    }
    add["ls"].add_argument("run", metavar="RUN", help="a run's folder")
    where = "a checkpoint's folder, or a run's (its latest)"
    add["show"].add_argument("path", metavar="CHECKPOINT", help=where)
    add["diff"].add_argument("paths", metavar="CHECKPOINT", nargs=2, help=where)
    add["average"].add_argument("paths", metavar="CHECKPOINT", nargs="+", help=where)
    add["average"].add_argument("--out", required=True, metavar="DIR", help="a new folder for the result")


def run(args: argparse.Namespace) -> None:
    """Prints, or writes the average and prints where."""
    from mmkd_jax.train import checkpoint_tools as tools

    if args.action == "ls":
        for one in tools.listed(args.run):
            loss = f"loss {one['scalars']['loss']:.4f}" if "loss" in one["scalars"] else ""
            line = (
                f"{one['step']:9} {one['bytes'] / 1e6:10.1f} MB  {one['saved']:20} {loss:12} {', '.join(one['notes'])}"
            )
            print(line.rstrip())
    elif args.action == "show":
        print(json.dumps(tools.described(args.path), indent=2))
    elif args.action == "diff":
        lines = list(tools.compared(*args.paths))
        print("\n".join(lines) or "no difference")
    else:
        print(tools.averaged(args.paths, args.out))
