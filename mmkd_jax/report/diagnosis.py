"""The page of a diagnosis study: numbers of every model, and heat maps of what attention lay on."""

from collections.abc import Mapping
from typing import Any

from mmkd_jax.report.document import document, table
from mmkd_jax.report.heatmap import SCALE
from mmkd_jax.report.markup import Markup, element, percent

METRICS = {"macro_auc": "AUC", "balanced_accuracy": "Balanced accuracy", "accuracy": "Accuracy", "macro_f1": "Macro F1"}
KINDS = {"attention": "attention over tiles", "probe": "probe on the mean tile"}


def page(study: Mapping[str, Any]) -> str:
    """The document of what `evals.diagnosis_study.evaluate` returns."""
    lede = f"{study['n']} tested slides ({_counts(study)}); {study['fitted']} slides to learn from, no patient in both."
    head = element(
        "header", element("p", f"Diagnosis of slides · {study['name']}", class_="kicker"),
        element("h1", headline(study)), element("p", f"{lede} Percent, 95 % intervals over patients.", class_="lede"),
    )  # fmt: skip
    return document(f"Diagnosis: {study['name']}", head, _numbers(study), _maps(study))


def headline(study: Mapping[str, Any]) -> str:
    """The best model by AUC in a sentence, and whether attention found the tiles, where that is known."""
    best = max(study["models"], key=lambda one: one["metrics"]["macro_auc"]["value"])
    auc = best["metrics"]["macro_auc"]
    span = f"{percent(auc['value'])} % [{percent(auc['low'])}, {percent(auc['high'])}]"
    told = f"{best['model']}, {KINDS[best['kind']]}: AUC {span}"
    found = [one for one in study["models"] if "attention_auc" in one["metrics"]]
    if found:
        first = max(found, key=lambda one: one["metrics"]["attention_auc"]["value"])
        auc = percent(first["metrics"]["attention_auc"]["value"])
        told += f"; attention of {first['model']} finds the deciding tiles with AUC {auc} %"
    return told


def _counts(study: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {name}" for name, count in study["counts"].items())


def _numbers(study: Mapping[str, Any]) -> Markup:
    names = [name for name in (*METRICS, "attention_auc") if any(name in one["metrics"] for one in study["models"])]
    titles = {**METRICS, "attention_auc": "Attention on the deciding tiles, AUC"}
    body = []
    for one in study["models"]:
        label = element("th", one["model"], element("small", KINDS[one["kind"]]), scope="row")
        body.append(element("tr", label, [_cell(one["metrics"].get(name)) for name in names]))
    shown = table("Tested slides", ["Model", *(titles[name] for name in names)], body)
    return element("section", element("h2", "How well slides are told apart"), shown)


def _cell(metric: Mapping[str, float] | None) -> Markup:
    if metric is None:
        return element("td", "–")
    return element(
        "td", percent(metric["value"]), element("small", f"{percent(metric['low'])}–{percent(metric['high'])}")
    )


def _maps(study: Mapping[str, Any]) -> Markup | None:
    if not study["maps"]:
        return None
    marked = any(one["marked"] for one in study["maps"])
    lede = ("Left the slide, right its tiles coloured by the rank of their attention: dark the least, light the most. "
            "Attention shows what the head used, not that it is disease.")  # fmt: skip
    lede += " Blue frames: tiles that are known to decide." if marked else ""
    cards = [_card(one) for one in study["maps"]]
    stops = ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*colour) for colour in SCALE)
    bar = "display:inline-block;width:220px;height:12px;border-radius:6px;vertical-align:middle"
    bar = element("span", style=f"{bar};background:linear-gradient(90deg,{stops})")
    scale = element("p", "least ", bar, " most attention", class_="note")
    return element("section", element("h2", "What attention lay on"), element("p", lede, class_="lede"), scale,
                   element("div", cards, class_="cards"))  # fmt: skip


def _card(one: Mapping[str, Any]) -> Markup:
    style = "width:calc(50% - 4px);height:auto;border-radius:6px"
    pictures = [
        element("img", src=one["slide_picture"], alt=f"slide {one['slide']}", style=style + ";margin-right:8px"),
        element("img", src=one["map_picture"], alt=f"attention on slide {one['slide']}", style=style),
    ]
    odds = f"{percent(one['probability'])} %"
    words = f"{one['slide']}: {one['label']}; {one['model']} says {one['said']} ({odds})"
    return element("div", element("div", pictures), element("p", words, class_="note"), class_="card")
