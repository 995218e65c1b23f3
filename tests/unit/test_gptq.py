"""GPTQ with ranges chosen on the way and coordinate descent: against rtn, against plain loops, on odd inputs; in torch
and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from quant_reference import WIDTHS, check_form, feed_back_row, moments, odd_cases, output_errors, weights

from mopeq.errors import BadInput
from mopeq.kernels import build
from mopeq.kernels.build import BEST, feedback
from mopeq.nouns import Format
from mopeq.quant import compiled, descent, gptq, rtn
from mopeq.quant.descent import Inputs, spread
from mopeq.tensors import per_input

SETS = {"torch": 0, "avx2": 1, "avx512": 2, "amx": 3}


def use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have gptq and descent work by torch, or by one instruction set."""
    if name == "torch":
        monkeypatch.setattr(compiled, "usable", lambda w: False)
        return
    lib = feedback()
    if lib is None or lib.mopeq_gptq_set(SETS[name]) < SETS[name]:
        pytest.skip(f"gptq.c cannot be built, or {name} is not here")


@pytest.fixture(params=SETS, autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    use(request.param, monkeypatch)
    yield request.param
    if (lib := feedback()) is not None:
        lib.mopeq_gptq_set(BEST)


def fed_back(w: torch.Tensor, fmt: Format, found: compiled.Factors) -> tuple[torch.Tensor, ...]:
    """Levels [E, C, N], scales and zero points [E, G, N] after rounding with feedback alone, by whoever is to work."""
    if not compiled.usable(w):
        return gptq.feed_back(w, fmt, found)
    codes, scale, zero = compiled.solve(w, fmt, found, gptq.tried(fmt), 0)
    return codes.mT.float() - spread(zero, fmt.group_size, w.shape[1]), scale, zero


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scheme", ["a", "s"])
def test_outputs_are_closer_than_rtns(bits: int, scheme: str) -> None:
    """Every matrix of every odd shape; in all, by much, where codes are few."""
    fmt = Format(bits, 32, scheme)
    ours, theirs = 0.0, 0.0
    for shape, w, m in odd_cases(bits):
        q = gptq.quantize(w, fmt, moments=m)
        check_form(q, w, fmt)
        ours_E, theirs_E = output_errors(w, q, m), output_errors(w, rtn.quantize(w, fmt), m)
        # damping is for inputs unlike those seen: on those seen it may cost a little where rtn is all but exact
        assert bool((ours_E <= theirs_E * 1.02).all()), (shape, ours_E / theirs_E)
        if shape[2] > 1:
            ours, theirs = ours + float(ours_E.sum()), theirs + float(theirs_E.sum())
    assert ours < (0.6 if bits < 8 else 0.8) * theirs


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["a", "s"])
def test_feedback_agrees_with_the_papers_loop(bits: int, scheme: str) -> None:
    """With the ranges that were chosen, codes are those of a loop over columns with inverses in float64."""
    fmt = Format(bits, 16, scheme)
    w, m = weights((3, 6, 40), seed=bits), moments(3, 40, seed=bits)
    found = descent.factored(m, 16)
    level, scale, zero = fed_back(w.mT.contiguous(), fmt, found)
    agreed = 0
    for e in range(3):
        for row in range(6):
            s = per_input(scale[e, :, row], 16, 40).double().numpy()
            z = per_input(zero[e, :, row], 16, 40).double().numpy()
            exact = w[e, row].double().numpy()
            h, order = found.h[e].double().numpy(), found.order[e].tolist()
            codes, tie = feed_back_row(exact, h, order, s, z, fmt.max_code)
            if tie > 1e-3:  # float32 and float64 may part at a tie, and all that follows with them
                assert np.array_equal(codes - z, level[e, :, row].numpy())
                agreed += 1
    assert agreed > 9


