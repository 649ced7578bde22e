"""From sources to a set: what is kept, what is dropped, and that nothing is dropped in silence."""

import io
import json
import re
import struct
import subprocess
import sys
import zlib

import data_fixtures as toy
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mmkd_jax import preprocess, registry
from mmkd_jax.cli import main
from mmkd_jax.data import media
from mmkd_jax.data.ingest import ingest
from mmkd_jax.data.pairs import PairsSet, pair_id
from mmkd_jax.data.sources import TABLE, Skipped, SourceRecord, open_source
from mmkd_jax.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return toy.webdataset(tmp_path / "toy")


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def with_metadata(codec="jpeg", **save):
    """A picture with a patient's name in EXIF, a comment and (PNG) text chunks."""
    image = Image.open(io.BytesIO(toy.picture(3, 40, 30)))
    exif = image.getexif()
    exif[0x010E] = "Jane Doe"
    exif[0x0112] = 6
    buffer = io.BytesIO()
    if codec == "jpeg":
        image.save(buffer, "jpeg", exif=exif, comment=b"Jane Doe", icc_profile=b"profile" * 30, dpi=(72, 72), **save)
        return buffer.getvalue() + b"trailing Jane Doe"
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", "Jane Doe")
    info.add_itxt("Name", "Jane Doe")
    image.save(buffer, "png", pnginfo=info, exif=exif)
    return buffer.getvalue() + b"Jane Doe"


@pytest.mark.parametrize(
    ("codec", "save"),
    [("jpeg", {}), ("jpeg", {"progressive": True}), ("jpeg", {"restart_marker_rows": 1}), ("png", {})],
)
def test_metadata_comes_off_and_no_pixel_changes(codec, save):
    data = with_metadata(codec, **save)
    stripped, found = media.strip(data)
    assert found == codec
    assert b"Jane" in data
    assert b"Jane" not in stripped
    np.testing.assert_array_equal(pixels(stripped), pixels(data))
    with Image.open(io.BytesIO(stripped)) as image:
        assert not image.getexif()
        if codec == "jpeg":
            assert image.info["icc_profile"] == b"profile" * 30
    assert media.strip(stripped) == (stripped, codec)


