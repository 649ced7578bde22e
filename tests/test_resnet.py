"""ResNet towers agree with open_clip's and timm's, under the names of PMC-CLIP's and MedCLIP's files."""

import dataclasses

import jax
import jax.numpy as jnp
import model_references as ref
import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from open_clip.modified_resnet import ModifiedResNet
from timm.models.resnet import Bottleneck
from timm.models.resnet import ResNet as TimmResNet

from mmkd_jax.errors import InputError
from mmkd_jax.models import state_dict
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.specs import ModelSpec, Preprocess, ResNetTower
from mmkd_jax.train import optim

pytestmark = pytest.mark.usefixtures("quick_compilation")
LAYOUTS = {"modified_resnet": "pmc_clip", "resnet": "medclip"}
OPTIMIZER = ConfigDict(
    {"lr": 1e-3, "warmup": 1, "beta1": 0.9, "beta2": 0.98, "epsilon": 1e-6, "decay": 0.2, "clip": 0.0}
)
HEADS = {"modified_resnet": "visual.", "resnet": "vision_model.model."}


def small(kind: str) -> ResNetTower:
    """Stages of one, two and three blocks; three by three cells at the end. timm's plain stem has 64 channels."""
    if kind == "resnet":
        return ResNetTower("resnet", 64, (2, 1, 3, 1), 0, 96)
    return ResNetTower("modified_resnet", 12, (2, 1, 3, 1), 8, 96)


def full(kind: str) -> ResNetTower:
    """ResNet-50 at 224 px."""
    return ResNetTower(kind, heads=32 if kind == "modified_resnet" else 0)


