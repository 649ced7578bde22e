"""The cross-attention head: torch on the same weights, what it may not depend on, and its training on small towers."""

import dataclasses

import jax
import numpy as np
import pytest
from test_vqa import Asked, Sees, run, shuffled

from mmkd_jax import api, tokenizers
from mmkd_jax.errors import InputError
from mmkd_jax.evals import base, vqa_fusion, vqa_training
from mmkd_jax.models import fusion
from mmkd_jax.models.dual_encoder import DualEncoder
from mmkd_jax.models.fusion import FusionSpec
from mmkd_jax.specs import ImageTower, ModelSpec, Preprocess, SwinTower, TextTower, TokenizerSpec
from mmkd_jax.train import metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")
HEAD = FusionSpec(patch_width=6, word_width=10, answers=5, width=8, heads=2, layers=1, dropout=0.0)
SPEC = ModelSpec(
    image=ImageTower(width=16, layers=1, heads=2, patch=8, image_size=16, mlp_width=32),
    text=TextTower(width=16, layers=1, heads=2, mlp_width=32, vocab_size=60, positions=16, context=16),
    embed=8,
    preprocess=Preprocess(size=16),
)


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype(np.float32), tree)


@pytest.fixture(scope="module")
def params():
    return random_like(jax.eval_shape(lambda: fusion.init(HEAD, jax.random.key(0))))


def inputs(n=3, patches=4, words=6):
    rng = np.random.default_rng(1)
    seen, said = rng.normal(size=(n, patches, 6)), rng.normal(size=(n, words, 10))
    mask = np.arange(words) < np.arange(2, 2 + n)[:, None]
    return seen.astype(np.float32), said.astype(np.float32), mask.astype(np.int32)


def test_equals_torch_on_the_same_weights(params):
    torch = pytest.importorskip("torch")
    seen, said, mask = inputs()
    found = fusion.apply(HEAD, params, seen, said, mask)
    t = jax.tree.map(lambda x: torch.tensor(np.array(x)), params)
    norm = lambda x, p: torch.nn.functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], 1e-6)  # noqa: E731
    line = lambda x, p: x @ p["kernel"].reshape(x.shape[-1], -1) + p["bias"].reshape(-1)  # noqa: E731
    words = line(norm(torch.tensor(said), t["word_norm"]), t["word"])
    patches = line(norm(torch.tensor(seen), t["patch_norm"]), t["patch"])
    block = t["block0"]
    q = line(norm(words, block["norm1"]), block["attention"]["query"]).reshape(3, -1, 2, 4).transpose(1, 2)
    both = line(patches, block["attention"]["key_value"]).reshape(3, -1, 2, 2, 4)
    k, v = both[:, :, 0].transpose(1, 2), both[:, :, 1].transpose(1, 2)
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, -1, 8)
    out = block["attention"]["out"]
    words = words + mixed @ out["kernel"].reshape(8, 8) + out["bias"]
    up = torch.nn.functional.gelu(line(norm(words, block["norm2"]), block["mlp"]["up"]))
    words = words + line(up, block["mlp"]["down"])
    there = torch.tensor(mask, dtype=torch.float32)[..., None]
    pooled = torch.cat([(words * there).sum(1) / there.sum(1), patches.mean(1)], 1)
    expected = line(norm(pooled, t["norm"]), t["answer"])
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-5)


def test_padding_and_the_order_of_patches_do_not_matter(params):
    seen, said, mask = inputs()
    found = fusion.apply(HEAD, params, seen, said, mask)
    other = np.where(mask[..., None] > 0, said, 7.0).astype(np.float32)
    np.testing.assert_allclose(fusion.apply(HEAD, params, seen[:, ::-1], other, mask), found, atol=1e-5)
    assert np.abs(fusion.apply(HEAD, params, seen + 1 * (seen > 0), said, mask) - found).max() > 1e-2


