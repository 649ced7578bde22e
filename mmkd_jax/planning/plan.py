"""The plan of a training run for a topology: does it fit, what does it move, how long may it take."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mmkd_jax import config as configs
from mmkd_jax import io
from mmkd_jax.data.pairs import PairsSet
from mmkd_jax.errors import InputError
from mmkd_jax.planning import compile as compiling
from mmkd_jax.planning import count, devices, estimate, findings, flops
from mmkd_jax.planning.hlo import HloError
from mmkd_jax.planning.topologies import Topology
from mmkd_jax.specs import ModelSpec
from mmkd_jax.train import setup

SCHEMA = 1
SAMPLE = 512  # captions that the mean length is taken of
NEXT = {"none": "dots", "dots": "full"}  # the remat policy that needs less memory
MOST = 4096  # pairs a device with which the search for the largest batch begins
REMATS = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be planned.

    Attributes:
      config: of the run.
      topology: of one slice; `config.mesh.slices` says how many.
      teachers: stage 2: widths of the stored features by name.
      cache: folder that keeps what was compiled.
      minutes: that one compile may take.
      pairs: of the training set, where the config names none.
      text_tokens: mean length of captions, where the config names no data.
    """

    config: ConfigDict
    topology: Topology
    teachers: Mapping[str, int]
    cache: epath.Path
    minutes: float = 60.0
    pairs: int = 0
    text_tokens: float = 0.0

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of the mesh's axes.

        Raises:
          InputError: they do not fit the topology.
        """
        sizes = {axis: int(self.config.mesh[axis]) for axis in ("data", "fsdp", "tensor")}
        total = self.topology.devices * self.config.mesh.slices
        rest = math.prod(size for size in sizes.values() if size != -1)
        if list(sizes.values()).count(-1) > 1 or min(sizes.values()) < -1 or 0 in sizes.values() or total % rest:
            raise InputError(f"mesh {sizes} does not fit the {total} devices of {self.topology.name}; give one axis -1")
        return {axis: total // rest if size == -1 else size for axis, size in sizes.items()}

    def compile(self, **changed: Any) -> compiling.Compiled:
        """The step with some of the config's fields changed."""
        values = configs.to_dict(self.config) | changed
        return compiling.step(values, self.topology, self.teachers, self.cache, self.minutes)


def make(request: Request) -> dict[str, Any]:
    """The plan of the batch in the config, as plain values.

    Raises:
      InputError: config, mesh and topology do not fit together, or the compiler gave up.
    """
    config, topology, mesh = request.config, request.topology, request.mesh
    tokens, length_of = text_length(request)
    parts = flops.by_part(config, text_tokens=tokens, teachers=request.teachers)
    known = devices.of_kind(topology.kind)
    made = {
        "schema": SCHEMA,
        "what": "an estimate from a compiler and arithmetic; nothing ran on these devices",
        "name": config.name,
        "topology": dataclasses.asdict(topology) | {"slices": config.mesh.slices},
        "mesh": mesh,
        "batch": config.batch,
        "remat": config.remat,
        "form": config.loss.form,
        "teachers": dict(request.teachers),
        "versions": compiling.versions(topology.platform),
        "model": {
            "flops_of_pair": sum(parts.values()), "parts": parts, "text_tokens": tokens, "text_length_of": length_of,
        },
        "allowed": known.memory if known else None,
    }  # fmt: skip
    made |= _compiled(request, mesh, made)
    return made


