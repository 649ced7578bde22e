"""Stage 2: every recipe's loss and gradients against torch, and the draw of teachers."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import equations, products

from mmkd_jax.errors import InputError
from mmkd_jax.models import heads
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, TextTower
from mmkd_jax.tasks import distill, maps, targets
from mmkd_jax.tasks.base import Features

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOLERANCE = 2e-5
N, EMBED = 12, 16
SCALE = math.log(10.0)  # of the student
WIDTHS = {"alpha": 6, "beta": 10, "gamma": 5}
PRESENT = {  # rows 10 and 11 have no teacher at all; rows 8 and 9 have gamma alone
    "alpha": [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
    "beta": [1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0],
    "gamma": [1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0],
}
MODALITY = np.array([0, 1, 2] * 4, np.int32)
ROUTING = np.array([[1.0, 0.0, 2.0], [0.25, 0.75, 0.5], [1.0, 1.0, 1.0]], np.float32)  # [modality, teacher]
RECIPES = {
    "public": distill.Recipe(),
    "mean": distill.Recipe(target="mean", icl_trained=True),
    "plus": distill.Recipe(target="heads", feature_weight=1.0, icl_weight=0.0, affinity_weight=1.0, centre=True),
}


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def make_batch(names=tuple(WIDTHS), seed=0) -> dict:
    """Unit-norm features around a common direction, zeros where absent."""
    stored = {}
    for i, name in enumerate(WIDTHS):
        rng = np.random.default_rng(seed + i)
        present = np.array(PRESENT[name], bool)
        towers = {tower: unit(rng.normal(size=(N, WIDTHS[name])) + 0.7) for tower in ("image", "text")}
        stored[name] = {tower: np.where(present[:, None], x, 0).astype(np.float32) for tower, x in towers.items()}
        stored[name]["present"] = present
    return {"modality": MODALITY, "targets": {name: stored[name] for name in names}}


def make_teacher(name: str, **changes) -> targets.TeacherTarget:
    rng = np.random.default_rng(len(name))
    width = WIDTHS[name]
    means = {f"{tower}_mean": rng.normal(size=width).astype(np.float32) / 4 for tower in ("image", "text")}
    scale = {"alpha": 20.0, "beta": 7.0, "gamma": 12.0}[name]
    return targets.TeacherTarget(name=name, width=width, space="native", scale=scale, **{**means, **changes})


def make_task(recipe, names=tuple(WIDTHS), routing=ROUTING, seed=0, **teacher) -> distill.DistillTask:
    spec = ModelSpec(
        image=ImageTower(width=16, layers=1, heads=2, patch=16, image_size=32, mlp_width=32),
        text=TextTower(width=16, layers=1, heads=2, mlp_width=32, vocab_size=60, positions=16, context=16),
        embed=EMBED,
        preprocess=Preprocess(size=32),
    )
    return distill.DistillTask(spec, [make_teacher(n, **teacher) for n in reversed(names)], recipe, routing, seed=seed)


@functools.cache
def usual(recipe: str) -> distill.DistillTask:
    """The task of a recipe with all three teachers."""
    return make_task(RECIPES[recipe])


@functools.cache
def make_inputs(recipe: str, names=tuple(WIDTHS)) -> dict:
    """What the objective is differentiated by: the student's features, its scale, and what the recipe adds."""
    rng = np.random.default_rng(9)
    inputs = {tower: unit(rng.normal(size=(N, EMBED)) + 0.3) for tower in ("image", "text")}
    inputs["logit_scale"] = np.float32(SCALE)
    if recipe == "mean":
        inputs["icl_scale"] = np.float32(1.3)
    if recipe == "plus":
        made = heads.init(jax.random.key(3), {name: WIDTHS[name] for name in names}, EMBED)
        inputs["heads"] = jax.tree.map(lambda x: np.asarray(x) + 0.1, made)
    return inputs


@functools.cache
def compiled(task):
    """The objective's value, reports and gradients as a compiled function of (inputs, batch, step)."""

    def loss(inputs, batch, step):
        params = {name: value for name, value in inputs.items() if name not in ("image", "text")}
        value, reports, _ = task.objective(params, Features(inputs["image"], inputs["text"]), batch, step)
        return value, reports

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def ours(task, batch, inputs, step=0):
    """Value, reports and gradients: ((value, reports), gradients)."""
    return compiled(task)(inputs, batch, np.int32(step))