def test_each_row_keeps_its_cheapest_candidate() -> None:
    fmt = Format(2, 24)
    w, m = weights((2, 5, 24), seed=1), moments(2, 24, seed=1)
    found = descent.factored(m, 24)
    level, scale, _ = fed_back(w.mT.contiguous(), fmt, found)
    s, z = gptq.searched_range(descent.take(w.mT, found.order), found.v, fmt)
    s_EKN, z_EKN = gptq.candidates(s, z, fmt)
    for e in range(2):
        for row in range(5):
            exact, hh = w[e, row].double().numpy(), found.h[e].double().numpy()
            costs = []
            for k in range(s_EKN.shape[1]):
                sk, zk = (np.full(24, float(t[e, k, row])) for t in (s_EKN, z_EKN))
                away = (feed_back_row(exact, hh, found.order[e].tolist(), sk, zk, 3)[0] - zk) * sk - exact
                costs.append(away @ hh @ away)
            away = level[e, :, row].double().numpy() * float(scale[e, 0, row]) - exact
            assert away @ hh @ away <= min(costs) * (1 + 1e-5)


def damped_loss(w: torch.Tensor, q_or_values: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    away = (q_or_values - w).double()
    return torch.einsum("enc,ecd,end->en", away, h.double(), away)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["a", "s"])
def test_descent_never_climbs_and_ends_where_no_code_helps(bits: int, scheme: str) -> None:
    fmt = Format(bits, 24, scheme)
    w, m = weights((2, 6, 60), seed=bits), moments(2, 60, seed=bits)
    h = descent.factored(m, 24).h
    losses = [damped_loss(w, gptq.quantize(w, fmt, moments=m, sweeps=n).dequantize(), h) for n in (0, 1, 2, 4, 40)]
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert float(losses[2].sum()) < 0.97 * float(losses[0].sum())
    q = gptq.quantize(w, fmt, moments=m, sweeps=40)
    at, scale = q.dequantize(torch.float64), per_input(q.scales.double(), 24, 60)
    pull = (at - w) @ h.double()
    curve = h.double().diagonal(dim1=1, dim2=2)[:, None]
    for step in (-1, 1):
        allowed = (q.codes.int() + step >= 0) & (q.codes.int() + step <= fmt.max_code)
        gain = 2 * step * scale * pull + curve * scale.square()  # what moving one code alone would change
        assert float(gain[allowed].min()) > -1e-3 * float((curve * scale.square()).mean())


def descend_row(w, h, level, scales, zeros, fmt):  # type: ignore[no-untyped-def]
    """One sweep over one row in float64, as its docstring tells it."""
    level, scales = level.copy(), scales.copy()
    spread = np.arange(len(w)) // fmt.group_size

    def refit(g: int) -> None:
        x = np.where(spread == g, level, 0)
        others = np.where(spread == g, 0, level * scales[spread]) - w
        curve = x @ h @ x
        if curve > 0:
            old, new = scales[g], float(np.float16(-(x @ h @ others) / curve))
            cost = [float((others + x * s) @ h @ (others + x * s)) for s in (old, new)]
            scales[g] = new if new > 0 and cost[1] < cost[0] else old

    for g in range(len(scales)):
        refit(g)
        for j in np.flatnonzero(spread == g):
            pull = h[j] @ (level * scales[spread] - w)
            best = np.rint(level[j] - pull / h[j, j] / scales[g])
            level[j] = np.clip(best, -zeros[g], fmt.max_code - zeros[g])
        refit(g)
    return level, scales


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_descent_agrees_with_a_plain_loop(bits: int) -> None:
    fmt = Format(bits, 20)
    w, m = weights((3, 8, 50), seed=bits), moments(3, 50, seed=bits)
    found = descent.factored(m, 20)
    start = fed_back(w.mT.contiguous(), fmt, found)
    level, scale = descent.descend(w.mT.contiguous(), fmt, found.h, *start, 1)
    same = 0
    for e in range(3):
        for row in range(8):
            given = [t[e, :, row].double().numpy() for t in start]
            wanted, scales = descend_row(w[e, row].double().numpy(), found.h[e].double().numpy(), *given, fmt)
            same += np.array_equal(wanted, level[e, :, row].numpy()) and np.allclose(
                scales, scale[e, :, row], rtol=1e-3
            )
    assert same >= 20  # of 24: the others met a tie


