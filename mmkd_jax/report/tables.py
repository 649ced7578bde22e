"""Tables of results and the retrieval examples, as HTML."""

import re
from collections.abc import Mapping, Sequence

from mmkd_jax.evals.summary import MEAN
from mmkd_jax.report.board import MODELS, Board, Model, picture
from mmkd_jax.report.markup import Markup, element, interval, number, percent

METRICS = {
    "balanced_accuracy": "Balanced accuracy", "accuracy": "Accuracy", "macro_f1": "Macro F1",
    "macro_auc": "Macro one-versus-rest AUC",
}  # fmt: skip
_RETRIEVAL = re.compile(r"(i2t|t2i)_(R@\d+|median_rank)_of_(\d+)(_strict)?")


def scores(board: Board, task: str, metric: str) -> Markup | None:
    """Models by sets: best in bold, shaded by value, intervals below; None without such numbers."""
    sets = board.datasets(task, metric)
    models = [m for m in board.models if any(board.get(task, metric, one.name, m.name) for one in sets)]
    if not models:
        return None
    values = [row["value"] for one in sets for m in models if (row := board.get(task, metric, one.name, m.name))]
    head = [element("th", "Model", scope="col")]
    for one in sets:
        head.append(
            element("th", one.label, scope="col", title=one.detail, class_="mean" if one.name == MEAN else None)
        )
    body = []
    for model in models:
        cells = [_name(model, board)]
        for one in sets:
            row = board.get(task, metric, one.name, model.name)
            best = board.best(task, metric, one.name, *MODELS)
            cells.append(_cell(row, best, min(values), max(values), one.name == MEAN))
        body.append(element("tr", cells, class_=f"lead {model.kind}" if model == board.highlight else model.kind))
    return _table(f"{METRICS.get(metric, metric)}, in percent", [element("tr", head)], body)


def _cell(row: Mapping | None, best: Mapping | None, low: float, high: float, mean: bool) -> Markup:
    kind = "mean" if mean else None
    if row is None:
        return element("td", "–", class_=kind)
    depth = 0.03 + 0.32 * ((row["value"] - low) / (high - low) if high > low else 0)
    value = percent(row["value"])
    shown = element("b", value) if best and row["value"] == best["value"] else value
    style = f"background:rgb(var(--shade) / {depth:.3f})"
    return element("td", shown, element("small", interval(row)), style=style, class_=kind)


def _name(model: Model, board: Board) -> Markup:
    note = element("small", model.kind) if model.kind != "student" else None
    dot = element("i", class_=f"swatch {'best' if model.kind in ('teacher', 'reference') else model.style}")
    return element("th", dot, model.label, note, scope="row")


def _table(caption: str, head: list[Markup], body: list[Markup]) -> Markup:
    table = element("table", element("caption", caption), element("thead", head), element("tbody", body))
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def retrieval(board: Board, strict: bool) -> list[Markup]:
    """One table a set: recall and median rank in both directions; pools are named."""
    tables = []
    for dataset in dict.fromkeys(r["dataset"] for r in board.rows if r["task"] == "retrieval"):
        rows = [r for r in board.rows if r["task"] == "retrieval" and r["dataset"] == dataset]
        metrics = list(dict.fromkeys(r["metric"] for r in rows))
        parsed = [(m, found.groups()) for m in metrics if (found := _RETRIEVAL.fullmatch(m))]
        kept = [(m, g) for m, g in parsed if bool(g[3]) == strict]
        if kept:
            tables.append(_retrieval_table(board, dataset, kept))
    return tables