# --- the reference: plain loops in float64, gradients by torch -----------------------------------------------------


class Reference:
    """The three losses, written from the formulas; `wrong` names a mistake to make, as a negative control."""

    def __init__(self, batch, wrong: str = "", smooth_l1: float = 0.0):
        self.smooth_l1 = smooth_l1
        self.torch = pytest.importorskip("torch", reason="torch is the reference of the losses")
        self.batch, self.wrong = batch, wrong
        self.stored = {
            name: {t: self.torch.tensor(stored[t], dtype=self.torch.float64) for t in ("image", "text")}
            for name, stored in batch["targets"].items()
        }
        self.has = {name: np.asarray(stored["present"]) for name, stored in batch["targets"].items()}
        self.teachers = {name: make_teacher(name) for name in self.stored}

    def tensor(self, x):
        return self.torch.tensor(np.asarray(x), dtype=self.torch.float64)

    def cross_entropy(self, logits, i):
        return self.torch.logsumexp(logits, 0) - logits[i]

    def task(self, inputs):
        """Symmetric InfoNCE of the pairs."""
        scale = self.torch.exp(inputs["logit_scale"])
        total = 0.0
        for i in range(N):
            total = total + self.cross_entropy(scale * inputs["text"] @ inputs["image"][i], i)
            total = total + self.cross_entropy(scale * inputs["image"] @ inputs["text"][i], i)
        return total / (2 * N)

    def mapped(self, name, tower, i):
        """A teacher's feature at the student's width: by a fixed Gaussian map of its name."""
        return self.stored[name][tower][i] @ self.tensor(seeded_map(name))

    def joint(self, inputs, shares, scale):
        """Weight 50 on squares meaned over samples and dimensions, and ICL; `shares[i]`: {teacher: share}."""
        rows = [i for i in range(N) if shares[i]]
        goal = {
            (tower, i): sum(share * self.mapped(name, tower, i) for name, share in shares[i].items())
            for tower in ("image", "text")
            for i in rows
        }
        if self.wrong == "unit targets":
            goal = {key: value / value.norm() for key, value in goal.items()}
        feature, icl = 0.0, 0.0
        for place, i in enumerate(rows):
            for tower, other in (("image", "text"), ("text", "image")):
                source = tower if self.wrong == "icl within a tower" else other
                against = self.torch.stack([goal[source, j] for j in rows])
                feature = feature + ((inputs[tower][i] - goal[tower, i]) ** 2).sum() / (len(rows) * EMBED)
                icl = icl + self.cross_entropy(scale * against @ inputs[tower][i], place) / (2 * len(rows))
        if self.wrong == "mean over samples only":
            feature = feature * EMBED
        return self.task(inputs) + 50 * feature + icl

    def public(self, inputs, drawn):
        """`drawn[i]`: the teacher of each sample, None where there is none."""
        scale = math.log(1 / 0.07)
        if self.wrong == "scale exponentiated":
            scale = 1 / 0.07
        return self.joint(inputs, [{} if name is None else {name: 1.0} for name in drawn], scale)

    def mean(self, inputs):
        shares = []
        for i in range(N):
            names = [name for name in self.has if self.has[name][i]]
            count = len(self.has) if self.wrong == "mean over all teachers" else max(len(names), 1)
            shares.append(dict.fromkeys(names, 1.0 / count))
        scale = self.torch.exp(inputs["icl_scale"])
        if self.wrong == "scale not exponentiated":
            scale = inputs["icl_scale"]
        return self.joint(inputs, shares, scale)

    def weights(self, i):
        """Weights of one sample's teachers: its modality's, among those present, sum 1."""
        names = list(self.has)
        row = {name: float(ROUTING[MODALITY[i]][sorted(WIDTHS).index(name)]) for name in names}
        if self.wrong == "another modality":
            row = {name: float(ROUTING[(MODALITY[i] + 1) % 3][sorted(WIDTHS).index(name)]) for name in names}
        row = {name: row[name] * bool(self.has[name][i]) for name in names}
        total = sum(row.values())
        if self.wrong == "weights not normalised":
            return row
        return {name: value / total if total else 0.0 for name, value in row.items()}

    def plus(self, inputs):
        feature, affinity = 0.0, 0.0
        weights = [self.weights(i) for i in range(N)]
        taught = N if self.wrong == "diluted" else sum(any(row.values()) for row in weights)
        for name, teacher in self.teachers.items():
            rows = [i for i in range(N) if weights[i][name] > 0]
            pool = list(range(N)) if self.wrong == "affinity not masked" else rows
            student = self.torch.exp(inputs["logit_scale"]) * inputs["image"] @ inputs["text"].T
            scale = 12.0 if self.wrong == "one scale for all teachers" else teacher.scale
            told = scale * self.stored[name]["image"] @ self.stored[name]["text"].T
            for i in rows:
                feature = feature + weights[i][name] / taught * self.own_space(inputs, name, i)
                for q, p in ((student, told), (student.T, told.T)):
                    log_q = self.torch.log_softmax(q[i, pool], 0)
                    log_p = self.torch.log_softmax(p[i, pool], 0)
                    affinity = affinity + weights[i][name] / taught * (log_p.exp() * (log_p - log_q)).sum() / 2
        return self.task(inputs) + feature + affinity

    def own_space(self, inputs, name, i):
        """1 - cosine to the centred target, mean of both towers; beside it smooth-L1 to that target at unit norm."""
        total = 0.0
        for tower in ("image", "text"):
            mean = self.tensor(getattr(self.teachers[name], f"{tower}_mean"))
            goal = self.stored[name][tower][i]
            goal = goal if self.wrong == "uncentred" else goal - mean
            head = inputs["heads"][name]["image" if self.wrong == "one head for both towers" else tower]
            said = inputs[tower][i] @ head["kernel"] + head["bias"]
            near = self.torch.nn.functional.smooth_l1_loss(said, goal if self.wrong == "long" else goal / goal.norm())
            cosine = 1 - said @ goal / (said.norm() * goal.norm())
            total = total + 0.5 * ((1 - self.smooth_l1) * cosine + self.smooth_l1 * near)
        return total

    def run(self, recipe, inputs, **given):
        """Value and gradients."""
        leaves, form = jax.tree.flatten(inputs)
        tensors = [self.tensor(x).requires_grad_() for x in leaves]
        value = getattr(self, recipe)(jax.tree.unflatten(form, tensors), **given)
        value.backward()
        grads = [self.torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
        return value.detach().numpy(), jax.tree.unflatten(form, [g.numpy() for g in grads])


@functools.cache
def seeded_map(name: str) -> np.ndarray:
    return np.asarray(targets.seeded_map(name, WIDTHS[name], EMBED))


def error(value, reference) -> float:
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    return np.max(np.abs(value - reference)) / max(np.max(np.abs(reference)), 1e-30)


def errors(recipe, wrong="", smooth_l1=0.0, **given) -> float:
    """The largest relative error of the loss and of each gradient."""
    batch, inputs = make_batch(), make_inputs(recipe)
    task = make_task(dataclasses.replace(RECIPES[recipe], smooth_l1=smooth_l1)) if smooth_l1 else usual(recipe)
    (value, _), grads = ours(task, batch, inputs)
    reference, expected = Reference(batch, wrong, smooth_l1).run(recipe, inputs, **given)
    found = [error(value, reference)]
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        other = expected
        for key in path:
            other = other[key.key]
        found.append(error(gradient, other))
    return max(found)


def drawn_by(task, batch, step=0) -> list[str | None]:
    """The teacher that a task draws for each sample."""
    present = {name: jnp.asarray(stored["present"]) for name, stored in batch["targets"].items()}
    draw = targets.draw_teacher(present, task.seed, jnp.int32(step))
    return [next((name for name in draw if draw[name][i] == 1), None) for i in range(N)]


def test_public_equals_torch():
    drawn = drawn_by(usual("public"), make_batch())
    assert drawn[8:] == ["gamma", "gamma", None, None]
    assert errors("public", drawn=drawn) <= TOLERANCE


@pytest.mark.parametrize(
    "wrong", ["scale exponentiated", "unit targets", "icl within a tower", "mean over samples only"]
)
def test_public_differs_from_what_is_wrong(wrong):
    drawn = drawn_by(usual("public"), make_batch())
    assert errors("public", wrong, drawn=drawn) > 100 * TOLERANCE


def test_public_differs_where_another_teacher_is_drawn():
    drawn = drawn_by(usual("public"), make_batch())
    drawn[0] = next(name for name in WIDTHS if name != drawn[0])
    assert errors("public", drawn=drawn) > 100 * TOLERANCE


def test_mean_equals_torch():
    assert errors("mean") <= TOLERANCE


@pytest.mark.parametrize(
    "wrong", ["scale not exponentiated", "mean over all teachers", "unit targets", "icl within a tower"]
)
def test_mean_differs_from_what_is_wrong(wrong):
    assert errors("mean", wrong) > 100 * TOLERANCE


def test_plus_equals_torch():
    assert errors("plus") <= TOLERANCE


@pytest.mark.parametrize(
    "wrong",
    [
        "uncentred",
        "affinity not masked",
        "diluted",
        "another modality",
        "weights not normalised",
        "one head for both towers",
        "one scale for all teachers",
    ],
)
def test_plus_differs_from_what_is_wrong(wrong):
    assert errors("plus", wrong) > 100 * TOLERANCE


def test_smooth_l1_takes_its_share_of_the_feature_loss():
    assert errors("plus", smooth_l1=0.5) <= TOLERANCE
    assert errors("plus", "long", smooth_l1=0.5) > 100 * TOLERANCE  # to targets not of unit norm


def test_reports_are_the_unweighted_parts():
    parts_of = {"public": ("feature", "icl"), "mean": ("feature", "icl"), "plus": ("feature", "affinity")}
    for recipe, parts in parts_of.items():
        switches = RECIPES[recipe]
        (value, reports), _ = ours(usual(recipe), make_batch(), make_inputs(recipe))
        weighted = sum(getattr(switches, f"{part}_weight") * reports[f"loss/{part}"] for part in parts)
        np.testing.assert_allclose(value, reports["loss/task"] + weighted, rtol=1e-6)
        assert set(reports) == {"loss/task", "logit_scale", *(f"loss/{part}" for part in parts)}


# --- switches ------------------------------------------------------------------------------------------------------


def test_of_all_teachers_the_hardest_alone_is_heard_where_all_others_are_dropped():
    """The feature loss: the largest distance among each sample's believed teachers, mean over samples with one."""
    changes = {"affinity_weight": 0.0, "task_weight": 0.0, "teacher_drop": 1.0}
    task = make_task(dataclasses.replace(RECIPES["plus"], **changes))
    batch, inputs = make_batch(), make_inputs("plus")
    (value, _), _ = ours(task, batch, inputs)
    reference = Reference(batch)
    tensors = jax.tree.map(reference.tensor, inputs)
    hardest, easiest = [], []
    for i in range(N):
        distances = [float(reference.own_space(tensors, n, i)) for n, w in reference.weights(i).items() if w > 0]
        if distances:
            hardest.append(max(distances))
            easiest.append(min(distances))
    np.testing.assert_allclose(value, np.mean(hardest), rtol=1e-5)
    assert abs(np.mean(easiest) / np.mean(hardest) - 1) > 1e-3


def test_dropping_is_random_keyed_by_name_and_keeps_the_sum():
    n, rate = 4000, 0.3
    weights = {"alpha": jnp.full(n, 0.5), "beta": jnp.full(n, 0.25), "gamma": jnp.where(jnp.arange(n) < 100, 0.0, 0.25)}
    losses = {"alpha": jnp.full(n, 0.1), "beta": jnp.full(n, 0.2), "gamma": jnp.full(n, 0.3)}
    drop = jax.jit(targets.drop_teachers, static_argnums=(2, 3))
    found = {name: np.asarray(x) for name, x in drop(weights, losses, rate, 0, 5).items()}
    np.testing.assert_allclose(sum(found.values()), sum(weights.values()), rtol=1e-6)
    assert (found["gamma"][100:] > 0).all()  # the hardest
    assert (found["beta"][:100] > 0).all()  # where the hardest has no weight
    assert not found["gamma"][:100].any()
    for name in ("alpha", "beta"):
        assert abs((found[name][100:] == 0).mean() - rate) < 4.5 * math.sqrt(rate * (1 - rate) / n)
    both = (found["alpha"][100:] == 0) & (found["beta"][100:] == 0)
    assert abs(both.mean() - rate**2) < 0.03  # independent
    other = drop(weights, losses, rate, 0, 6)
    assert np.mean((found["alpha"] == 0) == (np.asarray(other["alpha"]) == 0)) < 0.9
    fewer = drop({name: weights[name] for name in ("alpha", "gamma")}, losses, rate, 0, 5)
    np.testing.assert_array_equal(found["alpha"][100:] == 0, np.asarray(fewer["alpha"])[100:] == 0)
    for name, x in drop(weights, losses, 0.0, 0, 5).items():
        np.testing.assert_allclose(x, weights[name], rtol=1e-6)


def test_masked_feature_distillation_regresses_from_the_masked_picture_alone():
    task, plain = (make_task(distill.Recipe(target="mean", mask=mask)) for mask in (0.75, 0.0))
    batch, inputs = make_batch(), make_inputs("public")
    masked = unit(np.random.default_rng(3).normal(size=(N, EMBED)))
    params = {"logit_scale": inputs["logit_scale"]}

    @jax.jit
    def reports():
        def of(task, image, masked=None):
            return task.objective(params, Features(image, inputs["text"], masked), batch, np.int32(0))[1]

        return of(task, inputs["image"], masked), of(plain, inputs["image"]), of(plain, masked)

    found, whole, other = reports()
    assert found["loss/feature"] == other["loss/feature"] != whole["loss/feature"]
    assert found["loss/icl"] == whole["loss/icl"] != other["loss/icl"]
    assert found["loss/task"] == whole["loss/task"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher_drop": 0.5}, "recipe teacher_drop has no meaning for target random"),
        ({"target": "heads", "teacher_drop": 1.5}, "recipe teacher_drop is 1.5"),
        ({"smooth_l1": 0.5}, "recipe smooth_l1 has no meaning for target random"),
        ({"target": "heads", "smooth_l1": -0.5}, "recipe smooth_l1 is -0.5, not a share"),
        ({"target": "heads", "mask": 0.5}, "recipe mask has no meaning for target heads"),
        ({"mask": 1.0}, "the share of patches to drop is 1.0"),
    ],
)
def test_switches_that_say_nothing_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        make_task(distill.Recipe(**changes))


