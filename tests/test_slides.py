"""Slides as folders of tiles and as whole-slide images: tissue, places, magnification, resumption, damage."""

import sys

import numpy as np
import pytest
from PIL import Image

from mmkd_jax import io
from mmkd_jax.data import slide_features, slides
from mmkd_jax.errors import InputError

TISSUE = (slice(512, 1024), slice(768, 1536))  # rows and columns that are stained


@pytest.fixture(scope="module")
def scanned() -> np.ndarray:
    """Glass with a stained part whose colours tell where one is, uint8 `[1536, 2048, 3]`."""
    rng = np.random.default_rng(0)
    picture = np.full((1536, 2048, 3), 243, np.int64) + rng.integers(-3, 4, (1536, 2048, 1))
    y, x = np.mgrid[TISSUE]
    picture[TISSUE] = np.stack([120 + (x - 768) // 8, 40 + (y - 512) // 8, 150 + 0 * x], axis=-1)
    return picture.astype(np.uint8)


@pytest.fixture(scope="module")
def whole(scanned, tmp_path_factory):
    """A pyramidal TIFF of three levels at 0.5 microns a pixel, that is 20 times."""
    pytest.importorskip("openslide", reason="needs the extra wsi: pip install openslide-python openslide-bin")
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile to write a pyramid")
    path = tmp_path_factory.mktemp("wsi") / "case.tiff"
    with tifffile.TiffWriter(path) as file:
        for level in range(3):
            part = scanned[:: 2**level, :: 2**level]
            per_centimetre = 1e4 / (0.5 * 2**level)
            file.write(part, tile=(256, 256), photometric="rgb", subfiletype=int(level > 0), metadata=None,
                       resolution=(per_centimetre, per_centimetre), resolutionunit="CENTIMETER")  # fmt: skip
    return path


def test_tiles_cover_the_tissue_and_nothing_else(whole, scanned):
    found = slides.open_slide(whole, magnification=20, pixels=256)
    assert (found.name, found.side, found.size) == ("case", 256, (2048, 1536))
    expected = [(x, y) for y in range(512, 1024, 256) for x in range(768, 1536, 256)]
    assert [tuple(place) for place in found.places] == expected
    for (x, y), picture in zip(found.places, found.pictures()):
        np.testing.assert_array_equal(np.asarray(picture), scanned[y : y + 256, x : x + 256])


@pytest.mark.parametrize(("magnification", "side"), [(10, 512), (8, 640), (40, 128)])
def test_magnification_says_how_much_a_tile_covers(whole, scanned, magnification, side):
    found = slides.open_slide(whole, magnification=magnification, pixels=256)
    assert found.side == side
    assert found.level == {512: 1, 640: 1, 128: 0}[side]  # the level that has it, and not more pixels than needed
    (x, y), picture = next(zip(found.places, found.pictures()))
    assert picture.size == (256, 256)
    small = Image.fromarray(scanned[y : y + side, x : x + side]).resize((256, 256), Image.Resampling.BOX)
    assert np.abs(np.asarray(picture, int) - np.asarray(small, int)).mean() < 4


def test_tissue_is_what_is_stained(scanned):
    found = slides.tissue(scanned[::4, ::4])
    expected = np.zeros((384, 512), bool)
    expected[128:256, 192:384] = True
    assert (found == expected).mean() > 0.999
    assert not slides.tissue(np.full((50, 60, 3), 240, np.uint8)).any()  # glass alone
    assert not slides.tissue(np.zeros((50, 60, 3), np.uint8)).any()  # outside of what was scanned


def test_a_slide_without_tissue_or_scale(tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile to write slides")
    pytest.importorskip("openslide", reason="needs the extra wsi: pip install openslide-python openslide-bin")
    glass = np.full((512, 512, 3), 240, np.uint8)
    tifffile.imwrite(tmp_path / "glass.tiff", glass, tile=(256, 256), photometric="rgb", metadata=None,
                     resolution=(2e4, 2e4), resolutionunit="CENTIMETER")  # fmt: skip
    with pytest.raises(InputError, match="no tile of 256 px shows tissue"):
        slides.open_slide(tmp_path / "glass.tiff")
    tifffile.imwrite(tmp_path / "bare.tiff", glass, tile=(256, 256), photometric="rgb", metadata=None)
    with pytest.raises(InputError, match="says neither its magnification nor its microns"):
        slides.open_slide(tmp_path / "bare.tiff")


def test_unreadable_slides(whole, tmp_path, monkeypatch):
    data = whole.read_bytes()
    (tmp_path / "no.tiff").write_bytes(b"no slide at all")
    with pytest.raises(InputError, match=r"no\.tiff is no slide that can be read"):
        slides.open_slide(tmp_path / "no.tiff")
    (tmp_path / "half.tiff").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"half\.tiff (is no slide that can be read|is damaged)"):
        list(slides.open_slide(tmp_path / "half.tiff").pictures())
    with pytest.raises(InputError, match="there is no slide"):
        slides.open_slide(tmp_path / "none.svs")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(InputError, match=r"x\.txt is no slide: a folder of pictures, or one of \.svs"):
        slides.open_slide(tmp_path / "x.txt")
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(InputError, match="install the extra `wsi`"):
        slides.open_slide(whole)


def tile_folder(folder, names) -> None:
    """Tiles of 16 px, each of one grey."""
    folder.mkdir(parents=True)
    for k, name in enumerate(names):
        Image.fromarray(np.full((16, 16, 3), 10 * k + 5, np.uint8)).save(folder / f"{name}.png")


def test_folders_of_tiles(tmp_path):
    tile_folder(tmp_path / "pixels", ["a_x32_y0", "a_x0_y0", "a_x0_y16"])
    found = slides.open_slide(tmp_path / "pixels")
    assert found.places.tolist() == [[0, 0], [0, 16], [32, 0]]  # in the order of names
    assert (found.size, found.side) == ((48, 32), 16)
    assert [int(np.asarray(one)[0, 0, 0]) for one in found.pictures()] == [15, 25, 5]
    sheet = np.asarray(found.thumbnail())
    assert sheet.shape == (32, 48, 3)  # not enlarged
    assert sheet[10, -10, 0] == 5
    assert sheet[-10, -10, 0] == 255  # nothing is there
    tile_folder(tmp_path / "grid", ["0_0", "1_0", "0_1", "1_1"])
    assert sorted(map(tuple, slides.open_slide(tmp_path / "grid").places)) == [(0, 0), (0, 16), (16, 0), (16, 16)]
    tile_folder(tmp_path / "bare", ["a", "b", "c"])
    assert slides.open_slide(tmp_path / "bare").places.tolist() == [[0, 0], [16, 0], [0, 16]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no picture"):
        slides.open_slide(tmp_path / "empty")
    (tmp_path / "bare" / "b.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"b\.png: not a readable picture"):
        list(slides.open_slide(tmp_path / "bare").pictures())


class Colours:
    """An encoder that gives a tile's mean colour and counts what it is asked for."""

    name, identity = "colours", "1"

    def __init__(self):
        self.calls = 0

    def encode_image(self, pictures):
        self.calls += 1
        if self.calls == self.__dict__.get("fail_at"):
            raise KeyboardInterrupt
        return np.stack([np.asarray(one, np.float32).mean((0, 1)) / 255 for one in pictures])


def test_features_are_made_once_and_go_on_after_a_kill(tmp_path):
    for name in "abc":
        tile_folder(tmp_path / name, [f"{x}_{y}" for x in (0, 16) for y in (0, 16, 32)])
    encoder, out = Colours(), tmp_path / "features"
    found = [slides.open_slide(tmp_path / name) for name in "abc"]
    slide_features.make(found[0], encoder, out, batch=4)
    encoder.fail_at = encoder.calls + 2  # the second of two batches
    with pytest.raises(KeyboardInterrupt):
        slide_features.make(found[1], encoder, out, batch=4)
    assert sorted(path.name for path in out.iterdir()) == ["a.jpg", "a.json", "a.npy"]  # nothing half-made
    encoder = Colours()
    for one in found:
        path = slide_features.make(one, encoder, out, batch=4)
        x = np.load(path)
        assert (x.shape, x.dtype) == ((6, 3), np.float16)
        np.testing.assert_allclose(x[:, 0] * 255, [10 * k + 5 for k in range(6)], atol=0.1)
        assert io.read_json(path.with_suffix(".json"))["places"] == one.places.tolist()
    assert encoder.calls == 4  # of the two slides that were not done
    other = Colours()
    other.identity, other.name = "2", "other"
    with pytest.raises(InputError, match="holds features of colours; use another folder for other"):
        slide_features.make(found[0], other, out)
    other.identity, other.encode_image = "1", lambda pictures: np.full((len(pictures), 3), np.nan)
    with pytest.raises(InputError, match="not finite for slide a; its weights"):
        slide_features.make(found[0], other, tmp_path / "new")


def test_features_of_a_whole_slide(whole, tmp_path):
    encoder = Colours()
    path = slide_features.make(slides.open_slide(whole), encoder, tmp_path)
    assert np.load(path).shape == (6, 3)
    assert np.load(path)[:, 0].std() > 0.02  # the tiles differ, as the tissue does
    with Image.open(tmp_path / "case.jpg") as thumbnail:
        assert thumbnail.size == (1024, 768)
