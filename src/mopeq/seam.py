"""The one cut: only this file touches an experts module of transformers.

Experts modules share one interface (`use_experts_implementation`): forward(hidden_states [T, H], top_k_index [T, K],
top_k_weights [T, K]), stacked weights, and flags on each instance that say their layout. Watching goes through the
public door `ALL_EXPERTS_FUNCTIONS`; nothing here asks for a model's name. The few modules without that interface are
given it by the classes that a table in `families/` names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mopeq.errors import MopeqError
from mopeq.nouns import MoELayer, MoESpec
from mopeq.tables import pick

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
GROUPED_BYTES = 16  # torch's grouped product wants every row of its matrices to be a multiple of this


Run = Callable[[Tensor, Tensor, Tensor], Tensor]


class Adapted(nn.Module):
    """Base of the adapters: an experts module without transformers' shared interface, given its flags and its call.

    Mixed into the module's own class (`adopt`), so that its weights, names and, unless it is watched, its own forward
    stay as they are. `parts` names its parameters and submodules that hold the experts' weights; `keeps` the attributes
    that `share` needs, which runs on the packed module too.
    """

    has_gate = True
    has_bias = False
    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    parts: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    watched = False
    config: Any
    num_experts: int
    act_fn: Any
    gate_up_proj: Tensor
    down_proj: Tensor

    def adopted(self) -> None:
        """Called once, on taking the module over."""

    def stored(self) -> list[Tensor]:
        """The parameters that hold the experts' matrices."""
        return [self.gate_up_proj, self.down_proj]

    def arranged(self, stored: list[Tensor]) -> dict[str, Tensor]:
        """{projection: [E, out, in]} of them, or of tensors like them; differentiable."""
        top, down = (w.transpose(1, 2) for w in stored) if self.is_transposed else stored
        return {p: rows_of(top, p, self.is_concatenated) for p in ("gate", "up")} | {"down": down}

    def stacked_biases(self) -> dict[str, Tensor]:
        """{projection: [E, out]}."""
        return {}

    def share(self, run: Run, *args: Any) -> Tensor:
        """The module's call, by way of `run(x_TH, index_TK, weight_TK) -> [T, H]`, which sums over choices."""
        raise NotImplementedError

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gated: Tensor = self.act_fn(gate) * up
        return gated

    def forward(self, *args: Any) -> Any:
        if self.watched:
            return self.share(lambda x, index, weight: _watcher[-1](self, x, index, weight), *args)
        return super().forward(*args)


@cache
def mixed(adapter: type, own: type) -> type:
    """The class of an adopted module: the adapter's, before its own; what it says of its gate goes first."""
    own_gate = {"_apply_gate": own._apply_gate} if hasattr(own, "_apply_gate") else {}
    return type(own.__name__, (adapter, own), own_gate)


def adopt(model: nn.Module) -> None:
    """Give every experts module of a model that has a row in ADAPTERS the shared interface, in place and once."""
    from mopeq.families import ADAPTERS

    config: Any = getattr(model, "config", None)
    for module in model.modules():
        name = type(module).__name__
        if name in ADAPTERS and not isinstance(module, Adapted):
            adopted: Any = module
            adopted.__class__ = mixed(pick(ADAPTERS, name, "adapter"), type(adopted))  # type: ignore[arg-type]
            adopted.config = config.get_text_config()
            adopted.adopted()


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a layer's routed experts: an adopted one, or by the flags transformers' decorator leaves."""
    return isinstance(module, Adapted) or (
        all(hasattr(module, flag) for flag in FLAGS) and hasattr(module, "down_proj")
    )


def experts_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """(name, module) of every experts module, in the model's order; one without the shared interface is given it."""
    adopt(model)
    return [(name, module) for name, module in model.named_modules() if is_experts(module)]


def renamer(model: Any, mapping: Sequence[Any]) -> Callable[[str], tuple[str, str | None]]:
    """stored name -> (its name in the model, the source pattern of the converter that takes it or None), as
    transformers loads by a conversion mapping."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
    converters = [x for x in mapping if isinstance(x, WeightConverter)]
    state = model.state_dict()

    def renamed(name: str) -> tuple[str, str | None]:
        found: tuple[str, str | None] = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return found

    return renamed


def match_names(prefixes: list[str], names: list[str]) -> dict[str, str]:
    """{module name: on-disk prefix} of the experts: the same numbers in both (else the same last number), and of those
    the pair with most words in common, so that two towers are not mixed up.

    Prefixes that the model does not build (multi-token prediction heads) stay unmatched; a module without a prefix
    is an error.
    """

    def numbers(name: str) -> list[str]:
        return re.findall(r"\d+", name) or ["0"]

    pairs = []
    for name in names:
        for prefix in prefixes:
            if numbers(name)[-1] == numbers(prefix)[-1]:
                alike = len(set(name.split(".")) & set(prefix.split(".")))
                pairs.append((numbers(name) == numbers(prefix), name == prefix, alike, name, prefix))
    if not names:
        raise MopeqError(
            "the model has experts on disk, and no module with the shared experts interface",
            "give its experts module that by a row in src/mopeq/families/__init__.py, table ADAPTERS",
        )
    matched: dict[str, str] = {}
    for *_, name, prefix in sorted(pairs, key=lambda pair: pair[:3], reverse=True):
        if name not in matched and prefix not in matched.values():
            matched[name] = prefix
    if len(matched) < len(names):
        odd = next(name for name in names if name not in matched)
        raise MopeqError(
            f"{odd} has no counterpart among the checkpoint's experts",
            "does config.json ask for more layers than the weights hold? else please report this model",
        )
    return matched


def spare_odd_widths(model: Any) -> None:
    """Have experts computed one by one where torch's grouped product, transformers' default, takes no rows of such a
    width."""
    for module in model.modules():
        if is_experts(module):
            sizes = [side * w.element_size() for w in module.parameters() if w.ndim == 3 for side in w.shape[1:]]
            if any(size % GROUPED_BYTES for size in sizes):
                module.config._experts_implementation = "eager"


def twins(model: Any) -> dict[str, str]:
    """{experts module: the one whose weights it shares}, by the model's list of ties (before loading none is tied)."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    owners = {name: ties.get(f"{name}.down_proj", "").rpartition(".")[0] for name, _ in experts_modules(model)}
    return {name: owner for name, owner in owners.items() if owner}