def test_order_is_by_group_then_by_column_and_the_short_group_last() -> None:
    d = torch.tensor([[1.0, 2.0, 9.0, 8.0, 3.0, 4.0, 99.0], [5.0, 5.0, 1.0, 1.0, 2.0, 7.0, 0.0]])
    assert descent.column_order(d, 2).tolist() == [[2, 3, 5, 4, 1, 0, 6], [0, 1, 5, 4, 2, 3, 6]]
    assert descent.column_order(d[:, :3], 64).tolist() == [[2, 1, 0], [0, 1, 2]]


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("scheme", ["a", "s"])
def test_odd_weights_and_moments(bits: int, scheme: str) -> None:
    """All-zero, constant and one-signed matrices, outlier channels, huge and tiny weights; no token, one token, dead
    inputs, NaN moments: always finite codes, never worse than rtn by more than damping explains."""
    fmt, n = Format(bits, 32, scheme), 80
    base = weights((1, 6, n), seed=3)
    outlier = base.clone()
    outlier[..., 7] *= 100
    shapes = [base * 0, torch.full_like(base, 0.3), base.abs() + 0.1, -base.abs(), outlier, base * 1e4, base * 1e-5]
    m = moments(1, n, seed=3)
    one, dead = moments(1, n, seed=4, tokens=1), m.clone()
    dead[:, :9] = dead[:, :, :9] = 0
    wild = m.clone()
    wild[0, 0, 0] *= 1e8
    for w in shapes:
        for mm in (m, m * 0, m * 1e-20, m * 1e12, one, dead, wild):
            q = gptq.quantize(w, fmt, moments=mm)
            check_form(q, w, fmt)
            limit = float(output_errors(w, rtn.quantize(w, fmt), mm).sum())
            size = float(output_errors(w * 0, rtn.quantize(w, fmt), mm).sum())
            assert float(output_errors(w, q, mm).sum()) <= 1.05 * limit + 1e-3 * size
    sick = m.clone()
    sick[0, 3, 4] = float("nan")
    q, unseen = gptq.quantize(base, fmt, moments=sick), gptq.quantize(base, fmt, moments=m * 0)
    assert torch.equal(q.codes, unseen.codes) and torch.equal(q.scales, unseen.scales)
    assert torch.equal(gptq.quantize(shapes[0], fmt, moments=m).dequantize(), shapes[0])


def test_without_tokens_inputs_weigh_alike() -> None:
    fmt = Format(2, 32)
    w = weights((2, 8, 64))
    q = gptq.quantize(w, fmt, moments=torch.zeros(2, 64, 64))
    away, plain = (float((x.dequantize() - w).square().sum()) for x in (q, rtn.quantize(w, fmt)))
    assert away < 0.75 * plain
    assert torch.equal(gptq.quantize(w, fmt).codes, rtn.quantize(w, fmt).codes)


def test_scales_beyond_fp16_are_refused_and_feedback_stays_within() -> None:
    w, m = weights((1, 4, 64)), moments(1, 64)
    w[0, 2, 3] = 1e9
    with pytest.raises(BadInput, match="beyond fp16"):
        gptq.quantize(w, Format(2, 32), moments=m)
    w = torch.sign(weights((1, 4, 64))) * 6e4 * 1.5  # every range nearly all that fp16 scales reach
    check_form(gptq.quantize(w, Format(2, 32), moments=m), w, Format(2, 32))


