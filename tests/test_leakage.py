"""The leakage guard: planted copies of every kind are found, nothing else is, and its row index removes just them."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from mmkd_jax import cli
from mmkd_jax.data import leakage, perceptual_hash
from mmkd_jax.data.pairs import Pair, PairsSet, PairsWriter, pair_id
from mmkd_jax.data.rows import RowIndex

KINDS = ("file", "pixels", "half size", "jpeg", "brighter", "crop", "one-sided crop")
LONG = (("lc25000_lung", 0), ("nih_cxr", 0), ("odir_fundus", 3))
PLAIN = 2  # pictures of one tone on either side: no copies of each other


def scene(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Smooth random shapes on several scales."""
    rng = np.random.default_rng(seed)
    whole = np.zeros((height, width, 3))
    for cells in (3, 6, 12, 24):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        whole += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) / 4
    return Image.fromarray(whole.astype(np.uint8))


def encoded(image: Image.Image, codec: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, codec, **options)
    return buffer.getvalue()


def copy_of(kind: str, image: Image.Image) -> bytes:
    width, height = image.size
    if kind == "file":
        return encoded(image)
    if kind == "pixels":
        return encoded(image, compress_level=1)
    changed = {
        "half size": lambda: image.resize((width // 2, height // 2), Image.Resampling.BILINEAR),
        "jpeg": lambda: Image.open(io.BytesIO(encoded(image, "jpeg", quality=40))),
        "brighter": lambda: ImageEnhance.Brightness(image).enhance(1.2),
        "crop": lambda: image.crop((6, 4, width - 6, height - 4)),
        "one-sided crop": lambda: image.crop((8, 0, width, height - 5)),
    }
    return encoded(changed[kind]())


def add(writer: PairsWriter, key: str, image: bytes, **fields) -> None:
    writer.add(Pair(id=pair_id("made", key), image=image, captions=[key], source="made", **fields))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Training set of 60 scenes; evaluated set: copies of the first, then an article, a group, then 40 others."""
    root = tmp_path_factory.mktemp("planted")
    plain = [encoded(Image.new("RGB", (80, 80), (90 + k, 90, 90))) for k in range(2 * PLAIN)]
    with PairsWriter(root / "train") as writer:
        for k in range(60):
            article, group = {10: ("PMC7", ""), 11: ("", "clinic 7")}.get(k, (f"PMC{100 + k}", f"patient {k}"))
            add(writer, f"train {k}", encoded(scene(k)), article=article, group=group)
        for k in range(PLAIN):
            add(writer, f"plain {k}", plain[k])
        writer.finish(rows={"train": list(range(60 + PLAIN))})
    with PairsWriter(root / "test") as writer:
        for k, kind in enumerate(KINDS):
            add(writer, kind, copy_of(kind, scene(k)), article=f"PMC{900 + k}")
        add(writer, "article", encoded(scene(500)), article="PMC7")
        add(writer, "group", encoded(scene(501)), group="clinic 7")
        for k in range(40):
            add(writer, f"other {k}", encoded(scene(1000 + k)), article=f"PMC{1000 + k}", group=f"patient {1000 + k}")
        for k in range(PLAIN):
            add(writer, f"plain {PLAIN + k}", plain[PLAIN + k])
        writer.finish(rows={"test": list(range(len(KINDS) + 42 + PLAIN))})
    return root


def search(root, *arguments: str):
    out = root / "out"
    assert cli.main(["leakage", "--train", f"{root}/train:train", "--eval", f"{root}/test:test", "--out", str(out),
                     *arguments]) == 0  # fmt: skip
    return json.loads((out / "leakage.json").read_text()), out


def test_every_kind_of_copy_is_found_and_nothing_else(planted, capsys):
    told, out = search(planted)
    expected = {"id": 0, "bytes": 1, "pixels": 1, "near": len(KINDS) - 2, "article": 1, "group": 1}
    assert told["evaluation"][0]["leaks"] == expected
    assert told["train"][0]["leaks"] == expected
    assert f"{len(KINDS) + 2} of {len(KINDS) + 42 + PLAIN} leak" in capsys.readouterr().out
    page = (out / "leakage.html").read_text()
    assert page.count("<img") == 2 * sum(min(6, n) for n in (1, 2, len(KINDS), 1, 1))
    assert "http" not in page.replace("http://www.w3.org", "")


def test_the_clean_rows_are_all_but_these(planted):
    _, out = search(planted, "--install", "train")
    test, train = PairsSet.open(planted / "test"), PairsSet.open(planted / "train")
    kept = test.checked(RowIndex.load(out / "evaluation" / "test.test.clean.npz"))
    assert kept.rows.tolist() == list(range(len(KINDS) + 2, len(test)))
    assert "train.clean" in train.row_names()
    assert "test.clean" not in test.row_names()
    gone = {*range(len(KINDS)), 10, 11}
    assert train.rows("train.clean").rows.tolist() == [row for row in range(len(train)) if row not in gone]


def test_clean_rows_are_clean(planted):
    """A second search among what the first left finds nothing; the same search among all rows does."""
    search(planted, "--install", "train")
    told = {}
    for rows in ("train", "train.clean"):
        sides = [leakage.prints([leakage.Part.open(f"{planted}/{one}")]) for one in (f"train:{rows}", "test:test")]
        told[rows] = sum(len(one.train) for one in leakage.find(*sides).values())
    assert told["train.clean"] == 0 < told["train"]


@pytest.mark.parametrize("options", [{"distance": 0}, {"similarity": 0.999}])
def test_strict_settings_lose_copies(planted, options):
    """Negative control: what finds cropped copies is the distance allowed and the similarity asked for."""
    sides = [leakage.prints([leakage.Part.open(f"{planted}/{one}")]) for one in ("train", "test")]
    found = set(leakage.find(*sides, **options)["near"].evaluation.tolist())
    assert {0, 1} <= found < set(range(len(KINDS))) == set(leakage.find(*sides)["near"].evaluation.tolist())


@pytest.mark.parametrize(
    ("name", "errors"),
    [("ham10000", 0), *(pytest.param(*one, marks=pytest.mark.full) for one in LONG)],
)
def test_real_pictures_of_one_kind(mmkd_data, tmp_path, name, errors):
    """Among real pictures of one organ, copies of every kind are found, and (next to) no other picture is.

    Eyes with cataract look alike: blurred discs. They are the errors that remain.
    """
    pictures = []
    with tarfile.open(mmkd_data / name / f"{name}.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg") and len(pictures) < 300:
                pictures.append(Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB"))
    for side, start in (("train", 0), ("test", 150)):
        with PairsWriter(tmp_path / side) as writer:
            for k in range(start, start + 150):
                add(writer, f"{k}", encoded(pictures[k], "jpeg", quality=90))
            for k in range(3 * len(KINDS) if side == "test" else 0):
                add(writer, f"copy {k}", copy_of(KINDS[k % len(KINDS)], pictures[k]))
            writer.finish()
    sides = [leakage.prints([leakage.Part.open(str(tmp_path / side))]) for side in ("train", "test")]
    near = leakage.find(*sides)["near"]
    copies = near.evaluation >= 150
    assert set(zip(near.train[copies].tolist(), near.evaluation[copies].tolist())) >= {
        (k, 150 + k) for k in range(3 * len(KINDS))
    }
    assert len(set(near.evaluation[~copies].tolist())) <= errors


def test_the_citation_of_a_whole_set_is_not_an_origin(tmp_path):
    for name, start in (("train", 0), ("test", 500)):
        with PairsWriter(tmp_path / name) as writer:
            for k in range(leakage.CITED + 1):
                image = Image.fromarray(np.random.default_rng(start + k).integers(0, 256, (16, 16), dtype=np.uint8))
                add(writer, f"{start + k}", encoded(image), article="the paper of the set" if k else "PMC1")
            writer.finish()
    parts = [leakage.Part.open(str(tmp_path / name)) for name in ("train", "test")]
    sides = [leakage.prints([part]) for part in parts]
    many = leakage.find(*sides)["article"]
    assert len(set(many.evaluation.tolist())) == leakage.CITED + 1  # that many rows may still be of one article
    with PairsWriter(tmp_path / "more") as writer:
        for k in range(leakage.CITED + 1):
            add(writer, f"more {k}", encoded(scene(2000 + k, 16, 16)), article="the paper of the set")
        writer.finish()
    more = leakage.prints([leakage.Part.open(str(tmp_path / "more"))])
    assert more.citations == ["the paper of the set"]
    assert not len(leakage.find(sides[0], more)["article"].train)


@pytest.mark.parametrize("distance", [0, 3, 10, 15])
def test_the_search_is_exact(distance):
    """Against all pairs, among words of which many are near each other and many share a band."""
    rng = np.random.default_rng(distance)
    centres = rng.integers(0, 1 << 63, 20, dtype=np.uint64)

    def words(n: int) -> np.ndarray:
        flips = np.packbits(rng.random((n, 64)) < 0.12, axis=1).view(np.uint64)[:, 0]
        return centres[rng.integers(0, 20, n)] ^ flips

    first, second = words(300), words(400)
    apart = np.bitwise_count(first[:, None] ^ second)
    expected = np.argwhere(apart <= distance)
    assert np.array_equal(perceptual_hash.within(first, second, distance), expected)
    assert distance in (0, 3) or len(expected) > 100
    assert len(perceptual_hash.within(first, second[:0], distance)) == 0


def test_large_buckets_are_looked_at_in_pieces(monkeypatch):
    """All words alike in a band, which fills one bucket: found the same with very small pieces."""
    words = np.arange(200, dtype=np.uint64)
    whole = perceptual_hash.within(words, words, 2)
    monkeypatch.setattr(perceptual_hash, "_CANDIDATES", 64)
    assert np.array_equal(perceptual_hash.within(words, words, 2), whole)
    assert len(whole) == int((np.bitwise_count(words[:, None] ^ words) <= 2).sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval", "SET/test:nowhere"], "no row index 'nowhere'"),
        (["--eval", "SET/absent"], "no finished set"),
        (["--eval", "SET/test", "--distance", "16"], "--distance must be 0 to 15"),
    ],
)
def test_wrong_input_is_one_line(planted, tmp_path, capsys, arguments, message):
    arguments = [one.replace("SET", str(planted)) for one in arguments]
    assert cli.main(["leakage", "--train", f"{planted}/train", *arguments, "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
