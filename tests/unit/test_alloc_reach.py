"""Reachable totals: equal to the set of all sums, at odd shapes and for thousands of items alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mopeq.alloc.reach import largest_code_total, largest_total
from mopeq.errors import BadInput
from mopeq.nouns import Format


def most_by_total(weight_IF, bytes_IF):
    """Every reachable total and the most bytes it takes, item by item."""
    most = {0: 0}
    for weights, stored in zip(weight_IF.tolist(), bytes_IF.tolist(), strict=True):
        after: dict[int, int] = {}
        for total, spent in most.items():
            for w, b in zip(weights, stored, strict=True):
                after[total + w] = max(after.get(total + w, spent + b), spent + b)
        most = after
    return most


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 4), st.sampled_from([2, 4, 9, 30]), st.integers(1, 3))
def test_equals_the_set_of_all_sums(seed, items, formats, high, classes):
    rng = np.random.default_rng(seed)
    weight_IF = rng.integers(0, high, (items, formats))[rng.integers(0, min(classes, items), items)]
    weight_IF = weight_IF * int(rng.integers(1, 4))
    bytes_IF = rng.integers(0, high, (items, formats))
    most = most_by_total(weight_IF, bytes_IF)
    for limit in [-1, min(most) - 1, max(most), max(most) + 5, *rng.integers(0, max(most) + 2, 5).tolist()]:
        want = max((t for t in most if t <= limit), default=None)
        assert largest_total(weight_IF, limit) == want
        if want is None:
            with pytest.raises(BadInput, match="cannot hold the experts"):
                largest_code_total(weight_IF, bytes_IF, limit)
        else:
            assert largest_code_total(weight_IF, bytes_IF, limit) == (want, most[want])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=2, max_size=5), st.integers(1, 120))
def test_many_items_alike(row, items):
    """The argument about items off the extremes, against plain repetition, at every limit."""
    sums = {0}
    for _ in range(items):
        sums = {s + w for s in sums for w in row}
    weight_IF = np.tile(row, (items, 1))
    ordered = np.array(sorted(sums))
    for limit in np.random.default_rng(items).integers(ordered[0], ordered[-1] + 1, 20).tolist():
        assert largest_total(weight_IF, limit) == ordered[np.searchsorted(ordered, limit, side="right") - 1]


@pytest.mark.parametrize("group_size", [16, 64])
def test_awkward_shapes_of_real_formats(group_size):
    """Sides that 8 and the group do not divide, all widths 1 to 8: bytes are not linear in bits."""
    formats = [Format(b, group_size) for b in range(1, 9)]
    shapes = [(27, 41), (27, 41), (41, 27)] * 8
    code_IF = np.array([[f.bits * out * n for f in formats] for out, n in shapes])
    bytes_IF = np.array([[f.nbytes(out, n) for f in formats] for out, n in shapes])
    most = most_by_total(code_IF, bytes_IF)
    for average in (1.0, 2.37, 3.0, 5.5, 8.0):
        code, nbytes = largest_code_total(code_IF, bytes_IF, int(average * sum(out * n for out, n in shapes)))
        assert nbytes == most[code]
        assert code == max(t for t in most if t <= average * sum(out * n for out, n in shapes))
    sums = most_by_total(bytes_IF, code_IF)
    for limit in np.linspace(min(sums), max(sums), 9).astype(int).tolist():
        assert largest_total(bytes_IF, limit) == max(t for t in sums if t <= limit)


def test_a_real_model_spends_an_average_to_the_bit():
    """48 layers of 128 experts: an average of 3 bits is reached exactly, at uniform 3's bytes."""
    formats = [Format(b) for b in (2, 3, 4)]
    shapes = [(768, 2048), (768, 2048), (2048, 768)] * (48 * 128)
    code_IF = np.array([[f.bits * out * n for f in formats] for out, n in shapes])
    bytes_IF = np.array([[f.nbytes(out, n) for f in formats] for out, n in shapes])
    code, nbytes = largest_code_total(code_IF, bytes_IF, int(code_IF[:, 1].sum()))
    assert (code, nbytes) == (int(code_IF[:, 1].sum()), int(bytes_IF[:, 1].sum()))
    assert largest_total(bytes_IF, nbytes) == nbytes
    assert largest_total(bytes_IF, nbytes + 1) == nbytes


def test_nothing_in_common_is_refused_quickly():
    weight_IF = np.random.default_rng(0).integers(1, 10**6, (20_000, 3))
    with pytest.raises(BadInput, match="too little in common") as caught:
        largest_total(weight_IF, int(weight_IF[:, 1].sum()))
    assert "--group-size" in caught.value.hint