def test_adobe_colour_marker_stays():
    """It alone says that four channels are coded as YCCK; without it the colours turn."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(toy.picture(1))).convert("CMYK").save(buffer, "jpeg")
    data = bytearray(buffer.getvalue())
    data[data.index(b"Adobe") + 11] = 2  # the transform byte: YCCK
    assert not np.array_equal(pixels(bytes(data)), pixels(buffer.getvalue()))
    np.testing.assert_array_equal(pixels(media.strip(bytes(data))[0]), pixels(bytes(data)))


def test_transparency_and_palette_stay():
    image = Image.open(io.BytesIO(toy.picture(1))).convert("P")
    buffer = io.BytesIO()
    image.save(buffer, "png", transparency=3)
    stripped, _ = media.strip(buffer.getvalue())
    for data in (stripped, buffer.getvalue()):
        with Image.open(io.BytesIO(data)) as opened:
            np.testing.assert_array_equal(
                np.asarray(opened.convert("RGBA")),
                np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGBA")),
            )


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\xff\xd8\xff", b"\xff\xd8\xff\xe1\xff\xff", b"\x89PNG\r\n\x1a\n"])
def test_strip_refuses(data):
    if data == b"\xff\xd8\xff\xe1\xff\xff":
        assert media.strip(data)[0] == data[:2]  # nothing is left of it, which decoding then refuses
        return
    with pytest.raises(InputError):
        media.strip(data)


def test_shrink():
    image = Image.open(io.BytesIO(toy.picture(1, 800, 400)))
    data, codec = media.shrink(image, 500)
    assert (codec, Image.open(io.BytesIO(data)).size) == ("jpeg", (500, 250))
    data, codec = media.shrink(image, 200)
    assert codec == "png"
    expected = image.convert("RGB").resize((200, 100), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels(data), np.asarray(expected))
    assert Image.open(io.BytesIO(media.shrink(image, 5000)[0])).size == (800, 400)  # never larger
    deep = Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096)
    buffer = io.BytesIO()
    deep.save(buffer, "png")
    shallow = preprocess.decode(buffer.getvalue())
    assert pixels(media.shrink(shallow, 4)[0]).tolist() == (np.arange(16).reshape(4, 4) * 16).tolist()


def test_webdataset(folder, tmp_path):
    pairs = ingest(open_source("webdataset", [folder]), tmp_path / "out", shards=2)
    assert len(pairs) == 12
    assert pairs.row_names() == ["test", "toy.test", "toy.train", "train"]
    assert pairs.rows("toy.test").rows.tolist() == [3, 7, 11]
    assert pairs.classes == {"toy": ["cat", "dog"]}
    pair = pairs.read(5)
    assert pair.id == pair_id("toy", "k005")
    assert pair.captions == ["a picture of 5"]
    assert (pair.modality, pair.label, pair.label_id, pair.source) == ("mri", "dog", 1, "toy")
    assert (pair.license, pair.article) == ("CC0", "somewhere")
    assert pair.media == {"kind": "image", "codec": "jpeg", "width": 20, "height": 16, "spacing": []}
    np.testing.assert_array_equal(pixels(pair.image), pixels(toy.picture(5, codec="jpeg")))
    groups = pairs.table["group"]
    assert groups[4] == groups[5] != groups[6]
    pairs.verify()
    assert not (tmp_path / "out" / "skipped.jsonl").exists()


def test_what_identifies_a_patient_stays_behind(folder, tmp_path):
    pairs = ingest(open_source("webdataset", [folder]), tmp_path / "out")
    everything = b"".join(p.read_bytes() for p in (tmp_path / "out").glob("*") if p.is_file())
    for word in (b"secret", b"case_history", b"patient 2"):
        assert word not in everything
    assert pairs.read(0).extra == {}
    kept = ingest(open_source("webdataset", [folder], extra=("age",)), tmp_path / "out2")
    assert kept.read(0).extra == {"age": "89"}  # only when asked for by name


def test_several_inputs_and_same_bytes(folder, tmp_path):
    other = toy.webdataset(tmp_path / "more", n=5, split="val")
    sources = [open_source("webdataset", [folder, other / "more.tar"])]
    pairs = ingest(sources, tmp_path / "a")
    assert pairs.sources == ["more", "toy"]
    assert pairs.rows("val").rows.tolist() == list(range(12, 17))
    again = ingest([open_source("webdataset", [folder]), open_source("webdataset", [other])], tmp_path / "b")
    assert (again.hash, again.manifest["counts"]) == (pairs.hash, pairs.manifest["counts"])
    third = ingest(sources, tmp_path / "c" / "a")
    for file in (tmp_path / "a").glob("*.*"):
        assert (third.path / file.name).read_bytes() == file.read_bytes()


def bad_webdataset(path):
    good = json.dumps({"caption": "c"}).encode()
    png = toy.picture(0)
    cut = toy.picture(1, 200, 200, codec="jpeg")
    members = [
        *[m for k in range(20) for m in ((f"ok{k}.png", toy.picture(k)), (f"ok{k}.txt", b"text"))],
        ("nothing.jpg", b"not a picture"), ("nothing.json", good),
        ("cut.jpg", cut[: len(cut) // 2]), ("cut.json", good),
        ("silent.png", png), ("silent.json", b'{"modality": "ct"}'),
        ("blank.png", png), ("blank.txt", b"  \n"),
        ("broken.png", png), ("broken.json", b"{"),
        ("list.png", png), ("list.json", b"[1]"),
        ("number.png", png), ("number.json", b'{"caption": "c", "label_id": "x"}'),
        ("lonely.json", good),
        ("wrong.jpg", toy.picture(1, codec="jpeg")), ("wrong.json", b'{"caption": "c", "jpg_sha256": "00"}'),
        ("ok3.png", png), ("ok3.txt", b"again"),
    ]  # fmt: skip
    return toy.make_tar(path, members)


def test_every_loss_is_named(tmp_path, capsys):
    tar = bad_webdataset(tmp_path / "bad.tar")
    pairs = ingest(open_source("webdataset", [tar]), tmp_path / "out", max_bad=0.5)
    assert len(pairs) == 20
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    names = ["nothing", "cut", "silent", "blank", "broken", "list", "number", "lonely", "wrong", "ok3"]
    assert [s["key"] for s in skipped] == names
    reasons = {s["key"]: s["reason"] for s in skipped}
    assert reasons["silent"] == reasons["blank"] == "no caption"
    assert "twice" in reasons["ok3"]
    assert "SHA-256" in reasons["wrong"]
    assert "no picture" in reasons["lonely"]
    assert sum(pairs.manifest["made"]["skipped"].values()) == 10
    told = capsys.readouterr().err
    assert all(f"skipped {name}: " in told for name in names)
    assert "10 of 30 records skipped" in told


def test_too_much_damage_is_refused_and_leaves_nothing(tmp_path):
    tar = bad_webdataset(tmp_path / "in" / "bad.tar")
    with pytest.raises(InputError, match=r"10 of 30 records cannot be used .*first 'nothing'; at most 5% may be bad"):
        ingest(open_source("webdataset", [tar]), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def bomb(width, height):
    """A small PNG that promises more pixels than anyone would decode."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(99)))]
    body = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in (*chunks, (b"IEND", b""))
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_pixel_count_is_bounded(tmp_path):
    members = [("a.png", bomb(10000, 10000)), ("a.txt", b"t"), ("b.png", toy.picture(0)), ("b.txt", b"t")]
    tar = toy.make_tar(tmp_path / "x.tar", members)
    pairs = ingest(open_source("webdataset", [tar]), tmp_path / "out", max_bad=0.5)
    assert len(pairs) == 1
    assert "10000 x 10000 px exceeds" in next(iter(pairs.manifest["made"]["skipped"]))


