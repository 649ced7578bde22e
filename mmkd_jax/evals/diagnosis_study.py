"""A study of slides as a config describes it (configs/diagnosis.py): features, models, result rows and heat maps."""

import csv
import io as memory
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from mmkd_jax import config as configs
from mmkd_jax import io
from mmkd_jax.data import made_slides, slide_features, slides
from mmkd_jax.data.bags import Bags
from mmkd_jax.errors import InputError, near
from mmkd_jax.evals import bootstrap, diagnosis, results
from mmkd_jax.evals.bootstrap import Estimate
from mmkd_jax.evals.diagnosis import Slides
from mmkd_jax.report import heatmap
from mmkd_jax.report.diagnosis import page

__all__ = ["evaluate", "page"]

MODELS = ("attention", "probe")


def evaluate(
    config: ConfigDict, out: epath.Path, *, encoders: Iterable[Any], resamples: int, seed: int
) -> dict[str, Any]:
    """Evaluates every encoder on the slides; writes rows, predictions, heat maps; returns what the page shows.

    Args:
      config: of configs/diagnosis.py.
      out: folder of results; features of slides are kept in OUT/slides/ENCODER.
      encoders: that encode tiles; none where `config.features` has their features.
      resamples: of the intervals.
      seed: of the resamples and of training.

    Raises:
      InputError: a table, column, slide is missing or damaged, or there is no encoder.
    """
    if unknown := [name for name in config.models if name not in MODELS]:
        raise InputError(f"no model of slides is called {unknown[0]!r}; {near(unknown[0], MODELS)}")
    root = _root(config, out)
    table = read(config, root)
    truth = positives(root / config.truth) if config.truth else {}
    test = table.rows("test")
    told: dict[str, Any] = {
        "name": config.name, "n": len(test), "fitted": len(table.labels) - len(test), "models": [], "maps": [],
        "counts": {name: int((table.labels[test] == k).sum()) for k, name in enumerate(table.classes)},
        "config": configs.to_dict(config), "resamples": resamples, "seed": seed,
    }  # fmt: skip
    for name, checkpoint, folder in _features(config, root, table, encoders, out):
        bags = Bags([[folder / f"{slide}.npy"] for slide in table.names])
        for kind in config.models:
            found, drawn = _evaluated(config, table, bags, kind, name, folder, truth, out, resamples, seed)
            about = {"model": name, "checkpoint": checkpoint, "dataset": config.name, "task": f"diagnosis_{kind}"}
            results.update(out / "results.json", _rows(about, found, table, seed))
            told["models"].append({"model": name, "kind": kind, "metrics": {n: _told(n, e) for n, e in found.items()}})
            told["maps"] += drawn
    if not told["models"]:
        raise InputError("nothing encodes the slides; give --checkpoint, --teacher, or --config.features=DIR")
    return told