def test_a_matrix_is_the_same_alone_in_a_batch_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = Format(3, 32)
    w, m = weights((5, 12, 100)), moments(5, 100)
    whole = gptq.quantize(w, fmt, moments=m)
    again = gptq.quantize(w, fmt, moments=m).pack()
    assert all(torch.equal(v, again[k]) for k, v in whole.pack().items())
    monkeypatch.setattr(gptq, "CHUNK", 2 * 12 * 100)
    pieces = gptq.quantize(w, fmt, moments=m)
    # a batched product may sum in another order than a single one: a tie may fall the other way
    assert float((pieces.codes != whole.codes).float().mean()) < 0.02
    a, b = output_errors(w, whole, m), output_errors(w, pieces, m)
    assert torch.allclose(a, b, rtol=1e-2)


def test_matrices_may_lie_in_memory_as_they_like() -> None:
    w, m, fmt = weights((2, 40, 160)), moments(2, 160), Format(3, 32)
    wanted, wide = gptq.quantize(w, fmt, moments=m), torch.full((2, 163, 165), float("nan"))
    wide[:, 1:161, 2:162] = m
    for view in (m.permute(1, 2, 0).contiguous().permute(2, 0, 1), wide[:, 1:161, 2:162]):
        assert torch.equal(gptq.quantize(w.mT.contiguous().mT, fmt, moments=view).codes, wanted.codes)
    found, turned = descent.factored(m, 32), w.mT
    start = fed_back(turned.contiguous(), fmt, found)
    assert all(torch.equal(a, b) for a, b in zip(fed_back(turned, fmt, found), start, strict=True))
    last = descent.descend(turned.contiguous(), fmt, found.h, *start, 1, found.half_h)
    views = [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (found.h, *start)]
    ours = descent.descend(turned, fmt, *views, 1, found.half_h)
    assert all(torch.equal(a, b) for a, b in zip(ours, last, strict=True))


