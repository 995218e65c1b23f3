"""`mopeq eval --lm-eval`: a local task folder through the harness itself, offline, packed beside the original.

Skipped where lm-evaluation-harness is not installed (pip install 'mopeq[lm-eval]').
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import made
import pytest
from shared_files import shared

from mopeq.errors import BadInput
from mopeq.harness.lm_eval import find_tasks, language_model, mean_metric, plain_figures, said
from mopeq.verbs.contrast import contrasts
from mopeq.verbs.evaluate import evaluate

here = importlib.util.find_spec("lm_eval") is not None
harness = pytest.mark.skipif(not here, reason="needs lm-evaluation-harness (pip install 'mopeq[lm-eval]')")

CHOICES = """\
task: pick_one
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}} Answer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""
SPOKEN = """\
task: say_it
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs:
  max_gen_toks: 6
  until: ["\\n"]
metric_list:
  - metric: exact_match
"""
ROLLING = """\
task: read_on
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: bits_per_byte
"""
COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three local tasks over twelve questions: choices, an answer in words, a text to read."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    rows = [
        {"question": f"Which colour comes number {n} of {', '.join(COLOURS)}?", "choices": COLOURS, "gold": n % 4}
        for n in range(12)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("pick_one", CHOICES), ("say_it", SPOKEN), ("read_on", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def hf_figures(folder: Path, tasks: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """What the harness's own `hf` model makes of a folder that plain transformers loads."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        "hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=8,
        device="cpu",
        bootstrap_iters=0,
    )
    assert found is not None
    return {name: plain_figures(figures) for name, figures in found["results"].items()}


@harness
def test_a_folder_of_tasks_from_the_command_line(tasks: Path, tmp_path: Path) -> None:
    source, (out, _) = made.source("olmoe"), made.packed("olmoe")
    out = made.copy(out, tmp_path / "out")
    command = [sys.executable, "-c", "from mopeq.cli import main; main()", "eval", str(out), "--against", str(source)]
    command += ["--lm-eval", str(tasks), "--limit", "8", "--window", "128", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert set(result["tasks"]) == {"pick_one", "say_it", "read_on"}
    for name, metrics in (("pick_one", {"acc", "acc_norm"}), ("say_it", {"exact_match"})):
        row = result["tasks"][name]
        assert metrics <= set(row)
        assert row["n"] == 8
        low, high = row["ci95"]
        assert low <= row["score"] <= high
        assert {"original", "change", "agreement"} <= set(row)
    assert set(result["tasks"]["read_on"]) == {"bits_per_byte"}  # no mean of scores: its figure alone
    kept = json.loads((out / ".mopeq" / "eval_items.json").read_text())
    assert [row["task"] for row in kept["answers"]] == ["pick_one"] * 8 + ["say_it"] * 8
    assert all(row["prediction"] in "0123" for row in kept["answers"] if row["task"] == "pick_one")
    assert {name: len(one) for name, one in kept["units"].items()} == {"pick_one": 8, "say_it": 8}


@harness
def test_the_same_figures_as_the_harness_s_own_model(tasks: Path) -> None:
    """A dense checkpoint, by `hf` and by us: every figure alike. A packed one: what its unpacked logits give."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    source, names = made.source("olmoe"), ["pick_one", "say_it", "read_on"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(language_model(source, "cpu"), tasks=names, task_manager=manager, bootstrap_iters=0)
    assert found is not None
    ours, theirs = {n: plain_figures(r) for n, r in found["results"].items()}, hf_figures(source, tasks, names)
    assert ours == theirs
    assert all(math.isfinite(x) for row in ours.values() for x in row.values())


@harness
@pytest.mark.slow
def test_a_trained_dense_model_scores_as_with_hf(tasks: Path) -> None:
    """bench-lm, really trained: the same figures through mopeq's loader and through the harness's."""
    folder = shared("models/bench-lm")
    result = evaluate(folder, lm_eval=[str(tasks)], limit=12, window=128)
    theirs = hf_figures(folder, tasks, ["pick_one", "say_it", "read_on"])
    for name, figures in theirs.items():
        assert {key: result["tasks"][name][key] for key in figures} == pytest.approx(figures, abs=1e-12)


@harness
@pytest.mark.slow
def test_a_vision_language_model_is_asked_in_words_and_compared(tasks: Path, tmp_path: Path) -> None:
    """The embedded model: two checkpoints, measured one after the other, are compared item by item."""
    from mopeq.embedded import model_dir

    outs = {}
    for bits in ("2", "4"):
        outs[bits] = tmp_path / bits
        made.quantize(model_dir(), outs[bits], bits=bits, allocate="uniform", avg_bits=float(bits))
        evaluate(outs[bits], lm_eval=[str(tasks)], window=128, limit=12)
    (found,) = contrasts(outs)
    assert {row[0] for row in found.rows} >= {"perplexity", "pick_one"}


@harness
def test_what_is_no_task(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no task"):
        find_tasks([str(tmp_path)])
    _, found = find_tasks([str(tasks), str(tasks / "say_it.yaml")])
    assert set(found) == {"pick_one", "say_it", "read_on", str(tasks / "say_it.yaml")}


@pytest.mark.skipif(here, reason="lm-evaluation-harness is installed")
def test_without_the_harness_a_line_says_what_to_install() -> None:
    with pytest.raises(BadInput, match="is not here") as told:
        evaluate(made.packed("olmoe")[0], lm_eval=["arc_easy"], window=128, limit=1)
    assert told.value.hint == "pip install 'mopeq[lm-eval]'"


# ------------------------------------------------------------------------------- the harness's own form of results


def test_figures_and_the_metric_that_is_a_mean() -> None:
    samples: list[dict[str, Any]] = [
        {"doc_id": 1, "filter": "none", "acc": 1.0, "loss": 3.0, "filtered_resps": [(-1.0, False), (-0.5, True)]},
        {"doc_id": 0, "filter": "none", "acc": 0.0, "loss": 4.0, "filtered_resps": [(-1.0, False), (-2.5, True)]},
    ]
    figures = {
        "alias": "x",
        "loss,none": 3.5,
        "acc,none": 0.5,
        "acc_stderr,none": 0.5,
        "f1,strict": 0.25,
        "bad,none": "N/A",
    }
    assert plain_figures(figures) == {"loss": 3.5, "acc": 0.5, "f1/strict": 0.25}
    assert mean_metric(figures, samples) == ("acc", "none")
    assert mean_metric({"acc,none": 0.7}, samples) is None  # not the mean of the samples: some other sum
    assert [said(sample) for sample in samples] == ["1", "0"]
    assert said({"filtered_resps": ["four"]}) == "four"
