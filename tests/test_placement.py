"""Placements by the shipped rules: where everything goes, that no loss depends on it, what the compiler makes of it.

`python tests/test_placement.py` writes the golden tables anew.
"""

import dataclasses
import functools
import pathlib
import re

if __name__ == "__main__":
    import conftest  # noqa: F401 (the devices)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_fixtures as tiny

from mmkd_jax import config as configs
from mmkd_jax.errors import InputError
from mmkd_jax.models import constraints
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower
from mmkd_jax.tasks.clip import ClipTask
from mmkd_jax.tasks.distill import DistillTask, Recipe
from mmkd_jax.tasks.targets import TeacherTarget
from mmkd_jax.train import loop, optim, placement, setup, sharding, stability
from mmkd_jax.train import state as states

pytestmark = pytest.mark.usefixtures("quick_compilation")
GOLDEN = pathlib.Path(__file__).parent / "golden" / "sharding"
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 8, 1))
LARGE = {"width": 1024, "layers": 24, "heads": 16, "patch": 14, "mlp_width": 4096}  # OpenAI's ViT-L/14
SHIPPED = {
    "stage1_clip": ("stage1_clip.py", ()),
    "stage1_clip_demo": ("stage1_clip.py:demo", ()),
    "stage2_mmkd": ("stage2_mmkd.py:recipe=plus", ()),
    "stage2_mmkd_demo": ("stage2_mmkd.py:recipe=plus,demo", ()),
    "vit_l14": (
        "stage1_clip.py:text=clip",
        (
            *(f"--config.model.image.{name}={value}" for name, value in LARGE.items()),
            *("--config.model.embed=768", "--config.model.text.vocab_size=49408"),
        ),
    ),
}
SMALL = (
    "--config.batch=16",
    *(f"--config.model.{tower}.{field}" for tower in ("image", "text") for field in ("layers=1", "heads=4")),
)


def mesh_of(sizes):
    return sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))


def tables(name: str) -> str:
    """The tables of a shipped config on every mesh, from shapes alone."""
    address, overrides = SHIPPED[name]
    config = configs.load(f"{tiny.CONFIGS}/{address}", overrides)
    spec = ModelSpec.from_dict(configs.to_dict(config.model))
    task = ClipTask(spec)
    if config.task == "distill":
        mean = np.zeros(1, np.float32)
        teachers = [TeacherTarget(f"of_{width}", width, "native", 100.0, mean, mean) for width in (512, 768)]
        recipe = Recipe(**configs.to_dict(config.recipe))
        task = DistillTask(spec, teachers, recipe, np.ones((1, 2), np.float32), seed=0)
    transform = optim.optimizer(config.optimizer, 10, task.lr_scale)
    shapes = jax.eval_shape(lambda: states.init_state(task, transform, 0))
    made = []
    for sizes in MESHES:
        mesh = mesh_of(sizes)
        placed = sharding.shardings(shapes, config.sharding, mesh, config.unsharded)
        made.append(placement.describe(shapes.params, placed.params, mesh))
    return "\n".join(made)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_are_placed_as_their_golden_tables_say(name):
    assert tables(name) == (GOLDEN / f"{name}.txt").read_text()


