"""Damaged and hostile files by the thousand (tools/fuzz.py), and proof that what watches them sees."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

import fuzz

from mopeq.errors import BadInput

TOOL = Path(fuzz.__file__)


@pytest.fixture(scope="module", autouse=True)
def place() -> Iterator[None]:
    """All that cases are made from, woken before any child is forked, and its end."""
    fuzz.survey(0, 0)
    yield
    shutil.rmtree(fuzz.room(), ignore_errors=True)


def check(count: int, seed: int) -> None:
    """In a process of its own: a fork of one that runs many threads may die where memory is short, and says nothing."""
    facts = fuzz.room() / "facts.json"
    command = [sys.executable, str(TOOL), "--cases", str(count), "--seed", str(seed), "--json", str(facts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    found = json.loads(facts.read_text())
    assert found["cases"] >= 0.99 * count and not found["faults"]
    for target, answers in found["targets"].items():
        assert answers["refused"], f"no case of {target} was refused: is anything spoiled?"
    assert sum(answers["fine"] for answers in found["targets"].values()) > 0.05 * count, "all was refused"
    assert found["grown_bytes"] < fuzz.MEMORY


def test_a_thousand_cases() -> None:
    check(1000, 20260101)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_twenty_thousand_cases() -> None:
    check(20_000, int(time.time()))  # others every time; a fault says its target and seed


# ---------------------------------------------------------------------------------- the watch, seen to bite


def outcome_of(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> str:
    """The fault that a case which does this is found to have."""

    def target(_: object) -> str:
        act()
        return "fine"

    monkeypatch.setitem(fuzz.TARGETS, "planted", (target, 0.0))
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "STILL", 5.0 if act is stand_still else 120.0)
    monkeypatch.setitem(fuzz.TARGETS, "good", (lambda _: "fine", 0.0))
    (first, after) = fuzz.block([("planted", 0), ("good", 0)])
    assert after.target == "good" and not after.fault, "the case behind a faulty one runs"
    return first.fault


def never_end() -> None:
    while True:
        pass


def stand_still() -> None:
    """Without any work, so that only who watches from outside can tell."""
    time.sleep(60)


def write_outside() -> None:
    path = Path(tempfile.gettempdir()) / "mopeq-fuzz-was-here"
    path.write_text("x")
    path.unlink()


def refuse_without_hint() -> None:
    fuzz.told(BadInput("something", ""))


def blunder() -> None:
    """A verb with a bug, which the command line tells in one line: still no answer for a user."""
    import mopeq.verbs.verify

    mopeq.verbs.verify.verify = lambda out: {}["missing"]  # in the child alone
    fuzz.command("verify", "x")


PLANTED: dict[str, tuple[Callable[[], object], str]] = {
    "a traceback": (lambda: {}["missing"], "KeyError"),
    "a hang": (never_end, "more than 0.5 s"),
    "standing still": (stand_still, "stood still"),
    "a dead process": (lambda: os.kill(os.getpid(), 9), "ended with -9"),
    "too much memory": (lambda: bytearray(2 * fuzz.MEMORY), "MemoryError"),
    "a write outside": (write_outside, "mopeq-fuzz-was-here"),
    "a program": (lambda: os.system("true"), "os.system"),
    "no hint": (refuse_without_hint, "without line or hint"),
    "a fault of mopeq's": (blunder, "KeyError"),
    "an answer": (lambda: fuzz.command("verify", "--nonsense", 3, 4), ""),
}


@pytest.mark.parametrize("what", PLANTED)
def test_the_watch_sees(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz.command("verify", "nothing")  # the half second is for the case alone
    act, said = PLANTED[what]
    fault = outcome_of(act, monkeypatch)
    assert said in fault and bool(fault) == bool(said), fault


def test_a_picture_that_claims_much_is_refused_cheaply() -> None:
    """The bombs, each by its own words, in the time and memory of a small picture."""
    import resource

    from mopeq.data.readers import picture

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in fuzz.bombs():
        started = time.monotonic()
        size = None
        with contextlib.suppress(BadInput):
            size = picture(data).size
        assert size in (None, (8, 8))  # rows without end, of which eight are read
        assert time.monotonic() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
