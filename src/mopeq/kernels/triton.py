"""Our GPU kernels, launched: three or four launches, whatever the number of experts and their widths.

The layer's packed tensors become an arena (`kernels/arena.py`) at the first call and are let go; the module's `tiers`
give them back from there. Nothing is read back to the host, so calls can be captured in a CUDA graph after the first.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from mopeq.kernels import arena, few, hopper
from mopeq.kernels.arena import Arena
from mopeq.nouns import Format
from mopeq.seam import activate

SCAN_PAIRS = 64  # up to here each program finds its tile's pairs itself; above, they are sorted first
SORTED = 128  # pairs that a program sorts
FEW = 64  # tokens up to which a lone matrix is multiplied as experts are
MANY = 48  # pairs an expert, on average, from which plain Triton's tiles are large


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors (for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuses(experts: Any, x: Tensor) -> str:
    """Why these kernels cannot run these experts on these activations, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if x.dtype not in (torch.bfloat16, torch.float16) and not (interpreted() and x.dtype == torch.float32):
        return f"activations are {x.dtype}, not bf16 or fp16"
    if x.device.type != "cuda" and not interpreted():
        return f"it does not run on {x.device.type}"
    if x.device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU is older than Ampere"
    return arena.refuses(experts.formats)


@dataclass(frozen=True)
class Plan:
    """How one call is cut: pairs a tile; rows a program, programs sharing a reduction (of gate and up; of down)."""

    scan: int  # pairs every program scans, a power of two; 0: they are sorted first
    pairs: int
    rows: tuple[int, int]
    split: tuple[int, int]
    warps: int
    stages: int
    slots: int  # of a tile taken at a time


def plan(pairs: int, experts: int, shared_bytes: int) -> Plan:
    """By the number of (token, choice) pairs and how many an expert gets on average, as measured on H100 and H200;
    `shared_bytes` is the shared memory a program may take, which is smaller on other GPUs."""
    scan = max(8, 1 << (pairs - 1).bit_length()) if pairs <= SCAN_PAIRS else 0
    each = pairs / experts
    if each >= MANY:
        stages, slots = (3, 8) if shared_bytes >= 221184 else (3, 4) if shared_bytes >= 131072 else (2, 4)
        return Plan(scan, 128, (128, 128), (1, 1), 8, stages, slots)
    tile = 8 if each <= 4 else 16 if each <= 12 else 32
    split = (2, 2) if pairs <= 16 else (2, 1) if pairs <= 1024 else (1, 1)
    return Plan(scan, tile, (64, 64), split, 4, 3, 8)


@cache
def shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


@dataclass(frozen=True)
class Gate:
    """A gate function the kernels know: its number there, and the constants of the clamped one."""

    act: int
    alpha: float = 1.0
    limit: float = 0.0


UNKNOWN = Gate(0)


def known_gates(experts: Any) -> list[tuple[Gate, Callable[[Tensor, Tensor], Tensor]]]:
    """(gate, its formula) for every gate function the kernels have; the clamped one's constants are read off."""
    plain: dict[int, Callable[[Tensor], Tensor]] = {
        1: silu,
        2: gelu,
        3: lambda g: gelu(g, approximate="tanh"),
        4: torch.relu,
    }
    if not experts.has_gate:
        return [(Gate(act), lambda g, u, f=f: f(u)) for act, f in plain.items()]  # type: ignore[misc]
    found: list[Any] = [(Gate(act), lambda g, u, f=f: f(g) * u) for act, f in plain.items()]
    at = probe(experts, torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1e4])).double()
    if 0 < at[0] < 1 and at[1] > 0:
        alpha, limit = round(torch.logit(at[0]).item(), 4), round((at[1] / at[0] - 1).item(), 2)
        found.append((Gate(5, alpha, limit), partial(clamped, alpha=alpha, limit=limit)))
    return found