def test_the_golden_table_of_vit_l14_is_what_it_should_be():
    """Against numbers of others: OpenAI's ViT-L/14 has 427,616,513 parameters."""
    text = (GOLDEN / "vit_l14.txt").read_text().split("\n\n")
    assert text[0].startswith("mesh: data 8, fsdp 1, tensor 1\n")
    assert "\n427616513 numbers, 427616513 on one device (100.00%)" in text[0]
    assert len(re.findall(r"  whole  ", text[0])) == text[0].count("\n") - 2
    both = text[2]
    assert both.startswith("mesh: data 2, fsdp 2, tensor 2\n")
    for row in (
        r"image/layers/attention/qkv/kernel +24x1024x3x16x64 +- fsdp - tensor - +24x512x3x8x64",
        r"image/layers/mlp/down/kernel +24x4096x1024 +- tensor fsdp +24x2048x512",
        r"text/tokens/embedding +49408x768 +- fsdp +49408x384",
    ):
        assert re.search(rf"^{row}$", both, re.MULTILINE)
    share = [float(re.search(r"\(([\d.]+)%\)", part)[1]) for part in text]
    assert share[1] == pytest.approx(25, abs=0.2)
    assert share[3] == pytest.approx(12.5, abs=0.2)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What the order of devices depends on."""

    id: int
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "fake"


def test_slices_are_joined_along_data():
    # Listed so that slices alternate: their order must come from the index, not from the list.
    devices = [FakeDevice(id=10 * part + i, slice_index=part) for i in range(4) for part in (1, 0)]
    order = sharding.device_order((4, 2, 1), 2, devices)
    ids = np.vectorize(lambda device: device.id)(order)
    np.testing.assert_array_equal(ids[..., 0], [[0, 1], [2, 3], [10, 11], [12, 13]])
    whole = sharding.device_order((2, 2, 2), 2, devices)
    assert [{device.slice_index for device in part.flat} for part in whole] == [{0}, {1}]


@pytest.mark.parametrize(
    ("shape", "slices", "platform", "says"),
    [
        ((4, 2, 1), 4, "cpu", "mesh.slices is 4, the devices form 2; use --config.mesh.slices=2"),
        ((4, 2, 1), 1, "tpu", "mesh.slices is 1, the devices form 2"),
        ((1, 8, 1), 2, "cpu", "the data axis of 1 cannot be divided over 2 slices"),
    ],
)
def test_slices_that_are_not_there_are_refused(shape, slices, platform, says):
    devices = [FakeDevice(i, i // 4, platform) for i in range(8)]
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        sharding.device_order(shape, slices, devices)
    assert "\n" not in str(caught.value)


def test_slices_of_unequal_size_are_one_line():
    devices = [FakeDevice(i, int(i > 2)) for i in range(8)]
    with pytest.raises(InputError, match=r"no mesh of .* in 2 slices of these devices") as caught:
        sharding.device_order((4, 2, 1), 2, devices)
    assert "\n" not in str(caught.value)


def test_rules_that_leave_much_whole_on_an_fsdp_mesh_stop():
    config = tiny.stage1()
    shapes = DualEncoder(ModelSpec()).shapes()
    forgotten = tuple(rule for rule in config.sharding if "mlp/up/kernel" not in rule[0])
    assert len(forgotten) == len(config.sharding) - 1
    with pytest.raises(InputError, match=r"leave 29\.\d% whole on an fsdp mesh, text/layers/mlp/up/kernel") as caught:
        sharding.shardings(shapes, forgotten, mesh_of((2, 4, 1)), config.unsharded)
    assert "\n" not in str(caught.value)
    allowed = float(re.search(r"--config\.unsharded=([\d.]+)", str(caught.value))[1])
    sharding.shardings(shapes, forgotten, mesh_of((2, 4, 1)), allowed)
    sharding.shardings(shapes, forgotten, mesh_of((8, 1, 1)), 0.0)  # nothing is expected to be divided
    sharding.shardings(shapes, config.sharding, mesh_of((2, 4, 1)), config.unsharded)


STAGES = {"clip": tiny.stage1, **{name: functools.partial(tiny.stage2, name) for name in ("public", "plus")}}


@functools.cache
def three_steps(stage: str, sizes: tuple, dropped: int | None = None):
    """State and reports after three steps; `dropped` names a sample that another takes the place of."""
    config = STAGES[stage](*SMALL, "--config.model.text.dropout=0.1")
    job = setup.build(config)
    transform = optim.optimizer(config.optimizer, job.steps, job.task.lr_scale)
    init = functools.partial(states.init_state, job.task, transform, 0)
    mesh = mesh_of(sizes)
    placed = sharding.shardings(jax.eval_shape(init), config.sharding, mesh, config.unsharded)
    state = jax.jit(constraints.under(mesh, init), out_shardings=placed)()
    step = jax.jit(constraints.under(mesh, states.make_step(job.task, transform, 0)), out_shardings=(placed, None))
    reports = []
    for number in range(3):
        batch = {k: v for k, v in job.batches.batch(number).items() if k in job.fields}
        if dropped is not None:
            batch["image"][dropped] = batch["image"][dropped - 1]
        batch = sharding.global_batch(batch, mesh)
        with jax.transfer_guard("disallow"):
            state, report = step(state, batch)
        reports.append(jax.device_get(report))
    return state, reports


RUNS = [(stage, sizes) for stage in STAGES for sizes in MESHES[1:]]


@pytest.mark.full
@pytest.mark.parametrize(("stage", "sizes"), RUNS)
def test_fsdp_and_tensor_give_the_losses_of_data_parallel(stage, sizes):
    """Same start, same draws, same sums in another order: float32 rounding, at most 84 of its units after 3 steps."""
    expected, reports = three_steps(stage, (8, 1, 1))
    found, divided = three_steps(stage, sizes)
    for one, two in zip(divided, reports, strict=True):
        for name in two.keys() - {"not_finite"}:
            np.testing.assert_allclose(one[name], two[name], rtol=1e-5, err_msg=name)
    leaves = jax.tree_util.tree_leaves_with_path((found.params, found.opt_state))
    up = [leaf for path, leaf in leaves if optim.path_of(path).endswith("image/layers/mlp/up/kernel")]
    assert len(up) == 3  # the parameter and both moments
    for leaf in up:
        assert leaf.addressable_shards[0].data.size * sizes[1] * sizes[2] == leaf.size
    for one, two in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        # Adam's first steps are the learning rate whatever the gradient's size: noise about zero takes either sign.
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=2e-4)


@pytest.mark.full
def test_the_losses_notice_one_wrong_sample():
    _, reports = three_steps("clip", (8, 1, 1))
    _, wrong = three_steps("clip", (8, 1, 1), dropped=3)
    assert all(abs(one["loss"] / two["loss"] - 1) > 1e-3 for one, two in zip(wrong, reports, strict=True))


def compiled_tower(monkeypatch, sizes, wrap):
    """HLO of an image tower's gradient with its loops kept."""
    monkeypatch.setattr(constraints, "platform", lambda: "tpu")  # a CPU's program unrolls the layers
    tower = ImageTower(width=32, layers=3, heads=4, patch=16, image_size=32, mlp_width=128)
    text = TextTower(width=32, layers=1, heads=4, mlp_width=64, vocab_size=20, positions=8, context=8)
    model = DualEncoder(ModelSpec(image=tower, text=text, embed=16, preprocess=Preprocess(32)), remat="full")
    mesh = mesh_of(sizes)
    placed = sharding.shardings(model.shapes(), tiny.stage1().sharding, mesh)
    like = jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), model.shapes(), placed)
    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32, sharding=sharding.batch_sharding(mesh))
    gradient = jax.grad(lambda params, x: jnp.sum(jnp.square(model.encode_image(params, x))))
    gradient = constraints.under(mesh, gradient) if wrap else gradient
    return jax.jit(gradient, out_shardings=placed).lower(like, images).compile().as_text()