# --- maps ----------------------------------------------------------------------------------------------------------


def test_projected_features_are_taken_as_they_are():
    """A student that is its own target has no feature loss; a width that is not the student's is refused."""
    batch, inputs = make_batch(), make_inputs("mean")
    student = {tower: inputs[tower] for tower in ("image", "text")}
    batch["targets"] = {"alpha": {**student, "present": np.ones(N, bool)}}
    teacher = dataclasses.replace(make_teacher("alpha"), width=EMBED, space="projected")
    spec = make_task(RECIPES["mean"]).model.spec
    task = distill.DistillTask(spec, [teacher], RECIPES["mean"], ROUTING[:, :1], seed=0)
    (_, reports), _ = ours(task, batch, inputs)
    assert reports["loss/feature"] == 0
    narrow = dataclasses.replace(teacher, width=EMBED - 1)
    with pytest.raises(InputError, match=r"projected features of alpha are 15 wide, the student 16"):
        distill.DistillTask(spec, [narrow], RECIPES["mean"], ROUTING[:, :1], seed=0)


def fitted(name: str, kind: str, matrix: np.ndarray, shift=(0.0, 0.0)) -> maps.TargetMap:
    towers = ("image", "text")
    shifts = {tower: np.broadcast_to(np.float32(x), (len(matrix),)) for tower, x in zip(towers, shift)}
    offset = dict.fromkeys(towers, np.zeros(matrix.shape[1], np.float32))
    return maps.TargetMap(kind, name, "", kind == "centre", shifts, dict.fromkeys(towers, np.float32(matrix)), offset)


