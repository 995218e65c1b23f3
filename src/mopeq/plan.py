"""What a checkpoint will weigh, from headers alone: the same list of tensors that the writer later writes.

No torch here. `output_tensors` is the one place that says what is stored and how; planned bytes equal written bytes
because both are sums over it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mopeq.errors import BadInput
from mopeq.nouns import (
    PADDING,
    Budget,
    Format,
    LinearId,
    MoELayer,
    MoESpec,
    OutputTensor,
    PrecisionMap,
    TensorInfo,
    guard_name,
    size_text,
    tensor_bytes,
)

PER = ("projection", "gate-up", "expert", "layer-projection", "layer")


def other_format(other_bits: int, group_size: int) -> Format | None:
    """The format of all other 2-D weights; None keeps them at 16 bits."""
    if other_bits == 16:
        return None
    if other_bits not in (4, 8):
        raise BadInput(f"--other-bits {other_bits} is not offered", "choose 4, 8 or 16")
    return Format(other_bits, group_size)


def is_packable(tensor: TensorInfo, role: str) -> bool:
    """Whether `--other-bits` 4 or 8 applies: any 2-D weight except routers (whose precision is kept)."""
    return len(tensor.shape) == 2 and tensor.dtype in ("F32", "F16", "BF16") and role != "router" and (
        tensor.name.endswith(".weight")
    )  # fmt: skip


def kept_dtype(tensor: TensorInfo, role: str) -> str:
    """The dtype an unpacked tensor is written in: float32 matrices as bf16, all else as it was."""
    last = tensor.name.rpartition(".")[2]
    is_matrix = len(tensor.shape) == 2 and role != "router" and ("weight" in last or "embed" in last)
    return "BF16" if tensor.dtype == "F32" and is_matrix else tensor.dtype


def other_outputs(spec: MoESpec, other: Format | None) -> Iterator[OutputTensor]:
    """The tensors that are not routed experts, in source order."""
    for name, tensor in spec.tensors.items():
        role = spec.roles[name]
        if role == "routed expert":
            continue
        if other is not None and is_packable(tensor, role):
            stem = name.removesuffix(".weight")
            for suffix, (dtype, shape) in other.shapes(*tensor.shape).items():
                yield OutputTensor(f"{stem}.{suffix}", dtype, shape)
        else:
            yield OutputTensor(name, kept_dtype(tensor, role), tensor.shape)


def expert_outputs(spec: MoESpec, layer: MoELayer, map_: PrecisionMap) -> Iterator[OutputTensor]:
    """One layer's routed experts as they are stored: `…experts.<e>.<p>_proj.{qweight,scales,zeros,bias}`."""
    for e in range(layer.experts):
        for p in layer.projections:
            stem = f"{layer.prefix}.{e}.{p}_proj"
            for suffix, (dtype, shape) in map_[LinearId(layer.layer, e, p)].shapes(*layer.shapes[p]).items():
                yield OutputTensor(f"{stem}.{suffix}", dtype, shape)
            if p in layer.bias_places:
                name = layer.bias_places[p].name(e)
                yield OutputTensor(f"{stem}.bias", spec.tensors[name].dtype, (layer.shapes[p][0],))


def output_tensors(spec: MoESpec, map_: PrecisionMap, other: Format | None) -> Iterator[OutputTensor]:
    """Everything the packed checkpoint holds, in the order it is written."""
    yield from other_outputs(spec, other)
    yield OutputTensor(guard_name(layer.prefix for layer in spec.layers), "U8", (0,))
    for layer in spec.layers:
        yield from expert_outputs(spec, layer, map_)
    if map_.padding:
        yield OutputTensor(PADDING, "U8", (map_.padding,))


def fixed_bytes(spec: MoESpec, other: Format | None) -> int:
    """Payload that no map changes: all other tensors, and the experts' biases."""
    biases = 0
    for layer in spec.layers:
        for p, place in layer.bias_places.items():
            dtype = spec.tensors[place.name(0)].dtype
            biases += layer.experts * tensor_bytes(dtype, (layer.shapes[p][0],))
    return biases + sum(t.nbytes for t in other_outputs(spec, other))


