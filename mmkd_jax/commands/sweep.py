"""`mmkd sweep`: all runs of a config file's `sweep()`, made on this machine or a cluster and told in one table.

What several runs share (a stage-1 checkpoint, a feature set) is made once. Each device group makes one run at a time,
in a process of its own; a CPU is one group. The same command again makes what is missing. DIR then holds runs/,
shared/, logs/, table.json, table.csv, table.md, report.html and sweep.svg.

With --on slurm or --on gke each part is a job there, submitted through launch/slurm.sh or launch/gke.sh; what is
preempted is submitted again. The command waits and tells states; stopped, it leaves the jobs alone, and the same again
finds them. DIR must be where the jobs can reach it.

  mmkd sweep --config configs/sweeps/learning_rate.py --workdir runs/lr --dry-run
  mmkd sweep --config configs/sweeps/learning_rate.py --workdir /shared/lr --on slurm --submit=--gres=gpu:1
"""

import argparse

from mmkd_jax import cli

HELP = "make all runs of a config's sweep(), here or on a cluster, and one table of them"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    cli.add_config(parser)
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the sweep's folder; the same again continues")
    parser.add_argument("--devices", type=int, metavar="N", help="accelerators of each run here (default: 1)")
    parser.add_argument("--on", choices=("local", "slurm", "gke"), default="local", help="where (default: local)")
    parser.add_argument(
        "--submit",
        action="append",
        default=[],
        metavar="OPTION",
        help="an option of each job, as --submit=--partition=gpu or --submit=--cluster=C; may be repeated",
    )
    parser.add_argument("--into", metavar="FILE.md", help="then copy table and plot of the whole sweep into a document")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")


def run(args: argparse.Namespace) -> None:
    """Makes the runs that are not there yet, and the table of all."""
    from mmkd_jax.errors import InputError
    from mmkd_jax.sweeps import devices, plan, runner, submit, table

    cluster = _cluster(args)
    sweep = plan.load(args.config, args.overrides, args.workdir)
    if cluster:
        submit.check(sweep, cluster)
    if args.dry_run:
        _say(sweep, cluster)
        return
    if args.into:
        table.check_place(args.into, sweep.config.get("name", "sweep"))
    groups = None if cluster else devices.groups(args.devices or 1)
    plan.claim(sweep)
    failures = submit.run(sweep, cluster) if cluster else runner.run(sweep, groups)
    if any(runner.is_done(sweep, one) for one in sweep.runs):
        table.write(sweep)
        print(f"report: {sweep.workdir / 'report.html'}")
    if failures:
        first = failures[0]
        raise InputError(
            f"{len(failures)} of {len(sweep.shared) + len(sweep.runs)} parts of the sweep failed, first {first.task} "
            f"(exit code {first.code}: {first.line}); their logs are in {sweep.workdir / 'logs'}, "
            "the same command tries them again"
        )
    if args.into:
        table.put_into(args.into, sweep)


def _cluster(args: argparse.Namespace):
    """Where to submit to; None for this machine."""
    from mmkd_jax.errors import InputError
    from mmkd_jax.sweeps import submit

    if args.on == "local":
        if args.submit:
            raise InputError(f"--submit={args.submit[0]} is for --on slurm or --on gke")
        return None
    if args.devices is not None:
        raise InputError(f"--devices is for this machine; name what each job takes by --submit=OPTION of {args.on}")
    return submit.Cluster(args.on, tuple(args.submit))


def _say(sweep, cluster) -> None:
    import shlex

    from mmkd_jax.sweeps import runner

    for task in (*sweep.shared, *sweep.runs):
        print(f"# {task.name}{' (done)' if runner.is_done(sweep, task) else ''}")
        for command in task.commands:
            print(f"mmkd {shlex.join(command)}")
        if cluster:
            print(f"# as the job\n{cluster.printed(sweep, task)}")
    print(f"{len(sweep.runs)} runs, {len(sweep.shared)} shared")