@pytest.mark.parametrize("recipe", ["public", "mean"])
def test_a_fitted_map_takes_the_place_of_the_fixed_one(recipe):
    """The same matrix as a fitted map gives the same loss, another one another; a wrong width is refused."""
    spec = usual(recipe).model.spec
    (expected, _), _ = ours(usual(recipe), make_batch(), make_inputs(recipe))
    for factor in (1.0, 1.1):
        teachers = [
            dataclasses.replace(make_teacher(n), map=fitted(n, "autoencoder", factor * seeded_map(n))) for n in WIDTHS
        ]
        task = distill.DistillTask(spec, teachers, RECIPES[recipe], ROUTING, seed=0)
        (value, _), _ = ours(task, make_batch(), make_inputs(recipe))
        assert np.allclose(value, expected, rtol=1e-6) == (factor == 1.0)
    narrow = dataclasses.replace(make_teacher("alpha"), map=fitted("alpha", "identity", np.eye(WIDTHS["alpha"])))
    with pytest.raises(InputError, match=f"targets of alpha are {WIDTHS['alpha']} wide, the student {EMBED}"):
        distill.DistillTask(spec, [narrow], RECIPES[recipe], ROUTING[:, :1], seed=0)


def test_centring_by_a_fitted_map_is_centring_by_the_recipe():
    spec, (expected, _) = usual("plus").model.spec, ours(usual("plus"), make_batch(), make_inputs("plus"))[0]
    values = []
    for used in (True, False):
        teachers = []
        for name in WIDTHS:
            one = make_teacher(name)
            shift = (one.image_mean, one.text_mean) if used else (0.0, 0.0)
            teachers.append(dataclasses.replace(one, map=fitted(name, "centre", np.eye(WIDTHS[name]), shift)))
        task = distill.DistillTask(spec, teachers, RECIPES["plus"], ROUTING, seed=0)
        values.append(ours(task, make_batch(), make_inputs("plus"))[0][0])
    np.testing.assert_allclose(values[0], expected, rtol=1e-6)
    assert abs(values[1] - expected) > 1e-3


