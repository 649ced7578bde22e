"""The parts of smoke.py that compute: `python launch/smoke_parts.py PART OUT.json ARGUMENT ...`, a process each."""

import json
import math
import pathlib
import sys
import time
import zlib
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mmkd_jax import config as configs
from mmkd_jax import tokenizers
from mmkd_jax.batch import TextBatch
from mmkd_jax.losses import contrastive, distill, forms
from mmkd_jax.losses.base import Inputs
from mmkd_jax.models import constraints
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.planning import devices, flops, program
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, ResNetTower, SwinTower, TextTower, TokenizerSpec
from mmkd_jax.train import optim, setup, sharding, stability
from mmkd_jax.train.state import init_state, make_step

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
ROWS, WIDTH, CLASSES = 512, 64, ("red", "green", "blue", "grey")
GLOBAL = ("softmax", "sigmoid", "interactive", "affinity", "relation")  # losses that compare the batch with itself
WARM, TIMED = 3, 20  # steps of the throughput


def machine() -> dict:
    """What JAX sees, and the versions."""
    found = jax.devices()
    versions = {
        name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    }
    kinds = {"platform": found[0].platform, "kind": found[0].device_kind, "devices": len(found)}
    return {**kinds, "processes": jax.process_count(), "python": sys.version.split()[0], "versions": versions}


# --- numerics ---------------------------------------------------------------------------------------------------------


def golden(path: str) -> dict:
    """Writes all results of this process's platform as arrays by name."""
    found = results("highest")
    np.savez(path, **found)
    return {"arrays": len(found)}


def compare(path: str) -> dict:
    """Relative errors against the arrays at `path`, and as a control those of towers at the default precision."""
    with np.load(path) as stored:
        expected = dict(stored)
    errors = {name: apart(value, expected[name]) for name, value in results("highest").items()}
    control = {name: apart(value, expected[name]) for name, value in towers("default").items()}
    return {"errors": errors, "default": control, "missing": sorted(expected.keys() - errors.keys())}


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest value; infinite where something is not finite."""
    error = float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
    return error if math.isfinite(error) else math.inf


def results(precision: str) -> dict[str, np.ndarray]:
    """Values and gradients of every tower, and of every loss in every form that it has, on all devices."""
    found = towers(precision)
    mesh = Mesh(np.reshape(jax.devices(), (-1, 1, 1)), constraints.AXES)
    with jax.default_matmul_precision(precision):
        for name in contrastive.LOSSES | distill.LOSSES:
            for form in forms.FORMS if name in GLOBAL else forms.FORMS[:1]:
                found |= loss_results(name, form, mesh)
    return found


def towers(precision: str) -> dict[str, np.ndarray]:
    """Those of every tower."""
    with jax.default_matmul_precision(precision):
        return {k: v for name, spec in specs().items() for k, v in tower_results(name, spec).items()}


def specs() -> dict[str, ModelSpec]:
    """A small model of each kind of tower."""
    small = {"width": 64, "layers": 2, "heads": 4, "mlp_width": 256}
    text = {kind: TextTower(kind=kind, vocab_size=100, context=24, **small) for kind in ("bert", "clip")}
    towers = {
        "vit": (ImageTower(image_size=64, patch=16, **small), text["bert"]),
        "swin": (SwinTower(image_size=64, patch=4, width=24, stages=(2, 2), heads=2, window=4), text["clip"]),
        "resnet": (ResNetTower(width=16, stages=(1, 1, 1, 1), heads=8, image_size=64), text["bert"]),
    }
    kinds = {"bert": TokenizerSpec("wordpiece"), "clip": TokenizerSpec("bpe")}
    return {
        name: ModelSpec(name, image, text, 32, preprocess=Preprocess(size=64), tokenizer=kinds[text.kind])
        for name, (image, text) in towers.items()
    }


def tower_results(name: str, spec: ModelSpec) -> dict[str, np.ndarray]:
    """Embeddings of both towers of a model, and the gradient of their weighted sum."""
    encoder = DualEncoder(spec)
    params = jax.tree_util.tree_map_with_path(lambda path, x: weights_of(name, path, x.shape), encoder.shapes())
    images = drawn("images", (8, spec.image.image_size, spec.image.image_size, 3))
    length = spec.text.context
    mask = np.arange(length)[None] < np.arange(8)[:, None] + 8
    ids = np.where(mask, np.abs(drawn("ids", (8, length)) * 1000).astype(np.int32) % 90 + 5, 0).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    text = TextBatch(ids, mask.astype(np.int32), positions, np.zeros_like(ids))

    weights = drawn("weights", (8, spec.embed))

    def total(params, images, text, weights):
        features = encoder.encode_image(params, images), encoder.encode_text(params, text)
        return sum(jnp.sum(x * weights) for x in features), features

    step = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, (image, words)), gradient = step(params, images, text, weights)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])
    return {f"{name} image": np.asarray(image), f"{name} text": np.asarray(words), f"{name} gradient": flat}


def weights_of(name: str, path: tuple, shape: tuple[int, ...]) -> np.ndarray:
    """Arbitrary weights of a size that layers pass on; variances and scales of norms are positive."""
    leaf = jax.tree_util.keystr(path)
    noise = drawn(f"{name}{leaf}", shape) * 0.05
    return 1 + np.abs(noise) if leaf.endswith(("['variance']", "['scale']")) else noise


def loss_results(name: str, form: str, mesh: Mesh) -> dict[str, np.ndarray]:
    """A loss of features that are divided over the mesh, and its gradients."""
    function = (contrastive.LOSSES | distill.LOSSES)[name]
    common = drawn("common", (ROWS, WIDTH))
    rows = [common + drawn(part, (ROWS, WIDTH)) for part in ("image", "text", "target image", "target text")]
    rows = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows]
    weight = (np.arange(ROWS) % 5 > 0).astype(np.float32)
    divided = NamedSharding(mesh, PartitionSpec(constraints.BATCH_AXES))
    image, text, *targets, weight = (jax.device_put(x, divided) for x in (*rows, weight))

    def loss(live, targets, weight):
        image, text, scale, bias = live
        return function(Inputs(image, text, *targets, weight, scale, 50.0, bias), form)

    step = jax.jit(constraints.under(mesh, jax.value_and_grad(loss)))
    value, gradient = step((image, text, 20.0, -5.0), targets, weight)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])
    return {f"{name}/{form}": np.asarray(value), f"{name}/{form} gradient": flat}


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers float32 that depend on the name alone."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)


# --- data, throughput -------------------------------------------------------------------------------------------------


def data(folder: str) -> dict:
    """A pairs set of coloured pictures and a vocabulary of their captions."""
    from PIL import Image

    from mmkd_jax import cli

    root = pathlib.Path(folder)
    (root / "pictures").mkdir(parents=True)
    captions = []
    with (root / "pairs.jsonl").open("w") as file:
        for row in range(96):
            label = row % len(CLASSES)
            noise = np.random.default_rng(row).integers(0, 120, (48, 48, 3))
            pixels = (noise + np.eye(4, 3)[label] * 130).astype(np.uint8)
            Image.fromarray(pixels).save(root / "pictures" / f"{row}.png")
            captions.append(f"a {CLASSES[label]} picture, number {row}")
            line = {"image": f"pictures/{row}.png", "caption": captions[-1], "label": CLASSES[label], "split": "train"}
            file.write(json.dumps(line) + "\n")
    words = ["ingest", "jsonl", "--input", str(root / "pairs.jsonl"), "--out", str(root / "pairs")]
    if code := cli.main(words):
        raise SystemExit(code)
    learned = tokenizers.train(TokenizerSpec("wordpiece"), captions, vocab_size=200, context=16)
    (root / "vocabulary").mkdir()
    (root / "vocabulary" / tokenizers.FILE).write_bytes(learned.files()[tokenizers.FILE])
    return {"pairs": str(root / "pairs"), "vocabulary": str(root / "vocabulary"), "tokens": learned.vocab_size}


def throughput(batch: str, name: str) -> dict:
    """Pairs/s and MFU of a stage-1 config's step on all devices; the batch is halved until it fits."""
    count = jax.device_count()
    size = int(batch) * count
    while True:
        config = configs.load(f"{CONFIGS}/{name}", [f"--config.batch={size}"])
        try:
            seconds, loss = timed(config)
            break
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or size <= count:
                raise
            print(f"a batch of {size} does not fit: {str(error).splitlines()[0]}", flush=True)
            size //= 2
    per_pair, known = flops.model_flops(config), devices.of_kind(jax.devices()[0].device_kind)
    found = {"config": name, "batch": size, "step_seconds": seconds, "pairs_per_second": size / seconds, "loss": loss}
    achieved = per_pair * size / seconds / count
    found |= {"flops_per_pair": per_pair, "flops_per_second_and_device": achieved}
    stats = jax.local_devices()[0].memory_stats() or {}
    found["memory_peak_bytes"] = stats.get("peak_bytes_in_use")
    return found | {"peak_flops": known and known.flops, "mfu": achieved / known.flops if known else None}


