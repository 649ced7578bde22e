"""Preprocessing equals transformers' PIL processor and plain PIL on every kind of picture, and refuses bad data."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmkd_jax import preprocess
from mmkd_jax.errors import InputError
from mmkd_jax.specs import OPENAI_MEAN, OPENAI_STD, Preprocess

SIZES = [(689, 325), (224, 224), (225, 31), (40, 227), (229, 224), (231, 224), (7, 5)]
MODES = ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"]


def picture(size, mode="RGB", seed=0) -> Image.Image:
    """Smooth noise, so that interpolation has something to do."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 3 + 2, size[0] // 3 + 2, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(noise[..., 0]).resize(size))
        return image
    return image.quantize(32) if mode == "P" else image.convert(mode)


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def open_clips(image, size) -> np.ndarray:
    """torchvision's Resize and CenterCrop in PIL, then RGB: open_clip's order."""
    width, height = image.size
    new = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
    image = image.resize(new, Image.Resampling.BICUBIC)
    left, top = round((new[0] - size) / 2.0), round((new[1] - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_open_clips_steps(size, mode):
    image = picture(size, mode)
    ours = preprocess.eval_image(image, Preprocess(size=64))
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, open_clips(image, 64))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
@pytest.mark.parametrize("size", SIZES)
def test_equals_transformers(size, mode):
    from transformers import CLIPImageProcessorPil

    image = picture(size, mode)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    p = Preprocess(size=64, rgb_first=True)
    ours = preprocess.normalise(preprocess.eval_image(image, p), p)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_a_transparent_palette_equals_transformers():
    from transformers import CLIPImageProcessorPil

    image = preprocess.decode(encoded(picture((90, 70), "P"), transparency=3))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    theirs = processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    p = Preprocess(size=64, rgb_first=True)
    np.testing.assert_allclose(preprocess.normalise(preprocess.eval_image(image, p), p), theirs, atol=2e-6)


def medclips(image, size) -> np.ndarray:
    """The steps of MedCLIP's `dataset.py` in PIL: centred on black, greyscale, bicubic, one channel three times."""
    side = max(size, *image.size)
    canvas = Image.new("L", (side, side), 0)
    canvas.paste(image, (int((side - image.width) / 2), int((side - image.height) / 2)))
    grey = np.asarray(canvas.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    return np.stack([(grey - 0.5862785803043838) / 0.27950088968644304] * 3, axis=-1)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("size", [*SIZES, (60, 33)])
def test_equals_medclips_steps(size, mode):
    image = picture(size, mode)
    p = Preprocess(64, mean=(0.5862785803043838,) * 3, std=(0.27950088968644304,) * 3, frame="square", greyscale=True)
    ours = preprocess.normalise(preprocess.eval_image(image, p), p)
    np.testing.assert_allclose(ours, medclips(image, 64), atol=2e-6)
    for wrong in (Preprocess(64, mean=p.mean, std=p.std, greyscale=True), Preprocess(64, mean=p.mean, std=p.std)):
        assert image.size == (224, 224) or np.abs(preprocess.eval_image(image, wrong) - medclips(image, 64)).max() > 0.1


def test_frames_are_the_specs():
    with pytest.raises(InputError, match="frame 'round' is not one of crop, square"):
        Preprocess(frame="round")
    colour = preprocess.eval_image(picture((30, 20)), Preprocess(64, frame="square"))
    assert not colour[:20].any()
    assert colour[32, 32].any()
    assert np.ptp(colour.astype(int), axis=-1).max() > 20


@pytest.mark.parametrize("size", SIZES)
def test_sixteen_bits_equal_transformers_on_eight(size):
    """transformers cannot scale 16 bits; it is given the eight bits that decoding makes of them."""
    from transformers import CLIPImageProcessorPil

    values = np.asarray(picture(size, "L"), np.uint16) * 257
    image = preprocess.decode(encoded(Image.fromarray(values)))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    theirs = processor(picture(size, "L"), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    p = Preprocess(size=64, rgb_first=True)
    np.testing.assert_allclose(preprocess.normalise(preprocess.eval_image(image, p), p), theirs, atol=2e-6)


def test_the_order_of_rgb_and_resizing_matters_for_palettes():
    image = picture((300, 200), "P")
    after, before = (preprocess.eval_image(image, Preprocess(size=64, rgb_first=first)) for first in (False, True))
    assert np.abs(after.astype(int) - before).max() > 20


def test_interpolation_is_the_specs():
    image = picture((300, 200))
    bicubic, bilinear = (preprocess.eval_image(image, Preprocess(64, kind)) for kind in ("bicubic", "bilinear"))
    assert (bicubic != bilinear).any()


def test_normalise_is_alike_for_numpy_and_jax():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    p = Preprocess(size=4)
    wanted = (images / 255.0 - np.array(OPENAI_MEAN)) / np.array(OPENAI_STD)
    ours = preprocess.normalise(images, p)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, wanted, atol=1e-6)
    np.testing.assert_allclose(preprocess.normalise(jnp.asarray(images), p), ours, atol=1e-6)
    assert preprocess.normalise(jnp.asarray(images), p).dtype == jnp.float32


def test_sixteen_bits_keep_their_range():
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image = preprocess.decode(encoded(Image.fromarray(values)))
    assert (image.size, image.mode) == ((64, 64), "L")
    grey = preprocess.eval_image(image, Preprocess(size=64))
    assert np.abs(grey - (values / 257.0)[..., None]).max() < 1.0
    assert len(np.unique(grey)) == 256
    floats = preprocess.eval_image(Image.fromarray(values.astype(np.float32) * 7 - 3), Preprocess(size=64))
    assert np.abs(floats - (values / 257.0)[..., None]).max() < 1.0


def test_exif_and_comments_are_dropped_and_pixels_kept():
    exif = Image.Exif()
    exif[0x010F] = "a hospital's scanner"
    exif[0x0112] = 6
    data = encoded(picture((30, 20)), "JPEG", exif=exif, comment=b"patient name")
    image = preprocess.decode(data)
    assert image.size == (30, 20)
    assert not image.getexif()
    assert b"patient" not in encoded(image)
    assert b"scanner" not in encoded(image, "JPEG")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(io.BytesIO(data))))


def test_a_palettes_transparency_survives_decoding():
    image = picture((20, 20), "P")
    decoded = preprocess.decode(encoded(image, transparency=3))
    assert decoded.info == {"transparency": 3}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: b"not a picture",
        lambda data: data[: len(data) // 2],
        lambda data: data[:40] + b"\0" * 40 + data[80:],
    ],
)
def test_damaged_data_is_refused_in_one_line(spoil):
    data = encoded(picture((64, 64)))
    with pytest.raises(InputError, match="not a readable picture") as caught:
        preprocess.decode(spoil(data))
    assert "\n" not in str(caught.value)


def test_large_and_odd_pictures_are_refused():
    with pytest.raises(InputError, match="30 x 20 px exceeds the limit of 599"):
        preprocess.decode(encoded(picture((30, 20))), max_pixels=599)
    with pytest.raises(InputError, match="exceeds the limit"):
        preprocess.decode(encoded(Image.new("1", (12000, 12000))))
    with pytest.raises(InputError, match="no meaningful centre crop"):
        preprocess.eval_image(Image.new("L", (500, 4)), Preprocess(size=64))