def solved(w: torch.Tensor, fmt: Format, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dequantized [E, C, out] after feedback and after descent, with the loss [E, out] of the latter in float64."""
    found, n = descent.factored(m, fmt.group_size), w.shape[2]
    level, scale, zero = fed_back(w.mT.contiguous(), fmt, found)
    first = level * spread(scale, fmt.group_size, n)
    level, scale = descent.descend(w.mT.contiguous(), fmt, found.h, level, scale, zero, 2, found.half_h)
    last = level * spread(scale, fmt.group_size, n)
    return first, last, damped_loss(w, last.mT, found.h)


@pytest.mark.parametrize("bits", WIDTHS)
def test_compiled_is_torchs_but_for_ties(bits: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh weights, outputs around the tiles' sizes, inputs around the groups': nearly all codes the same, and a tie
    that falls the other way costs nothing."""
    if path == "torch":
        pytest.skip("it is what the others are held against")
    rng = np.random.default_rng()
    for out, n, group in ((1, 5, 16), (16, 64, 32), (33, 100, 64), (64, 257, 128), (65, 40, 16), (130, 96, 24)):
        fmt, seed = Format(bits, group, "as"[int(rng.integers(2))]), int(rng.integers(1 << 30))
        w, m = weights((2, out, n), seed=seed), moments(2, n, seed=seed)
        found = solved(w, fmt, m)
        with monkeypatch.context() as patch:
            use("torch", patch)
            wanted = solved(w, fmt, m)
        for ours, theirs in zip(found[:2], wanted[:2], strict=True):
            differ = (ours - theirs).abs() > 2e-3 * theirs.abs()
            if path != "amx":
                assert int(differ.sum()) <= max(1, 0.05 * differ.numel()), (seed, fmt, out, n)
        limit = 0.02 if path == "amx" else 0.005  # many codes lie near ties: other codes, as good on the mean
        assert float((found[2].sum() / wanted[2].sum()).log().abs()) < limit, (seed, fmt, out, n)


def test_the_same_bits_by_any_vectors_and_threads(path: str) -> None:
    lib = feedback()
    if path != "avx512" or lib is None or build.factors() is None:
        pytest.skip("once, where gptq.c and factors.c can be built and AVX-512 is here")
    threads = torch.get_num_threads()
    for shape, bits in (((3, 100, 130), 2), ((1, 20, 64), 3), ((2, 64, 300), 4)):
        w, m = weights(shape, seed=bits), moments(shape[0], shape[2], seed=bits)
        made = []
        try:
            for vectors, count in ((2, 1), (1, 1), (2, 2), (1, 3)):
                lib.mopeq_gptq_set(vectors)
                torch.set_num_threads(count)
                found = descent.factored(m, 64)
                start = fed_back(w.mT.contiguous(), Format(bits, 64), found)
                made.append((*start, *descent.descend(w.mT.contiguous(), Format(bits, 64), found.h, *start, 2)))
        finally:
            torch.set_num_threads(threads)
        for other in made[1:]:
            assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


def test_factors_are_torchs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """H to the last bits but one, M and v as good a product, of fresh moments around the tiles' sizes; the same bits
    with either set of instructions and any threads. A matrix that is not positive definite is named, alone."""
    lib = build.factors()
    if path not in ("avx512", "amx") or lib is None or lib.mopeq_factors_set(2) < 2:
        pytest.skip("once by all sets of instructions, for jobs with and without halves")
    rng, threads = np.random.default_rng(), torch.get_num_threads()
    for n in (1, 5, 63, 64, 65, 130, 257):
        seed = int(rng.integers(1 << 30))
        m, group = moments(3, n, seed=seed), int(rng.integers(1, 5)) * 32
        m[1] *= 1e6
        order = descent.column_order(m.diagonal(dim1=-2, dim2=-1), group)
        damping = torch.full((3,), descent.DAMPING)
        _, wanted = descent.factors_of(m, order, damping, group)
        made = []
        try:
            for vectors, count in ((2, 1), (1, 2), (2, 5)):  # a matrix each, or all at one
                lib.mopeq_factors_set(vectors)
                torch.set_num_threads(count)
                failed, found = compiled.factors_of(m, order, damping, group)
                assert not failed.any()
                made.append([t for t in (found.h, found.mt, found.v) if t is not None])
        finally:
            torch.set_num_threads(threads)
            lib.mopeq_factors_set(BEST)
        assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True)), (n, seed)
        assert torch.allclose(found.h, wanted.h, rtol=1e-6, atol=1e-6), (n, seed)
        assert torch.equal(found.mt, found.mt.tril()) and bool((found.mt.diagonal(dim1=-2, dim2=-1) == 1).all())
        ordered = torch.stack([h[i][:, i] for h, i in zip(wanted.h.double(), order, strict=True)])
        away = (found.mt.double().mT * found.v.double()[:, None]) @ found.mt.double() - ordered
        assert float(away.norm() / ordered.norm()) < 1e-5, (n, seed)
        assert (found.half_h is not None) == (path == "amx" and n >= compiled.LEAST)
        if found.half_h is not None and found.half_mt is not None:
            for half, exact in ((found.half_h, found.h), (found.half_mt, found.mt)):
                assert torch.equal(half[:, :n, :n], exact.bfloat16())
                assert not half[:, :n, n : half.shape[1]].any() and not half[:, n:, : half.shape[1]].any()
    indefinite = torch.stack([torch.eye(70), torch.ones(70, 70) - 3 * torch.eye(70)])
    indefinite[1].diagonal().fill_(0.5)
    failed, _ = compiled.factors_of(indefinite, torch.arange(70).repeat(2, 1), torch.zeros(2), 64)
    assert failed.tolist() == [0, 1]


def test_torch_makes_factors_where_factors_c_cannot_be_built(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, m, fmt = weights((2, 40, 160)), moments(2, 160), Format(3, 32)
    cost = output_errors(w, gptq.quantize(w, fmt, moments=m), m)
    monkeypatch.setattr(build, "factors", lambda: None)
    found = gptq.quantize(w, fmt, moments=m)
    check_form(found, w, fmt)
    assert torch.allclose(output_errors(w, found, m), cost, rtol=0.05)


def test_torchs_defaults_change_nothing() -> None:
    """A caller may make its own tensors in bf16, or on a GPU, unless said."""
    w, m, fmt = weights((2, 40, 160)), moments(2, 160), Format(3, 32)
    wanted, before = gptq.quantize(w, fmt, moments=m), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            found = gptq.quantize(w, fmt, moments=m)
            h = descent.factored(m, 32).h
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.scales, wanted.scales)
    assert torch.equal(h, descent.factored(m, 32).h)


