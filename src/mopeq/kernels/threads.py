"""Shares a C function's work among as many threads as torch takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


@cache
def pool(n: int) -> ThreadPoolExecutor:
    """Threads that wait for work; a process forked off has none of them, and makes its own."""
    return ThreadPoolExecutor(n)


os.register_at_fork(after_in_child=pool.cache_clear)


def share(work: Callable[[int, int], int], threads: int | None = None) -> None:
    """Calls work(thread, threads) for every thread, of torch's number unless said; MemoryError where one does not
    return 0."""
    n = torch.get_num_threads() if threads is None else threads
    if n == 1:
        failed = work(0, 1)
    else:
        failed = any(list(pool(n).map(lambda thread: work(thread, n), range(n))))
    if failed:
        raise MemoryError("no memory to work in")


def threads_for(operations: int, least: int) -> int:
    """How many of torch's threads to wake, where one should have `least` operations at least to be worth it."""
    return max(1, min(torch.get_num_threads(), operations // least))