def test_maps_keep_lengths_and_differ_by_name():
    fixed = {name: np.asarray(targets.seeded_map(name, 512, 512)) for name in ("alpha", "beta")}
    x = np.random.default_rng(0).normal(size=(64, 512))
    lengths = np.linalg.norm(x @ fixed["alpha"], axis=1) / np.linalg.norm(x, axis=1)
    assert abs(lengths.mean() - 1) < 0.02
    cosines = np.sum(unit(x @ fixed["alpha"]) * unit(x @ fixed["beta"]), axis=1)
    assert np.abs(cosines).max() < 0.25
    np.testing.assert_array_equal(fixed["alpha"], targets.seeded_map("alpha", 512, 512))


# --- rows and teachers without weight ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_row_without_a_teacher_contributes_nothing_but_its_pair(recipe):
    """Whatever stands in its place in the store; and no gradient but the task loss's reaches it."""
    task, batch, inputs = usual(recipe), make_batch(), make_inputs(recipe)
    before = ours(task, batch, inputs)
    for stored in batch["targets"].values():
        for tower in ("image", "text"):
            stored[tower] = np.where(stored["present"][:, None], stored[tower], 7.0).astype(np.float32)
    after = ours(task, batch, inputs)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    no_task = make_task(dataclasses.replace(RECIPES[recipe], task_weight=0.0))
    _, grads = ours(no_task, batch, inputs)
    for tower in ("image", "text"):
        moved = np.abs(grads[tower]).max(axis=1) > 0
        # The affinity and the interactive loss have columns only of rows with a teacher.
        assert moved.tolist() == [True] * 10 + [False] * 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_batch_without_any_teacher_leaves_the_task_loss(recipe):
    batch, inputs = make_batch(), make_inputs(recipe)
    for stored in batch["targets"].values():
        stored["present"][:] = False
    (value, reports), grads = ours(usual(recipe), batch, inputs)
    assert value == reports["loss/task"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_a_teacher_of_no_weight_changes_nothing():
    """Neither loss nor gradients of the student, bit for bit; the task has no heads for it."""
    routing = ROUTING.copy()
    routing[:, 1] = 0.0
    two = ("alpha", "gamma")
    with_beta = make_task(RECIPES["plus"], routing=routing)
    without = make_task(RECIPES["plus"], two, routing=ROUTING[:, [0, 2]])
    (loss, _), grads = ours(with_beta, make_batch(), make_inputs("plus"))
    (expected, _), others = ours(without, make_batch(two), make_inputs("plus", two))
    assert loss == expected
    for name in ("image", "text", "logit_scale"):
        np.testing.assert_array_equal(grads[name], others[name])
    assert set(jax.eval_shape(with_beta.init, jax.random.key(0))[0]["heads"]) == set(two)
    (different, _), _ = ours(usual("plus"), make_batch(), make_inputs("plus"))
    assert abs(different / loss - 1) > 1e-3  # a weight would be seen
    with pytest.raises(InputError, match="stage 2 has no teacher"):
        make_task(RECIPES["plus"], routing=np.zeros_like(ROUTING))


def test_heads_start_the_same_whoever_else_is_there():
    all_three, _ = make_task(RECIPES["plus"]).init(jax.random.key(0))
    alone, _ = make_task(RECIPES["plus"], ("beta",), routing=ROUTING[:, :1]).init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, all_three["heads"]["beta"], alone["heads"]["beta"])
    other, _ = make_task(RECIPES["plus"], ("beta",), routing=ROUTING[:, :1]).init(jax.random.key(1))
    assert np.abs(other["heads"]["beta"]["image"]["kernel"] - alone["heads"]["beta"]["image"]["kernel"]).max() > 0.01


