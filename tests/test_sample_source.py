"""The embedded source: real pictures, the same every time, honest splits, nothing from the network."""

import hashlib
import io
import socket
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from mmkd_jax import config
from mmkd_jax.data.sources import SourceRecord, open_source, pictures, sample
from mmkd_jax.errors import InputError

pytest.importorskip("data_store", reason="needs the extra demo (pydicom-data)")
pytest.importorskip("mahotas", reason="needs the extra demo (mahotas)")

IDENTIFYING = ("PatientName", "PatientID", "PatientBirthDate", "StudyDate", "InstitutionName", "StudyInstanceUID")


@pytest.fixture(scope="module")
def records() -> list[SourceRecord]:
    return list(sample.records())


def digest(records) -> str:
    total = hashlib.sha256()
    for record in records:
        pixels = np.asarray(Image.open(io.BytesIO(record.image)))
        total.update(repr((record.key, record.captions, record.label_id, record.split, pixels.shape)).encode())
        total.update(pixels.tobytes())
    return total.hexdigest()


def test_enough_for_the_specialists_of_the_demo(records, repository):
    assert len(records) >= 600
    specialists = config.load(str(repository / "configs/demo.py")).specialists
    counts = Counter((record.modality, record.split) for record in records)
    for name, modalities in specialists.items():
        assert sum(counts[modality, "train"] for modality in modalities) >= 100, name
        assert sum(counts[modality, "test"] for modality in modalities) >= 50, name
    assert {modality for modality, _ in counts} <= {m for modalities in specialists.values() for m in modalities}


def test_labelled_sets_have_all_classes_in_both_splits(records):
    names = sample.classes()
    assert len(names) >= 3
    counts = Counter((r.source, r.split, r.label) for r in records)
    for source, labels in names.items():
        assert len(labels) == len(set(labels)) >= 3
        for split in ("train", "test"):
            assert all(counts[source, split, label] >= 8 for label in labels), (source, split)
    for record in records:
        assert record.label == (names[record.source][record.label_id] if record.label_id >= 0 else "")


def test_records_are_well_formed(records):
    assert len({(r.source, r.key) for r in records}) == len(records)
    for record in records:
        image = Image.open(io.BytesIO(record.image))
        assert image.size == (sample.SIZE, sample.SIZE)
        assert image.mode in ("L", "RGB")
        assert np.asarray(image).std() > 3  # not blank
        assert len(record.captions) == 2
        assert all(10 < len(caption) < 160 for caption in record.captions)
        assert record.license
        assert record.group


def test_train_and_test_share_no_pixel(records):
    """A test crop overlaps no train crop of the same picture and frame, and no group is in both splits."""
    boxes = defaultdict(lambda: defaultdict(list))
    splits = defaultdict(set)
    for record in records:
        boxes[record.extra["picture"], record.extra["frame"]][record.split].append(record.extra["box"])
        splits[record.group].add(record.split)
    assert all(len(found) == 1 for found in splits.values())
    compared = 0
    for by_split in boxes.values():
        for a in by_split["train"]:
            for b in by_split["test"]:
                compared += 1
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    assert compared > 1000  # the check had something to check


def test_regions_lie_inside_the_pictures():
    for picture in pictures.PICTURES:
        with sample._path(picture) as path:
            frames = picture.read(str(path))
        for split, regions in picture.boxes.items():
            for frame in picture.frames[split]:
                height, width = frames[frame].shape[:2]
                assert frames[frame].dtype == np.uint8
                for left, top, right, bottom in regions:
                    assert 0 <= left < right <= width, picture.name
                    assert 0 <= top < bottom <= height, picture.name


def test_same_every_time_and_without_the_network(records, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the embedded source opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert digest(sample.records()) == digest(records)


def test_no_patient_data_in_texts(records):
    """Nothing of the identifying DICOM tags reaches a record."""
    from pydicom import dcmread

    texts = " ".join({t for r in records for t in (*r.captions, r.article, r.group, str(r.extra))}).lower()
    seen = 0
    for picture in pictures.PICTURES:
        with sample._path(picture) as path:
            if path.suffix != ".dcm":
                continue
            tags = dcmread(path, stop_before_pixels=True)
        for name in (
            "PatientName",
            "PatientID",
            "PatientBirthDate",
            "StudyDate",
            "InstitutionName",
            "StudyInstanceUID",
        ):
            value = str(tags.get(name, "")).strip().lower()
            if len(value) > 3:
                seen += 1
                assert value not in texts, (picture.name, name)
    assert seen > 10


def test_wrong_input():
    with pytest.raises(InputError, match="takes no input"):
        next(sample.records(["some/folder"]))
    with pytest.raises(InputError, match="no option"):
        open_source("sample", [], size=64)


def test_a_missing_package_is_named(monkeypatch):
    def missing(package):
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(sample.importlib.resources, "files", missing)
    with pytest.raises(InputError, match=r"extra 'demo' \(data_store is missing\)"):
        next(sample.records())
