"""The global batch as a function of the step: no process, thread or restart changes it."""

import data_fixtures as toy
import numpy as np
import pytest

from mmkd_jax.data.batches import Batches
from mmkd_jax.data.pairs import PairsWriter
from mmkd_jax.data.rows import RowIndex
from mmkd_jax.data.views import ViewPolicy
from mmkd_jax.errors import InputError
from mmkd_jax.preprocess import decode


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return toy.make_pairs(tmp_path_factory.mktemp("batches") / "pairs")


@pytest.fixture(scope="module")
def features(pairs, tmp_path_factory):
    root = tmp_path_factory.mktemp("batches")
    return {
        "a": toy.make_features(root / "a", pairs, dtype="float32"),
        "b": toy.make_features(root / "b", pairs, seed=9, teacher="b", width=4, dtype="float32"),
    }


def make(pairs, **changes):
    arguments = {"batch": 8, "seed": 5, "policy": toy.POLICY, "image_size": 8, "tokenizer": toy.CharTokenizer()}
    return Batches(pairs, **{**arguments, "block": 4, "window": 3, **changes})


def same(a, b):
    assert a.keys() == b.keys()
    for name in ("row", "visit", "image", "modality"):
        np.testing.assert_array_equal(a[name], b[name])
        assert a[name].dtype == b[name].dtype
    for x, y in zip(a["text"], b["text"]):
        np.testing.assert_array_equal(x, y)
    assert a["targets"].keys() == b["targets"].keys()
    for name, target in a["targets"].items():
        for field, value in target.items():
            np.testing.assert_array_equal(value, b["targets"][name][field])


def together(parts):
    """Slices of the processes, one after the other."""
    return {
        **{k: np.concatenate([p[k] for p in parts]) for k in ("row", "visit", "image", "modality")},
        "text": type(parts[0]["text"])(*(np.concatenate(x) for x in zip(*(p["text"] for p in parts)))),
        "targets": {
            name: {f: np.concatenate([p["targets"][name][f] for p in parts]) for f in target}
            for name, target in parts[0]["targets"].items()
        },
    }


def test_content(pairs):
    """Everything in a batch, made again from the parts."""
    batches = make(pairs, caption="first")
    for step in (0, 4, 5, 17):
        batch = batches.batch(step)
        assert batch["image"].shape == (8, 8, 8, 3)
        assert batch["image"].dtype == np.uint8
        assert batch["modality"].dtype == np.int32
        assert batch["targets"] == {}
        for i, (row, visit) in enumerate(zip(batch["row"], batch["visit"])):
            pair = pairs.read(int(row))
            expected = toy.POLICY.render(decode(pair.image), pair.id, int(visit), 8)
            np.testing.assert_array_equal(batch["image"][i], expected)
            assert pairs.modalities[batch["modality"][i]] == pair.modality
            np.testing.assert_array_equal(batch["text"].ids[i], toy.CharTokenizer()(pair.captions[:1]).ids[0])
        assert batches.ids(step) == [pairs.read(int(r)).id for r in batch["row"]]


def test_every_epoch_takes_every_row_once(pairs):
    batches = make(pairs)
    rows, visits = (np.concatenate([batches.batch(s)[k] for s in range(10)]) for k in ("row", "visit"))
    for epoch in range(2):
        assert sorted(rows[epoch * 40 : (epoch + 1) * 40]) == list(range(40))
    np.testing.assert_array_equal(visits, np.repeat([0, 1], 40))


def test_visits_show_other_views(pairs):
    batches = make(pairs)
    seen = {}
    for step in range(15):
        batch = batches.batch(step)
        for row, image in zip(batch["row"], batch["image"]):
            seen.setdefault(int(row), set()).add(image.tobytes())
    assert np.mean([len(images) for images in seen.values()]) > 2.5  # of 3 visits


def test_a_batch_is_a_pure_function_of_the_step(pairs, features):
    first, second = make(pairs, features=features, caption="random"), make(pairs, features=features, caption="random")
    later = [first.batch(s) for s in range(12)]
    for step in (11, 3, 7, 3):
        same(second.batch(step), later[step])
    assert any(not np.array_equal(make(pairs, seed=6).batch(s)["row"], later[s]["row"]) for s in range(3))


@pytest.mark.parametrize("count", [2, 4, 8])
def test_processes_divide_the_batch(pairs, features, count):
    whole = make(pairs, features=features, caption="random")
    parts = [make(pairs, features=features, caption="random", process=(i, count)) for i in range(count)]
    for step in (0, 4, 9):
        same(together([p.batch(step) for p in parts]), whole.batch(step))
        assert parts[1].ids(step) == whole.ids(step)
    assert len(parts[0].batch(0)["row"]) == 8 // count


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_threads_and_restarts_change_nothing(pairs, features, threads):
    batches = make(pairs, features=features, caption="random")
    for start, stop in ((0, 7), (5, 12), (11, 11)):
        got = list(batches.iterate(start, stop, threads=threads))
        assert [step for step, _ in got] == list(range(start, stop))
        for step, batch in got:
            same(batch, make(pairs, features=features, caption="random").batch(step))


def test_leaving_the_iterator_early(pairs):
    seen = []
    for step, _batch in make(pairs).iterate(0, 1000, threads=2):
        seen.append(step)
        break
    iterator = make(pairs).iterate(0, 1000)
    seen.append(next(iterator)[0])
    iterator.close()
    assert seen == [0, 0]
    assert next(iterator, None) is None  # closed, with nothing left behind to wait for


