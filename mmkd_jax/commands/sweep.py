"""`mmkd sweep`: all runs of a config file's `sweep()`, made on this machine and told in one table.

What several runs share (a stage-1 checkpoint, a feature set) is made once. Each device group makes one run at a time,
in a process of its own; a CPU is one group. The same command again makes what is missing. DIR then holds runs/,
shared/, logs/, table.json, table.csv, table.md, report.html and sweep.svg.

  mmkd sweep --config configs/sweeps/learning_rate.py --workdir runs/lr --dry-run
"""

import argparse

from mmkd_jax import cli

HELP = "make all runs of a config's sweep() on this machine, and one table of them"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    cli.add_config(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the sweep's folder; the same again continues")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="accelerators of each run (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")


def run(args: argparse.Namespace) -> None:
    """Makes the runs that are not there yet, and the table of all."""
    from mmkd_jax.errors import InputError
    from mmkd_jax.sweeps import devices, plan, runner

    sweep = plan.load(args.config, args.overrides, args.workdir)
    if args.dry_run:
        _say(sweep)
        return
    groups = devices.groups(args.devices)
    plan.claim(sweep)
    failures = runner.run(sweep, groups)
    if any(runner.is_done(sweep, one) for one in sweep.runs):
        from mmkd_jax.sweeps import table

        table.write(sweep)
        print(f"report: {sweep.workdir / 'report.html'}")
    if failures:
        first = failures[0]
        raise InputError(
            f"{len(failures)} of {len(sweep.shared) + len(sweep.runs)} parts of the sweep failed, first {first.task} "
            f"(exit code {first.code}: {first.line}); their logs are in {sweep.workdir / 'logs'}, "
            "the same command tries them again"
        )


def _say(sweep) -> None:
    import shlex

    from mmkd_jax.sweeps import runner

    for task in (*sweep.shared, *sweep.runs):
        print(f"# {task.name}{' (done)' if runner.is_done(sweep, task) else ''}")
        for command in task.commands:
            print(f"mmkd {shlex.join(command)}")
    print(f"{len(sweep.runs)} runs, {len(sweep.shared)} shared")