# --- the draw ------------------------------------------------------------------------------------------------------


def draws(present, seed=0, steps=1, start=0):
    """Drawn teachers, one-hot `[steps, n]` by name."""
    many = jax.vmap(lambda step: targets.draw_teacher(present, seed, step))(jnp.arange(start, start + steps))
    return {name: np.asarray(values) for name, values in many.items()}


def test_the_draw_is_uniform_among_those_present():
    steps, n = 200, 300
    kinds = np.arange(n) % 4  # all three present; alpha and beta; gamma alone; none
    present = {
        "alpha": jnp.asarray(np.isin(kinds, (0, 1))),
        "beta": jnp.asarray(np.isin(kinds, (0, 1))),
        "gamma": jnp.asarray(np.isin(kinds, (0, 2))),
    }
    found = draws(present, steps=steps)
    expected = {0: (1 / 3, 1 / 3, 1 / 3), 1: (1 / 2, 1 / 2, 0), 2: (0, 0, 1), 3: (0, 0, 0)}
    count = steps * n / 4
    for kind, chances in expected.items():
        for name, chance in zip(sorted(present), chances, strict=True):
            share = found[name][:, kinds == kind].mean()
            assert abs(share - chance) <= 4.5 * math.sqrt(chance * (1 - chance) / count), (kind, name, share)
    total = sum(found.values())
    np.testing.assert_array_equal(total, np.broadcast_to(kinds != 3, total.shape))  # exactly one, or none


