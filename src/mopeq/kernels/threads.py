"""Shares a C function's work among as many threads as torch takes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def share(work: Callable[[int, int], int]) -> None:
    """Calls work(thread, threads) for every thread; MemoryError where one does not return 0."""
    n = torch.get_num_threads()
    if n == 1:
        failed = work(0, 1)
    else:
        with ThreadPoolExecutor(n) as pool:
            failed = any(list(pool.map(lambda thread: work(thread, n), range(n))))
    if failed:
        raise MemoryError("no memory to work in")
