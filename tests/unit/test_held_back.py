"""A map must beat one width for all on the half of the calibration that it was not made from."""

from __future__ import annotations

from dataclasses import replace

import made
import numpy as np
import pytest

from mopeq.deciding import decide, held_back, solve
from mopeq.job import Job, open_job
from mopeq.nouns import PrecisionMap, Sensitivity
from mopeq.options import Options


def untried(map_: PrecisionMap, uniform: PrecisionMap) -> None:
    """No trial: the matrices are not at hand."""


def job_of(**options: object) -> Job:
    asked = {"sensitivity": "hessian", "method": "rtn", "per": "expert"} | options
    return open_job(made.source("olmoe"), Options(**asked))


def sensitivity_of(job: Job, halves_JF: list[np.ndarray]) -> Sensitivity:
    """Costs by item of two halves, each matrix of an item with a part of its item's."""
    share = 1 / np.bincount(job.problem.item_of_I)[job.problem.item_of_I]
    halves = np.stack([half_JF[job.problem.item_of_I] * share[:, None] for half_JF in halves_JF])
    linears = tuple(linear for linear, _ in job.spec.linears)
    return Sensitivity("fisher", linears, job.options.formats, halves.mean(0), halves_HIF=halves)


def costs(job: Job, seed: int) -> np.ndarray:
    """Of items some of which matter a hundred times as much as others."""
    scale_J = np.exp(np.random.default_rng(seed).normal(0, 2, len(job.problem.bytes_JF)))
    return scale_J[:, None] * 4.0 ** -np.array([f.bits for f in job.options.formats])


@pytest.mark.parametrize("budget", [{"avg_bits": 3}, {"fit": "uniform 3"}])
def test_a_map_that_only_its_own_half_likes_is_not_taken(budget: dict[str, object]) -> None:
    if "fit" in budget:
        budget = {"fit": job_of(avg_bits=3, allocate="uniform").predicted_bytes}
    job = job_of(**budget)
    told, noise = [costs(job, 0), costs(job, 0)], [costs(job, 1), costs(job, 2)]
    map_, notes = decide(job, sensitivity_of(job, told), untried)
    assert map_.digest == solve(job, sensitivity_of(job, told)).digest and len(map_.counts()) > 1
    assert len(notes) == 1 and "100%" in notes[0] and "every matrix" not in notes[0]
    map_, notes = decide(job, sensitivity_of(job, noise), untried)
    assert {f.bits for f in map_.formats.values()} == {3} and "every matrix gets 3" in notes[0]
    assert job.predicted_bytes == job.fixed + map_.nbytes(job.spec)


def test_the_ratio_is_of_the_other_half() -> None:
    job = job_of(avg_bits=3)
    halves = [costs(job, 3), costs(job, 4)]
    s = sensitivity_of(job, halves)
    assert s.halves_HIF is not None
    three = job.options.formats[1]
    assert three.bits == 3
    ratios = []
    for own, other in ((0, 1), (1, 0)):
        map_ = solve(job, replace(s, cost_IF=s.halves_HIF[own]))
        spent = sum(s.halves_HIF[other][i, job.options.formats.index(map_[x])] for i, x in enumerate(s.linears))
        ratios.append(spent / s.halves_HIF[other][:, 1].sum())
    assert held_back(job, s, three)[0] == pytest.approx(np.mean(ratios))


def test_nothing_is_checked_between_widths_or_without_halves() -> None:
    job = job_of(avg_bits=2.5)
    noise = sensitivity_of(job, [costs(job, 1), costs(job, 2)])
    assert decide(job, noise, untried)[1] == []
    assert decide(job_of(avg_bits=3), replace(noise, halves_HIF=None), untried)[1] == []
    assert decide(job_of(avg_bits=3, allocate="inverted"), noise, untried)[1] == []