def gathered_in_loops(text: str) -> list[set[str]]:
    """Shapes of what the body of each loop gathers."""
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    parts = re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ \([^\n]*\{\n)", text)
    inside = [part for part in parts if re.match(r"%?([\w.\-]+)", part)[1] in bodies]
    assert inside
    return [set(re.findall(r"= (\w+\[[\d,]*\])\S* all-gather", part)) for part in inside]


def test_fsdp_gathers_a_layers_weights_inside_the_loop_over_layers(monkeypatch):
    """Forward and backward: the four kernels of one layer, no activations, and no stack of layers anywhere."""
    text = compiled_tower(monkeypatch, (1, 8, 1), wrap=True)
    kernels = {"f32[1,32,3,4,8]", "f32[1,4,8,32]", "f32[1,32,128]", "f32[1,128,32]"}
    assert gathered_in_loops(text) == [kernels, kernels]
    assert not re.search(r"= \w+\[3,[\d,]*\]\S* all-gather", text)
    # What the constraints are for: without them activations are divided by columns, and no kernel is gathered.
    alone = gathered_in_loops(compiled_tower(monkeypatch, (1, 8, 1), wrap=False))
    assert not any(kernels & found for found in alone)


def test_no_device_holds_the_whole_model_while_it_is_drawn():
    text = TextTower(width=256, layers=2, heads=4, mlp_width=1024, vocab_size=2000, positions=64, context=64)
    image = ImageTower(width=256, layers=4, heads=4, patch=16, image_size=32, mlp_width=1024)
    model = DualEncoder(ModelSpec(image=image, text=text, embed=256, preprocess=Preprocess(32)))
    mesh = mesh_of((1, 8, 1))
    placed = sharding.shardings(model.shapes(), tiny.stage1().sharding, mesh, 0.05)
    size = sum(x.size * 4 for x in jax.tree.leaves(model.shapes()))

    def used(init):
        compiled = jax.jit(constraints.under(mesh, init), out_shardings=placed).lower(jax.random.key(0)).compile()
        memory = compiled.memory_analysis()
        return compiled, (memory.temp_size_in_bytes + memory.output_size_in_bytes) / size

    def flat(key):
        leaves, tree = jax.tree.flatten(model.shapes())
        ends = np.cumsum([leaf.size for leaf in leaves])
        draw = jax.random.truncated_normal(key, -2.0, 2.0, (int(ends[-1]),))
        return jax.tree.unflatten(
            tree, [part.reshape(leaf.shape) for part, leaf in zip(jnp.split(draw, ends[:-1]), leaves, strict=True)]
        )

    init, share = used(model.init)
    assert share < 0.75
    assert used(flat)[1] > 1.0  # the obvious way: every device draws everything and keeps its part
    values = init(jax.random.key(0))
    # The mesh decides where numbers are made, not which.
    expected = model.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, values, expected)
    assert float(values["image"]["layers"]["mlp"]["up"]["kernel"].std()) == pytest.approx(0.88 * 512**-0.5, rel=0.01)