def test_row_index(pairs):
    index = RowIndex(np.array([3, 9, 30]), pairs.hash, "few")
    batches = make(pairs, rows=index, batch=6)
    assert sorted(batches.batch(0)["row"]) == [3, 3, 9, 9, 30, 30]
    assert batches.size == 3
    with pytest.raises(InputError, match="is for the set"):
        make(pairs, rows=RowIndex(np.array([3]), "other", "few"))
    with pytest.raises(InputError, match="is empty"):
        make(pairs, rows=RowIndex(np.array([], np.int64), pairs.hash, "none"))


def test_captions(pairs):
    """A random caption is one of the pair's, another one on other visits, and all are taken."""
    batches = make(pairs, caption="random")
    tokenise, taken = toy.CharTokenizer(), {}
    for step in range(60):
        batch = batches.batch(step)
        for row, ids in zip(batch["row"], batch["text"].ids):
            known = [i.tobytes() for i in tokenise(pairs.read(int(row)).captions).ids]
            taken.setdefault(int(row), []).append(known.index(ids.tobytes()))
    for row, choices in taken.items():
        if len(pairs.read(row).captions) > 1:
            assert len(set(choices)) > 1
    counts = np.bincount([c for row, choices in taken.items() if row % 3 == 2 for c in choices], minlength=3)
    assert counts.min() > 0.7 * counts.mean()


def test_captions_are_tokenised_once(pairs):
    tokenizer = toy.CharTokenizer()
    batches = make(pairs, tokenizer=tokenizer)
    for step in range(20):
        batches.batch(step)
    assert tokenizer.calls == 40


def test_targets_belong_to_the_view_and_caption_that_are_shown(pairs, features):
    batches = make(pairs, features=features, caption="random")
    image, text = toy.feature_values(pairs, 6, 2)
    shown = set()
    for step in range(12):
        batch = batches.batch(step)
        target = batch["targets"]["a"]
        assert set(batch["targets"]) == {"a", "b"}
        assert batch["targets"]["b"]["image"].shape == (8, 4)
        for i, row in enumerate(map(int, batch["row"])):
            pair = pairs.read(row)
            assert target["present"][i] == (not toy.absent(40)[row])
            if not target["present"][i]:
                assert not target["image"][i].any()
                continue
            (view,) = (k for k in range(2) if np.array_equal(image[row, k], target["image"][i]))
            shown.add((row, view))
            np.testing.assert_array_equal(batch["image"][i], toy.POLICY.render(decode(pair.image), pair.id, view, 8))
            (caption,) = (c for c in range(len(pair.captions)) if np.array_equal(text[row][c], target["text"][i]))
            ids = toy.CharTokenizer()([pair.captions[caption]]).ids[0]
            np.testing.assert_array_equal(batch["text"].ids[i], ids)
    assert len(shown) == 2 * int((~toy.absent(40)).sum())  # two epochs go through both views of every row


def test_features_of_another_policy_or_number_of_views(pairs, features, tmp_path):
    with pytest.raises(InputError, match="'a' have the view policy"):
        make(pairs, features=features, policy=ViewPolicy(seed=99))
    one = toy.make_features(tmp_path / "c", pairs, views=1)
    with pytest.raises(InputError, match=r"different numbers of views \(\{'a': 2, 'c': 1\}\)"):
        make(pairs, features={"a": features["a"], "c": one})


def test_order_of_the_teachers_does_not_matter(pairs, features):
    turned = dict(reversed(features.items()))
    same(make(pairs, features=turned).batch(3), make(pairs, features=features).batch(3))
    alone = make(pairs, features={"b": features["b"]}).batch(3)
    np.testing.assert_array_equal(
        alone["targets"]["b"]["image"], make(pairs, features=features).batch(3)["targets"]["b"]["image"]
    )


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_damaged_record_surfaces_with_its_own_words(pairs, tmp_path, threads):
    damaged = toy.make_pairs(tmp_path / "p")
    file = damaged.path / damaged.manifest["shards"][1]["file"]
    data = bytearray(file.read_bytes())
    data[60] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError) as caught:
        list(make(damaged).iterate(0, 5, threads=threads))
    assert type(caught.value) is InputError
    assert str(caught.value).startswith(f"{file}: record 0 fails its checksum")
    assert "\n" not in str(caught.value)


def test_an_unreadable_picture_and_a_missing_caption_name_the_pair(tmp_path):
    for name, change, message in (
        ("picture", {"image": b"no picture"}, "not a readable picture"),
        ("caption", {"captions": []}, "has no caption"),
    ):
        pair = toy.pair(0)
        vars(pair).update(change)
        with PairsWriter(tmp_path / name) as writer:
            writer.add(pair)
            spoilt = writer.finish()
        with pytest.raises(InputError, match=f"{pair.id}.*{message}"):
            list(make(spoilt, batch=1).iterate(0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch of 0"),
        ({"batch": 9, "process": (0, 2)}, "cannot be divided among 2"),
        ({"caption": "last"}, "caption 'last'"),
        ({"block": 0}, "at least one row"),
    ],
)
def test_wrong_arguments(pairs, change, message):
    with pytest.raises(InputError, match=message):
        make(pairs, **change)


def test_identity(pairs, features):
    """Whatever changes a batch changes the identity; processes and threads do not."""
    base = make(pairs, features=features)
    index = RowIndex(np.arange(20), pairs.hash, "half")
    others = [
        make(pairs, features={"a": features["a"]}),
        make(pairs, features=features, rows=index),
        make(pairs, features=features, seed=6),
        make(pairs, features=features, batch=4),
        make(pairs, features=features, caption="random"),
        make(pairs, policy=ViewPolicy()),
        make(pairs, features=features, block=5),
    ]
    assert all(other.identity != base.identity for other in others)
    assert make(pairs, features=features, process=(1, 2)).identity == base.identity
    import json

    assert json.loads(json.dumps(base.identity)) == base.identity