def read(config: ConfigDict, root: epath.Path) -> Slides:
    """The table of slides.

    Raises:
      InputError: it is not there, a column is missing, a slide comes twice, a label or split is unknown.
    """
    rows = _table(root / config.table, (config.slide, config.label, config.split))
    names = [row[config.slide] for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{config.table}: slide {twice[0]!r} comes twice; keep one row")
    classes = tuple(config.classes) or tuple(sorted({row[config.label] for row in rows}))
    for row in rows:
        if row[config.label] not in classes:
            raise InputError(
                f"slide {row[config.slide]!r} has the label {row[config.label]!r}; {near(row[config.label], classes)}"
            )
        if row[config.split] not in ("train", "val", "test"):
            raise InputError(f"slide {row[config.slide]!r} has the split {row[config.split]!r}, not train, val or test")
    patients = [row.get(config.patient) or row[config.slide] for row in rows]
    labels = np.array([classes.index(row[config.label]) for row in rows], np.int64)
    return Slides(np.array(names), np.array(patients), labels, np.array([row[config.split] for row in rows]), classes)


def positives(path: epath.Path) -> dict[str, dict[tuple[int, int], bool]]:
    """By slide and place of a tile, whether it is known to matter.

    Raises:
      InputError: the table or a column is missing, or a place is no number.
    """
    found: dict[str, dict[tuple[int, int], bool]] = {}
    for row in _table(path, ("slide", "x", "y", "positive")):
        try:
            found.setdefault(row["slide"], {})[int(row["x"]), int(row["y"])] = bool(int(row["positive"]))
        except ValueError as error:
            raise InputError(f"{path}: {error}; x and y are pixels, positive is 1 or 0") from None
    return found


def _root(config: ConfigDict, out: epath.Path) -> epath.Path:
    if config.tiles:
        return made_slides.make(config.tiles, out, **configs.to_dict(config.made))
    if not config.root:
        raise InputError("no folder of slides is given; use --config.root=DIR")
    return io.as_path(config.root)


def _table(path: epath.Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.exists():
        raise InputError(f"{path} does not exist; name the table with --config.table or --config.truth")
    rows = list(csv.DictReader(memory.StringIO(path.read_text())))
    if not rows:
        raise InputError(f"{path} has no rows")
    for name in columns:
        if name not in rows[0]:
            raise InputError(f"{path} has no column {name!r}; {near(name, rows[0])}")
    return rows


def _features(
    config: ConfigDict, root: epath.Path, table: Slides, encoders: Iterable[Any], out: epath.Path
) -> Iterator[tuple[str, str, epath.Path]]:
    """Name, checkpoint and folder of features of everything that encodes the slides."""
    if config.features:
        folder = io.as_path(config.features)
        yield f"features:{folder.name}", str(folder), folder
    for encoder in encoders:
        folder = out / "slides" / results.file_name(encoder.name)
        for name in table.names:
            path = root / config.path.format(slide=name)
            tiles = slides.open_slide(path, magnification=config.magnification, pixels=config.pixels)
            if tiles.name != name:
                raise InputError(f"slide {name} lies in {path}, whose name is another; call it {name}")
            slide_features.make(tiles, encoder, folder)
        yield encoder.name, str(encoder.checkpoint), folder


def _evaluated(
    config, table: Slides, bags: Bags, kind: str, name: str, folder: epath.Path, truth: dict, out: epath.Path,
    resamples: int, seed: int,
) -> tuple[dict[str, Estimate], list[dict]]:  # fmt: skip
    """Estimates by metric, and heat maps."""
    test = table.rows("test")
    if kind == "probe":
        scores, weights = diagnosis.probe(table, bags, seed), None
    else:
        settings = diagnosis.Settings(**configs.to_dict(config.heads))
        run = out / "runs" / results.file_name(config.name) / results.file_name(name)
        scores, weights, _ = diagnosis.attention(table, bags, settings, run, seed)
    found = diagnosis.estimates(config.name, table, scores, resamples, seed)
    groups = np.unique(table.patients[test], return_inverse=True)[1]
    arrays = {
        "ids": table.names[test],
        "labels": table.labels[test],
        "scores": scores.astype(np.float32),
        "groups": groups,
    }
    results.save_predictions(results.predictions_path(out, name, config.name, f"diagnosis_{kind}"), arrays)
    if weights is None:
        return found, []
    known = [_known(folder, slide, truth) for slide in table.names[test]]
    pairs = [(one, mark) for one, mark in zip(weights, known) if mark is not None and 0 < mark.sum() < len(mark)]
    if pairs:
        found["attention_auc"] = diagnosis.finds(*zip(*pairs), resamples, seed)
    return found, _maps(config, table, scores, weights, known, name, folder, out)


def _known(folder: epath.Path, slide: str, truth: dict) -> np.ndarray | None:
    """Bool `[tiles]`, which tiles are known to matter; None where nothing is known of the slide."""
    path = folder / f"{slide}.json"
    if slide not in truth or not path.exists():
        return None
    places = [tuple(place) for place in io.read_json(path)["places"]]
    if not any(place in truth[slide] for place in places):
        raise InputError(f"config.truth knows no tile of slide {slide} by its place, such as {places[0]}")
    return np.array([truth[slide].get(place, False) for place in places])


def _maps(config, table: Slides, scores, weights, known, name: str, folder: epath.Path, out: epath.Path) -> list[dict]:
    """Heat maps of a few tested slides, classes in turn, as files and as the page shows them."""
    test, found = table.rows("test"), []
    by_class = [np.flatnonzero(table.labels[test] == k) for k in range(len(table.classes))]
    turns = [rows[k] for k in range(config.pictures) for rows in by_class[::-1] if k < len(rows)]
    for k in turns[: config.pictures]:
        slide = str(table.names[test][k])
        told, picture = folder / f"{slide}.json", folder / f"{slide}.jpg"
        if not (told.exists() and picture.exists()):
            continue  # features from elsewhere: nothing is known of the tiles' places
        record = io.read_json(told)
        with picture.open("rb") as file:
            plain = Image.open(file).convert("RGB")
        size = tuple(record["size"])
        drawn = heatmap.draw(plain, np.array(record["places"]), record["side"], size, weights[k], known[k])
        stream = memory.BytesIO()
        drawn.save(stream, "PNG")
        io.write_bytes(
            out / "heatmaps" / results.file_name(name) / f"{results.file_name(slide)}.png", stream.getvalue()
        )
        said = int(scores[k].argmax())
        found.append(
            {"slide": slide, "model": name, "label": table.classes[table.labels[test][k]], "said": table.classes[said],
             "probability": float(scores[k, said]), "marked": known[k] is not None and bool(known[k].any()),
             "slide_picture": heatmap.embedded(plain), "map_picture": heatmap.embedded(drawn)}
        )  # fmt: skip
    return found


def _told(name: str, estimate: Estimate) -> dict[str, float]:
    try:
        low, high = estimate.interval()
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return {"value": float(estimate.value), "low": low, "high": high}


def _rows(about: dict, found: dict[str, Estimate], table: Slides, seed: int) -> list[dict]:
    test = table.rows("test")
    context = {
        "profile": about["task"],
        "classes": len(table.classes),
        "split_hash": io.hash_of([table.names.tolist(), table.splits.tolist()]),
        "bootstrap": {"method": "percentile", "unit": "patient"},
        "undefined_resamples": bootstrap.undefined(found),
    }
    counted = {"n": len(test), "seed": seed, "context": context}
    return [{**about, "metric": metric, **_told(metric, one), **counted} for metric, one in found.items()]