def test_the_draw_is_fresh_at_each_step_for_each_sample_and_seed():
    present = {name: jnp.ones(600, bool) for name in WIDTHS}
    found = draws(present, steps=40)
    winner = np.argmax(np.stack([found[name] for name in sorted(found)]), axis=0)
    assert abs(np.mean(winner[1:] == winner[:-1]) - 1 / 3) < 0.02  # steps are independent
    assert abs(np.mean(winner[:, 1:] == winner[:, :-1]) - 1 / 3) < 0.02  # and samples
    other = draws(present, seed=1, steps=40)
    assert abs(np.mean(sum(found[n] * other[n] for n in found)) - 1 / 3) < 0.02  # and seeds
    again = draws(present, steps=1, start=7)
    for name in found:
        np.testing.assert_array_equal(again[name][0], found[name][7])  # a function of the step alone


def test_taking_a_teacher_away_changes_the_draw_only_where_it_had_won():
    present = {name: jnp.ones(500, bool) for name in WIDTHS}
    whole, fewer = draws(present, steps=5), draws({n: present[n] for n in ("alpha", "gamma")}, steps=5)
    lost = whole["beta"] == 1
    assert 0.2 < lost.mean() < 0.5
    for name in ("alpha", "gamma"):
        np.testing.assert_array_equal(fewer[name][~lost], whole[name][~lost])
    assert abs(fewer["alpha"][lost].mean() - 0.5) < 0.1
    # The same where it is absent for some samples only.
    some = {**present, "beta": jnp.arange(500) % 2 == 0}
    partly = draws(some, steps=5)
    kept = (np.arange(500) % 2 == 0)[None] | ~lost
    for name in present:
        np.testing.assert_array_equal(partly[name][kept], whole[name][kept])