def timed(config) -> tuple[float, float]:
    """Seconds of a step, and the last loss."""
    mesh = sharding.make_mesh(config.mesh)
    spec = ModelSpec.from_dict(configs.to_dict(config.model))
    task = program.assumed_task(config, spec, {})
    transform = stability.guard(optim.optimizer(config.optimizer, 1000, task.lr_scale), config.spikes)
    shapes = jax.eval_shape(lambda: init_state(task, transform, config.seed))
    placement = sharding.shardings(shapes, config.sharding, mesh, config.unsharded)
    state = jax.jit(lambda: init_state(task, transform, config.seed), out_shardings=placement)()
    step = sharding.program(make_step(task, transform, config.seed), mesh, placement)
    given = jax.tree.map(filled(spec), program.batch_shapes(config, spec, {}))
    batch = jax.device_put({k: v for k, v in given.items() if k in setup.Job.fields}, sharding.batch_sharding(mesh))
    for _ in range(WARM):
        state, reports = step(state, batch)
    jax.block_until_ready(state)
    begin = time.perf_counter()
    for _ in range(TIMED):
        state, reports = step(state, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - begin) / TIMED, float(reports["loss"])


def filled(spec: ModelSpec):
    """A function from a shape to an array: pixels, or ones, which are tokens and masks of whole texts."""
    rng = np.random.default_rng(0)
    return lambda x: rng.integers(0, 255, x.shape, np.uint8) if x.dtype == np.uint8 else np.ones(x.shape, x.dtype)


if __name__ == "__main__":
    part, out, *words = sys.argv[1:]
    pathlib.Path(out).write_text(json.dumps(globals()[part](*words)))
