"""How many threads C files get of torch's."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch


def share(work: Callable[[Any, int], int], job: ctypes.Structure, threads: int | None = None) -> None:
    """Has a C function do a job, on as many threads as torch takes unless said. MemoryError."""
    if work(ctypes.byref(job), torch.get_num_threads() if threads is None else threads):
        raise MemoryError("no memory to work in")


def threads_for(operations: int, least: int) -> int:
    """How many of torch's threads to wake, where one should have `least` operations at least to be worth it."""
    return max(1, min(torch.get_num_threads(), operations // least))
