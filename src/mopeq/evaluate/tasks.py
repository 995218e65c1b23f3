"""Items and a way to answer them -> a score for each task.

A task is one of VLMEvalKit's benchmarks (known by its file's name), or a category of any other data file. The metric
follows: the benchmark's own; for a category the one that its name asks for (CATEGORIES), multiple choice where there
are options, else the same words in normal form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from mopeq.data.benchmarks import kind_of
from mopeq.data.readers import Item
from mopeq.errors import BadInput
from mopeq.evaluate import METRICS
from mopeq.evaluate.metrics import Scored, as_the_kit_loads
from mopeq.evaluate.paired import mean_of
from mopeq.evaluate.text import KIT, RULES
from mopeq.tables import pick

Answer = Callable[[list[Item]], list[str]]
Z95 = 1.959963984540054
CATEGORIES = ((r"yesno(-.*)?", "yesno"), (r"document", "anls"), (r"chart", "relaxed"), (r"caption", "caption"))


def run_tasks(
    items: Sequence[Item],
    answer: Answer,
    rules: str = KIT,
    records: list[dict] | None = None,
    original: Answer | None = None,
    units: dict[str, list[float]] | None = None,
) -> dict[str, dict[str, Any]]:
    """{task: {metric: value, "score", "n", "ci95": [low, high]}}, in the order of the items.

    answer: items -> what the model says to each; called once, with every item that has a right answer
    original: the same of the original model; then "original" (its score), "change" (of the score, with its paired
      interval, see paired.py) and "agreement" (share of items answered in the same words) are added
    units: for each task what its score is a mean of, to be compared with another checkpoint's
    rules: for VLMEvalKit's benchmarks, "paper" or "vlmeval-0.0.20" (metrics.py tells the difference)
    records: one dict an item is appended: task, index, source, prediction, answer, score
    `score` is the mean of the items' scores, 0 to 1, and ci95 its 95 % interval (Wilson's where scores are 0 or 1);
    the metric's own values keep their names and scales. BadInput if nothing can be scored.
    """
    known_rules(rules)
    asked = [item for item in items if item.messages is not None and item.answer is not None]
    if not asked:
        raise BadInput("no item has a question and its answer", "tasks need data with answers, such as a TSV")
    said, theirs = answer(asked), None if original is None else original(asked)
    assert len(said) == len(asked), f"{len(said)} answers to {len(asked)} items"
    tasks = {}
    for name, places in task_places(asked).items():
        group, texts = [asked[place] for place in places], [said[place] for place in places]
        scored = score(texts, group, rules)
        tasks[name] = scored.table | summary(scored)
        found = [_record(name, *row) for row in zip(group, texts, scored.score_of, strict=True)]
        if theirs is not None:
            others = [theirs[place] for place in places]
            tasks[name] |= against(scored, score(others, group, rules), texts, others)
            found = [row | {"original": other} for row, other in zip(found, others, strict=True)]
        if records is not None:
            records += found
        if units is not None:
            units[name] = units_of(scored)
    return tasks


def known_rules(rules: str) -> None:
    """BadInput for rules that are none."""
    if rules not in RULES:
        raise BadInput(f"no rules are called {rules!r}", f"choose from: {', '.join(RULES)}")


def against(scored: Scored, other: Scored, texts: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """The original's score, the change of the score from it, and how often both say the same."""
    ours, theirs = units_of(scored), units_of(other)
    change = mean_of([a - b for a, b in zip(ours, theirs, strict=True)])
    same = [a == b for a, b in zip(texts, others, strict=True)]
    return {"original": math.fsum(theirs) / len(theirs), "change": change, "agreement": sum(same) / len(same)}


def agreement(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{"all", "text", "image": {"agreement", "ci95", "n"}}: the share of items both models answer in the same words;
    empty where the original's answers are not known."""
    found = {}
    for name in ("all", "text", "image"):
        rows = [row for row in records if "original" in row and name in ("all", row["modality"])]
        if rows:
            same = [float(row["prediction"] == row["original"]) for row in rows]
            found[name] = {"agreement": math.fsum(same) / len(same), "ci95": interval(same), "n": len(same)}
    return found


def task_places(items: Sequence[Item]) -> dict[str, list[int]]:
    """{task: places of its items}. Categories of two files that share a name are told apart by the file's."""
    datasets: dict[str, set[str]] = {}
    for item in items:
        datasets.setdefault(_category(item), set()).add(item.meta.get("dataset", ""))
    tasks: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        dataset, category = item.meta.get("dataset", ""), _category(item)
        shared = len(datasets[category]) > 1 and category != dataset
        tasks.setdefault(f"{dataset}/{category}" if shared else category, []).append(place)
    return tasks


def score(predictions: Sequence[str], items: Sequence[Item], rules: str = KIT) -> Scored:
    """One task's score. The benchmarks' answers go the way of the kit's files first; other data is taken as it is."""
    metric = pick(METRICS, metric_of(items), "metric")
    if kind_of(items[0].meta.get("dataset", "")) is None:
        return metric(predictions, items, KIT)
    return metric(*as_the_kit_loads(predictions, items), rules)


def metric_of(items: Sequence[Item]) -> str:
    """The row of METRICS for one task's items."""
    kind = kind_of(items[0].meta.get("dataset", ""))
    if kind is not None:
        return kind
    named = next((metric for pattern, metric in CATEGORIES if re.fullmatch(pattern, _category(items[0]))), None)
    return named or ("mcq" if all(item.meta.get("options") for item in items) else "words")


def summary(scored: Scored) -> dict[str, Any]:
    """score, n and ci95 of what the score is a mean of."""
    units = units_of(scored)
    mean = math.fsum(units) / len(units)
    return {"score": mean, "n": len(units), "ci95": interval(units)}


def units_of(scored: Scored) -> list[float]:
    return scored.score_of if scored.units is None else scored.units


def interval(units: Sequence[float]) -> list[float]:
    """95 % interval of the mean of values in 0 … 1: Wilson's for zeros and ones, else normal, kept inside 0 … 1."""
    n, mean = len(units), math.fsum(units) / len(units)
    if all(unit in (0.0, 1.0) for unit in units):
        middle = (mean + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(mean * (1 - mean) / n + Z95**2 / (4 * n * n))
    else:
        middle = mean
        half = Z95 * math.sqrt(math.fsum((unit - mean) ** 2 for unit in units) / max(1, n - 1) / n)
    return [max(0.0, min(mean, middle - half)), min(1.0, max(mean, middle + half))]  # rounding keeps the mean inside


def _category(item: Item) -> str:
    """The task an item belongs to: its benchmark, else its category (`yesno-…` are kinds of one), else its file."""
    dataset = item.meta.get("dataset", "")
    if kind_of(dataset) is not None:
        return dataset
    category = str(item.meta.get("category") or dataset or "task")
    return "yesno" if category.startswith("yesno-") else category


def _record(task: str, item: Item, prediction: str, value: float) -> dict[str, Any]:
    answer = item.meta.get("answer", item.answer)
    modality = "image" if item.images else "text"
    record = {"task": task, "index": item.meta.get("index"), "source": item.source, "modality": modality}
    return record | {"prediction": prediction, "answer": answer, "score": value}
