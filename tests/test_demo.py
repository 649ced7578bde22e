"""The demo: how it divides data, what its captions say, what it refuses, and (in the full tier) all of it."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import data_fixtures as toy
import numpy as np
import pytest
from PIL import Image

from mmkd_jax import cli, io
from mmkd_jax import config as configs
from mmkd_jax.data.sources import SourceRecord
from mmkd_jax.demo import pipeline, scores, story
from mmkd_jax.errors import InputError
from mmkd_jax.evals import results
from mmkd_jax.evals.floor import FLOOR, PixelFloor


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo on a toy set with the specialists' modalities, not run yet."""
    root = tmp_path_factory.mktemp("demo")
    data = toy.webdataset(root / "busi", 48)
    config = configs.load(str(pipeline.CONFIGS / "demo.py:fast")).unlock()
    config.specialists.radiology, config.specialists.micro_path = ("xray",), ("ct",)
    config.specialists.skin_eye_scope, config.dev = ("mri",), 0.3
    return pipeline.Demo(config.lock(), io.make_workdir(root / "work"), (str(data),), "label", 1)


def test_training_rows_are_divided_by_group_and_specialists_see_their_own(demo):
    pairs = demo.pairs()
    fit, dev, train = (set(pairs.rows(name).rows.tolist()) for name in ("fit", "dev", "train"))
    assert fit | dev == train
    assert not fit & dev
    assert fit
    assert dev
    group = np.asarray(pairs.table["group"])
    assert not set(group[sorted(fit)].tolist()) & set(group[sorted(dev)].tolist())
    modality = np.asarray(pairs.modalities)[pairs.table["modality"]]
    for name, modalities in demo.config.specialists.items():
        rows = pairs.rows(f"fit.{name}").rows
        assert set(modality[rows]) == set(modalities)
        assert set(rows.tolist()) <= fit


def test_a_set_that_nobody_may_train_on_is_in_no_training_rows(demo, tmp_path):
    config = configs.ConfigDict(demo.config.to_dict())
    config.never_trained = ("busi",)
    other = pipeline.Demo(config, io.make_workdir(tmp_path), demo.data, "label", 1)
    with pytest.raises(InputError, match="no training pair has a modality"):
        other.pairs()


def test_captions_of_the_modality_setting_tell_no_label(demo):
    told = [p.captions for p in demo.pairs("modality").read_many(range(12))]
    assert {text for texts in told for text in texts} == {"a ct image.", "a mri image.", "a xray image."}
    free = SourceRecord(key="k", image=b"", captions=("as written",), source="s", modality="ct")
    assert pipeline.modality_only(free) == ("as written",)
    assert demo.pairs("modality").hash == demo.pairs("label").hash


def test_vocabularies_are_the_same_every_time(demo, tmp_path):
    again = pipeline.Demo(demo.config, io.make_workdir(tmp_path), demo.data, "label", 1)
    demo.config.unlock().vocabulary = 520
    assert demo.vocabulary("bpe").read_bytes() == again.vocabulary("bpe").read_bytes()


def test_the_pixel_floor_sees_pixels_and_colours():
    red, grey = Image.new("RGB", (30, 20), (255, 0, 0)), Image.new("L", (8, 8), 128)
    features = PixelFloor().encode_image([red, grey])
    assert features.shape == (2, 792)
    np.testing.assert_allclose(features[0, :6], [1, 0, 0, 1, 0, 0])
    np.testing.assert_allclose(features[0, 768:].reshape(3, 8).argmax(axis=1), [7, 0, 0])
    with pytest.raises(InputError, match="no text encoder"):
        PixelFloor().encode_text(["x"])


def test_no_path_of_the_machine_reaches_the_page():
    assert story._without_paths(["mmkd", "--workdir", "/a/b/run/", "--fast"]) == [
        "mmkd",
        "--workdir",
        "run",
        "--fast",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "/nowhere"], "--data /nowhere does not exist"),
        (["--seeds", "0"], "give at least 1"),
        (["--fast", "--seeds", "2"], "exclude each other"),
        (["--captions", "none"], "invalid choice"),
    ],
)
def test_wrong_input_is_one_line(arguments, says, tmp_path, capsys):
    assert cli.main(["demo", "--workdir", str(tmp_path / "run"), *arguments]) == 2
    complaint = capsys.readouterr().err
    assert says in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_whole_demo_killed_on_the_way_ends_in_the_same_results(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = [sys.executable, "-m", "mmkd_jax", "demo", "--fast", "--workdir"]
    assert subprocess.run([*command, str(whole)]).returncode == 0
    for artefact in ("teachers/radiology/run/metrics.jsonl", "students-label/seed0/public/metrics.jsonl"):
        process = subprocess.Popen([*command, str(broken)])
        while process.poll() is None and not (broken / artefact).exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
        assert process.poll() is None, f"the demo ended before {artefact} was there"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run([*command, str(broken)]).returncode == 0
    mine, theirs = results.load(whole / "results.json"), results.load(broken / "results.json")
    assert json.dumps(mine, sort_keys=True) == json.dumps(theirs, sort_keys=True)
    names = {row["model"] for row in mine}
    assert {"teacher:radiology", scores.BEST, FLOOR, "stage1", "clip_only", "public", "mean", "plus"} <= names
    page = (whole / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert {"open_clip_config.json", "README.md"} <= set(os.listdir(whole / "export"))