def clamped(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """gpt-oss' gate."""
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(alpha * gate)


def probe(experts: Any, gate: Tensor, up: Tensor) -> Tensor:
    """The module's own gate function of some values, float32."""
    width = experts.shapes["up"][0]
    device = next((p.device for p in experts.parameters()), torch.device("cpu"))
    spread = {"gate": gate, "up": up}
    top = {p: v.view(-1, 1).repeat(1, width).float().to(device) for p, v in spread.items() if p in experts.projections}
    return activate(experts, top)[:, 0].float().cpu()


def gate_of(experts: Any) -> Gate:
    """Which of the kernels' gate functions the module's own is, found by trying values; UNKNOWN if none."""
    g, u = torch.meshgrid(torch.linspace(-13, 17, 61), torch.linspace(-23, 19, 22), indexing="ij")
    g, u = g.flatten(), u.flatten()
    try:
        own = probe(experts, g, u)
        for gate, formula in known_gates(experts):
            if torch.allclose(own, formula(g, u), rtol=1e-4, atol=1e-5):
                return gate
    except (RuntimeError, ValueError):  # a gate that minds the dtype or the shape
        pass
    return UNKNOWN


@dataclass(frozen=True)
class Layer:
    """What the launches need of one layer: its arena, as the element types it is read in, and its gate."""

    arena: Arena
    gate: Gate
    words: Tensor
    halves: Tensor
    widths: dict[str, int]  # of gate and up together, under "up", and of "down": a bit for each width of the arena
    uniform: dict[str, bool]  # whether all have one group size


def layer_of(experts: Any) -> Layer:
    """The layer's arena, made at the first call."""
    kept = experts.__dict__.get("_triton_layer")
    if kept is None or kept.arena.data is not experts._buffers.get("arena_data"):
        made, widths, uniform = experts.arena(), {}, {}
        for name, members in (("up", [p for p in experts.projections if p != "down"]), ("down", ["down"])):
            formats = {fmt for p in members for fmt in experts.formats[p]}
            widths[name] = sum(1 << bits for bits in {arena.STORED[fmt.bits] for fmt in formats})
            uniform[name] = len({fmt.group_size for fmt in formats}) == 1
        gate = gate_of(experts)
        kept = Layer(made, gate, made.data.view(torch.int16), made.data.view(torch.float16), widths, uniform)
        experts.__dict__["_triton_layer"] = kept
    return kept


def experts_forward(experts: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The experts' function of x_TH [T, H] for index_TK and weight_TK [T, K]; see kernels.ref for the meaning."""
    from mopeq.kernels import triton_kernels as kernels

    layer = layer_of(experts)
    tokens, k = index_TK.shape
    pairs, count, width = tokens * k, experts.num_experts, experts.shapes["down"][0]
    out = x_TH.new_empty(tokens, width)
    if pairs == 0:
        return out.zero_()
    x, ids, weight = x_TH.contiguous(), index_TK.contiguous(), weight_TK.contiguous()
    bias = experts.bias_of("down")
    with on(x):
        prompt = pairs > few.MOST_EACH * count and hopper.suits(experts, layer, x, pairs)
        y = many_pairs(experts, layer, x, ids) if prompt else few_pairs(experts, layer, x, ids)
        has_bias = bias is not None
        if experts.has_post_expert_norm:
            y = with_bias(y.float().sum(0), bias, ids, count)
            y, has_bias = experts.post_expert_norm(y.to(x.dtype)).contiguous()[None], False
        block = 256 if width >= 256 else 64
        kernels.weighted_sum[(tokens, -(-width // block))](
            y, weight, bias, ids, out, pairs, CHOICES=k, E=count, N=width, BIAS=has_bias, SPLIT=len(y), BN=block,
            num_warps=2, **following(x),
        )  # fmt: skip
    return out


def refuses_linear(matrix: Any, x: Tensor) -> str:
    """Why these kernels cannot multiply activations x with a PackedMatrix, or ""."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"activations are {x.dtype}, not bf16 or fp16"
    tokens = x.numel() // matrix.in_features
    if not hopper.fits((matrix.in_features, matrix.out_features), tokens, x):
        return "a size is no multiple of 8"
    if not (few.available(x.device) if tokens <= FEW else hopper.available(x.device)):
        return "Triton's Gluon does not run here, or this GPU is not one for prompts"
    return arena.refuses({"down": [matrix.format]})


def linear(matrix: Any, x: Tensor) -> Tensor:
    """x [..., in] times the transpose of a PackedMatrix -> [..., out]."""
    kept = matrix.__dict__.get("_triton_layer")
    if kept is None or kept[0].arena.data is not matrix._buffers.get("arena_data"):
        kept = matrix.__dict__["_triton_layer"] = layer_of_matrices(matrix.arena(), matrix.format, x.device)
    return by_matrices(kept, x)


def joined(matrices: Any, x: Tensor) -> Tensor:
    """The same by each matrix of a Joined whose arena is whole, one's outputs behind another's: few tokens only."""
    made, kept = matrices.arena(), matrices.__dict__.get("_triton_layer")
    if kept is None or kept[0].arena.data is not made.data:
        kept = matrices.__dict__["_triton_layer"] = layer_of_matrices(made, matrices.members[0].format, x.device)
    return by_matrices(kept, x)


def layer_of_matrices(made: Arena, fmt: Format, device: torch.device) -> tuple[Layer, Tensor]:
    """What launches need of matrices that stand alone, all of one format; and zeros for `few.linear` to count in."""
    made = replace(made, table=made.table.to(device))
    views = made.data.view(torch.int16), made.data.view(torch.float16)
    layer = Layer(made, UNKNOWN, *views, {"down": 1 << arena.STORED[fmt.bits]}, {"down": True})
    blocks = sum(-(-size // 64) for size in few.outputs(layer)) * (FEW // 8)
    return layer, torch.zeros(blocks, dtype=torch.int32, device=device)


def by_matrices(kept: tuple[Layer, Tensor], x: Tensor) -> Tensor:
    """x [..., in] times the transposes of a layer's matrices -> [..., all their outputs]."""
    layer, arrived = kept
    sizes = few.outputs(layer)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = x.new_empty(len(rows), sum(sizes))
    if len(rows):
        with on(x):
            if len(rows) > FEW:
                hopper.linear(layer, rows, y)
            else:
                early = following(rows)
                few.linear(layer, rows, y, arrived, WAIT=early["EARLY"], **early)
    return y.view(*x.shape[:-1], sum(sizes))


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Launches go to x's GPU, if it is on one."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def gating(experts: Any, gate: Gate) -> dict[str, Any]:
    """What the kernels are told about the gate."""
    has_bias = experts.bias_of("up") is not None
    return dict(GATED=experts.has_gate, ACT=gate.act, ALPHA=gate.alpha, LIMIT=gate.limit, BIAS=has_bias)


def many_pairs(experts: Any, layer: Layer, x: Tensor, ids: Tensor) -> Tensor:
    """`few_pairs` for prompts, by the kernels of `hopper`: [1, pairs, H]."""
    biases = experts.bias_of("gate"), experts.bias_of("up")
    cut = hopper.cuts(ids.numel() / experts.num_experts)
    routed = routing(ids, experts.num_experts, cut[0])
    told = gating(experts, layer.gate) | following(x)
    return hopper.products(experts, layer, x, routed, cut, ids.numel(), told, biases)


def few_pairs(experts: Any, layer: Layer, x: Tensor, ids: Tensor) -> Tensor:
    """down(act(gate x) * (up x)) for each pair, without down's bias: [parts to be summed, pairs, H]."""
    if few.suits(experts, x, ids.numel()):
        return few_by_gluon(experts, layer, x, ids)
    from mopeq.kernels import triton_kernels as kernels

    k, pairs, count = ids.shape[1], ids.numel(), experts.num_experts
    blocks, gate, early = plan(pairs, count, shared_bytes(x.device)), layer.gate, starts_early(x)
    made, sides = layer.arena, 2 if experts.has_gate else 1
    top, down = made.layouts["up"], made.layouts["down"]
    bias_gate, bias_up = experts.bias_of("gate"), experts.bias_of("up")
    split_top, split_down = blocks.split
    tiles, routed = pairs, [ids] * 4  # not read while scanning
    if not blocks.scan:
        routed = routing(ids, count, blocks.pairs)
        tiles = len(routed[1])
    shared = dict(E=count, BM=blocks.pairs, SLOTS=blocks.slots, SCAN=blocks.scan, STAGES=blocks.stages)
    shared |= dict(PTX=is_nvidia(x), num_warps=blocks.warps)
    source, gate_kind = (made.table, layer.words, made.data, layer.halves), gating(experts, gate)
    fused = gate.act > 0 and split_top == 1
    h = x.new_empty(pairs, top.out_features)
    parts = h if fused else torch.empty(sides, split_top, *h.shape, device=x.device)
    kernels.upper[(-(-top.out_features // blocks.rows[0]), tiles, 1 if fused else sides * split_top)](
        x, h, parts, *source, bias_gate, bias_up, ids, pairs, *routed, CHOICES=k, N=top.out_features,
        K=top.in_features, W=top.words, GROUP=top.group, UNIFORM=layer.uniform["up"], WIDTHS=layer.widths["up"],
        FUSED=fused, SPLIT=split_top, BN=blocks.rows[0], EARLY=early, **gate_kind, **shared,
    )  # fmt: skip
    if not fused:
        h = gated(experts, layer, parts, x, ids)
    kind = torch.float32 if pairs <= 1024 else x.dtype
    y = torch.empty(split_down, pairs, down.out_features, device=x.device, dtype=kind)
    kernels.lower[(-(-down.out_features // blocks.rows[1]), tiles, split_down)](
        h, y, *source, ids, pairs, *routed, P=len(made.layouts) - 1, N=down.out_features, K=down.in_features,
        W=down.words, GROUP=down.group, UNIFORM=layer.uniform["down"], WIDTHS=layer.widths["down"],
        SPLIT=split_down, BN=blocks.rows[1], **shared, **following(x),
    )  # fmt: skip
    return y


def few_by_gluon(experts: Any, layer: Layer, x: Tensor, ids: Tensor) -> Tensor:
    """`few_pairs` by the kernel of `few`."""
    pairs, count, early = ids.numel(), experts.num_experts, following(x)
    cut = few.cut(pairs, count, experts.shapes)
    routed = [ids] * 4 if cut.scan else routing(ids, count, cut.pairs)
    parts = torch.empty(2 if experts.has_gate else 1, cut.split[0], pairs, experts.shapes["up"][0], device=x.device)
    if cut.scan:
        few.product(cut, x, parts, layer, "up", ids, routed, EARLY=early["EARLY"], WAIT=False)
    else:
        few.product(cut, x, parts, layer, "up", ids, routed, WAIT=early["EARLY"], FIRST=True, **early)
    h = gated(experts, layer, parts, x, ids)
    y = torch.empty(1, cut.split[1], pairs, experts.shapes["down"][0], device=x.device)
    few.product(cut, h, y, layer, "down", ids, routed, WAIT=early["EARLY"], **early)
    return y[0]


def gated(experts: Any, layer: Layer, parts: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    """The inputs of `down` [pairs, I] from the parts [sides, split, pairs, I] of gate and up."""
    from mopeq.kernels import triton_kernels as kernels

    if layer.gate.act == 0:
        return unknown_gate(experts, parts.sum(1), ids).to(x.dtype).contiguous()
    _, split, pairs, n = parts.shape
    h = x.new_empty(pairs, n)
    kernels.gating[(pairs, -(-n // 256))](
        parts, h, experts.bias_of("gate"), experts.bias_of("up"), ids, pairs, E=experts.num_experts, N=n, SPLIT=split,
        BN=256, num_warps=2, **gating(experts, layer.gate), **following(x),
    )  # fmt: skip
    return h


def routing(ids: Tensor, experts: int, each: int) -> list[Tensor]:
    """(pairs in the order of their experts; each tile's expert or -1, its first pair's place there, the last's + 1)."""
    from mopeq.kernels import triton_kernels as kernels

    pairs = ids.numel()
    blocks, tiles, padded = -(-pairs // SORTED), pairs // each + experts, 1 << (experts - 1).bit_length()
    made = [ids.new_empty(size, dtype=torch.int32) for size in (pairs, tiles, tiles, tiles)]
    shape = dict(E=experts, EP=padded, C=SORTED, num_warps=8)
    counts = ids.new_empty(blocks, padded, dtype=torch.int32)
    kernels.counting[(blocks,)](ids, pairs, counts, EARLY=starts_early(ids), **shape)
    programs = max(blocks, -(-tiles // 64))  # each writes 64 tiles, so that few pairs do not wait for one to write all
    kernels.sorting[(programs,)](ids, pairs, counts, blocks, tiles, *made, BM=each, **shape, **following(ids))
    return made


def is_nvidia(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.version.hip is None and not interpreted()


def starts_early(x: Tensor) -> bool:
    """Whether a kernel may start before the one it waits for has ended (programmatic dependent launch: Hopper)."""
    return is_nvidia(x) and torch.cuda.get_device_capability(x.device) >= (9, 0)


def following(x: Tensor) -> dict[str, bool]:
    """How a kernel is launched that waits for the one before."""
    return dict(EARLY=True, launch_pdl=True) if starts_early(x) else dict(EARLY=False)


def with_bias(y_PN: Tensor, bias: Tensor | None, ids: Tensor, experts: int) -> Tensor:
    return y_PN if bias is None else y_PN + bias[ids.flatten().clamp(0, experts - 1)].to(y_PN.dtype)


def unknown_gate(experts: Any, sides: Tensor, ids: Tensor) -> Tensor:
    """A gate function that the kernels do not have, between two launches: by the module's own, from [sides, P, I]."""
    upper = [p for p in experts.projections if p != "down"]
    top = {p: with_bias(y, experts.bias_of(p), ids, experts.num_experts) for p, y in zip(upper, sides, strict=True)}
    return activate(experts, top)