@pytest.mark.parametrize("size", [700, 3000])
def test_truncated_tar(folder, tmp_path, size):
    tar = folder / "toy.tar"
    tar.write_bytes(tar.read_bytes()[:size])
    with pytest.raises(InputError, match=re.escape(str(tar)) + " is not a whole tar file"):
        ingest(open_source("webdataset", [folder]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_members_are_not_unpacked(tmp_path):
    tar = toy.make_tar(tmp_path / "x.tar", [("../../evil.png", toy.picture(0)), ("../../evil.txt", b"text")])
    pairs = ingest(open_source("webdataset", [tar]), tmp_path / "out" / "set")
    assert len(pairs) == 1
    assert not list(tmp_path.glob("**/evil*"))


def test_manifest_beside_the_tar(tmp_path):
    tar = toy.make_tar(tmp_path / "m" / "x.tar", [("a.png", toy.picture(0)), ("b.png", toy.picture(1))])
    lines = [{"key": k, "caption": f"of {k}", "split": "val"} for k in "abc"]
    (tar.parent / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = ingest(open_source("webdataset", [tar.parent]), tmp_path / "out", max_bad=0.4)
    assert [p.captions for p in pairs.read_many(range(2))] == [["of a"], ["of b"]]
    assert pairs.manifest["made"]["skipped"] == {"is in manifest.jsonl but not in the tar": 1}
    (tar.parent / "manifest.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="one JSON object with a key a line"):
        ingest(open_source("webdataset", [tar.parent]), tmp_path / "out2")


def test_jsonl(tmp_path):
    (tmp_path / "a.jpg").write_bytes(with_metadata())
    lines = [
        {"image": "a.jpg", "captions": ["one", "two"], "modality": "ct", "split": "val"},
        {"image": "missing.jpg", "caption": "x"},
        {"image": "a.jpg", "key": "again", "caption": "x", "label": "cat", "label_id": 0},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = ingest(open_source("jsonl", [tmp_path / "in.jsonl"], name="mine"), tmp_path / "out", max_bad=0.5)
    assert [p.captions for p in pairs.read_many(range(2))] == [["one", "two"], ["x"]]
    assert pairs.row_names() == ["mine.train", "mine.val", "train", "val"]
    assert b"Jane" not in pairs.read(0).image
    skipped = json.loads((tmp_path / "out" / "skipped.jsonl").read_text())
    assert skipped["key"] == "missing.jpg"
    for text, message in (("{", "line 1: not JSON"), ('{"caption": "x"}', "line 1: no field `image`")):
        (tmp_path / "in.jsonl").write_text(text)
        with pytest.raises(InputError, match=message):
            ingest(open_source("jsonl", [tmp_path / "in.jsonl"]), tmp_path / "out2")


def test_captions_exclude_and_max_side(folder, tmp_path):
    pairs = ingest(
        open_source("webdataset", [folder]),
        tmp_path / "out",
        captions=lambda record: [record.modality],
        exclude=lambda record: record.split == "test",
        max_side=10,
    )
    assert len(pairs) == 9
    assert pairs.read(1).captions == ["ct"]
    assert pairs.manifest["made"]["excluded"] == 3
    assert pairs.row_names() == ["toy.train", "train"]
    assert pairs.read(0).media | {"spacing": []} == {
        "kind": "image",
        "codec": "png",
        "width": 10,
        "height": 8,
        "spacing": [],
    }


def test_label_beyond_the_classes(folder, tmp_path):
    (folder / "classes.json").write_text('["cat"]')
    with pytest.raises(InputError, match="label_id 1, but only 1 class names"):
        ingest(open_source("webdataset", [folder]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def records(inputs, *, count=2):
    """A source of one's own."""
    for i in range(count):
        yield SourceRecord(str(i), toy.picture(i), (f"caption {i}",), "own", split="a/b")
    yield Skipped("x", "because")


def test_source_by_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "source.py").write_text("from test_ingest import records\nMADE = 'drawn by hand'")
    monkeypatch.syspath_prepend(tmp_path)
    pairs = ingest(open_source("my_lab.source", count=30), tmp_path / "out")
    assert len(pairs) == 30
    assert pairs.row_names() == ["a_b", "own.a_b"]
    assert pairs.manifest["made"]["skipped"] == {"because": 1}
    assert pairs.manifest["made"]["sources"] == [{"source": "my_lab.source", "inputs": [], "note": "drawn by hand"}]


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import data_fixtures as toy, types
from mmkd_jax.data.ingest import ingest
from mmkd_jax.data.sources import Source, SourceRecord
def records(inputs):
    for i in range(300):
        if i == 200: os.kill(os.getpid(), 9)
        yield SourceRecord(str(i), toy.picture(i % 3), ("a",), "own")
ingest(Source("own", types.SimpleNamespace(records=records), (), {}), sys.argv[2])
"""


def test_a_killed_ingest_leaves_nothing_that_opens(repository, folder, tmp_path):
    out = tmp_path / "killed" / "out"
    arguments = [sys.executable, "-c", KILLED, str(repository / "tests"), str(out)]
    assert subprocess.run(arguments, cwd=repository, capture_output=True).returncode == -9
    assert list(out.parent.iterdir()) == []
    assert len(ingest(open_source("webdataset", [folder]), out)) == 12


def test_registry():
    assert registry.resolve("json", {"json": "json.dumps"}) is json.dumps
    assert registry.resolve("json.dumps", {}) is json.dumps
    assert registry.resolve("os.path", {}).join
    for name, message in (
        ("webdatset", "unknown source 'webdatset' (a dotted path works as well); did you mean 'webdataset'"),
        ("no_such_module.thing", "there is no module no_such_module"),
        ("json.dumsp", "json has no 'dumsp'; did you mean 'dump' or 'dumps'"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            open_source(name)


def test_wrong_sources(tmp_path):
    with pytest.raises(InputError, match="has no option 'nmae'; did you mean 'name'"):
        open_source("webdataset", ["x"], nmae="x")
    with pytest.raises(InputError, match="has no function records"):
        open_source("json.dumps")
    for inputs, message in (([], "needs --input"), (["/nowhere"], "does not exist"), ([tmp_path], "holds no .tar")):
        with pytest.raises(InputError, match=message):
            ingest(open_source("webdataset", inputs), tmp_path / "out")
    with pytest.raises(InputError, match="is not a file"):
        ingest(open_source("jsonl", [tmp_path]), tmp_path / "out")


def test_command(folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "ingest",
        "webdataset",
        "--input",
        str(folder),
        "--out",
        str(out),
        "--shards",
        "2",
        "--option",
        "name=n",
    ]
    assert main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows"] == 12
    assert summary["indices"]["train"] == 9
    assert len(PairsSet.open(out).manifest["shards"]) == 2
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err
    for wrong in (["--shards", "0"], ["--max-side", "0"], ["--option", "x"], ["--option", "x=1"]):
        assert main(["ingest", "webdataset", "--input", str(folder), "--out", str(tmp_path / "w"), *wrong]) == 2
        assert not (tmp_path / "w").exists()


def test_real_data(mmkd_data, tmp_path):
    pairs = ingest(open_source("webdataset", [mmkd_data / "busi", mmkd_data / "covid_cxr"]), tmp_path / "out")
    assert pairs.manifest["counts"]["source"] == {"busi": 544, "covid_cxr": 302}
    assert len(pairs.rows("busi.train")) == 405
    assert pairs.manifest["made"]["skipped"] == {}
    assert pairs.classes["busi"] == json.loads((mmkd_data / "busi" / "classes.json").read_text())
    pairs.verify()
    train, test = (set(pairs.table["group"][pairs.rows(f"busi.{s}").rows]) for s in ("train", "test"))
    assert not train & test
    with pytest.raises(InputError, match="262 of 262 records cannot be used"):
        ingest(open_source("webdataset", [mmkd_data / "vqa_rad"]), tmp_path / "vqa")


def test_help_names_every_source(capsys):
    assert main(["ingest", "--help"]) == 0
    told = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"{', '.join(TABLE)}, a module" in told
