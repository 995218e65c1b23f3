"""Tasks: which items belong together, which metric they get, and what an interval is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scipy.stats import binomtest

from mopeq.data.readers import Item
from mopeq.errors import BadInput
from mopeq.evaluate.tasks import agreement, interval, metric_of, run_tasks, task_places


def item(answer: object, dataset: str = "world", category: str = "", **meta: object) -> Item:
    row = {"answer": answer, "dataset": dataset, "category": category, "options": {}, "index": "0"} | meta
    return Item(messages=[{"role": "user", "content": []}], answer=str(answer), meta=row)


@pytest.mark.parametrize(
    ("category", "metric"),
    [("yesno", "yesno"), ("yesno-count", "yesno"), ("document", "anls"), ("chart", "relaxed"), ("caption", "caption")]
    + [("counting", "words"), ("colour", "words"), ("emblem", "words"), ("words", "words"), ("position", "words")],
)
def test_the_metric_of_a_category(category: str, metric: str) -> None:
    assert metric_of([item("x", category=category)]) == metric


def test_options_make_it_multiple_choice() -> None:
    assert metric_of([item("A", category="diagram", options={"A": "x", "B": "y"})]) == "mcq"
    assert metric_of([item("A", dataset="ChartQA_TEST", category="diagram", options={"A": "x"})]) == "relaxed"


def test_tasks_by_category_and_benchmark() -> None:
    asked = [
        item("1", category="counting"),
        item("Yes", category="yesno-count"),
        item("No", category="yesno-position"),
        item("Yes", dataset="POPE", category="random"),
        item("2", dataset="other", category="counting"),
        item("x", dataset="plain"),
    ]
    assert task_places(asked) == {
        **{"world/counting": [0], "yesno": [1, 2], "POPE": [3]},
        **{"other/counting": [4], "plain": [5]},
    }


def test_the_whole_run() -> None:
    asked = [
        item("3", category="counting", index="a"),
        item("4", category="counting", index="b"),
        item("Yes", category="yesno-count"),
        Item(text="a document without a question"),
        Item(messages=[{"role": "user", "content": []}], meta={"dataset": "world"}),
    ]
    seen: list[list[Item]] = []

    def answer(shown: list[Item]) -> list[str]:
        seen.append(shown)
        return ["three", "5", "Yes."]

    records: list[dict] = []
    tasks = run_tasks(asked, answer, records=records)
    assert seen == [asked[:3]]
    assert list(tasks) == ["counting", "yesno"]
    assert tasks["counting"]["score"] == 0.5 and tasks["counting"]["n"] == 2 and tasks["counting"]["Overall"] == 50.0
    assert tasks["yesno"] == {"Overall": 100.0, "yesno-count": 100.0, "score": 1.0, "n": 1} | {
        "ci95": tasks["yesno"]["ci95"]
    }
    assert [(r["task"], r["index"], r["prediction"], r["answer"], r["score"]) for r in records] == [
        ("counting", "a", "three", "3", 1.0),
        ("counting", "b", "5", "4", 0.0),
        ("yesno", "0", "Yes.", "Yes", 1.0),
    ]


def test_circular_intervals_count_questions() -> None:
    options = {"A": "x", "B": "y"}
    asked = [item("A", dataset="MMBench", options=options, index=str(index)) for index in (1, 1000001, 2, 1000002)]
    task = run_tasks(asked, lambda shown: ["A", "A", "A", "B"])["MMBench"]
    assert task["n"] == 2 and task["score"] == 0.5 == task["Overall"]


def test_rules_and_answers_must_be_there() -> None:
    with pytest.raises(BadInput, match="rules"):
        run_tasks([item("x")], lambda shown: ["x"], rules="newest")
    with pytest.raises(BadInput, match="no item"):
        run_tasks([Item(text="x")], lambda shown: [])


@pytest.mark.parametrize(("right", "n"), [(0, 1), (1, 1), (0, 20), (7, 20), (20, 20), (431, 1000)])
def test_intervals_of_ones_and_zeros_are_wilsons(right: int, n: int) -> None:
    wanted = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert interval([1.0] * right + [0.0] * (n - right)) == pytest.approx([wanted.low, wanted.high], abs=1e-9)


def test_other_intervals_are_normal_and_stay_inside() -> None:
    units = [0.2, 0.9, 0.5, 0.5]
    mean = sum(units) / 4
    half = 1.959963984540054 * math.sqrt(sum((u - mean) ** 2 for u in units) / 3 / 4)
    assert interval(units) == pytest.approx([max(0, mean - half), min(1, mean + half)])
    assert interval([0.9, 0.99]) == [pytest.approx(0.945 - 1.959963984540054 * 0.045), 1.0]


def test_the_originals_answers_are_scored_beside() -> None:
    wanted = ["3", "4", "5", "6"]
    asked = [item(w, category="counting", index=str(i)) for i, w in enumerate(wanted)]
    asked[3] = replace(asked[3], images=(b"x",))
    records: list[dict] = []
    units: dict[str, list[float]] = {}
    found = run_tasks(
        asked, lambda _: ["3", "9", "5", "8"], records=records, original=lambda _: ["3", "4", "5", "7"], units=units
    )["counting"]
    assert (found["score"], found["original"], found["agreement"]) == (0.5, 0.75, 0.5)
    assert found["change"]["mean"] == -0.25
    assert found["change"]["ci95"][0] < -0.25 < found["change"]["ci95"][1] == 0.0
    assert units == {"counting": [1.0, 0.0, 1.0, 0.0]}
    assert [row["original"] for row in records] == ["3", "4", "5", "7"]
    alike = agreement(records)
    assert {name: (a["agreement"], a["n"]) for name, a in alike.items()} == {
        "all": (0.5, 4),
        "text": (2 / 3, 3),
        "image": (0.0, 1),
    }
    assert alike["all"]["ci95"][0] < 0.5 < alike["all"]["ci95"][1]
    assert agreement([{"prediction": "3", "modality": "text"}]) == {}  # the original was not asked