def every_draw() -> dict[str, np.ndarray]:
    """All ways to draw one present teacher for each sample: one-hot float32 `[draws, N]` by name."""
    names = sorted(WIDTHS)
    choices = [[name for name in names if PRESENT[name][i]] or [None] for i in range(N)]
    draws = list(itertools.product(*choices))
    assert len(draws) == len(set(draws)) == math.prod(map(len, choices)) == 144
    return {name: np.array([[one == name for one in draw] for draw in draws], np.float32) for name in names}


def gradient_of(task, batch, inputs):
    """The gradient by the student's features as a function of the step."""

    def gradient(step):
        def loss(features):
            return task.objective({"logit_scale": inputs["logit_scale"]}, features, batch, step)[0]

        return jax.grad(loss)(Features(jnp.asarray(inputs["image"]), jnp.asarray(inputs["text"])))

    return gradient


@pytest.mark.parametrize(("icl_weight", "equal"), [(0.0, True), (1.0, False)])
def test_the_average_feature_gradient_of_public_over_all_draws_is_that_of_mean(monkeypatch, icl_weight, equal):
    """For the feature loss alone; with the interactive loss, which is not linear in the target, it is not."""
    batch, inputs, draws = make_batch(), make_inputs("public"), every_draw()
    weights = {"task_weight": 0.0, "icl_weight": icl_weight}
    wanted = jax.jit(gradient_of(make_task(distill.Recipe(target="mean", **weights)), batch, inputs))(jnp.int32(0))
    monkeypatch.setattr(targets, "draw_teacher", lambda present, seed, step: {n: draws[n][step] for n in present})
    draws = jax.tree.map(jnp.asarray, draws)
    random = gradient_of(make_task(distill.Recipe(target="random", **weights)), batch, inputs)
    many = jax.jit(jax.vmap(random))(jnp.arange(144))
    for of_draws, of_mean in zip(many[:2], wanted[:2], strict=True):
        found = error(np.asarray(of_draws, np.float64).mean(axis=0), of_mean)
        assert found <= 1e-5 if equal else found > 1e-3
        assert error(of_draws[0], of_mean) > 0.1  # one draw is another matter
        assert error(np.asarray(of_draws[:72], np.float64).mean(axis=0), of_mean) > 0.01  # and so is half of them


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_product_of_an_objective_is_at_highest_precision(recipe):
    """Targets' maps, heads and similarities, forwards and backwards, of the nested widths too."""
    task = make_task(dataclasses.replace(RECIPES[recipe], teacher_drop=0.5 * (recipe == "plus")))
    task.widths = (4, 8)

    def loss(inputs):
        params = {name: value for name, value in inputs.items() if name not in ("image", "text")}
        return task.objective(params, Features(inputs["image"], inputs["text"]), make_batch(), jnp.int32(0))[0]

    found = products(list(equations(jax.make_jaxpr(jax.value_and_grad(loss))(make_inputs(recipe)).jaxpr)))
    # Of the task: three widths, once forwards and twice backwards. Heads of three teachers and their own similarities
    # (the student's are the task's), or their maps and two interactive similarities, which have one live side.
    assert len(found) == 9 + (3 * 2 * 3 + 3 if recipe == "plus" else 3 * 2 + 2 * 2)
    assert set(found) == {(jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)}
