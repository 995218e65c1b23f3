"""Seconds for exact allocation at real models' sizes, on one core: python bench/alloc.py

Costs are lognormal per item times 4^-bits, with noise that leaves about a tenth of the items' curves not convex.
"""

from __future__ import annotations

import os
import resource
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from mopeq.alloc.baselines import random_mix
from mopeq.alloc.kmeans import cluster
from mopeq.alloc.knapsack import solve, solve_code
from mopeq.alloc.reach import largest_code_total, largest_total

Pair = tuple[np.ndarray, np.ndarray]


def weights(out: int, n: int, bits: list[int], group: int) -> tuple[list[int], list[int]]:
    """Code bits and stored bytes of a matrix [out, n] at each width: codes, fp16 scales, packed zero points."""
    groups = -(-n // group)
    stored = [out * -(-n * b // 8) + 2 * out * groups + groups * -(-out * b // 8) for b in bits]
    return [out * n * b for b in bits], stored


def items(layers: int, experts: int, hidden: int, width: int, bits: list[int], groups: list[int]) -> Pair:
    """Code bits and bytes [items, formats] of all gate, up and down projections; formats are groups within bits."""
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    each = [[weights(*shape, [b], g) for b in bits for g in groups] for shape in shapes]
    code_PF = np.array([[c[0] for c, _ in row] for row in each])
    bytes_PF = np.array([[s[0] for _, s in row] for row in each])
    return np.tile(code_PF, (layers * experts, 1)), np.tile(bytes_PF, (layers * experts, 1))


def costs(count: int, bits: list[int], groups: list[int], noise: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    level = np.array([4.0**-b * (g / 64) ** 0.5 for b in bits for g in groups])
    return np.exp(rng.normal(size=(count, 1))) * level * np.exp(noise * rng.normal(size=(count, len(level))))


def bent(cost_IF: np.ndarray) -> float:
    """The share of items whose three costs are not convex."""
    return float((cost_IF[:, 0] - cost_IF[:, 1] < cost_IF[:, 1] - cost_IF[:, 2]).mean())


def line(name: str, seconds: float, more: str) -> None:
    print(f"{name:62s} {seconds:8.3f} s   {more}")


def case(name: str, model: tuple[int, int, int, int], bits: list[int], groups: list[int], noise: float = 0.6) -> None:
    code_IF, bytes_IF = items(*model, bits, groups)
    cost_IF = costs(len(code_IF), bits, groups, noise, seed=0)
    limit = int(0.6 * bytes_IF.min(1).sum() + 0.4 * bytes_IF.max(1).sum())
    share = f", {bent(cost_IF):.0%} not convex" if len(bits) == 3 and len(groups) == 1 else ""
    print(f"{name}: {len(code_IF):,} items x {len(bits) * len(groups)} formats{share}")
    start = time.perf_counter()
    total = largest_total(bytes_IF, limit)
    assert total is not None
    line("  reach, bytes", time.perf_counter() - start, f"{limit - total} bytes of {limit:,} unreachable")
    start = time.perf_counter()
    found = solve(cost_IF, bytes_IF, total)
    line("  knapsack, bytes", time.perf_counter() - start, f"cost {found.cost:.6f} gap {found.gap:g}")
    start = time.perf_counter()
    code, least = largest_code_total(code_IF, bytes_IF, 3 * int(code_IF[:, 0].sum()) // bits[0])
    line("  reach, code bits then bytes", time.perf_counter() - start, f"{code:,} bits {least:,} bytes")
    start = time.perf_counter()
    found = solve_code(cost_IF, code_IF, bytes_IF, code, least)
    line("  knapsack, code bits then bytes", time.perf_counter() - start, f"cost {found.cost:.6f} gap {found.gap:g}")
    start = time.perf_counter()
    random_mix(bytes_IF, total, 0)
    line("  random mix", time.perf_counter() - start, "")


def main() -> None:
    case("Qwen3-30B-A3B", (48, 128, 2048, 768), [2, 3, 4], [64])
    case("one layer in three", (16, 128, 2048, 768), [2, 3, 4], [64])
    case("widths 1 to 8", (48, 128, 2048, 768), list(range(1, 9)), [64])
    case("widths 2, 4, 8", (48, 128, 2048, 768), [2, 4, 8], [64])
    case("two group sizes", (48, 128, 2048, 768), [2, 3, 4], [64, 128])
    case("a group that does not divide (steps 2967 and 2968)", (48, 128, 2048, 1472), [2, 3, 4], [128])
    case("two groups, one of which does not divide", (48, 128, 2048, 1408), [2, 3, 4], [64, 256])
    case("odd sides, small", (2, 16, 41, 27), [2, 3, 4], [16])
    start = time.perf_counter()
    cluster(np.exp(np.random.default_rng(0).normal(size=18432)), [2, 3, 4])
    line("kmeans, 18,432 scores", time.perf_counter() - start, "")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
