"""`mopeq eval --data TASK.tsv` on tables in VLMEvalKit's official layout, pictures and all, with the embedded model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import made
import pytest
from shared_files import shared
from vlmeval_kit import EXPECTED, flat

from mopeq.data.readers import read
from mopeq.embedded import model_dir
from mopeq.errors import BadInput
from mopeq.evaluate.tasks import score
from mopeq.evaluate.text import KIT, PAPER
from mopeq.progress import silence
from mopeq.report.facts import read_evaluation
from mopeq.verbs.contrast import contrasts
from mopeq.verbs.evaluate import evaluate

TASKS = (
    *("AI2D_TEST", "COCO_VAL", "ChartQA_TEST", "DocVQA_VAL", "InfoVQA_VAL"),
    *("MME", "MMMU_DEV_VAL", "OCRVQA_TESTCORE", "OCRBench"),
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    with silence():
        made.quantize(model_dir(), out, bits="2,4", avg_bits=3.0)
    return out


def test_one_table_of_each_kind(packed: Path) -> None:
    """Choices, yes or no, words: asked in the family's wording, scored by the rules named, kept item by item."""
    tables = [shared(f"fixtures/vlmeval/{name}.tsv") for name in ("AI2D_TEST", "MME", "ChartQA_TEST")]
    result = evaluate(packed, data=tables, limit=2, window=64, rules=PAPER)
    assert (result["rules"], result["wording"]) == (PAPER, "qwen3_vl_moe")
    assert {name: row["n"] for name, row in result["tasks"].items()} == {"AI2D_TEST": 2, "MME": 2, "ChartQA_TEST": 2}
    kept = json.loads((packed / ".mopeq" / "eval_items.json").read_text())
    assert kept["rules"] == PAPER
    assert len(kept["answers"]) == 6
    assert all(row["prediction"] for row in kept["answers"])
    assert read_evaluation(result).words.endswith("at most 2 rows of each kind, benchmarks by the rules of paper")


def test_rules_are_checked_first(packed: Path) -> None:
    with pytest.raises(BadInput, match="no rules"):
        evaluate(packed, data=[Path("no-such.tsv")], rules="newest")


def test_scores_by_other_rules_are_not_compared(packed: Path, tmp_path: Path) -> None:
    table = shared("fixtures/vlmeval/ChartQA_TEST.tsv")
    folders = {}
    for rules in (PAPER, KIT):
        folders[rules] = made.copy(packed, tmp_path / rules)
        evaluate(folders[rules], data=[table], limit=2, window=64, rules=rules)
    (found,) = contrasts(folders)
    assert [row[0] for row in found.rows] == ["perplexity"]


@pytest.mark.slow
@pytest.mark.parametrize("rules", [PAPER, KIT])
def test_every_task_of_the_paper_from_the_command_line(packed: Path, tmp_path: Path, rules: str) -> None:
    """The tables whole; the figures printed are the metric's of the answers kept, under the kit's names."""
    tables = {name: shared(f"fixtures/vlmeval/{name}.tsv") for name in TASKS}
    kept = tmp_path / "records.jsonl"
    words = ["eval", str(packed), "--rules", rules, "--save", str(kept), "--window", "64", "--json"]
    words += [word for path in tables.values() for word in ("--data", str(path))]
    command = [sys.executable, "-c", "from mopeq.cli import main; main()", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert list(result["tasks"]) == list(TASKS)
    records = [json.loads(line) for line in kept.read_text().splitlines()]
    expected = json.loads((shared("fixtures/vlmeval") / EXPECTED[rules]).read_text())
    for name, path in tables.items():
        said = [row["prediction"] for row in records if row["task"] == name]
        items = read(path)
        table = score(said, items, rules).table
        assert {key: result["tasks"][name][key] for key in table} == table
        assert set(flat(expected[name]["score"])) == set(table)
