"""mopeq's scores and prompts beside VLMEvalKit's: python tools/metric_table.py [page]

The fixtures are small tables in the official layout with predictions, and the scores and prompts that two versions of
the unmodified kit made of them. Prints task x rules and writes the table into docs/evaluation.md. The folder with
`fixtures/` is $MOPEQ_SHARED, else `shared` beside the repository. tests/equivalence/test_vlmeval_metrics.py asserts the
same on every run.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import mopeq
from mopeq.data.benchmarks import kind_of
from mopeq.data.readers import Item, read
from mopeq.evaluate.tasks import score

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(os.environ.get("MOPEQ_SHARED") or ROOT.parent / "shared") / "fixtures" / "vlmeval"
PAGE = ROOT / "docs" / "evaluation.md"
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests")]

from seed_sizes import between, head, row  # noqa: E402
from vlmeval_kit import EXPECTED, flat  # noqa: E402

TASKS = {  # the figure that stands for a task
    "AI2D_TEST": "Overall",
    "COCO_VAL": "CIDEr",
    "ChartQA_TEST": "Overall",
    "DocVQA_VAL": "Overall",
    "InfoVQA_VAL": "Overall",
    "MME": "perception",
    "MMMU_DEV_VAL": "validation/Overall",
    "OCRBench": "Final Score",
    "OCRVQA_TESTCORE": "Overall",
    "POPE": "Overall",
    "TextVQA_VAL": "Overall",
}


def words(item: Item) -> list[str]:
    """What a prompt says, a picture as a word."""
    assert item.messages is not None
    return [part.get("text", "(picture)") for part in item.messages[0]["content"]]


def differing_prompts(items: list[Item], prompts: list[list[dict[str, str]]]) -> int:
    wanted = [[p["value"] if p["type"] == "text" else "(picture)" for p in prompt] for prompt in prompts]
    return sum(words(item) != want for item, want in zip(items, wanted, strict=True))


def main() -> None:
    if not FIXTURES.is_dir():
        sys.exit(f"error: {FIXTURES} does not exist\nhint: set MOPEQ_SHARED to the folder that holds fixtures/")
    kits = {rules: json.loads((FIXTURES / name).read_text()) for rules, name in EXPECTED.items()}
    lines = head(
        "task", "metric", "figure", *(f"`{r}`: kit, mopeq" for r in kits), "compared", "differ", "prompts", "differ"
    )
    totals = [0, 0, 0, 0]
    for name, shown in TASKS.items():
        items = read(FIXTURES / f"{name}.tsv")
        said = json.loads((FIXTURES / f"{name}.predictions.json").read_text())
        answers = [said[item.meta["index"]] for item in items]
        cells, counts = [], [0, 0, 0, 0]
        for rules, kit in kits.items():
            wanted, ours = flat(kit[name]["score"]), score(answers, items, rules).table
            assert set(wanted) == set(ours), f"{name}: {set(wanted) ^ set(ours)}"
            cells.append(f"{wanted[shown]:.6g}, {ours[shown]:.6g}" if shown in wanted else "none, none")
            counts[0] += len(wanted)
            counts[1] += sum(not math.isclose(wanted[k], ours[k], rel_tol=1e-12, abs_tol=1e-12) for k in wanted)
            counts[2] += len(items)
            counts[3] += differing_prompts(items, kit[name]["prompts"])
        lines.append(row(f"`{name}`", f"`{kind_of(name)}`", shown, *cells, *map(str, counts)))
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
    lines.append(row("all", "", "", "", "", *map(str, totals)))
    made = f"Made by `python tools/metric_table.py` with mopeq {mopeq.__version__}."
    body = "\n".join([*lines, "", made])
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    page.write_text(between(page.read_text(), "equality", body))
    print(body)


if __name__ == "__main__":
    main()
