"""The report: well formed, self-contained, escaped, and with the numbers that it was given."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from mmkd_jax import report
from mmkd_jax.cli import main
from mmkd_jax.errors import InputError
from mmkd_jax.evals import results
from mmkd_jax.report import bars, curves, markup, plot
from mmkd_jax.report.board import Board, picture, thumbnail

ATTACK = "<script>alert('x')</script> & \"quotes\" </title></svg>"
VOID = {"meta", "img"}


def row(model, dataset, value, task="zeroshot", metric="balanced_accuracy", **context):
    context = {"classes": 4, "modality": "ct"} | context
    about = {"model": model, "checkpoint": "", "dataset": dataset, "task": task, "metric": metric}
    return {**about, "value": value, "low": value - 0.1, "high": value + 0.1, "n": 50, "seed": 0, "context": context}


def sample():
    """Two students, a control, two teachers, two sets and all sections."""
    scores = {
        "plus": (0.71, 0.52), "public": (0.6, 0.4), "clip_only": (0.5, 0.3),
        "teacher:ct": (0.75, 0.2), "teacher:skin": (0.3, 0.45),
    }  # fmt: skip
    rows = []
    for model, values in scores.items():
        rows += [row(model, d, v) for d, v in zip(("lung ct", "moles"), values)]
        rows += [row(model, "mean", sum(values) / 2, datasets=["lung ct", "moles"])]
        rows += [row(model, "lung ct", values[0], task="linear_probe")]
        for metric in ("i2t_R@1_of_7", "t2i_R@1_of_9", "i2t_R@1_of_9_strict"):
            rows.append(row(model, "cases", values[1], task="retrieval", metric=metric))
        rows.append(row(model, "cases", 10 * (1 - values[1]), task="retrieval", metric="i2t_median_rank_of_7"))
    image = thumbnail(Image.new("RGB", (30, 20), (200, 10, 10)))
    found = {"caption": "a found caption", "cosine": 0.5, "right": True}
    return {
        "title": "a test",
        "headline": "The student is good.",
        "rows": rows,
        "models": [{"name": "clip_only", "label": "no distillation", "kind": "control"}, {"name": "public"}],
        "highlight": "plus",
        "differences": [{"label": "plus minus public", "value": 0.1, "low": 0.05, "high": 0.15}],
        "curves": {"plus": [(i, {"loss": 5 / (1 + i)}) for i in range(60)], "stage1": [[0, {"other": 1.0}]]},
        "timings": [("read", 3.0), ("train", 57.0)],
        "examples": [
            {
                "model": "plus",
                "dataset": "cases",
                "i2t": [{"image": image, "caption": "truth", "rank": 2, "pool": 7, "top": [found]}],
                "t2i": [{"caption": "asked", "rank": 1, "pool": 9, "top": [{**found, "image": image, "right": False}]}],
            }
        ],
        "provenance": {"commit": "abc", "versions": {"jax": "0.10"}, "licences": ["CC BY 4.0"]},
        "notes": ["Small models."],
    }


class Page(HTMLParser):
    """Checks that every element is closed in order; keeps attributes and text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.links, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for k, v in attributes if k in ("src", "href", "action", "srcset", "xlink:href")]
        assert not [k for k, _ in attributes if k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)


@pytest.fixture
def page(tmp_path):
    report.write_report(tmp_path / "report.html", sample())
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_is_well_formed_and_stands_alone(page):
    parsed = Page(page)
    assert page.startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "object"} & set(parsed.tags)
    assert parsed.links
    assert all(link.startswith("data:image/jpeg;base64,") for link in parsed.links)
    outside = re.sub(r'xmlns="[^"]*"', "", page)
    assert not re.search(r"https?:|url\(|@import", outside)
    assert "prefers-color-scheme: dark" in page


def test_page_has_every_section_and_number(page):
    text = " ".join(Page(page).texts)
    for words in ("The student is good.", "no distillation", "Mean of 2 sets", "plus minus public", "Small models.",
                  "57 s", "CC BY 4.0", "a found caption", "truth", "asked", "rank 2 of 7 captions"):  # fmt: skip
        assert words in text, words
    for number in ("71.0", "52.0", "61.5", "+10.0"):
        assert number in text
    assert "61.0–81.0" in text
    assert "1 of 2" in re.sub(r"\s+", " ", text)  # ahead of the best teacher on one set of two
    for name in ("scores", "zeroshot", "linear_probe", "retrieval", "examples", "training", "time", "notes"):
        assert f'id="{name}"' in page


def test_sections_without_data_are_left_out(tmp_path):
    report.write_report(tmp_path / "r.html", {"title": "empty"})
    page = (tmp_path / "r.html").read_text()
    assert Page(page).tags.count("section") == 0
    assert "<h1>empty</h1>" in page


