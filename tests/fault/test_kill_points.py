"""A few of tools/kill_points.py's disturbances, and proof that its counting sees work done twice."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import kill_points
from kill_points import LINES, Tally, count_again, disturb

KILLED_OFTEN = ["rtn", "fisher+gptq", "fisher+gptq, layer by layer"]


def check(tally: Tally) -> None:
    assert tally.disturbances and tally.same == tally.sequences and not tally.wrong and not tally.twice, tally


@pytest.mark.parametrize("name", KILLED_OFTEN)
def test_killed_and_resumed(name: str) -> None:
    """The same bytes, and nothing done twice."""
    tally, rng = Tally(), random.Random(5)
    while tally.disturbances < 3:
        disturb(LINES[name], "kill", rng, tally, 3)
    check(tally)


@pytest.mark.parametrize("name", ["eval", "plan"])
def test_what_only_reads_is_killed(name: str) -> None:
    tally, rng = Tally(), random.Random(1)
    while not tally.disturbances:
        disturb(LINES[name], "kill", rng, tally, 1)
    check(tally)


@pytest.mark.parametrize("what", kill_points.CHANGES)
def test_a_changed_source(what: str) -> None:
    tally = Tally()
    kill_points.changed_source(what, random.Random(3), tally)
    check(tally)


def test_a_source_that_changes_while_it_is_read() -> None:
    tally = Tally()
    kill_points.changed_while_read(random.Random(0), tally)
    check(tally)


def test_work_done_twice_would_be_counted() -> None:
    """The steps of a run that begins anew at each kill: all that was finished counts as done twice."""
    line = LINES["rtn"]
    calm = line.undisturbed
    tally = Tally()
    count_again(tally, line, [calm.steps, calm.steps], calm.out)
    assert len(tally.twice) == tally.units // 2 > 100
    half = [calm.steps[: len(calm.steps) // 2], calm.steps[len(calm.steps) // 2 :]]
    tally = Tally()
    count_again(tally, line, half, calm.out)
    assert not tally.twice and not tally.in_hand


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_two_hundred_kills() -> None:
    tallies = kill_points.survey(200, 1, list(LINES))
    assert sum(t.disturbances for name, t in tallies.items() if name.startswith("kill")) >= 200
    assert not [line for t in tallies.values() for line in (*t.wrong, *t.twice)]
