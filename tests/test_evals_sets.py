"""The evaluators on sets on disk: a synthetic one, and real pictures whose pixel floors are known."""

import numpy as np
import pytest
from data_fixtures import make_pairs

from mmkd_jax.data import ingest
from mmkd_jax.data.sources import open_source
from mmkd_jax.evals import base


class Pixels:
    """16 x 16 pixels and a colour histogram; texts become noise that depends on their letters."""

    name, checkpoint, spec, logit_scale = "pixels", "", None, 1.0

    def encode_image(self, images, projected=True):
        return np.stack([self._image(image.convert("RGB")) for image in images])

    def encode_text(self, texts):
        noise = [np.random.default_rng([ord(letter) for letter in text]).standard_normal(792) for text in texts]
        return np.stack(noise).astype(np.float32)

    def _image(self, image):
        small = np.asarray(image.resize((16, 16)), np.float32).ravel() / 255
        histograms = [
            np.bincount(channel.ravel() >> 5, minlength=8) for channel in np.moveaxis(np.asarray(image), 2, 0)
        ]
        return np.concatenate([small, np.concatenate(histograms) / (image.width * image.height)]).astype(np.float32)


def value(rows, **wanted):
    (row,) = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
    return row["value"]


def test_run_on_a_set_on_disk(tmp_path):
    rows = {"toy.train": list(range(30)), "toy.test": list(range(30, 60)), "other.val": list(range(40, 60))}
    pairs = make_pairs(tmp_path / "pairs", 60, rows=rows)
    other, toy = base.sets_of(pairs)
    assert (toy.name, toy.class_names, toy.split_hash) == ("toy", ("cat", "dog"), pairs.rows("toy.test").hash)
    assert (other.name, other.captions) == ("other", True)
    found = base.run(Pixels(), pairs, [other, toy], tmp_path / "out", bootstrap=100)
    assert {row["task"] for row in found} == set(base.TASKS) - {"multilabel", "vqa", "vqa_zeroshot"}
    # groups of two hold both classes: drawn as a whole, without strata
    of_toy = next(row for row in found if row["task"] == "zeroshot")["context"]["bootstrap"]
    assert (of_toy["unit"], of_toy["strata"]) == ("group", "none")
    # 20 images with captions of their own, in groups of two
    assert {row["metric"].split("_of_")[1] for row in found if row["task"] == "retrieval"} == {"20", "20_strict"}
    assert base.run(Pixels(), pairs, [other, toy], tmp_path / "again", bootstrap=100) == found


@pytest.mark.parametrize(("name", "floor"), [("endotect_gi", 0.98), ("busi", 0.55)])
def test_probe_on_pixels_reaches_the_known_floor(name, floor, mmkd_data, tmp_path):
    """`floor`: balanced accuracy that logistic regression on such features has elsewhere; sampling error allowed."""
    pairs = ingest.ingest(open_source("webdataset", [mmkd_data / name]), tmp_path / "pairs")
    rows = base.run(Pixels(), pairs, base.sets_of(pairs), tmp_path, bootstrap=50)
    assert abs(value(rows, task="linear_probe", metric="balanced_accuracy") - floor) < 0.06
    chance = 1 / len(pairs.classes[name])
    assert abs(value(rows, task="zeroshot", metric="balanced_accuracy") - chance) < 0.15  # noise is no prompt
