"""The grouped kernel against the reference, and the reference against a formula written out here, in float64.

Experts modules of real families are packed with random formats an expert and projection, at awkward sizes.
"""

from __future__ import annotations

import math
from typing import Any

import made  # noqa: F401  (sets the number of threads before torch is imported)
import pytest
import torch
from torch import Tensor, nn

from mopeq.kernels import KERNELS, grouped
from mopeq.nouns import Format
from mopeq.plugins.experts import QuantizedExperts
from mopeq.plugins.hf import projection_shapes
from mopeq.quant.rtn import quantize
from mopeq.seam import bias, weights
from mopeq.tables import pick

REF, FAST = pick(KERNELS, "ref", "kernel"), pick(KERNELS, "torch", "kernel")
FORMATS = [Format(b, g, s) for b in range(1, 9) for g in (16, 40) for s in "as"]
HIDDEN, INNER, EXPERTS = 44, 21, 7  # nothing here is a multiple of 8 or of a group


def olmoe() -> Any:
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    return OlmoeExperts(OlmoeConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_experts=EXPERTS))


def gpt_oss() -> Any:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return GptOssExperts(GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS))


def ungated() -> Any:
    """What no family of the others has: no gate, biases, a norm after each expert."""
    from transformers import OlmoeConfig
    from transformers.integrations.moe import use_experts_implementation

    @use_experts_implementation(has_gate=False, has_bias=True, has_post_expert_norm=True)
    class Ungated(nn.Module):
        def __init__(self, config: Any):
            super().__init__()
            self.num_experts = EXPERTS
            self.up_proj = nn.Parameter(torch.empty(EXPERTS, INNER, HIDDEN))
            self.up_proj_bias = nn.Parameter(torch.empty(EXPERTS, INNER))
            self.down_proj = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))
            self.down_proj_bias = nn.Parameter(torch.empty(EXPERTS, HIDDEN))
            self.act_fn = nn.GELU()
            self.post_expert_norm = nn.LayerNorm(HIDDEN)

        def forward(self, *_: Any) -> Tensor:
            raise AssertionError("not called")

    return Ungated(OlmoeConfig())


MODULES = {"olmoe": olmoe, "gpt_oss": gpt_oss, "ungated": ungated}


def pack_module(kind: str, seed: int, palette: list[Format] = FORMATS) -> tuple[QuantizedExperts, dict[str, Any]]:
    """(packed module, {"w": {p: [E, out, in] float64}, "b": {p: [E, out]} or {}, "module": the original})."""
    torch.manual_seed(seed)
    module, keeper = MODULES[kind](), MODULES[kind]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.6)
    keeper.load_state_dict(module.state_dict())
    w = {p: x.detach().clone() for p, x in weights(module).items()}
    b = {p: bias(module, p).detach().clone() for p in w} if module.has_bias else {}
    shapes = projection_shapes(module)
    formats = {p: [palette[i] for i in torch.randint(len(palette), (EXPERTS,)).tolist()] for p in w}
    exact = {p: x.double().clone() for p, x in w.items()}
    with torch.device("meta"):
        packed = QuantizedExperts(module, formats, shapes)
    stored: dict[str, Tensor] = {}
    for p in w:
        for e in range(EXPERTS):
            q = quantize(w[p][e], formats[p][e])
            exact[p][e] = q.dequantize(torch.float64)
            parts = q.pack() | ({"bias": b[p][e]} if b else {})
            stored |= {f"{e}.{p}_proj.{suffix}": value for suffix, value in parts.items()}
    packed.fill(stored.__getitem__)
    return packed, {"w": exact, "b": {p: x.double() for p, x in b.items()}, "module": keeper}