def model_layers(spec: MoESpec, model: nn.Module) -> list[tuple[MoELayer, Any]]:
    """(layer, experts module) for every MoE layer the model has, in layer order."""
    found = experts_modules(model)
    layers = {layer.prefix: layer for layer in spec.layers}
    shared = twins(model)
    matched = match_names(list(layers), [name for name, _ in found if name not in shared])
    matched |= {name: matched[owner] for name, owner in shared.items()}
    return sorted(((layers[matched[name]], module) for name, module in found), key=lambda pair: pair[0].layer)


# ------------------------------------------------------------------------------------- weights of a module


def stored(module: Any) -> list[Tensor]:
    """The parameters that hold an experts module's matrices."""
    if isinstance(module, Adapted):
        return module.stored()
    return [module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj]


def views(module: Any, like_stored: list[Tensor]) -> dict[str, Tensor]:
    """{projection: [E, out, in]} of an experts module's `stored` tensors, or of others like them."""
    if isinstance(module, Adapted):
        return module.arranged(like_stored)
    top, down = like_stored
    if module.is_transposed:
        top, down = top.transpose(1, 2), down.transpose(1, 2)
    if not module.has_gate:
        return {"up": top, "down": down}
    return {p: rows_of(top, p, module.is_concatenated) for p in ("gate", "up")} | {"down": down}


def weights(module: Any) -> dict[str, Tensor]:
    """{projection: [E, out, in]}: views of a module's weights, whatever its layout."""
    return views(module, stored(module))


def bias(module: Any, p: str) -> Tensor | None:
    """A view of one projection's biases [E, out], or None."""
    if isinstance(module, Adapted):
        return module.stacked_biases().get(p)
    if not module.has_bias:
        return None
    if p == "down":
        return module.down_proj_bias
    return rows_of(module.gate_up_proj_bias, p, module.is_concatenated) if module.has_gate else module.up_proj_bias


def own_weights(module: Any) -> list[str]:
    """Names of a module's parameters and submodules that hold the experts' weights and biases."""
    return list(module.parts) if isinstance(module, Adapted) else list(module._parameters)


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
    found = [module for _, module in experts_modules(model)]
    before = {id(m): m.config._experts_implementation for m in found}
    _watcher.append(watcher)
    for module in found:
        module.config._experts_implementation, module.watched = "mopeq_watch", True
    try:
        yield
    finally:
        for module in found:
            module.config._experts_implementation, module.watched = before[id(module)], False
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


Change = Callable[[str, int, Tensor, Tensor], Tensor]


def plain_forward(
    module: Any,
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    see: Callable[[Seen], None] | None = None,
    change: Change | None = None,
) -> Tensor:
    """The experts' function written out, one expert after another; differentiable any number of times.

    `see` is shown each expert that some token chose; `change(projection, expert, inputs [S, in], outputs [S, out])`
    gives the outputs to go on with.
    """
    out_TH = torch.zeros_like(x_TH)
    names = ("gate", "up") if module.has_gate else ("up",)
    w = weights(module)
    biases = {p: bias(module, p) for p in w}

    def project(p: str, e: int, x: Tensor) -> Tensor:
        b = biases[p]
        y = functional.linear(x, w[p][e].to(x.dtype), None if b is None else b[e])
        return y if change is None else change(p, e, x, y)

    parts = list(routed(index_TK, w["down"].shape[0]))
    inputs = taken(x_TH, [tokens for _, tokens, _ in parts])
    k = index_TK.shape[1]
    shares = taken(weight_TK.flatten(), [tokens * k + choice for _, tokens, choice in parts])
    for (e, tokens, _), x, weight in zip(parts, inputs, shares, strict=True):
        top = {p: project(p, e, x) for p in names}
        h = activate(module, top)
        down = project("down", e, h)
        if see is not None:
            see(Seen(e, tokens, weight, dict.fromkeys(names, x) | {"down": h}, top | {"down": down}))
        y = module.post_expert_norm(down) if getattr(module, "has_post_expert_norm", False) else down
        out_TH.index_add_(0, tokens, (y * weight.unsqueeze(-1)).to(out_TH.dtype))
    return out_TH


def taken(x_T: Tensor, some: Sequence[Tensor]) -> Iterator[Tensor]:
    """x_T[rows] for each of some rows. Where gradients are asked for, all by one operator, whose gradient is one sum
    over them; else one after another, which takes less memory."""
    if some and x_T.requires_grad and torch.is_grad_enabled():
        yield from x_T.index_select(0, torch.cat(list(some))).split([len(rows) for rows in some])
    else:
        yield from (x_T[rows] for rows in some)


def shown(seen_S: Tensor, keep_S: Tensor | None) -> Tensor:
    """What of a `Seen` counts: rows that are no padding, all where there is none; without its graph."""
    return seen_S.detach() if keep_S is None else seen_S.detach()[keep_S]