def _retrieval_table(board: Board, dataset: str, metrics: list[tuple[str, tuple]]) -> Markup:
    record = next((one for one in board.data.get("datasets", ()) if one["name"] == dataset), {})
    label = record.get("label") or dataset.replace("_", " ")
    first = [element("th", "Model", scope="col", rowspan=2)]
    for direction, words in (("i2t", "image → text"), ("t2i", "text → image")):
        own = [g for _, g in metrics if g[0] == direction]
        if own:
            note = element("small", f"of {own[0][2]} {'captions' if direction == 'i2t' else 'images'}")
            first.append(element("th", words, note, colspan=len(own), scope="colgroup"))
    second = [element("th", g[1].replace("_", " ").replace("median rank", "med."), scope="col") for _, g in metrics]
    body = []
    for model in board.models:
        found = [board.get("retrieval", metric, dataset, model.name) for metric, _ in metrics]
        if not any(found):
            continue
        cells = [_name(model, board)]
        for (metric, parts), row in zip(metrics, found):
            ranked = parts[1] == "median_rank"
            best = board.best("retrieval", metric, dataset, *MODELS, lowest=ranked)
            text = "–" if row is None else number(row["value"]) if ranked else percent(row["value"])
            tip = None if row is None or ranked else f"95 % interval {interval(row)}"
            wins = row is not None and best is not None and row["value"] == best["value"]
            cells.append(element("td", element("b", text) if wins else text, title=tip))
        body.append(element("tr", cells, class_=f"lead {model.kind}" if model == board.highlight else model.kind))
    return _table(label, [element("tr", first), element("tr", second)], body)


def examples(blocks: Sequence[Mapping]) -> list[Markup]:
    """Queries with what a model found for them; right answers are marked by a sign, a word and a colour."""
    parts = []
    for block in blocks:
        cards = [_image_query(item) for item in block.get("i2t", ())]
        cards += [_text_query(item) for item in block.get("t2i", ())]
        title = " on ".join(filter(None, (block.get("model"), block.get("dataset"))))
        parts += [element("h3", title), element("div", cards, class_="cards")]
    return parts


def cases(blocks: Sequence[Mapping], unfolded: int = 4) -> list[Markup]:
    """Pictures of each set that a model had right and wrong; sets after the first few are folded."""
    parts = []
    for place, block in enumerate(blocks):
        rows = [
            element("div", [_case(one, kind) for one in block[kind]], class_="gallery") for kind in ("right", "wrong")
        ]
        title = f"{block['dataset']}: {block['model']}, {percent(block['accuracy'])} % right".replace("_", " ")
        shown = element("div", rows, class_="panel padded")
        if place < unfolded:
            parts += [element("h3", title), shown]
        else:
            parts.append(element("details", element("summary", title), shown))
    return parts


def _case(item: Mapping, kind: str) -> Markup:
    image = element("img", src=picture(item["image"]), alt=item["truth"], loading="lazy")
    said = None if kind == "right" else element("span", "is ", element("q", item["truth"]))
    words = element(
        "figcaption", _verdict(kind == "right"), f" {percent(item['score'])} % ", element("q", item["answer"]), said
    )
    return element("figure", image, words, class_=kind)


def _image_query(item: Mapping) -> Markup:
    found = [
        element("li", _verdict(top["right"]), element("q", top["caption"]), element("small", f"{top['cosine']:.2f}"),
                class_="right" if top["right"] else "wrong")
        for top in item["top"]
    ]  # fmt: skip
    image = element("img", src=picture(item["image"]), alt="Query image", loading="lazy")
    truth = element("p", element("b", "True caption "), element("q", item["caption"]), class_="truth")
    return element(
        "article", element("figure", image), element("div", _rank(item, "captions"), truth, element("ol", found)),
        class_="card i2t",
    )  # fmt: skip


def _text_query(item: Mapping) -> Markup:
    found = []
    for top in item["top"]:
        image = element("img", src=picture(top["image"]), alt=top.get("caption", "Retrieved image"), loading="lazy")
        words = element("figcaption", _verdict(top["right"]), f" {top['cosine']:.2f}")
        found.append(element("figure", image, words, class_="right" if top["right"] else "wrong"))
    query = element("p", element("q", item["caption"]), class_="truth")
    return element("article", _rank(item, "images"), query, element("div", found, class_="strip"), class_="card t2i")


def _rank(item: Mapping, what: str) -> Markup | None:
    if "rank" not in item:
        return None
    return element("p", f"First right answer at rank {item['rank']} of {item['pool']} {what}", class_="rank")


def _verdict(right: bool) -> Markup:
    return element("span", "✓ right" if right else "✗ wrong", class_="verdict")
