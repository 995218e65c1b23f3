"""Prompts and scores equal VLMEvalKit's, value for value, under both sets of rules.

The fixtures are eleven small tables in the kit's layout with predictions, and what two versions of the unmodified kit
made of them.
"""

from __future__ import annotations

import json

import pytest
from shared_files import shared
from vlmeval_kit import EXPECTED, flat

from mopeq.data.readers import read
from mopeq.evaluate.tasks import run_tasks, score
from mopeq.evaluate.text import KIT, PAPER

BENCHMARKS = (
    *("AI2D_TEST", "COCO_VAL", "ChartQA_TEST", "DocVQA_VAL", "InfoVQA_VAL", "MME"),
    *("MMMU_DEV_VAL", "OCRBench", "OCRVQA_TESTCORE", "POPE", "TextVQA_VAL"),
)


@pytest.mark.parametrize("rules", [PAPER, KIT])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_scores_are_the_kits(name: str, rules: str) -> None:
    folder = shared("fixtures/vlmeval")
    expected = flat(json.loads((folder / EXPECTED[rules]).read_text())[name]["score"])
    said = json.loads((folder / f"{name}.predictions.json").read_text())
    items = read(folder / f"{name}.tsv")
    table = score([said[item.meta["index"]] for item in items], items, rules).table
    assert table == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_the_two_rules_differ_where_they_should() -> None:
    folder = shared("fixtures/vlmeval")
    differ = set()
    for name in BENCHMARKS:
        said = json.loads((folder / f"{name}.predictions.json").read_text())
        items = read(folder / f"{name}.tsv")
        tables = [score([said[item.meta["index"]] for item in items], items, rules).table for rules in (PAPER, KIT)]
        if tables[0] != tables[1]:
            differ.add(name)
    assert differ == {"AI2D_TEST", "ChartQA_TEST"}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts_are_the_kits(name: str) -> None:
    folder = shared("fixtures/vlmeval")
    expected = json.loads((folder / EXPECTED[KIT]).read_text())[name]["prompts"]
    items = read(folder / f"{name}.tsv")
    assert len(items) == len(expected)
    for item, wanted in zip(items, expected, strict=True):
        assert item.messages is not None and len(item.messages) == 1
        parts = item.messages[0]["content"]
        assert [part.get("text", "(image)") for part in parts] == [
            part["value"] if part["type"] == "text" else "(image)" for part in wanted
        ]
        assert len(item.images) == sum(part["type"] == "image" for part in wanted)


def test_all_benchmarks_at_once_through_run_tasks() -> None:
    folder = shared("fixtures/vlmeval")
    items = [item for name in BENCHMARKS for item in read(folder / f"{name}.tsv")]
    said = {name: json.loads((folder / f"{name}.predictions.json").read_text()) for name in BENCHMARKS}
    records: list[dict] = []
    tasks = run_tasks(
        items, lambda asked: [said[i.meta["dataset"]][i.meta["index"]] for i in asked], PAPER, records=records
    )
    assert list(tasks) == list(BENCHMARKS) and len(records) == len(items)
    expected = json.loads((folder / EXPECTED[PAPER]).read_text())
    for name in BENCHMARKS:
        whole = flat(expected[name]["score"])
        assert {key: tasks[name][key] for key in whole} == pytest.approx(whole)
        low, high = tasks[name]["ci95"]
        assert 0 <= low <= tasks[name]["score"] <= high <= 1
        assert tasks[name]["n"] == len(said[name])
