"""Stored = live for a teacher of every family: the same views and captions, in any order of teachers."""

import data_fixtures as toy
import ml_dtypes
import model_references as ref  # noqa: F401  (skips where the reference libraries are missing)
import numpy as np
import published_teachers as published
import pytest
from PIL import Image

import teachers
from mmkd_jax import preprocess
from mmkd_jax.data.features import FeatureSet
from teachers import specs
from teachers.emit import emit

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_compilation")]
ROWS, VIEWS = 6, 2


@pytest.fixture(scope="module")
def world(tmp_path_factory, quick_compilation):
    """Pairs, a teacher of each family, and the folders of float32 and, in the other order, of bfloat16 features."""
    root = tmp_path_factory.mktemp("families")
    pairs = toy.make_pairs(root / "pairs", ROWS, shards=1)
    loaded = {}
    for family in published.FAMILIES:
        file = published.write(root / family, published.make(family))
        loaded[family] = teachers.load(published.record(family), file, micro_batch=4)
    emit(loaded, pairs, root / "float32", policy=toy.POLICY, views=VIEWS, dtype="float32")
    emit(dict(reversed(loaded.items())), pairs, root / "bfloat16", policy=toy.POLICY, views=VIEWS, dtype="bfloat16")
    return pairs, loaded, root


def test_every_family_of_the_records_is_here():
    """The towers that emission may meet: those of all records."""
    here = {kinds(spec) for _, spec in published.FAMILIES.values()}
    assert {kinds(specs.find(name).spec) for name in specs.TEACHERS} <= here


def kinds(spec):
    return spec.image.layout, spec.image.kind, spec.text.kind, spec.text.pooling


@pytest.mark.parametrize("family", published.FAMILIES)
def test_stored_is_live(world, family):
    pairs, loaded, root = world
    teacher = loaded[family]
    stored = {dtype: FeatureSet.open(root / dtype / family, pairs) for dtype in ("float32", "bfloat16")}
    assert {one.manifest["backend"] for one in stored.values()} == {teacher.backend}
    before = None
    for view in range(VIEWS):
        image = live_images(teacher, pairs, view)
        text = unit(teacher.encode_text(teacher.tokenize([pair.captions[-1] for pair in everything(pairs)])))
        last = pairs.table["captions"] - 1
        found = {dtype: one.read(np.arange(ROWS), np.full(ROWS, view), last) for dtype, one in stored.items()}
        for tower, wanted in (("image", image), ("text", text)):
            np.testing.assert_array_equal(found["float32"][tower], wanted)
            rounded = wanted.astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(found["bfloat16"][tower], rounded)
        if before is not None:  # another view, another row and another caption would be seen
            assert np.abs(before - image).max() > 1e-5
        assert np.abs(image[0] - image[1]).max() > 1e-5
        assert np.abs(text[0] - text[1]).max() > 1e-5
        before = image


def everything(pairs):
    return pairs.read_many(range(ROWS))


def live_images(teacher, pairs, view):
    """Each picture of its own call."""
    found = []
    for pair in everything(pairs):
        pixels = toy.POLICY.render(preprocess.decode(pair.image), pair.id, view, teacher.spec.preprocess.size)
        found.append(teacher.encode_image(teacher.preprocess(Image.fromarray(pixels))[None])[0])
    return unit(np.stack(found))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)
