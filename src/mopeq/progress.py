"""Progress for people: a live line with rate and time left in a terminal, now and then a plain line in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

LOG_EVERY = 10.0  # seconds between plain lines


class Progress:
    """Counts work done towards a total and tells it on stderr."""

    def __init__(self, what: str, total: float, unit: str, quiet: bool):
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet
        self.done, self.start = 0.0, time.monotonic()
        self.live = sys.stderr.isatty()
        self.told = self.start

    def step(self, amount: float = 1.0) -> None:
        self.done += amount
        now = time.monotonic()
        if not self.quiet and now - self.told >= (0.2 if self.live else LOG_EVERY):
            self.told = now
            self.tell(f"\r\x1b[K{self.line()}" if self.live else f"{self.line()}\n")

    def line(self) -> str:
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = self.done / seconds
        share = 100 * self.done / self.total if self.total else 100.0
        if not rate:
            return f"{self.what}: {share:3.0f} %"
        left = max(self.total - self.done, 0.0) / rate
        return f"{self.what}: {share:3.0f} %  {amount_text(rate)} {self.unit}/s  {time_text(left)} left"

    def tell(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    def close(self) -> None:
        if not self.quiet:
            seconds = time.monotonic() - self.start
            rate = self.done / max(seconds, 1e-9)
            end = f"{self.what}: {amount_text(self.done)} {self.unit} in {time_text(seconds)}"
            self.tell(("\r\x1b[K" if self.live else "") + f"{end} ({amount_text(rate)} {self.unit}/s)\n")


def amount_text(x: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g}{letter}"
    return f"{x:.3g}"


def time_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


_quiet: list[bool] = []


@contextmanager
def progress(what: str, total: float, unit: str) -> Iterator[Progress]:
    """`with progress("quantize", weights, "weights") as p: p.step(n)`. The last line is left out if it fails."""
    p = Progress(what, total, unit, quiet=bool(_quiet))
    yield p
    p.close()


def say(line: str) -> None:
    """One plain line on stderr."""
    if not _quiet:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


@contextmanager
def silence() -> Iterator[None]:
    """No progress within the block: for tests and library use."""
    _quiet.append(True)
    try:
        yield
    finally:
        _quiet.pop()