# --------------------------------------------------------------------------------------------- the choice


@dataclass(frozen=True)
class Problem:
    """What an allocator chooses among: items (a linear, or linears tied by `--per`) by formats.

    `item_of_I` is each linear's item; `code_JF` and `bytes_JF` are an item's code bits and stored bytes per format.
    """

    formats: tuple[Format, ...]
    item_of_I: np.ndarray
    code_JF: np.ndarray
    bytes_JF: np.ndarray
    layer_of_J: np.ndarray


def make_problem(spec: MoESpec, formats: tuple[Format, ...], per: str) -> Problem:
    """Tie the spec's linears into the items that `--per` names."""
    if per not in PER:
        raise BadInput(f"--per {per} is not offered", f"choose from: {', '.join(PER)}")
    keys = {
        "projection": lambda i: (i.layer, i.expert, i.projection),
        "gate-up": lambda i: (i.layer, i.expert, i.projection == "down"),
        "expert": lambda i: (i.layer, i.expert),
        "layer-projection": lambda i: (i.layer, i.projection),
        "layer": lambda i: (i.layer,),
    }[per]
    index: dict[tuple[Any, ...], int] = {}
    linears = spec.linears
    item_of_I = np.array([index.setdefault(keys(i), len(index)) for i, _ in linears], dtype=np.int64)
    weights: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for _, shape in linears:
        if shape not in weights:
            out, n = shape
            code = np.array([f.bits * out * n for f in formats], dtype=np.int64)
            weights[shape] = code, np.array([f.nbytes(out, n) for f in formats], dtype=np.int64)
    code_JF = np.zeros((len(index), len(formats)), dtype=np.int64)
    bytes_JF = np.zeros_like(code_JF)
    np.add.at(code_JF, item_of_I, np.stack([weights[shape][0] for _, shape in linears]))
    np.add.at(bytes_JF, item_of_I, np.stack([weights[shape][1] for _, shape in linears]))
    layer_of_J = np.zeros(len(index), dtype=np.int64)
    layer_of_J[item_of_I] = [i.layer for i, _ in linears]
    return Problem(formats, item_of_I, code_JF, bytes_JF, layer_of_J)


@dataclass(frozen=True)
class Target:
    """The exact totals an allocation must meet: bytes of routed experts, and code bits where `--avg-bits` counts.

    Under `--avg-bits` the bytes are the most that choices of so many code bits take; what a choice leaves is padding.
    """

    expert_bytes: int
    code_bits: int | None


def target(spec: MoESpec, problem: Problem, budget: Budget, fixed: int) -> Target:
    """The largest total that the shapes can reach under the budget (spent exactly, whatever the costs)."""
    from mopeq.alloc.reach import largest_code_total, largest_total

    if budget.avg_bits is not None:
        limit = int(budget.avg_bits * spec.expert_params + 1e-6)
        least = int(problem.code_JF.min(1).sum())
        if least > limit:
            bits = least / spec.expert_params
            raise BadInput(
                f"an average of {budget.avg_bits:g} bits cannot be met: the narrowest widths come to {bits:g}",
                f"try --avg-bits {bits:g}, or add a narrower width to --bits",
            )
        code, nbytes = largest_code_total(problem.code_JF, problem.bytes_JF, limit)
        return Target(int(nbytes), int(code))
    assert budget.fit_bytes is not None
    least = int(problem.bytes_JF.min(1).sum()) + fixed
    if least > budget.fit_bytes:
        given, taken = size_text(budget.fit_bytes), size_text(least)
        if given == taken:
            given, taken = f"{budget.fit_bytes:,} bytes", f"{least:,}"
        raise BadInput(
            f"{given} cannot hold this model: with every expert at"
            f" {min(f.bits for f in problem.formats)} bits it takes {taken}",
            f"try --fit {least}" + ("" if fixed < 0.3 * least else ", or a smaller --other-bits"),
        )
    total = largest_total(problem.bytes_JF, budget.fit_bytes - fixed)
    assert total is not None
    return Target(int(total), None)


