"""`mmkd demo`: the whole method on one machine, from pictures to a report.

Three specialist teachers are trained, stored and read back like any teacher; their features are emitted; students are
pretrained (stage 1) and distilled (stage 2, three recipes) beside one that is never distilled; every model is
evaluated; DIR/report.html tells it all. Without --data the pictures are those that packages of the demo extra carry:
enough to see that everything runs, not to judge quality. The same command again continues where it stopped.

With --prepare it stops before the students: pairs, teachers, their features and scores are what
configs/sweeps/ladder.py starts from.
"""

import argparse

HELP = "run the whole method: teachers, features, both stages, evaluation, report, export"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--workdir", required=True, metavar="DIR", help="everything goes here")
    parser.add_argument("--data", nargs="+", default=[], metavar="DIR", help="WebDataset sets instead of the embedded")
    parser.add_argument("--fast", action="store_true", help="tiny models, few steps: to see that it runs")
    parser.add_argument("--seeds", type=int, metavar="N", help="the experiment: N seeds, longer runs, more controls")
    parser.add_argument("--prepare", action="store_true", help="no students: only what they learn from")
    parser.add_argument(
        "--captions",
        choices=("label", "modality"),
        default="label",
        help="what students' captions of labelled sets say (default: label)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs what is not there yet."""
    import jax

    from mmkd_jax import config as configs
    from mmkd_jax import io
    from mmkd_jax.demo import story
    from mmkd_jax.demo.pipeline import CONFIGS, Clock, Demo
    from mmkd_jax.errors import InputError

    if args.seeds is not None and args.seeds < 1:
        raise InputError(f"--seeds {args.seeds}: give at least 1")
    if args.fast and args.seeds:
        raise InputError("--fast and --seeds exclude each other: one is to see it run, the other to measure")
    missing = [place for place in args.data if not io.as_path(place).exists()]
    if missing:
        raise InputError(f"--data {missing[0]} does not exist")
    kind = "fast" if args.fast else "experiment" if args.seeds else ""
    config = configs.load(str(CONFIGS / "demo.py") + (f":{kind}" if kind else ""))
    data = tuple(str(io.as_path(place)) for place in args.data)
    demo = Demo(config, io.make_workdir(args.workdir), data, args.captions, args.seeds or 1)
    if args.fast:  # some dozen steps do not pay for good machine code
        jax.config.update("jax_disable_most_optimizations", True)
    if args.prepare:
        story.prepare(demo, Clock(demo.workdir))
        return
    report = story.tell(demo)
    print(f"report: {report}")
