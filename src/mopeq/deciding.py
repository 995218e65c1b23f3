"""The precision map of a job: solved at exactly the budget, then tried against one width for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mopeq.alloc import ALLOCATORS
from mopeq.checkpoint import read_json
from mopeq.job import Job, by_layers_or_whole, scene_of, sense_digest
from mopeq.nouns import Format, PrecisionMap, Sensitivity, make_map
from mopeq.packed import json_bytes, write_atomic
from mopeq.plan import Problem
from mopeq.progress import say
from mopeq.quant import sensed_as
from mopeq.rundir import RunDir, stage_digest
from mopeq.tables import pick

if TYPE_CHECKING:
    from mopeq.data.calibration import Calibration
    from mopeq.sense.trial import Trial

SURE = 2.0  # standard errors by which a map must beat one width where they are tried


def decide(
    job: Job, sensitivity: Sensitivity | None, trial: Callable[[PrecisionMap, PrecisionMap], Trial | None]
) -> tuple[PrecisionMap, list[str]]:
    """The solved map, or one width for all where that spends the same and the map does no better on data it was not
    made from; with a note that says so."""
    map_ = solve(job, sensitivity)
    if sensitivity is None or (uniform := same_total(job)) is None:
        return map_, []
    nbytes = None if job.target is None else job.target.expert_bytes
    plain = make_map(job.spec, [uniform for _ in job.spec.linears], nbytes)
    ratio, agree = held_back(job, sensitivity, uniform)
    found = trial(map_, plain) if map_.digest != plain.digest else None
    better, notes = ratio is None or ratio < 1, []
    if found is not None:
        better = found.map_kl + SURE * found.error < found.uniform_kl and (found.fresh or better)
        kind = "that neither was made from" if found.fresh else "they were made from (there is no other)"
        notes.append(
            f"on {found.tokens:,} tokens of calibration {kind} the map's KL is {found.map_kl:.4g}, that of uniform"
            f" {uniform.name} {found.uniform_kl:.4g} (standard error of the difference {found.error:.2g})"
        )
    if ratio is not None and (found is None or not found.fresh):
        notes.append(
            f"on the half of the calibration it was not made from, a map costs {ratio:.2f} of uniform {uniform.name};"
            f" maps of both halves agree in {agree:.0%} of matrices"
        )
    if better or not notes:
        return map_, notes
    notes[-1] += f": every matrix gets {uniform.name}; more --calib-tokens would tell them apart"
    return plain, notes


def tried(
    job: Job,
    run: RunDir,
    sensitivity: Sensitivity | None,
    calibration: Calibration | None,
    on: str | None,
    map_: PrecisionMap,
    uniform: PrecisionMap,
) -> Trial | None:
    """Both maps tried on data (of the digest `on`) that they were not made from, if there is more of it, with the
    matrices that sensing quantized; None where these are not at hand. Kept, since they may go once the layers are
    quantized."""
    o = job.options
    if sensitivity is None or not o.tries_quantizers:
        return None
    made_of = {"source": job.spec.digest, "data": sensitivity.data_digest, "method": sensed_as(o.method), "on": on}
    maps = {"map": map_.digest, "uniform": uniform.digest}
    digest = stage_digest("trial", sensed=o.sensitivity, seed=o.seed, **made_of, **maps)
    file = run.path / "trials" / f"{digest}.json"
    if file.exists():
        from mopeq.sense.trial import Trial

        return Trial(**read_json(file))
    if calibration is None:
        return None
    from mopeq.sense.trial import trial

    fresh, scene = calibration.tries, scene_of(job, run, sense_digest(job, calibration), calibration)
    found: Trial | None = by_layers_or_whole(
        job, lambda parts: trial(replace(scene, parts=parts), map_, uniform, fresh or calibration.batches, bool(fresh))
    )
    if found is not None:
        write_atomic(file, json_bytes(vars(found)))
    elif not job.spec.adapted:
        say("allocate: the map is not tried: of what sensing quantized not all is on disk, which lacked room for it")
    return found


def same_total(job: Job) -> Format | None:
    """The one format which, given to every matrix, spends the same budget, if there is one."""
    if job.options.allocate != "knapsack" or job.target is None:
        return None
    problem, target = job.problem, job.target
    wanted = (
        (problem.bytes_JF, target.expert_bytes) if target.code_bits is None else (problem.code_JF, target.code_bits)
    )
    return next((fmt for fmt, total in zip(problem.formats, wanted[0].sum(0), strict=True) if total == wanted[1]), None)


def held_back(job: Job, sensitivity: Sensitivity, uniform: Format) -> tuple[float | None, float]:
    """A map's cost over uniform's, on the half of the data it was not made from (mean of both ways round; None where
    there are no halves, or nothing costs anything), and the share of matrices in which the halves' maps agree.

    A map is chosen for looking cheap, so on the data it was chosen by it always does.
    """
    if sensitivity.halves_HIF is None:
        return None, 0.0
    problem = job.problem
    maps = [solve(job, replace(sensitivity, cost_IF=half_IF)) for half_IF in sensitivity.halves_HIF]
    column = {fmt: f for f, fmt in enumerate(problem.formats)}
    choices = [np.array([column[m[i]] for i, _ in job.spec.linears]) for m in maps]
    ratios = []
    for half_IF, choice_I in zip(sensitivity.halves_HIF[::-1], choices, strict=True):
        whole = half_IF[:, column[uniform]].sum()
        if whole > 0:
            ratios.append(half_IF[np.arange(len(choice_I)), choice_I].sum() / whole)
    return (float(np.mean(ratios)) if ratios else None), float((choices[0] == choices[1]).mean())


def solve(job: Job, sensitivity: Sensitivity | None) -> PrecisionMap:
    """Items' costs and scores from the sensitivity's, then the allocator."""
    from mopeq.alloc.choose import Question

    problem = job.problem
    cost_JF = score_J = None
    if sensitivity is not None:
        cost_JF = item_costs(problem, sensitivity)
        if sensitivity.score_I is not None:
            score_J = np.zeros(len(cost_JF))
            np.add.at(score_J, problem.item_of_I, sensitivity.score_I)
    question = Question(problem, cost_JF, score_J, job.target, job.options.scope, job.options.seed)
    choice_J = pick(ALLOCATORS, job.options.allocate, "allocator")(question)
    nbytes = None if job.target is None else job.target.expert_bytes
    return make_map(job.spec, [problem.formats[f] for f in choice_J[problem.item_of_I]], nbytes)


def item_costs(problem: Problem, sensitivity: Sensitivity) -> np.ndarray:
    """Items' costs by format, as the allocators take them: sums over an item's linears, and wider is never worse at one
    group size."""
    from mopeq.alloc.baselines import running_min

    assert sensitivity.formats == problem.formats
    cost_JF = np.zeros(problem.bytes_JF.shape)
    np.add.at(cost_JF, problem.item_of_I, sensitivity.cost_IF)
    groups = np.array([f.group_size for f in problem.formats])
    for group in np.unique(groups):
        cost_JF[:, groups == group] = running_min(cost_JF[:, groups == group])
    return cost_JF