def uniform_target(spec: MoESpec, problem: Problem, budget: Budget, fixed: int) -> Target:
    """Totals of the one width that `uniform` takes: the average itself, or the widest that fits."""
    totals_F = problem.bytes_JF.sum(0)
    if budget.avg_bits is not None:
        for f, fmt in enumerate(problem.formats):
            if fmt.bits == budget.avg_bits:
                return Target(int(totals_F[f]), int(problem.code_JF[:, f].sum()))
        widths = sorted({fmt.bits for fmt in problem.formats})
        raise BadInput(
            f"--allocate uniform has one width, and {budget.avg_bits:g} is none of {', '.join(map(str, widths))}",
            f"try --avg-bits {min(widths, key=lambda w: abs(w - (budget.avg_bits or 0)))}, or --allocate random",
        )
    assert budget.fit_bytes is not None
    fitting = [int(t) for t in totals_F if t + fixed <= budget.fit_bytes]
    if not fitting:
        target(spec, problem, budget, fixed)  # says what the smallest would take
        raise BadInput("no single width fits", "try --allocate knapsack")
    return Target(max(fitting), None)


def uniform_bytes(spec: MoESpec, fmt: Format, fixed: int) -> int:
    """Payload with every routed expert in one format."""
    return fixed + sum(fmt.nbytes(*shape) * layer.experts for layer in spec.layers for shape in layer.shapes.values())


def cluster_bounds(problem: Problem, scope: str) -> tuple[int, int]:
    """The least and most bytes of routed experts where only clusters of scores decide (kmeans).

    Equal scores all take the narrowest width. At most, each cluster but the widest holds one item, the one that loses
    least by it; `scope` "layer" has such clusters in every layer, "model" but once.
    """
    least = most = 0
    layers = problem.layer_of_J if scope == "layer" else np.zeros_like(problem.layer_of_J)
    for layer in np.unique(layers):
        bytes_JF = problem.bytes_JF[layers == layer]
        widest = min(bytes_JF.shape) - 1  # fewer items than widths: a cluster for each, and the narrow ones are used
        saved_JF = bytes_JF[:, [widest]] - bytes_JF[:, :widest]
        least += int(bytes_JF[:, 0].sum())
        most += int(bytes_JF[:, widest].sum() - saved_JF.min(axis=0).sum())
    return least, most


# ------------------------------------------------------------------------------------------ what it takes


def kv_bytes_per_token(config: Mapping[str, Any]) -> int | None:
    """Bytes of KV cache a token takes in 16 bits, over all layers; None where the config does not tell.

    Counted as transformers caches it: multi-head latent attention stores expanded keys and values.
    """
    text = next((config[k] for k in ("text_config", "language_config") if isinstance(config.get(k), dict)), config)

    def number(*keys: str) -> int | None:
        return next((int(text[k]) for k in keys if isinstance(text.get(k), int) and text.get(k)), None)

    layers, heads = number("num_hidden_layers", "n_layers"), number("num_attention_heads", "n_heads")
    hidden = number("hidden_size", "d_model")
    if not layers or not heads or not hidden:
        return None
    if nope := number("qk_nope_head_dim"):
        width = heads * (nope + (number("qk_rope_head_dim") or 0) + (number("v_head_dim") or nope))
    else:
        width = 2 * (number("num_key_value_heads", "n_kv_heads") or heads) * (number("head_dim") or hidden // heads)
    return 2 * layers * width


def largest_layer_bytes(spec: MoESpec) -> int:
    """Bytes, once read, of the largest MoE layer's experts: what one step of the line holds in memory."""
    sizes = []
    for layer in spec.layers:
        places = {p.name(e) for p in layer.places.values() for e in range(layer.experts)}
        sizes.append(sum(tensor_bytes(spec.tensors[name].dtype, spec.tensors[name].shape) for name in places))
    return max(sizes)
