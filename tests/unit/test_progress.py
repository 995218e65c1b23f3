"""Progress lines: a share at once, a rate and the time left as soon as they are known."""

from __future__ import annotations

import re

import pytest

from mopeq.progress import Progress, time_text


def test_no_rate_and_no_time_left_before_anything_is_done() -> None:
    assert Progress("sense: fisher", 26, "layers", quiet=False).line() == "sense: fisher:   0 %"


def test_rate_and_time_left() -> None:
    p = Progress("quantize", 100, "weights", quiet=True)
    p.start -= 10
    p.step(25)
    assert re.fullmatch(r"quantize:  25 %  2\.[45]\d* weights/s  30 s left", p.line())
    p.step(76)  # parts of a layer may add up to a little more
    assert p.line().endswith("0.0 s left")


def test_a_log_gets_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    p = Progress("quantize", 100, "weights", quiet=False)
    p.step(1)
    assert capsys.readouterr().err == ""
    p.told -= 11
    p.step(1)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (59.6, "60 s"), (61, "1 min 01 s"), (3 * 3600 + 61, "3 h 01 min")]
)
def test_times(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