def quiet_step(task, transform, seed, ema=0.0):
    """A step that compiles at once, looks at the batch and changes nothing."""

    def step(state, batch):
        seen = jnp.mean(batch["image"].astype(jnp.float32))
        found = stability.not_finite(state.params, state.params)
        return state.replace(step=state.step + 1), {"loss": seen, "grad_norm": seen, "not_finite": found}

    return step


@pytest.mark.parametrize("sizes", [(2, 4, 1), (8, 1, 1)])
def test_a_run_prints_and_keeps_the_table(tmp_path, monkeypatch, capsys, sizes):
    monkeypatch.setattr(loop, "make_step", quiet_step)
    fields = [f"--config.mesh.{axis}={size}" for axis, size in zip(sharding.AXES, sizes)]
    loop.run(tiny.stage1(*SMALL, *fields, "--config.steps=1"), tmp_path / "run")
    table = (tmp_path / "run" / "sharding.txt").read_text()
    assert table.startswith(f"mesh: data {sizes[0]}, fsdp {sizes[1]}, tensor 1\n")
    assert "image/layers/mlp/up/kernel" in table
    assert capsys.readouterr().err.count(table) == (sizes[1] > 1)


def test_nothing_is_copied_to_a_device_unnoticed(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_step", quiet_step)
    monkeypatch.setattr(sharding, "global_batch", lambda batch, mesh: batch)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.run(tiny.stage1(*SMALL, "--config.steps=1"), tmp_path / "run")


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for config_name in SHIPPED:
        (GOLDEN / f"{config_name}.txt").write_text(tables(config_name))
