"""Which totals can be spent: the largest reachable total within a limit, from weights alone.

A total is reached by choosing one format an item; only weights above each item's least count, in units of their
greatest common divisor. The reachable totals are the bits of one long integer, bit t set where t units can be spent:
an item of offsets {0, a, b} turns `bits` into bits | bits << a | bits << b.

Thousands of items alike are taken in one go. Let their offsets, divided by their own common divisor, be S with largest
element M. Among any M offsets some (not none) sum to a multiple of M: of the M + 1 running sums two leave the same
remainder. Such a sum of m offsets between 0 and M is q * M with q < m, so q items at M and m - q at 0 spend the same.
Repeating this leaves fewer than M items off the two extremes: n items reach what M - 1 of them reach with all of S,
plus any multiple of M up to n - M + 1 times. The multiples take about log2(n) shifts.
"""

from __future__ import annotations

import numpy as np

from mopeq.alloc.hull import Ints
from mopeq.errors import BadInput

MOST_BITS = 2**32  # 512 MiB an integer, of which three are alive
MOST_WORK = 2**40  # bits moved, about a minute


def largest_total(weight_IF: Ints, limit: int) -> int | None:
    """The largest sum of one weight per item that is <= limit; None where even the least weights exceed it.

    weight_IF int64 [items, formats]. Raises BadInput where shapes have so little in common that the search would not
    end in reasonable time.
    """
    low_I = weight_IF.min(1)
    floor = int(low_I.sum())
    if floor > limit:
        return None
    offset_IF = weight_IF - low_I[:, None]
    unit = int(np.gcd.reduce(offset_IF, axis=None)) or 1
    room = (limit - floor) // unit
    if room >= int(offset_IF.max(1).sum()) // unit:
        return int(weight_IF.max(1).sum())
    classes = _classes(offset_IF // unit)
    _refuse_if_endless(classes, room)
    bits, within = 1, (1 << (room + 1)) - 1
    for offsets, count in classes:  # the few off the extremes first: `bits` is still short
        for _ in range(_few(offsets, count)):
            bits = _either(bits, offsets) & within
    for offsets, count in classes:
        bits = _up_to(bits, offsets[-1], count - _few(offsets, count), room) & within
    return floor + unit * (bits.bit_length() - 1)


def largest_code_total(code_IF: Ints, bytes_IF: Ints, code_limit: int) -> tuple[int, int]:
    """The largest reachable total of code bits within the limit, and the most bytes that choices of it take.

    Raises BadInput where even the narrowest formats exceed the limit, and as `largest_total` does.
    """
    from mopeq.alloc.knapsack import solve_code

    code_total = largest_total(code_IF, code_limit)
    if code_total is None:
        least = int(code_IF.min(1).sum())
        raise BadInput(
            f"{code_limit} code bits cannot hold the experts: the narrowest formats take {least}",
            "raise --avg-bits, or add a narrower width to --bits",
        )
    choice_I = solve_code(np.zeros(code_IF.shape), code_IF, -bytes_IF, code_total).choice_I
    return code_total, int(bytes_IF[np.arange(len(choice_I)), choice_I].sum())


def _classes(units_IF: Ints) -> list[tuple[list[int], int]]:
    """Items of the same offsets: their positive offsets, ascending and distinct, and how many they are."""
    rows, counts = np.unique(np.sort(units_IF, axis=1), axis=0, return_counts=True)
    classes: dict[tuple[int, ...], int] = {}
    for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
        offsets = tuple(sorted({u for u in row if u}))
        classes[offsets] = classes.get(offsets, 0) + count
    return [(list(offsets), count) for offsets, count in classes.items() if offsets]


def _few(offsets: list[int], count: int) -> int:
    """How many items may stay off the extremes 0 and M."""
    return min(count, offsets[-1] // int(np.gcd.reduce(offsets)) - 1)


def _either(bits: int, offsets: list[int]) -> int:
    """One more item, of offset 0 or any of `offsets`."""
    result = bits
    for offset in offsets:
        result |= bits << offset
    return result


def _up_to(bits: int, step: int, times: int, room: int) -> int:
    """`bits` plus any of 0, 1, ..., `times` steps, nothing beyond `room` being asked."""
    times, have = min(times, room // step), 0
    while have < times:
        more = min(have + 1, times - have)
        bits |= bits << (step * more)
        have += more
    return bits


def _refuse_if_endless(classes: list[tuple[list[int], int]], room: int) -> None:
    length = min(room, sum(_few(offsets, count) * offsets[-1] for offsets, count in classes))
    shifts = sum(_few(offsets, count) * len(offsets) for offsets, count in classes)
    if room > MOST_BITS or shifts * length > MOST_WORK:
        raise BadInput(
            "these shapes, widths and group sizes have too little in common for an exact budget",
            "use one --group-size that divides the experts' dimensions, or give --avg-bits",
        )