def test_dropout_needs_a_key(params):
    seen, said, mask = inputs()
    spec = dataclasses.replace(HEAD, dropout=0.5)
    plain = fusion.apply(spec, params, seen, said, mask)
    np.testing.assert_array_equal(plain, fusion.apply(HEAD, params, seen, said, mask))
    a, b, c = (fusion.apply(spec, params, seen, said, mask, jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-2


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(InputError, match="a width of 8 cannot be divided among 3 heads"):
        fusion.init(dataclasses.replace(HEAD, heads=3), jax.random.key(0))


def test_a_blind_head_is_given_no_picture(params):
    seen, said, mask = inputs()
    closed = np.zeros(3, bool)
    batch = {"patches": seen, "words": said, "mask": mask, "closed": closed}
    blind = vqa_training.FusionTask(HEAD, np.ones((2, 5), bool), blind=True)
    sees = vqa_training.FusionTask(HEAD, np.ones((2, 5), bool))
    whole = {"fusion": params}
    without = blind.scores(whole, {name: one for name, one in batch.items() if name != "patches"})
    np.testing.assert_array_equal(blind.scores(whole, batch), without)
    assert np.abs(sees.scores(whole, batch) - without).max() > 1e-2
    assert np.abs(blind.scores(whole, batch | {"words": said[::-1]}) - without).max() > 1e-2


def test_a_task_takes_its_settings_as_arguments():
    (head,) = base.find(["vqa_fusion:seeds=5,lr=0.01"]).values()
    assert head == dataclasses.replace(vqa_fusion.FROZEN, seeds=5, lr=0.01)
    assert list(base.find(["vqa_fusion:seeds=5", "zeroshot"])) == ["vqa_fusion", "zeroshot"]
    for wrong, message in (("vqa_fusion:seed=5", "did you mean 'seeds'"), ("zeroshot:seeds=5", "takes no arguments"),
                           ("vqa_fusion:seeds=few", "seeds")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            base.find([wrong])


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def student(quick_compilation):
    """A student of random weights: its towers see colours and words all the same."""
    words = ["is it red there any green the picture blue which colour"]
    tokenizer = tokenizers.train(TokenizerSpec("wordpiece"), words, vocab_size=60, context=16)
    spec = dataclasses.replace(SPEC, text=dataclasses.replace(SPEC.text, vocab_size=tokenizer.vocab_size))
    params = jax.tree.map(np.asarray, DualEncoder(spec).init(jax.random.key(0)))
    return api.Student("tiny", "nowhere", spec, params, tokenizer, {}, 16)


def small(**more):
    return vqa_fusion.Head(**{"epochs": 12, "batch": 32, "lr": 1e-2, "width": 16, "layers": 1, "seeds": 1, **more})


@pytest.fixture(scope="module")
def frozen(student, tmp_path_factory):
    """A trained head's rows, the pictures, and where it lies."""
    out, pairs = tmp_path_factory.mktemp("fusion"), Asked()
    return evaluated(small(), pairs, student, out), pairs, out


def evaluated(head, pairs, encoder, folder=None, seed=0):
    (one,) = base.sets_of(pairs)
    features = base.Features(encoder, pairs, 16)
    return head.evaluate(base.TaskData(one, features, 10.0, seed, 100, "embedding", folder))


def number(result, metric):
    return result.estimates[metric][0].value


@pytest.mark.full
def test_frozen_towers_are_enough_to_see_colours(frozen):
    result, _, out = frozen
    common = result.context["commonest_answer"]
    assert number(result, "closed_accuracy") > common["closed"] + 0.15
    assert number(result, "open_accuracy") > common["open"] + 0.3
    closed = result.predictions["closed"]
    assert set(result.predictions["answers"][closed]) <= {"yes", "no"}
    assert not set(result.predictions["answers"][~closed]) & {"yes", "no"}
    (folder,) = out.iterdir()
    losses = [line["loss"] for line in metrics.read(folder / "seed0")]
    assert losses[-1] < 0.7 * losses[0]
    assert number(result, "blind_accuracy") < max(number(result, "accuracy") - 0.2, 0.6)
    assert result.estimates["picture_gain"][0].interval()[0] > 0.1


@pytest.mark.full
def test_a_trained_head_is_not_trained_again(frozen, student, monkeypatch):
    result, pairs, out = frozen
    monkeypatch.setattr(vqa_training.QuestionBatches, "iterate", None)
    again = evaluated(small(), pairs, student, out)
    np.testing.assert_array_equal(again.predictions["answers"], result.predictions["answers"])
    np.testing.assert_array_equal(again.predictions["yes"], result.predictions["yes"])


@pytest.mark.full
def test_towers_are_trained_where_that_is_asked_for(student, tmp_path):
    pairs = Asked(train=40, test=20)
    result = evaluated(small(trained=True, epochs=30), pairs, student, tmp_path)
    assert result.context["profile"] == "cross_attention_unfrozen"
    assert number(result, "closed_accuracy") > result.context["commonest_answer"]["closed"] + 0.1
    assert number(result, "open_accuracy") > result.context["commonest_answer"]["open"] + 0.3
    folder = next(tmp_path.iterdir()) / "seed0"
    vocabulary = ("blue", "green", "no", "red", "yes")
    spec = FusionSpec(16, 16, len(vocabulary), 16, 4, 1, 0.1)
    task = vqa_training.FusionTask(spec, np.ones((2, 5), bool), DualEncoder(student.spec))
    like = jax.eval_shape(lambda: task.init(jax.random.key(0))[0])
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like)
    step = max(int(one.name) for one in (folder / "checkpoints").iterdir() if one.name.isdigit())
    learned = vqa_training.checkpoint.load_params(folder / "checkpoints" / str(step), like)
    for tower in ("image", "text"):
        moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), learned[tower], student.params[tower])
        assert sum(change > 0 for change in jax.tree.leaves(moved)) > len(jax.tree.leaves(moved)) / 2
        assert max(jax.tree.leaves(moved)) < 0.1  # from where they were, at a tenth of the head's rate


@pytest.mark.full
def test_shuffled_answers_leave_chance(student):
    result = evaluated(small(), shuffled(0), student)
    low, high = result.estimates["yes_no_auc"][0].interval()
    assert low <= 0.5 <= high
    assert result.estimates["picture_gain"][0].interval()[0] <= 0  # the picture adds nothing


@pytest.mark.full
def test_several_seeds_are_a_mean_and_share_what_is_done(frozen, student):
    """Heads of a seed that is there are not trained again; the interval covers questions and seeds."""
    one, pairs, out = frozen
    two = evaluated(small(seeds=2), pairs, student, out)
    (folder,) = out.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["seed0", "seed0-blind", "seed1", "seed1-blind"]
    said = two.predictions["answers_of_seeds"]
    np.testing.assert_array_equal(said[0], one.predictions["answers"])
    assert (said[0] != said[1]).any()
    right = (said == two.predictions["truth"]).mean(axis=1)
    assert number(two, "accuracy") == pytest.approx(right.mean())
    assert two.context["seeds"] == 2


def test_features_without_towers_are_refused():
    with pytest.raises(InputError, match="sees gives features only; cross-attention needs"):
        run(Asked(train=8, test=4), ["vqa_fusion"], Sees())


def test_towers_without_patches_are_refused(student):
    other = dataclasses.replace(student.spec, image=SwinTower(), preprocess=Preprocess())
    other = dataclasses.replace(student, spec=other)
    with pytest.raises(InputError, match="tiny: cross-attention needs patches, an image tower of kind vit"):
        evaluated(small(), Asked(train=8, test=4), other)