def test_moments_near_the_end_of_float32() -> None:
    """Their sum is beyond it, their mean is not."""
    m = moments(2, 70)
    large = m * (2e38 / m.diagonal(dim1=1, dim2=2).amax(1))[:, None, None]
    assert bool(large.isfinite().all()) and not bool(large.diagonal(dim1=1, dim2=2).sum(1).isfinite().all())
    assert torch.allclose(descent.factored(large, 32).h, descent.factored(m, 32).h, rtol=1e-5, atol=1e-6)


def test_codes_are_those_of_both_steps(path: str) -> None:
    """gptq's one call against feedback and descent one after the other: the same bits, turned."""
    if path == "torch":
        pytest.skip("in torch these are two calls")
    for shape, bits, scheme in (
        ((2, 70, 130), 2, "a"),
        ((1, 5, 33), 3, "s"),
        ((2, 64, 256), 8, "a"),
        ((1, 17, 1), 1, "a"),
    ):
        fmt, w, m = Format(bits, 32, scheme), weights(shape, seed=bits), moments(shape[0], shape[2], seed=bits)
        inputs = Inputs(m)
        found, turned = inputs.factors(32), w.mT.contiguous()
        level, scale, zero = fed_back(turned, fmt, found)
        level, scale = descent.descend(turned, fmt, found.h, level, scale, zero, 2, found.half_h)
        wanted, q = descent.coded(level, scale, zero, fmt), gptq.quantize(w, fmt, moments=inputs)
        assert torch.equal(q.codes, wanted.codes) and torch.equal(q.scales, wanted.scales)
        assert scheme == "s" or torch.equal(q.zeros, wanted.zeros)  # type: ignore[arg-type]


def test_amx_costs_what_others_do(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products are of bf16 factors: other codes near ties, the same cost, and the same bits with any threads."""
    if path != "amx":
        pytest.skip("it is what is held against AVX-512")
    threads, rng, ratios = torch.get_num_threads(), np.random.default_rng(), []
    for out, n, group, bits in ((33, 128, 32, 2), (70, 300, 64, 3), (128, 200, 128, 4), (100, 411, 96, 2)):
        fmt, seed = Format(bits, group), int(rng.integers(1 << 30))
        w, m = weights((2, out, n), seed=seed), moments(2, n, seed=seed)
        assert descent.factored(m, group).half_h is not None
        found = solved(w, fmt, m)
        codes = gptq.quantize(w, fmt, moments=m).codes
        try:
            torch.set_num_threads(3)
            assert torch.equal(gptq.quantize(w, fmt, moments=m).codes, codes)
        finally:
            torch.set_num_threads(threads)
        use("avx512", monkeypatch)
        wanted = solved(w, fmt, m)
        use("amx", monkeypatch)
        assert not torch.equal(found[0], wanted[0])  # it did run
        ratios.append(float(found[2].sum() / wanted[2].sum()))
    assert abs(float(np.mean(ratios)) - 1) < 0.01, ratios


def test_widths_and_matrices_share_what_is_made_of_their_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = descent.factored
    monkeypatch.setattr(descent, "factored", lambda m, size: made.append(size) or real(m, size))
    inputs = Inputs(moments(3, 48))
    for bits in (2, 3):
        for seed in (0, 1):
            w = weights((3, 6, 48), seed=seed)
            q = gptq.quantize(w, Format(bits, 16), moments=inputs)
            assert torch.equal(q.codes, gptq.quantize(w, Format(bits, 16), moments=inputs.moments).codes)
    assert made == [16] * 5  # one that is shared, and the four beside it