def test_text_from_data_is_escaped(tmp_path):
    """The same attack in every field that may hold text."""
    data = json.loads(json.dumps(sample()))

    def poison(value, key=None):
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v, key) for v in value]
        fixed = ("image", "task", "metric", "model", "name", "kind", "dataset", "highlight", "checkpoint", "datasets")
        return ATTACK if isinstance(value, str) and key not in fixed else value

    data = poison(data)
    data["models"] = [{"name": "plus", "label": ATTACK}]
    data["datasets"] = [{"name": "lung ct", "label": ATTACK, "detail": ATTACK}, {"name": "cases", "label": ATTACK}]
    data["provenance"] = {ATTACK: {ATTACK: [ATTACK, {ATTACK: ATTACK}]}}
    data["timings"], data["curves"] = [(ATTACK, 1.0)], {ATTACK: [(0, {ATTACK: 1.0}), (1, {ATTACK: 2.0})]}
    data["rows"] += [row(ATTACK, ATTACK, 0.5)]
    report.write_report(tmp_path / "r.html", data)
    page = (tmp_path / "r.html").read_text()
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "<script" not in page
    assert sum(ATTACK in text for text in parsed.texts) >= 12
    ElementTree.fromstring(report.main_plot_svg(data))


def test_the_escape_test_can_fail():
    """Negative control: markup that is passed on as it is would be noticed."""
    assert "script" in Page(str(markup.element("p", markup.Markup("<script></script>")))).tags
    assert "script" not in Page(str(markup.element("p", "<script></script>", title='"><script>'))).tags


@pytest.mark.parametrize(
    "uri",
    ["https://example.org/a.jpg", "data:text/html;base64,AAAA", "data:image/svg+xml;base64,AAAA",
     'data:image/png;base64,AAAA" onerror="x', "", None, b"data"],
)  # fmt: skip
def test_only_embedded_pictures_are_shown(uri, tmp_path):
    data = sample()
    data["examples"][0]["i2t"][0]["image"] = uri
    with pytest.raises(InputError, match="embedded"):
        report.write_report(tmp_path / "r.html", data)
    assert not (tmp_path / "r.html").exists()


def test_thumbnails_are_small_rgb_jpegs():
    for image in (Image.new("L", (800, 400)), Image.new("RGBA", (400, 800)), Image.new("P", (3, 3))):
        assert picture(thumbnail(image)).startswith("data:image/jpeg;base64,/9j/")
    assert len(thumbnail(Image.new("RGB", (2000, 2000)))) < 3000


def marks(svg, style):
    """Centres of the circles in groups of a style."""
    space = "{http://www.w3.org/2000/svg}"
    groups = [
        g for g in svg.iter(f"{space}g") if style in g.get("class", "").split() and g.find(f"{space}title") is not None
    ]
    return [float(c.get("cx")) for g in groups for c in g.iter(f"{space}circle")]


def test_main_plot_stands_alone_and_puts_marks_where_the_numbers_say():
    svg = ElementTree.fromstring(report.main_plot_svg(sample()))
    space = "{http://www.w3.org/2000/svg}"
    assert svg.find(f"{space}style") is not None
    assert "lung ct" in svg.find(f"{space}desc").text
    assert "plus 71.0" in svg.find(f"{space}desc").text
    board = Board(sample())
    frame = plot._frame(board, board.datasets("zeroshot", "balanced_accuracy"), "zeroshot", "balanced_accuracy", 1000)
    wanted = [frame.x(v) for v in ((0.71 + 0.52) / 2, 0.71, 0.52)]
    np.testing.assert_allclose(marks(svg, "s0"), wanted, atol=0.01)
    others = [frame.x(v) for v in (0.375, 0.3, 0.2)]  # the teacher that is not the best of the row
    others[0] = frame.x(min((0.75 + 0.2) / 2, (0.3 + 0.45) / 2))
    np.testing.assert_allclose(marks(svg, "t"), others, atol=0.01)
    assert (frame.x(0.0), frame.x(1.0)) == (frame.left, frame.right)  # the lowest interval reaches down to 0.1
    for element in svg.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(name, 0)) <= 1000


def test_main_plot_needs_zero_shot_scores():
    with pytest.raises(InputError, match="evaluate the task zeroshot"):
        report.main_plot_svg({"rows": [row("a", "b", 0.5, task="linear_probe")]})
    only = {"rows": [row("a", "b", 0.5)]}  # one model, one set, no teacher, no mean
    ElementTree.fromstring(report.main_plot_svg(only))
    ElementTree.fromstring(report.main_plot_svg(only, width=360))


