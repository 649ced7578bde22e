"""Verification finds every wrong setting that weights do not tell, and passes what is right."""

import dataclasses

import model_references as ref
import numpy as np
import published_teachers as published
import pytest
from PIL import Image

import teachers
from mmkd_jax import cli
from mmkd_jax.models import layers, state_dict
from teachers import verify
from teachers.specs import Facts, known

pytestmark = pytest.mark.usefixtures("quick_compilation")
CAPTIONS = published.CAPTIONS


def pictures(n: int = 4) -> list[Image.Image]:
    """Smooth pictures of odd sizes, in colour, grey and with a palette."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8)).resize((70 + 9 * i, 81)) for i in range(n)]
    return [image.convert(("RGB", "L", "P")[i % 3]) for i, image in enumerate(coarse)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The weights file of a family, written once."""
    written = {}

    def file(family):
        if family not in written:
            written[family] = published.write(tmp_path_factory.mktemp(family), published.make(family))
        return written[family]

    return file


def both(family, file, **changes):
    """The flax teacher with a changed tower, and torch's as the record says."""
    name = published.record(family)
    ours, theirs = (teachers.load(name, file, backend, micro_batch=4) for backend in ("flax", "torch"))
    spec = ours.spec
    for tower, values in changes.items():
        spec = dataclasses.replace(spec, **{tower: dataclasses.replace(getattr(spec, tower), **values)})
    if changes:  # the shapes of our parameters tell heads, so they are made anew
        tensors = {key: value.numpy() for key, value in published.make(family).tensors.items()}
        ours = dataclasses.replace(ours, spec=spec, params=state_dict.to_params(spec, tensors))
    return ours, theirs


@pytest.mark.parametrize(
    ("family", "tower", "change"),
    [
        ("open_clip", "image", {"activation": "quick_gelu"}),
        ("open_clip", "image", {"heads": 8}),
        ("open_clip", "text", {"heads": 4}),
        ("open_clip", "text", {"norm_epsilon": 1e-3}),
        ("transformers", "text", {"activation": "gelu"}),
        ("unimed", "text", {"padding": "attended"}),
        ("unimed", "text", {"activation": "quick_gelu"}),
        ("pmc_clip", "image", {"heads": 32}),
        ("pmc_clip", "text", {"padding": "masked"}),
        ("pmc_clip_masked", "text", {"padding": "attended"}),
        ("medclip_vit", "image", {"activation": "quick_gelu"}),
        ("medclip_vit", "text", {"padding": "pooled"}),
        ("medclip_vit", "text", {"pooling": "token"}),
        ("medclip_resnet", "image", {"norm_epsilon": 1e-3}),
    ],
)
def test_a_wrong_setting_on_one_side_is_found(files, family, tower, change):
    ours, theirs = both(family, files(family), **{tower: change})
    spec = theirs.spec
    if tower == "image":
        images = np.stack([theirs.preprocess(image) for image in pictures()])
        difference = verify.relative_difference(ours.encode_image(images), theirs.encode_image(images))
    else:
        text = ref.texts(spec) if spec.text.kind == "bert" else theirs.tokenize(CAPTIONS)
        difference = verify.relative_difference(ours.encode_text(text), theirs.encode_text(text))
    assert difference > 2 * verify.TOLERANCE


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Arguments that name pictures and texts."""
    folder = tmp_path_factory.mktemp("material")
    for i, image in enumerate(pictures()):
        image.save(folder / f"{i}.png")
    (folder / "captions.txt").write_text("\n".join([*CAPTIONS, "", "another"]))
    return ["--images", str(folder), "--texts", str(folder / "captions.txt"), "and one"]


def command(name, file, *arguments):
    return cli.main(["teachers", "verify", name, "--weights", str(file), *arguments])


def test_right_weights_pass(files, material, capsys):
    file = files("unimed")
    assert command(published.record("unimed"), file, *material) == 0
    out = capsys.readouterr().out
    hashed = teachers.load(published.record("unimed"), file).weights_hash
    assert f"{published.record('unimed')}, weights {hashed[:12]}" in out
    assert "over   4 images" in out
    assert "over   6 texts" in out
    assert "tolerance 2e-05: the backends agree" in out


OTHER = Facts(
    dataclasses.replace(published.FAMILIES["biomedclip"][1], name="other"), "a file", (known("all of it", "this test"),)
)


def test_a_wrong_implementation_fails_with_1(files, material, capsys, monkeypatch):
    """The tanh form of GELU, which JAX takes unless told otherwise, in our towers only."""
    import jax

    monkeypatch.setitem(layers.ACTIVATIONS, "gelu", jax.nn.gelu)
    assert command(f"{__name__}.OTHER", files("biomedclip"), *material) == 1
    out = capsys.readouterr().out
    assert "THE BACKENDS DIFFER: do not use this teacher" in out
    assert "Traceback" not in out


def test_embedded_pictures_are_the_default(files, capsys):
    pytest.importorskip("data_store", reason="the extra demo, which has the embedded pictures, is not installed")
    images, captions = verify.samples()
    assert len(images) == 15
    assert len(set(captions)) == len(captions) == 30
    assert command(published.record("unimed"), files("unimed")) == 0
    out = capsys.readouterr().out
    assert "over  15 images" in out
    assert "over  30 texts" in out


@pytest.mark.parametrize(
    ("image", "text", "agrees"),
    [(0.0, 2e-5, True), (3e-5, 0.0, False), (0.0, 3e-5, False), (float("nan"), 0.0, False), (0.0, float("nan"), False)],
)
def test_both_towers_must_agree_and_nan_does_not(image, text, agrees):
    assert verify.Comparison("x", "0" * 64, 1, 1, image, text).agrees is agrees


def test_the_difference_is_relative_to_the_largest_feature():
    theirs = np.array([[4.0, -8.0], [1.0, 0.5]])
    assert verify.relative_difference(theirs + np.array([[0, 0], [0.5, 0.1]]), theirs) == 0.0625
    assert np.isnan(verify.relative_difference(theirs * [[1, np.nan]], theirs))


def test_wrong_arguments_are_one_line(files, material, capsys, monkeypatch, tmp_path):
    file = files("unimed")
    name = published.record("unimed")
    (tmp_path / "empty").mkdir()
    for arguments, says in [
        (["--images", str(tmp_path / "no.png")], "there is no picture"),
        (["--images", str(tmp_path / "empty")], "holds no pictures"),
        (["--texts", "no.txt"], "there is no text file"),
        (["--samples", "there", "--texts", "a"], "--samples brings its own pictures and texts"),
    ]:
        assert command(name, file, *arguments) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
    assert command(name, tmp_path / "no.pt", *material) == 2
    assert "does not exist; give its weights" in capsys.readouterr().err


def test_published_samples_are_handed_on(monkeypatch, capsys):
    from teachers import samples

    monkeypatch.setattr(samples, "page", lambda name, weights, folder: f"{name} {weights} {folder}")
    assert command("PLIP", "w.pt", "--samples", "there") == 0
    assert capsys.readouterr().out == "PLIP w.pt there\n"
