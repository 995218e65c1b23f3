"""lm-evaluation-harness asks, mopeq's checkpoints answer: `pip install 'mopeq[lm-eval]'`.

    mopeq eval OUT --lm-eval TASK                       from the command line, with intervals and the original beside
    lm_eval.simple_evaluate(language_model("OUT"), …)   from Python, as the harness does it

Prompts, requests and metrics are the harness's; its `hf` model does the asking, with the packed model inside. What is
kept of a task: its own figures, and item by item the first of its metrics that is a mean of values from 0 to 1.
A built-in task's data set is fetched by the harness; a folder of task files stays on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mopeq.checkpoint import find_folder
from mopeq.data.encode import max_positions
from mopeq.data.processor import load_processor, tokenizer_of
from mopeq.errors import BadInput, MopeqError, first_line
from mopeq.evaluate.metrics import Scored
from mopeq.evaluate.tasks import against, summary
from mopeq.models import load_model, pick_device
from mopeq.packed import check_if_sealed
from mopeq.progress import say

Tasks = tuple[Any, list[str]]  # the harness's task manager, and what to ask it for
BATCH = 8  # requests in one pass
INSTALL = "pip install 'mopeq[lm-eval]'"
NAME, FILTER = "{}/{}", "none"  # a figure of a filter that is not the harness's default bears its name


def model_class() -> Any:
    """The harness's `hf` model; BadInput where it is not installed."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise BadInput(f"lm-evaluation-harness is not here ({first_line(error)})", INSTALL) from None
    return HFLM


def language_model(out: str | Path, device: str = "auto", batch_size: int = BATCH) -> Any:
    """A model for `lm_eval.simple_evaluate`: the packed checkpoint (or any that transformers loads) at OUT."""
    import torch

    model_class()
    folder, _ = find_folder(out)
    check_if_sealed(folder)
    place = pick_device(device)
    model = load_model(folder, torch.bfloat16 if place == "cuda" else torch.float32, place)
    return harness_model(model, load_processor(folder), batch_size)


def harness_model(model: Any, processor: Any, batch_size: int = BATCH) -> Any:
    """A loaded model as the harness takes one. Positions and tokenizer are the checkpoint's."""
    return model_class()(
        pretrained=model,
        backend="causal",
        tokenizer=tokenizer_of(processor),
        max_length=max_positions(model.config),
        batch_size=batch_size,
    )


def run_harness(
    tasks: Tasks,
    model: Any,
    original: Any | None,
    processor: Any,
    limit: int | None,
    records: list[dict[str, Any]],
    units: dict[str, list[float]],
) -> dict[str, dict[str, Any]]:
    """{task: the harness's figures, and "score", "n", "ci95" where one of them is a mean of values from 0 to 1}.

    tasks: from find_tasks. original: the model to compare with, if it is in memory; then "original", "change" and
    "agreement" as evaluate.tasks has them.
    records, units: item by item, as for every other task.
    """
    ours = asked(tasks, harness_model(model, processor), limit)
    theirs = None if original is None else asked(tasks, harness_model(original, processor), limit)
    found: dict[str, dict[str, Any]] = {}
    for name, figures in ours["results"].items():
        found[name] = plain_figures(figures)
        samples = ours["samples"].get(name, [])
        metric = mean_metric(figures, samples)
        if metric is None:
            continue
        scored, said = values(samples, *metric)
        found[name] |= summary(scored)
        units[name] = scored.score_of
        rows = [_record(name, sample, *metric) for sample in _of(samples, metric[1])]
        if theirs is not None:
            other, others = values(theirs["samples"][name], *metric)
            found[name] |= against(scored, other, said, others)
            rows = [row | {"original": answer} for row, answer in zip(rows, others, strict=True)]
        records += rows
    return found


def find_tasks(names: Sequence[str]) -> Tasks:
    """Names that the harness knows, folders of task files, task files. BadInput for what is none of these."""
    model_class()
    from lm_eval.tasks import TaskManager

    folders = [name for name in names if Path(name).is_dir()]
    files = [name for name in names if Path(name).is_file()]
    known = [name for name in names if name not in folders and name not in files]
    say("finding the harness's tasks")
    local = TaskManager(include_path=folders, include_defaults=False).all_subtasks if folders else []
    if folders and not local:
        raise BadInput(f"{folders[0]} holds no task files", "a task is a .yaml file with `task: NAME`")
    manager = TaskManager(include_path=folders or None, include_defaults=bool(known))
    for name in known:
        if not manager.match_tasks([name]):
            raise BadInput(f"lm-evaluation-harness has no task {name!r}", "lm-eval ls tasks lists them")
    return manager, [*known, *files, *(name for name in local if name not in known)]


def asked(tasks: Tasks, model: Any, limit: int | None) -> dict[str, Any]:
    """The harness's own results, samples kept. Its data sets may be missing, or its tasks faulty: told in one line."""
    from lm_eval import simple_evaluate

    manager, names = tasks
    try:
        found = simple_evaluate(model, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0)
    except MopeqError:
        raise
    except Exception as problem:  # whatever task files, data sets and their loaders raise
        raise MopeqError(
            f"lm-evaluation-harness stopped: {type(problem).__name__}: {first_line(problem)}",
            "is the task's data set at hand? A built-in one is fetched from the hub",
        ) from problem
    assert found is not None
    return dict(found)


def plain_figures(figures: dict[str, Any]) -> dict[str, float]:
    """The harness's "acc,none": 0.5 as "acc": 0.5. Standard errors and what is no number are left out."""
    out = {}
    for key, value in figures.items():
        name, _, filtered = key.partition(",")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if filtered and number and not name.endswith("_stderr"):
            out[name if filtered == FILTER else NAME.format(name, filtered)] = float(value)
    return out


def mean_metric(figures: dict[str, Any], samples: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    """(metric, filter) of the first figure that is the mean of the samples' values, all of them from 0 to 1."""
    for key, value in figures.items():
        name, _, filtered = key.partition(",")
        kept = _of(samples, filtered)
        rows = [float(x) for sample in kept if isinstance(x := sample.get(name), (int, float)) and 0 <= x <= 1]
        whole = len(rows) == len(kept) > 0 and isinstance(value, (int, float))
        if whole and abs(math.fsum(rows) / len(rows) - value) < 1e-9:
            return name, filtered
    return None


def values(samples: Sequence[dict[str, Any]], metric: str, filtered: str) -> tuple[Scored, list[str]]:
    """(each item's score, what was said to it)."""
    rows = _of(samples, filtered)
    return Scored([float(row[metric]) for row in rows], {}), [said(row) for row in rows]


def said(sample: dict[str, Any]) -> str:
    """The answer in a sample: its text, or the number of the likeliest choice."""
    answers = sample["filtered_resps"]
    if all(isinstance(answer, (list, tuple)) for answer in answers) and len(answers) > 1:
        return str(max(range(len(answers)), key=lambda place: answers[place][0]))
    return str(answers[0]) if len(answers) == 1 else str(answers)


def _of(samples: Sequence[dict[str, Any]], filtered: str) -> list[dict[str, Any]]:
    return sorted((row for row in samples if row["filter"] == filtered), key=lambda row: row["doc_id"])


def _record(task: str, sample: dict[str, Any], metric: str, filtered: str) -> dict[str, Any]:
    record = {"task": task, "index": str(sample["doc_id"]), "source": f"lm-eval {task}", "modality": "text"}
    score = {"score": float(sample[metric]), "metric": metric if filtered == FILTER else NAME.format(metric, filtered)}
    return record | {"prediction": said(sample), "answer": str(sample["target"])} | score