def test_models_are_told_apart_by_colour_and_shape():
    board = Board(sample())
    assert [m.name for m in board.models][:2] == ["clip_only", "public"]
    looks = {m.name: (m.kind, m.style, m.shape) for m in board.models}
    assert looks["plus"] == ("student", "s0", "circle")
    assert looks["public"] == ("student", "s1", "square")
    assert looks["clip_only"] == ("control", "c", "cross")
    assert looks["teacher:ct"][0] == "teacher"
    assert board.highlight.name == "plus"
    assert Board({"rows": sample()["rows"]}).highlight.name == "clip_only"  # the last student without more words
    drawn = [m for m in board.models if m.shape]
    assert len({(m.style, m.shape) for m in drawn}) == len(drawn)


def test_a_reference_is_shown_but_never_the_best(tmp_path):
    data = sample()
    data["rows"].append(row("oracle", "lung ct", 0.99))
    data["models"].append({"name": "oracle", "kind": "reference"})
    report.write_report(tmp_path / "r.html", data)
    page = (tmp_path / "r.html").read_text()
    assert "99.0" in page
    assert "<b>99.0</b>" not in page
    assert "<b>75.0</b>" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_line": "x"}, "did you mean 'headline'"),
        ({"notes": "x"}, "must be a list"),
        ({"highlight": "pluss"}, "did you mean 'plus'"),
        ({"rows": [{"model": "x"}]}, "must have exactly the fields"),
        ({"models": [{"label": "x"}]}, "must have a name"),
        ({"models": [{"name": "plus", "kind": "pupil"}]}, "kind of"),
        ({"differences": [{"label": "x", "value": 1.0}]}, "must have label, value, low and high"),
    ],
)
def test_wrong_data_is_refused(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        report.write_report(tmp_path / "r.html", sample() | change)
    assert not list(tmp_path.iterdir())


def test_curves_are_smoothed_without_bias_and_drawn():
    line = np.arange(101.0)
    np.testing.assert_allclose(curves.smooth(line), line)  # a straight line stays as it is, also at the ends
    noise = np.random.default_rng(0).standard_normal(400)
    assert curves.smooth(noise)[50:-50].std() < 0.3
    board = Board(sample())
    panels = curves.panels(board, sample()["curves"])
    assert len(panels) == 2
    assert 'class="s0"' in panels[0]  # the colour of the model of that name
    assert "other" in panels[1]  # a run without a loss shows what it has
    for panel in (*panels, *curves.panels(board, {"flat": [(0, {"loss": 1.0}), (1, {"loss": 1.0})]})):
        ElementTree.fromstring(panel)
    assert curves.panels(board, {"broken": [(0, {"loss": float("nan")})], "none": []}) == []
    assert len(curves.panels(board, {"two": [(0, {"loss": 1.0, "b": 2.0})]}, ["loss", "b", "c"])) == 2


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (1.3, 4.2), (0.0012, 0.0019), (10, 900), (-3, 5)):
        ticks = curves._ticks(low, high)
        assert 3 <= len(ticks) <= 7 or (low, high) == (0, 1), (low, high, ticks)
        assert low <= ticks[0] < ticks[-1] <= high * (1 + 1e-9)


def test_long_timelines_are_added_up():
    timings = [(f"train {name} (seed {seed})", 10.0) for name in "abc" for seed in range(6)]
    assert bars.timeline(timings).count("<li>") == 3
    assert "1 min 00 s" in bars.timeline(timings)
    assert bars.timeline(timings[:5]).count("<li>") == 5
    assert bars.timeline([("nothing", 0.0)]).count("<li>") == 1


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1.0, "1"), (0.12345, "0.123"), (12.345, "12.3"), (1234.5, "1,234"), (100, "100"),
                        (1e-5, "1.0e−05"), (-0.5, "−0.5"), (99.96, "100"), (float("inf"), "not finite")],
)  # fmt: skip
def test_numbers_are_sensible(value, text):
    assert markup.number(value) == text


def test_small_texts():
    assert [markup.signed(v) for v in (0.0421, -0.0004, -0.02)] == ["+4.2", "±0.0", "−2.0"]
    assert [markup.duration(s) for s in (4.21, 59, 61, 3599.6, 7500)] == [
        "4.2 s", "59 s", "1 min 01 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip
    nested = markup.element("a", ["x<", None, [markup.element("b")]], class_="c", stroke_width=2.0, title=None)
    assert nested == '<a class="c" stroke-width="2">x&lt;<b></b></a>'


def test_command_rebuilds_from_data_or_results(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "no report_data.json and no results.json" in capsys.readouterr().err
    results.save(tmp_path / "results.json", sample()["rows"])
    assert main(["report", str(tmp_path)]) == 0
    assert "report.html" in capsys.readouterr().out
    first = (tmp_path / "report.html").read_text()
    assert "The student is good." not in first
    (tmp_path / "report_data.json").write_text(json.dumps(sample()))
    assert main(["report", str(tmp_path)]) == 0
    assert "The student is good." in (tmp_path / "report.html").read_text()
    (tmp_path / "report_data.json").write_text("[]")
    assert main(["report", str(tmp_path)]) == 2
