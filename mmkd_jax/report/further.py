"""Every number of the tasks that have no part of their own on the page: profiles, findings, few labels, neighbours."""

from mmkd_jax.report.board import Board
from mmkd_jax.report.markup import Markup, element, number

# A task whose name begins so is shown elsewhere on the page or on a page of its own; `retrieval_all` is not.
_ELSEWHERE = ("zeroshot", "linear_probe", "retrieval")
_STUDIES = ("vqa", "survival", "diagnosis")


def sections(board: Board) -> list[Markup]:
    """A table a task and set, metrics by models, each number as results.json has it, its interval below."""
    places = dict.fromkeys((row["task"], row["dataset"]) for row in board.rows)
    return [
        _table(board, task, dataset)
        for task, dataset in places
        if task not in _ELSEWHERE and task.partition("_")[0] not in _STUDIES
    ]


def _table(board: Board, task: str, dataset: str) -> Markup:
    rows = [row for row in board.rows if (row["task"], row["dataset"]) == (task, dataset)]
    models = [model for model in board.models if any(row["model"] == model.name for row in rows)]
    head = [element("th", words, scope="col") for words in ("Number", *(model.label for model in models))]
    body = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        found = [board.get(task, metric, dataset, model.name) for model in models]
        body.append(element("tr", element("th", metric.replace("_", " "), scope="row"), [_cell(row) for row in found]))
    unit = ", in percent" if any(row["context"].get("unit") == "percent" for row in rows) else ""
    caption = f"{task} on {dataset}{unit}".replace("_", " ")
    table = element("table", element("caption", caption), element("thead", element("tr", head)), element("tbody", body))
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _cell(row: dict | None) -> Markup:
    if row is None:
        return element("td", "–")
    return element("td", number(row["value"]), element("small", f"{number(row['low'])} to {number(row['high'])}"))