def _compiled(request: Request, mesh: Mapping[str, int], made: Mapping[str, Any]) -> dict[str, Any]:
    """What the compiler's answer adds to a plan."""
    config, topology = request.config, request.topology
    found = request.compile()
    if not found.fits:
        policy = NEXT.get(config.remat)
        fewer = _unit(request) * max(1, config.batch // 2 // _unit(request))
        advice = ([f"--config.remat={policy}"] if policy else []) + [f"--config.batch={fewer}"]
        advice += [f"--config.accumulate={2 * config.accumulate}"]
        return {"fits": False, "needed": found.needed, "allowed": found.allowed or made["allowed"], "try": advice}
    allowed, peak = made["allowed"], found.memory["peak"] or found.memory["temp"] + found.memory["argument"]
    try:
        totals = count.count(found.text, mesh)
    except HloError as error:
        raise InputError(f"the step compiles (peak {peak / 2**30:.2f} GiB a device), but {error}") from error
    spent = estimate.seconds(totals, topology, mesh)
    pair = made["model"]["flops_of_pair"]
    per_device = pair * config.batch / math.prod(mesh.values())
    run = estimate.run(spent, pair, config.batch, steps(request), topology, config.mesh.slices)
    return {
        "fits": allowed is None or peak <= allowed,
        "memory": found.memory | {"peak": peak},
        "flops": {"counted": totals.flops, "model": per_device, "ratio": totals.flops / per_device},
        "cycles": totals.cycles,
        "collectives": findings.collectives(totals),
        "custom_calls": dict(totals.hidden),
        "warnings": findings.warnings(found.text, totals, mesh, config, request.teachers),
        "seconds": spent,
        "rests_on": estimate.RESTS_ON,
        "run": run,
        "cached": found.cached,
    }


def text_length(request: Request) -> tuple[float, str]:
    """Mean tokens of a caption, and where that is from."""
    config = request.config
    if request.text_tokens:
        return request.text_tokens, "given"
    if config.data.pairs and config.tokenizer:
        spec = ModelSpec.from_dict(configs.to_dict(config.model))
        tokenizer, pairs = setup.load_tokenizer(config, spec), PairsSet.open(config.data.pairs)
        rows = range(0, len(pairs), max(1, len(pairs) // SAMPLE))
        texts = [pair.captions[0] for pair in pairs.read_many(list(rows)) if pair.captions]
        return float(tokenizer(texts).mask.sum(axis=1).mean()), f"measured on {len(texts)} captions"
    return float(config.model.text.context), "the whole context, for want of data; give --text-tokens"


def steps(request: Request) -> int | None:
    """Updates of the whole run; None where nothing says how many pairs there are."""
    config = request.config
    if config.steps:
        return config.steps
    count_ = request.pairs
    if not count_ and config.data.pairs:
        pairs = PairsSet.open(config.data.pairs)
        count_ = len(pairs.rows(config.data.rows).rows) if config.data.rows else len(pairs)
    return max(1, config.epochs * count_ // config.batch) if count_ else None


def _unit(request: Request) -> int:
    """The smallest step between batches that the mesh and the micro-batches can divide."""
    mesh = request.mesh
    return mesh["data"] * mesh["fsdp"] * request.config.accumulate


def memory(topology: Topology) -> int:
    """Bytes that a device of the topology has.

    Raises:
      InputError: it is made of CPU devices, which share the host's.
    """
    allowed = getattr(devices.of_kind(topology.kind), "memory", None)
    if allowed is None:
        raise InputError(f"nothing limits the memory of {topology.name}; name a topology of TPUs")
    return allowed


def largest_batch(request: Request, remat: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The largest batch that fits under a remat policy, by bisection from above, to an eighth; each compile is told.

    What is far too large is refused in seconds, what fits takes minutes: so the search comes from above.
    """
    unit, allowed = _unit(request), memory(request.topology)
    tried = []

    def fits(number: int) -> bool:
        found = request.compile(batch=number * unit, remat=remat)
        peak = found.memory.get("peak")
        good = found.fits and peak <= allowed
        tried.append({"batch": number * unit, "fits": good, "peak": peak, "needed": found.needed})
        size = f"peak {peak / 2**30:.2f} GiB" if found.fits else f"needs {(found.needed or 0) / 2**30:.2f} GiB"
        known = ", compiled earlier" if found.cached else ""
        say(f"remat {remat}, batch {number * unit}: {'fits' if good else 'too large'}, {size}{known}")
        return good

    low, high = 0, 2 * max(1, MOST // request.config.accumulate)
    while high > 1 and not low:
        middle = high // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    while low and high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return {"remat": remat, "batch": low * unit, "below": high * unit, "tried": tried}


def save(made: Mapping[str, Any], out: epath.Path, name: str) -> epath.Path:
    """Writes the plan as JSON and as a page; returns the JSON's path."""
    from mmkd_jax.planning import page

    io.write_json(out / f"{name}.json", made)
    io.write_text(out / f"{name}.html", page.page(made))
    return out / f"{name}.json"
