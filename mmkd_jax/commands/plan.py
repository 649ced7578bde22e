"""Plans a training run for devices that are not there: does it fit, what does it cost.

mmkd plan --config configs/stage1_clip.py --config.batch=16384 --topology v5e:16x16 --pairs 2900000
mmkd plan --config configs/stage2_mmkd.py --config.batch=16384 --topology v5p-128 --text-tokens 60
mmkd plan --config configs/stage1_clip.py --topology v6e:16x16 --config.mesh.slices=2
mmkd plan --config configs/stage1_clip.py:smoke --topology cpu:8

The real step is compiled ahead of time, in a process of its own; TPUs take `pip install "jax[tpu]"`, and no TPU. Times
are ranges and estimates from a compiler: nothing runs on the devices. What was compiled is kept in DIR/compiled.
"""

import argparse

from mmkd_jax.cli import add_config

HELP = "what a run needs and costs on TPUs that are not there, from their compiler"
NINE = ("BMC-CLIP", "BiomedCLIP", "UniMed-CLIP", "QuiltNet-B-32", "GenMedClip", "PLIP", "PubMedCLIP", "PMC-CLIP",
        "MedCLIP-ViT")  # fmt: skip


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    add_config(parser)
    parser.add_argument("--topology", required=True, metavar="NAME", help="v5e:16x16, v5litepod-256, cpu:8 ...")
    parser.add_argument("--out", default="plans", metavar="DIR", help="for plan and compiled programs (default: plans)")
    parser.add_argument("--largest-batch", action="store_true", help="also bisect the largest batch for each remat")
    parser.add_argument("--pairs", type=int, default=0, metavar="N", help="of the training set, for the whole run")
    parser.add_argument("--text-tokens", type=float, default=0.0, metavar="N", help="mean length of captions")
    parser.add_argument(
        "--teachers", nargs="+", default=[], metavar="NAME=WIDTH", help="of stage 2 (default: the nine of MMKD-CLIP)"
    )
    parser.add_argument("--limit", type=float, default=60.0, metavar="MIN", help="minutes of a compile (default: 60)")


def run(args: argparse.Namespace) -> None:
    """Prints and saves the plan; exit code 0 whether it fits or not."""
    from mmkd_jax import config as configs
    from mmkd_jax import io
    from mmkd_jax.planning import page, plan, topologies

    config, topology = configs.load(args.config, args.overrides), topologies.find(args.topology)
    teachers = _teachers(config, args.teachers) if config.task == "distill" else {}
    _positive(args)
    if args.largest_batch:
        plan.memory(topology)  # refused before anything is compiled
    with io.workdir(args.out) as out:
        request = plan.Request(
            config, topology, teachers, out / "compiled", args.limit, pairs=args.pairs, text_tokens=args.text_tokens
        )
        made = plan.make(request)
        print("\n".join(page.lines(made)), flush=True)
        if args.largest_batch:
            say = lambda text: print(text, flush=True)  # noqa: E731
            made["largest"] = [plan.largest_batch(request, remat, say) for remat in plan.REMATS]
            for one in made["largest"]:
                print(f"largest batch, remat {one['remat']}: {one['batch'] or 'none'} fits, {one['below']} does not")
        slices = f"{config.mesh.slices}x" if config.mesh.slices > 1 else ""
        name = f"{config.name}-{slices}{topology.name.replace(':', '-')}"
        print(f"saved {plan.save(made, out, name)}")


def _positive(args: argparse.Namespace) -> None:
    from mmkd_jax.errors import InputError

    for option in ("pairs", "text_tokens", "limit"):
        if getattr(args, option) < 0 or (option == "limit" and not args.limit):
            raise InputError(f"--{option.replace('_', '-')} must be positive, not {getattr(args, option):g}")


def _teachers(config, given: list[str]) -> dict[str, int]:
    """Widths by name: as given, of the config's feature sets, or of the nine teachers of MMKD-CLIP."""
    from mmkd_jax import io
    from mmkd_jax.errors import InputError

    widths = {}
    for entry in given:
        name, _, width = entry.partition("=")
        if not name or not width.isdigit() or not int(width):
            raise InputError(f"--teachers {entry!r} must be NAME=WIDTH")
        widths[name] = int(width)
    if not widths and config.features:
        folders = sorted(io.as_path(config.features).glob("*/manifest.json"))
        widths = {file.parent.name: io.read_json(file)["width"] for file in folders}
        widths = {name: width for name, width in widths.items() if not config.teachers or name in config.teachers}
    if not widths:
        from teachers import specs

        widths = {name: specs.find(name).spec.embed for name in config.teachers or NINE}
    return widths
