"""What a checkpoint's saved sensitivities still tell: other budgets, and what other yardsticks would change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mopeq.alloc.baselines import costs_from_scores
from mopeq.checkpoint import read_json
from mopeq.deciding import item_costs, solve
from mopeq.errors import BadInput
from mopeq.job import Job
from mopeq.nouns import Format, MoESpec, PrecisionMap, Sensitivity
from mopeq.plan import other_outputs
from mopeq.report.explore import Explorer
from mopeq.report.facts import MODALITIES, Missing, whole_number
from mopeq.report.study import Study, minmax_product
from mopeq.report.study import study as study_of
from mopeq.verbs.map import job_of, run_of, saved_sensitivities, saved_sensitivity

# ------------------------------------------------------------------------------------------- another budget


BYTES = "BYTES"  # stands for them in a command


def can_solve(facts: Mapping[str, Any]) -> bool:
    """Whether a sensitivity and the knapsack chose the checkpoint's map."""
    options = facts.get("options")
    return isinstance(options, dict) and options.get("map") is None and options.get("allocate") == "knapsack"


def gather_explorer(out: Path, facts: dict[str, Any], command: str, missing: dict[str, Missing]) -> Explorer | None:
    """What other budgets are solved from: the sensitivity, and the source's headers for the shapes. `command` makes
    such a checkpoint, with BYTES for its budget."""
    if not can_solve(facts):
        return None  # there is no budget to change; why there is no sensitivity is said elsewhere
    try:
        job = opened(facts, None)
        saved = saved_sensitivity(run_of(out, facts), facts, job)
        if saved is None:
            return None
        before, _, after = command.rpartition(BYTES)
        result = facts.get("result")
        start = whole_number(result.get("bytes_weights")) if isinstance(result, dict) else None
        return explorer_of(job, saved, start or 0, (before, after))
    except BadInput as problem:
        missing["explorer"] = Missing(f"Other budgets cannot be tried here: {problem.line}.", command)
        return None


def opened(facts: dict[str, Any], avg_bits: float | None) -> Job:
    """The checkpoint's job at a budget; BadInput where its source is gone or changed."""
    if not Path(str(facts.get("source"))).is_dir():
        raise BadInput("the source is no longer where it was", "")
    return job_of(facts, avg_bits, None)


def explorer_of(job: Job, sensitivity: Sensitivity, start: int, command: tuple[str, str]) -> Explorer:
    """What the page solves budgets from; BadInput where a cost is not a number."""
    layers = tuple(
        (layer.layer, layer.prefix, layer.experts, {p: layer.shapes[p] for p in layer.projections})
        for layer in job.spec.layers
    )
    return Explorer(
        job.options.per,
        job.options.formats,
        layers,
        item_costs(job.problem, sensitivity),
        "nats per token" if "nat" in sensitivity.unit else "a score, not nats",
        other_bytes(job.spec, job.options.other, job.fixed),
        start,
        command,
    )


def other_bytes(spec: MoESpec, other: Format | None, fixed: int) -> dict[str, int]:
    """{role: bytes} of what no map changes, largest first; what the experts' biases take under "biases"."""
    found = {}
    for role in dict.fromkeys(spec.roles.values()):
        tensors = {name: tensor for name, tensor in spec.tensors.items() if spec.roles[name] == role}
        found[role] = sum(t.nbytes for t in other_outputs(replace(spec, tensors=tensors), other))
    found["biases"] = fixed - sum(found.values())
    return dict(sorted(((role, n) for role, n in found.items() if n), key=lambda row: -row[1]))


# ----------------------------------------------------------------------------- sensitivity against frequency


def gather_study(out: Path, facts: dict[str, Any], map_: PrecisionMap) -> Study | None:
    """The map's sensitivity against the tokens, all others that are saved, and the hybrid of hessian and tokens; None
    where no tokens were counted or the source is gone."""
    if not can_solve(facts):
        return None
    run = run_of(out, facts)
    try:
        job = opened(facts, None)
        own = saved_sensitivity(run, facts, job)
        job = opened(facts, map_.code_bits(job.spec) / job.spec.expert_params)
    except BadInput:
        return None  # said by the explorer
    saved = [
        s for s in saved_sensitivities(run.path) if set(s.linears) == set(map_) and s.formats == job.options.formats
    ]
    counted = next((s for s in ([own] if own else []) + saved if s.tokens_LE is not None), None)
    if own is None or counted is None or counted.tokens_LE is None:
        return None
    value_LE = by_expert(job, own)
    tokens_LE = np.where(np.isnan(value_LE), np.nan, counted.tokens_LE.astype(np.float64))
    grids = {"frequency": tokens_LE}
    parts = {m: counted.tokens_by_modality[m] for m in MODALITIES if m in counted.tokens_by_modality}
    if len(parts) > 1:
        grids |= {f"frequency, {m}": np.where(np.isnan(value_LE), np.nan, t) for m, t in parts.items()}
    for s in saved:
        if s.method not in (own.method, "frequency"):
            grids.setdefault(s.method, by_expert(job, s))
    if "hybrid" not in (own.method, *grids) and "hessian" in (own.method, *grids):
        grids["hybrid"] = minmax_product(tokens_LE, grids.get("hessian", value_LE))
    mine = solve(job, own)
    others = {name: (grid_LE, changed_by(job, own, mine, grid_LE)) for name, grid_LE in grids.items()}
    layers = tuple(layer.layer for layer in job.spec.layers)
    return study_of(own.method, layers, value_LE, tokens_LE, others, len(map_.formats), measured_losses(out, job))


def by_expert(job: Job, s: Sensitivity) -> np.ndarray:
    """[L, E]: scores, or costs of the narrowest format, summed over projections."""
    value_I = s.score_I if s.score_I is not None else s.cost_IF[:, 0]
    rows = {layer.layer: i for i, layer in enumerate(job.spec.layers)}
    grid_LE = np.full((len(rows), max(layer.experts for layer in job.spec.layers)), np.nan)
    for layer in job.spec.layers:
        grid_LE[rows[layer.layer], : layer.experts] = 0.0
    np.add.at(grid_LE, ([rows[i.layer] for i in s.linears], [i.expert for i in s.linears]), value_I)
    return grid_LE


def changed_by(job: Job, own: Sensitivity, mine: PrecisionMap, grid_LE: np.ndarray) -> int:
    """How many matrices get another width where each expert's value, times 4^-bits, is the cost."""
    rows = {layer.layer: i for i, layer in enumerate(job.spec.layers)}
    score_I = np.array([grid_LE[rows[i.layer], i.expert] for i in own.linears])
    cost_IF = costs_from_scores(score_I, [f.bits for f in own.formats])
    other = solve(job, replace(own, cost_IF=cost_IF, score_I=score_I))
    return sum(mine[i] != other[i] for i in mine)


def measured_losses(out: Path, job: Job) -> tuple[str, list[tuple[int, int, float]]] | None:
    """What `bench/one_in.py` measured: the format, and (layer, expert, KL) of each expert stored alone in it."""
    path = out / ".mopeq" / "one_in.json"
    if not path.exists():
        return None
    body = read_json(path)
    try:
        rows = [(int(r["layer"]), int(r["expert"]), float(r["kl"])) for r in body["rows"]]
        return (str(body["format"]), rows) if body["source_digest"] == job.spec.digest else None
    except (KeyError, TypeError, ValueError) as problem:
        raise BadInput(f"{path} cannot be read: {problem}", "delete it and measure again") from None