def written_out(kind: str, truth: dict[str, Any], x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' function in plain loops and scalars' formulas, float64."""
    w, b = truth["w"], truth["b"]

    def project(p: str, e: int, x: Tensor) -> Tensor:
        y = w[p][e] @ x
        return y + b[p][e] if b else y

    out = torch.zeros(x_TH.shape, dtype=torch.float64)
    for t in range(x_TH.shape[0]):
        for k in range(index_TK.shape[1]):
            e = int(index_TK[t, k])
            if not 0 <= e < EXPERTS:
                continue
            x = x_TH[t].double()
            up = project("up", e, x)
            if kind == "olmoe":
                gate = project("gate", e, x)
                h = gate / (1 + torch.exp(-gate)) * up
            elif kind == "gpt_oss":
                gate = project("gate", e, x).clamp(max=7.0)
                h = (up.clamp(-7.0, 7.0) + 1) * gate / (1 + torch.exp(-1.702 * gate))
            else:
                h = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
            y = project("down", e, h)
            if kind == "ungated":
                norm = truth["module"].post_expert_norm
                y = (y - y.mean()) / torch.sqrt(y.var(unbiased=False) + norm.eps)
                y = y * norm.weight.detach().double() + norm.bias.detach().double()
            out[t] += float(weight_TK[t, k]) * y
    return out


def routing(case: str, seed: int, k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, H], index [T, K], weight [T, K] in float64 for a named case."""
    g = torch.Generator().manual_seed(seed)
    tokens = {"none": 0, "one": 1}.get(case, 13)
    x = torch.randn(tokens, HIDDEN, generator=g, dtype=torch.float64)
    index = torch.stack([torch.randperm(EXPERTS, generator=g)[:k] for _ in range(tokens)]) if tokens else None
    index = torch.empty(0, k, dtype=torch.int64) if index is None else index
    weight = torch.rand(tokens, k, generator=g, dtype=torch.float64)
    if case == "all on one":
        index.fill_(4)
    elif case == "some unused":
        index.clamp_(max=2)
    elif case == "duplicates":
        index[:, 1] = index[:, 0]
    elif case == "out of range":
        index[::2, 0], index[1::3, 1], index[5] = -1, EXPERTS, torch.tensor([-1, EXPERTS, EXPERTS + 3])
        weight[index < 0] = float("nan")  # what is not ours must not be multiplied either
    elif case == "strided":
        x = x.T.contiguous().T
        index, weight = index.T.contiguous().T, weight.repeat_interleave(2, 1)[:, ::2]
    elif case == "int32":
        index = index.int()
    return x, index, weight


CASES = ["many", "none", "one", "all on one", "some unused", "duplicates", "out of range", "strided", "int32"]


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to b's largest value."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max()) if b.numel() else 0.0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", MODULES)
def test_kernels_agree_in_float64(kind: str, case: str) -> None:
    packed, truth = pack_module(kind, seed=CASES.index(case))
    packed, truth["module"] = packed.double(), truth["module"].double()
    x, index, weight = routing(case, seed=CASES.index(case))
    wanted = written_out(kind, truth, x, index, weight)
    for kernel in (REF, FAST):
        found = kernel(packed, x, index, weight).detach()
        assert found.dtype == torch.float64 and found.shape == x.shape
        assert bool(torch.isfinite(found).all())
        assert distance(found, wanted) < 1e-12


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_every_format_alone(fmt: Format) -> None:
    packed, truth = pack_module("olmoe", seed=fmt.bits, palette=[fmt])
    x, index, weight = routing("many", seed=fmt.bits)
    wanted = written_out("olmoe", truth, x, index, weight)
    assert distance(REF(packed, x, index, weight), wanted) < 1e-12
    assert distance(FAST(packed, x, index, weight), wanted) < 1e-12
    assert [t.format for p in packed.projections for t in packed.tiers(p)] == [fmt] * 3


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_activations_of_other_dtypes(kind: str, dtype: torch.dtype, bound: float) -> None:
    """Packed modules accept float32, bf16 and fp16; routing weights may stay float32."""
    packed, truth = pack_module(kind, seed=11)
    x, index, weight = routing("many", seed=11)
    x = x.to(dtype) * 0.5
    wanted = written_out(kind, truth, x, index, weight.float())
    packed = packed.to(dtype)
    for kernel in (REF, FAST):
        for routing_dtype in (dtype, torch.float32):
            found = kernel(packed, x, index, weight.to(routing_dtype))
            assert found.dtype == dtype and found.shape == x.shape
            assert distance(found, wanted) < bound


@pytest.mark.parametrize("kind", MODULES)
def test_forward_is_the_fast_kernel_and_bounded_chunks_change_nothing(kind: str, monkeypatch: Any) -> None:
    packed, _ = pack_module(kind, seed=5)
    x, index, weight = routing("many", seed=5)
    x, weight = x.float(), weight.float()
    whole = packed(x, index, weight)
    assert torch.equal(whole, FAST(packed, x, index, weight))
    monkeypatch.setattr(grouped, "CHUNK", 1)  # one expert at a time
    assert torch.equal(packed(x, index, weight), whole)


def test_only_chosen_experts_are_unpacked(monkeypatch: Any) -> None:
    from mopeq.plugins import experts as module

    packed, _ = pack_module("olmoe", seed=9)
    x, index, weight = routing("some unused", seed=9)
    seen: set[int] = set()
    original = module.Tier.dequantize

    def watched(tier: Any, chosen: list[int], dtype: torch.dtype) -> Tensor:
        seen.update(chosen)
        return original(tier, chosen, dtype)

    monkeypatch.setattr(module.Tier, "dequantize", watched)
    packed(x.float(), index, weight.float())
    assert seen == {0, 1, 2}


def test_a_token_does_not_depend_on_its_batch() -> None:
    packed, _ = pack_module("gpt_oss", seed=2)
    packed = packed.double()
    x, index, weight = routing("many", seed=2)
    together = packed(x, index, weight)
    for t in range(len(x)):
        alone = packed(x[t : t + 1], index[t : t + 1], weight[t : t + 1])
        assert distance(alone[0], together[t]) < 1e-12


@pytest.mark.parametrize("kind", MODULES)
def test_resident_memory_is_the_packed_size(kind: str) -> None:
    packed, truth = pack_module(kind, seed=3)
    stored = sum(packed.formats[p][e].nbytes(*packed.shapes[p]) for p in packed.projections for e in range(EXPERTS))
    stored += sum(4 * b.numel() for b in truth["b"].values())
    norms = sum(4 * p.numel() for p in packed.parameters())
    assert norms == (4 * 2 * HIDDEN if kind == "ungated" else 0)
    assert sum(b.numel() * b.element_size() for b in packed.buffers()) == stored
    assert not list(packed._original[0].parameters(recurse=False))  # the original's weights are let go


@pytest.mark.parametrize("kind", MODULES)
def test_casts_leave_scales_alone(kind: str) -> None:
    """`.to(bfloat16)` casts fp16 tensors without a word; scales are kept as bit patterns."""
    packed, _ = pack_module(kind, seed=4)
    before = {(e, p): packed.qweight(e, p).dequantize() for p in packed.projections for e in range(EXPERTS)}
    packed = packed.to(torch.bfloat16).to(torch.float16).double()
    for (e, p), wanted in before.items():
        assert torch.equal(packed.qweight(e, p).dequantize(), wanted)


def test_a_sealed_module_gives_back_what_was_stored() -> None:
    packed, _ = pack_module("gpt_oss", seed=6)
    state = packed.state_dict()
    for p in packed.projections:
        for e in range(EXPERTS):
            q = packed.qweight(e, p)
            for suffix, value in q.pack().items():
                assert torch.equal(state[f"{e}.{p}_proj.{suffix}"], value)
                assert state[f"{e}.{p}_proj.{suffix}"].dtype == value.dtype
            assert f"{e}.{p}_proj.bias" in state
    suffixes = sum(3 if q.scheme == "a" else 2 for p in packed.projections for q in packed.formats[p])
    assert len(state) == suffixes + 3 * EXPERTS


def test_what_did_not_load_is_named() -> None:
    from mopeq.errors import MopeqError

    with torch.device("meta"):
        module = olmoe()
        packed = QuantizedExperts(
            module, {p: [Format(3)] * EXPERTS for p in ("gate", "up", "down")}, projection_shapes(module)
        )
    with pytest.raises(MopeqError, match=r"expert 0 gate: qweight came as torch.uint8 \[3\]"):
        packed.fill(lambda name: torch.zeros(3, dtype=torch.uint8))