def spec_of(tower: ResNetTower) -> ModelSpec:
    text = ref.bert_tower(projection="linear")
    return ModelSpec(name="small", image=tower, text=text, embed=ref.EMBED, preprocess=Preprocess(tower.image_size))


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """As `model_references.randomise`, BatchNorm statistics too; queries and keys large enough to tell heads apart."""
    generator = torch.Generator().manual_seed(seed)
    ref.randomise(model, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.copy_(0.7 + 0.6 * torch.rand(module.weight.shape, generator=generator))
                module.running_mean.copy_(0.3 * torch.randn(module.running_mean.shape, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
        for name, value in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                value.mul_(2.0)
    return model.eval()


def reference(tower: ResNetTower) -> torch.nn.Module:
    if tower.kind == "modified_resnet":
        model = ModifiedResNet(tower.stages, ref.EMBED, tower.heads, tower.image_size, tower.width)
    else:
        model = TimmResNet(Bottleneck, tower.stages)
        model.fc = torch.nn.Linear(tower.features, ref.EMBED, bias=False)
    return randomise(model)


def published(spec: ModelSpec, model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The image tower's tensors with a text tower beside them, as the published files name them."""
    layout = LAYOUTS[spec.image.kind]
    shapes = jax.tree.map(lambda s: np.full(s.shape, 0.5, np.float32), DualEncoder(spec).shapes())
    text = {
        key: value
        for key, value in state_dict.from_params(spec, shapes, layout).items()
        if key.startswith("text") or key == "logit_scale"
    }
    return text | {HEADS[spec.image.kind] + key: value for key, value in ref.tensors(model).items()}


def features(spec: ModelSpec, params, images) -> jax.Array:
    return jax.jit(DualEncoder(spec).encode_image)(params, images)


@pytest.fixture(scope="module", params=["modified_resnet", "resnet"])
def case(request):
    """Spec, published tensors, pictures, and the reference's features of them."""
    spec = spec_of(small(request.param))
    model = reference(spec.image)
    images = ref.pictures(spec)
    with torch.no_grad():
        return spec, published(spec, model), images, model(ref.torch_images(images)).numpy()


def error(spec, tensors, images, wanted):
    return ref.relative_error(features(spec, state_dict.to_params(spec, tensors), images), wanted)


def changed(spec, **values):
    return dataclasses.replace(spec, image=dataclasses.replace(spec.image, **values))


def test_features_agree(case):
    assert error(*case) <= ref.TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize("kind", ["modified_resnet", "resnet"])
def test_full_size_features_agree(kind):
    spec = spec_of(full(kind))
    model = reference(spec.image)
    images = ref.pictures(spec, 2)
    with torch.no_grad():
        wanted = model(ref.torch_images(images)).numpy()
    assert error(spec, published(spec, model), images, wanted) <= ref.TOLERANCE


def test_a_wrong_epsilon_is_caught(case):
    spec, *rest = case
    assert error(changed(spec, norm_epsilon=1e-3), *rest) > 2 * ref.TOLERANCE


def test_other_heads_are_caught(case):
    spec, *rest = case
    if spec.image.kind == "modified_resnet":
        assert error(changed(spec, heads=32), *rest) > 100 * ref.TOLERANCE
    else:
        with pytest.raises(InputError, match="has no heads, not 8"):
            changed(spec, heads=8)


@pytest.mark.parametrize(
    ("fault", "patch"),
    [
        ("average_pool", lambda x: x[:, ::2, ::2]),
        ("max_pool", lambda x: jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")),
    ],
)
def test_another_pooling_between_stages_is_caught(case, monkeypatch, fault, patch):
    spec, *rest = case
    if (fault == "average_pool") != (spec.image.kind == "modified_resnet"):
        pytest.skip("the other kind pools so")
    monkeypatch.setattr(f"mmkd_jax.models.resnet.{fault}", patch)
    assert error(spec, *rest) > 100 * ref.TOLERANCE


def test_an_average_instead_of_attention_is_caught(case, monkeypatch):
    spec, *rest = case
    if spec.image.kind == "resnet":
        pytest.skip("it has no attention pool")
    monkeypatch.setattr("mmkd_jax.models.resnet.AttentionPool.__call__", lambda self, x: x.mean((1, 2)))
    assert error(spec, *rest) > 100 * ref.TOLERANCE


@pytest.mark.parametrize("statistic", ["mean", "variance"])
def test_forgotten_statistics_are_caught(case, statistic):
    spec, tensors, images, wanted = case
    params = state_dict.to_params(spec, tensors)
    stem = params["image"]["stem"]
    norm = stem["first"]["norm"] if spec.image.kind == "modified_resnet" else stem["norm"]
    norm[statistic] = np.full_like(norm[statistic], statistic == "variance")
    assert ref.relative_error(features(spec, params, images), wanted) > 100 * ref.TOLERANCE


def test_weights_survive_the_way_there_and_back(case):
    spec, tensors, *_ = case
    layout = LAYOUTS[spec.image.kind]
    back = state_dict.from_params(spec, state_dict.to_params(spec, tensors), layout)
    theirs = {key: value for key, value in tensors.items() if value.dtype == np.float32}
    assert back.keys() == theirs.keys()
    assert all(np.array_equal(back[key], theirs[key]) for key in theirs)


def test_an_odd_number_of_rows_is_pooled_as_torch_does():
    from mmkd_jax.models.resnet import average_pool, max_pool

    x = np.random.default_rng(0).normal(size=(1, 7, 7, 2)).astype(np.float32)
    theirs = ref.torch_images(x)
    for ours, wanted in (
        (average_pool(x), torch.nn.functional.avg_pool2d(theirs, 2)),
        (max_pool(x), torch.nn.functional.max_pool2d(theirs, 3, 2, 1)),
    ):
        np.testing.assert_allclose(ours, wanted.numpy().transpose(0, 2, 3, 1), atol=1e-6)


def test_weights_that_do_not_fit_are_refused_by_name(case):
    spec, tensors, *_ = case
    name = f"{HEADS[spec.image.kind]}layer3.2.bn3.running_var"
    assert name in tensors
    with pytest.raises(InputError, match=f"missing {name}"):
        state_dict.to_params(spec, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(InputError, match=rf"{name} is \(3,\), not"):
        state_dict.to_params(spec, tensors | {name: np.ones(3, np.float32)})
    extra = name.replace("layer3.2", "layer3.3")
    with pytest.raises(InputError, match=f"left over {extra}"):
        state_dict.to_params(spec, tensors | {extra: tensors[name]})


def test_the_trainer_leaves_statistics_alone():
    spec = spec_of(ResNetTower("modified_resnet", 4, (1, 2), 4, 32))
    rng = np.random.default_rng(0)
    shapes = DualEncoder(spec).shapes()["image"]
    params = jax.tree.map(lambda s: rng.uniform(0.1, 0.5, s.shape).astype(np.float32), shapes)
    images = ref.pictures(spec)
    transform = optim.optimizer(OPTIMIZER, 10, lambda path: 1.0)

    def loss(image):
        return jnp.square(DualEncoder(spec).encode_image({"image": image}, images)).sum()

    @jax.jit
    def step(image):
        updates, _ = transform.update(jax.grad(loss)(image), transform.init(image), image)
        return updates

    updates = jax.tree_util.tree_leaves_with_path(step(params))
    moved = {optim.path_of(path): bool(np.any(update != 0)) for path, update in updates}
    statistics = {name for name in moved if name.endswith(("/mean", "/variance"))}
    assert len(statistics) == 2 * (3 + 2 * 4 + 3)
    assert not [name for name in statistics if moved[name]]
    assert sum(moved.values()) > 30
