"""The one cut: only this file touches an experts module of transformers.

Experts modules share one interface (`use_experts_implementation`): forward(hidden_states [T, H], top_k_index [T, K],
top_k_weights [T, K]), stacked weights, and flags on each instance that say their layout. Watching goes through the
public door `ALL_EXPERTS_FUNCTIONS`; nothing here asks for a model's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mopeq.errors import MopeqError
from mopeq.nouns import MoELayer, MoESpec

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a layer's routed experts, by the flags transformers' decorator leaves on it."""
    return all(hasattr(module, flag) for flag in FLAGS) and hasattr(module, "down_proj")


def experts_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of every experts module, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if is_experts(module)]


def match_names(prefixes: list[str], names: list[str]) -> dict[str, str]:
    """{module name: on-disk prefix} of the experts: by layer number, and by order where a number occurs twice.

    Prefixes that the model does not build (multi-token prediction heads) stay unmatched; a module without a prefix
    is an error.
    """

    def by_number(keys: list[str]) -> dict[tuple[int, int], str]:
        seen: dict[int, int] = {}
        found = {}
        for key in keys:
            n = int((re.findall(r"\d+", key) or ["0"])[-1])
            found[n, seen.get(n, 0)] = key
            seen[n] = seen.get(n, 0) + 1
        return found

    on_disk = by_number(prefixes)
    matched = {name: on_disk[key] for key, name in by_number(names).items() if key in on_disk}
    if len(matched) < len(names):
        odd = next(name for name in names if name not in matched)
        raise MopeqError(f"{odd} has no counterpart among the checkpoint's experts", "please report this model")
    return matched


def model_layers(spec: MoESpec, model: nn.Module) -> list[tuple[MoELayer, Any]]:
    """(layer, experts module) for every MoE layer the model has, in layer order."""
    found = experts_modules(model)
    layers = {layer.prefix: layer for layer in spec.layers}
    matched = match_names(list(layers), [name for name, _ in found])
    return sorted(((layers[matched[name]], module) for name, module in found), key=lambda pair: pair[0].layer)


# ------------------------------------------------------------------------------------- weights of a module


def views(module: Any, top: Tensor, down: Tensor) -> dict[str, Tensor]:
    """{projection: [E, out, in]} as views of an experts module's two stacked tensors (its weights, or their like)."""
    if module.is_transposed:
        top, down = top.transpose(1, 2), down.transpose(1, 2)
    if not module.has_gate:
        return {"up": top, "down": down}
    return {p: rows_of(top, p, module.is_concatenated) for p in ("gate", "up")} | {"down": down}


def weights(module: Any) -> dict[str, Tensor]:
    """{projection: [E, out, in]}: views of a module's weights, whatever its layout."""
    return views(module, module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj)


def bias(module: Any, p: str) -> Tensor | None:
    """A view of one projection's biases [E, out], or None."""
    if not module.has_bias:
        return None
    if p == "down":
        return module.down_proj_bias
    return rows_of(module.gate_up_proj_bias, p, module.is_concatenated) if module.has_gate else module.up_proj_bias


def rows_of(both: Tensor, p: str, concatenated: bool) -> Tensor:
    """Gate's or up's rows (dimension 1) of a fused tensor."""
    if not concatenated:
        return both[:, (0 if p == "gate" else 1) :: 2]
    half = both.shape[1] // 2
    return both[:, :half] if p == "gate" else both[:, half:]


def join_gate_up(module: Any, gate: Tensor, up: Tensor) -> Tensor:
    """[S, I] and [S, I] -> [S, 2I] in the order the module's gate function expects."""
    return torch.cat([gate, up], -1) if module.is_concatenated else torch.stack([gate, up], -1).flatten(-2)


def activate(module: Any, top: dict[str, Tensor]) -> Tensor:
    """The inputs of `down` [S, I] from the outputs of gate and up (or of up alone), by the module's own gate."""
    if not module.has_gate:
        return module.act_fn(top["up"])
    return module._apply_gate(join_gate_up(module, top["gate"], top["up"]))


# ----------------------------------------------------------------------------------------------- watching

Watcher = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
_watcher: list[Watcher] = []


def _dispatch(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return _watcher[-1](module, hidden_states, top_k_index, top_k_weights)


@contextmanager
def watch(model: Any, watcher: Watcher) -> Iterator[None]:
    """Within the block every experts module of the model runs as `watcher(module, x_TH, index_TK, weight_TK)`."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("mopeq_watch", _dispatch)
    before = {id(m): m.config._experts_implementation for _, m in experts_modules(model)}
    _watcher.append(watcher)
    for _, module in experts_modules(model):
        module.config._experts_implementation = "mopeq_watch"
    try:
        yield
    finally:
        for _, module in experts_modules(model):
            module.config._experts_implementation = before[id(module)]
        _watcher.pop()


def routed(index_TK: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, token positions, which of the token's k choices) for each expert that some token chose.

    Indices outside 0 … experts-1 (expert parallelism's "not mine") are left out.
    """
    flat = index_TK.flatten()
    order = torch.argsort(flat, stable=True)
    ids, counts = torch.unique_consecutive(flat[order], return_counts=True)
    k, at = index_TK.shape[1], 0
    for e, count in zip(ids.tolist(), counts.tolist(), strict=True):
        picked = order[at : at + count]
        at += count
        if 0 <= e < experts:
            yield e, picked // k, picked % k


@dataclass(frozen=True)
class Seen:
    """One expert's part in a forward pass: what was routed to it, and what its projections made of it.

    `inputs` and `outputs` are {projection: [S, in]} and [S, out]; `tokens` [S] are positions among the layer's T.
    """

    expert: int
    tokens: Tensor
    weight: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def plain_forward(
    module: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, see: Callable[[Seen], None] | None = None
) -> Tensor:
    """The experts' function written out, one expert after another; differentiable any number of times.

    `see` is shown each expert that some token chose.
    """
    out_TH = torch.zeros_like(x_TH)
    names = ("gate", "up") if module.has_gate else ("up",)
    w = weights(module)
    biases = {p: bias(module, p) for p in w}

    def project(p: str, e: int, x: Tensor) -> Tensor:
        b = biases[p]
        return linear(x, w[p][e], None if b is None else b[e])

    for e, tokens, choice in routed(index_TK, module.down_proj.shape[0]):
        x = x_TH[tokens]
        top = {p: project(p, e, x) for p in names}
        h = activate(module, top)
        down = project("down", e, h)
        weight = weight_TK[tokens, choice]
        if see is not None:
            see(Seen(e, tokens, weight, dict.fromkeys(names, x) | {"down": h}, top | {"down": down}))
        y = module.post_expert_norm(down) if getattr(module, "has_post_expert_norm", False) else down
        out_TH = out_TH.index_add(0, tokens, (y * weight.unsqueeze(-1)).to(out_TH.dtype))
    return out_TH
