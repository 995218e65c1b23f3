"""What the tests of quantizers share: odd weights, odd moments, and plain loops in float64 that answer for them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mopeq.nouns import Format
from mopeq.tensors import QWeight

SHAPES = ((3, 7, 40), (2, 16, 64), (1, 5, 70), (4, 9, 129), (2, 3, 1), (1, 1, 33))
WIDTHS = range(1, 9)


def weights(shape: tuple[int, ...], seed: int = 0, spread: float = 0.05) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def moments(experts: int, n: int, seed: int = 0, tokens: int = 200) -> Tensor:
    """X^T X of correlated inputs of very different sizes."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(experts, n, n, generator=g) / n**0.5 + torch.eye(n)
    sizes = torch.rand(experts, 1, n, generator=g).mul(3).exp()
    x = torch.randn(experts, tokens, n, generator=g) @ mix * sizes
    return x.mT @ x


def odd_cases(seed: int) -> Iterator[tuple[tuple[int, int, int], Tensor, Tensor]]:
    """(shape, weights, moments) of every odd shape."""
    for i, shape in enumerate(SHAPES):
        yield shape, weights(shape, seed=seed + i), moments(shape[0], shape[2], seed=i)


def output_errors(w: Tensor, q: QWeight, m: Tensor) -> Tensor:
    """tr(D M D^T) of each matrix [E], in float64."""
    away = q.dequantize(torch.float64) - w.double()
    return torch.einsum("enc,ecd,end->e", away, m.double(), away)


def check_form(q: QWeight, w: Tensor, fmt: Format) -> None:
    """Codes, scales and zero points are what the format can store."""
    assert q.shape == tuple(w.shape) and q.format == fmt
    assert q.codes.dtype == torch.uint8 and int(q.codes.max()) <= fmt.max_code
    assert q.scales.dtype == torch.float16 and q.scales.shape == (*w.shape[:-1], fmt.groups(w.shape[-1]))
    assert bool((q.scales > 0).all()) and bool(torch.isfinite(q.scales).all())
    if fmt.scheme == "s":
        assert q.zeros is None
    else:
        assert q.zeros is not None and q.zeros.dtype == torch.uint8 and q.zeros.shape == q.scales.shape
        assert int(q.zeros.max()) <= fmt.max_code
    back = QWeight.unpack(q.pack(), fmt, *w.shape[-2:])
    assert torch.equal(back.dequantize(), q.dequantize()) and bool(torch.isfinite(q.dequantize()).all())


def feed_back_row(w: np.ndarray, h: np.ndarray, order: list[int], scales: np.ndarray, zeros: np.ndarray, top: int):
    """One row's codes by GPTQ as the paper tells it, with given scales and zero points per column: round a column,
    spread its error over the columns to come by the inverse of what is left of h. float64; also the distance of
    every rounding from a tie, in steps."""
    w, left, codes, ties = w.copy(), list(order), np.zeros(len(w)), []
    while left:
        j = left[0]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        step = w[j] / scales[j]
        ties.append(abs(abs(step - np.floor(step)) - 0.5))
        codes[j] = np.clip(np.rint(step) + zeros[j], 0, top)
        error = (w[j] - (codes[j] - zeros[j]) * scales[j]) / inverse[0, 0]
        w[left] -= error * inverse[0]
        left = left[1:]
    return codes, min(ties)
