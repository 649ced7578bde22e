"""`mmkd encode`: what is encoded, in which order, under which names, and what is refused."""

import data_fixtures as toy
import numpy as np
import pytest
import train_fixtures as tiny

import mmkd_jax
from mmkd_jax import cli

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.untrained(tiny.stage1("--config.seed=3"), tmp_path_factory.mktemp("run") / "student")


@pytest.fixture(scope="module")
def student(checkpoint):
    return mmkd_jax.load(checkpoint)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with four pictures of several kinds and depths, a text, and a folder without pictures."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "deeper").mkdir()
    (root / "none").mkdir()
    (root / "b.png").write_bytes(toy.picture(1))
    (root / "a.JPG").write_bytes(toy.picture(2, codec="jpeg"))
    (root / "deeper" / "c.tiff").write_bytes(toy.picture(3, codec="tiff"))
    (root / "deeper" / "d.webp").write_bytes(toy.picture(4, codec="webp"))
    (root / "notes.txt").write_text("row 1, caption 0\n\n  \nnothing of the kind\n")
    (root / "none" / "e.csv").write_text("1,2")
    (root / "._a.JPG").write_bytes(b"what a Mac leaves beside a picture")
    return root


@pytest.fixture
def encode(checkpoint, tmp_path):
    def call(*arguments, out="out.npz"):
        return cli.main(["encode", "--checkpoint", str(checkpoint), "--out", str(tmp_path / out), *arguments])

    return call


def load(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def test_a_folder_and_a_text_file(encode, student, pictures, tmp_path, capsys):
    assert encode("--images", str(pictures), "--texts", str(pictures / "notes.txt")) == 0
    assert "4 pictures and 2 texts" in capsys.readouterr().out
    found = load(tmp_path / "out.npz")
    names = ["a.JPG", "b.png", "deeper/c.tiff", "deeper/d.webp"]
    assert found["image_path"].tolist() == [str(pictures / name) for name in names]
    assert found["text_line"].tolist() == ["row 1, caption 0", "nothing of the kind"]
    assert found["image"].shape == (4, 32)
    assert found["text"].shape == (2, 32)
    for tower in ("image", "text"):
        assert found[tower].dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found[tower], axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(found["image"], student.encode_image([pictures / name for name in names]))
    np.testing.assert_array_equal(found["text"], student.encode_text(found["text_line"].tolist()))
    assert np.abs(found["image"][0] - found["image"][1]).max() > 1e-3  # rows are not alike
    assert np.abs(found["text"][0] - found["text"][1]).max() > 1e-3


def test_single_files_and_texts_in_the_order_given(encode, student, pictures, tmp_path):
    order = [str(pictures / "deeper" / "d.webp"), str(pictures / "a.JPG")]
    assert encode("--images", *order, "--texts", "row 3, caption 0", str(pictures / "notes.txt"), "an end") == 0
    found = load(tmp_path / "out.npz")
    assert found["image_path"].tolist() == order
    assert found["text_line"].tolist() == ["row 3, caption 0", "row 1, caption 0", "nothing of the kind", "an end"]
    np.testing.assert_array_equal(found["image"], student.encode_image(order))


def test_one_kind_alone(encode, pictures, tmp_path):
    assert encode("--images", str(pictures / "b.png"), out="pictures.npz") == 0
    assert set(load(tmp_path / "pictures.npz")) == {"image", "image_path"}
    assert encode("--texts", "a cat", out="deep/er/texts.npz") == 0
    assert set(load(tmp_path / "deep" / "er" / "texts.npz")) == {"text", "text_line"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to encode: give --images or --texts"),
        (["--texts", "{root}/empty.txt"], "nothing to encode"),
        (["--texts", "{root}/nowhere.txt"], "there is no text file"),
        (["--images", "{root}/nowhere.png"], "nowhere.png"),
        (["--images", "{root}/none"], "holds no pictures"),
        (["--images", "{root}/damaged.png"], "damaged.png: not a readable picture"),
        (["--images"], "expected at least one argument"),
        (["--image", "{root}/b.png"], "did you mean '--images'"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(encode, pictures, tmp_path, capsys, arguments, says):
    root = tmp_path / "root"
    (root / "none").mkdir(parents=True)
    (root / "empty.txt").write_text("\n \n")
    (root / "damaged.png").write_bytes(toy.picture(1)[:60])
    assert encode(*[argument.format(root=root) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["root"]


def test_what_is_there_is_not_overwritten(encode, tmp_path, capsys):
    (tmp_path / "out.npz").write_bytes(b"precious")
    assert encode("--texts", "a cat") == 2
    assert "exists; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "out.npz").read_bytes() == b"precious"


def test_a_folder_that_is_no_checkpoint(pictures, tmp_path, capsys):
    arguments = ["--checkpoint", str(pictures), "--out", str(tmp_path / "out.npz"), "--texts", "a cat"]
    assert cli.main(["encode", *arguments]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
