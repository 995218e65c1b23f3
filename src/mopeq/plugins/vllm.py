"""vLLM: an entry point of the group `vllm.general_plugins`, so that `vllm serve OUT` runs from packed weights.

vLLM calls `register` in every process. A layer's routed experts run by mopeq's kernels behind a custom operator, which
tracing and graph capture take as one step. All other matrices are vLLM's own: where they are stored packed
(`--other-bits` 4 or 8) they are unpacked while they are read, into the dtype that the model runs in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from mopeq.errors import MopeqError
from mopeq.kernels import triton
from mopeq.kernels.choice import refusal
from mopeq.nouns import PADDING, Format, guard_name
from mopeq.packed import check_sizes, check_version, read_map
from mopeq.plugins.hf import expert_formats
from mopeq.plugins.hook import close_doors
from mopeq.plugins.vllm_layer import ClampedGate, FlatLayer, Gate
from mopeq.tensors import QWeight

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}
CLAMPED = "swigluoai"  # GPT-OSS's gate, which is no activation alone
BY_LAYER = ("gpt_oss",)  # vLLM's loader of these takes no expert's matrix by itself
PROJECTION = {"w1": "gate", "w3": "up", "w2": "down"}  # by vLLM's shard_id
_layers: WeakValueDictionary[str, FlatLayer] = WeakValueDictionary()


def register() -> None:
    """The entry point. Importing this module has registered the config; here the loader's stream of tensors is taken
    through `dense_others`, once a process."""
    close_doors()
    original = DefaultModelLoader.get_all_weights
    if getattr(original, "knows_mopeq", False):
        return

    @wraps(original)
    def get_all_weights(self: Any, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        weights = original(self, model_config, model)
        if model_config.quantization != "mopeq":
            yield from weights
        else:
            fields = model_config.hf_config.quantization_config
            experts = list(fields["experts"])
            weights = dense_others(weights, fields["other"], tuple(experts), model_config.dtype)
            by_layer = model_config.hf_config.model_type in BY_LAYER
            yield from fill_experts(weights, experts, model) if by_layer else weights

    get_all_weights.knows_mopeq = True  # type: ignore[attr-defined]
    DefaultModelLoader.get_all_weights = get_all_weights


def dense_others(
    weights: Iterable[tuple[str, Tensor]], other: str | None, experts: tuple[str, ...], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors, but for its padding; packed matrices outside the experts as `.weight`, dequantized.

    `other`: their format's name; `experts`: the prefixes of the experts' names.
    """
    fmt = None if other is None else Format.parse(other)
    suffixes = () if fmt is None else tuple(fmt.shapes(1, 1))
    guards = {guard_name([prefix]) for prefix in experts}
    experts = tuple(f"{prefix}." for prefix in experts)
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, value in weights:
        stem, _, suffix = name.rpartition(".")
        if name == PADDING or name in guards:
            continue
        if fmt is None or suffix not in suffixes or name.startswith(experts):
            yield name, value
            continue
        parts = waiting.setdefault(stem, {})
        parts[suffix] = value
        if len(parts) == len(suffixes):
            codes = waiting.pop(stem)["qweight"]
            q = QWeight.unpack(parts, fmt, codes.shape[0], codes.shape[1] * 8 // fmt.bits)
            yield f"{stem}.weight", q.dequantize(dtype)
    if waiting:
        stem = min(waiting)
        raise MopeqError(f"of {stem} only {', '.join(waiting[stem])} is there", "the checkpoint is damaged")


def fill_experts(
    weights: Iterable[tuple[str, Tensor]], experts: list[str], model: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """Put the experts' tensors, whose names begin with `experts`, in their places in the model; give on all others."""
    layers: dict[str, Any] = {
        on_disk(experts, m.layer_name): m for m in model.modules() if isinstance(m, RoutedExperts)
    }
    for name, value in weights:
        prefix, _, last = name.partition(".experts.")
        layer = layers.get(f"{prefix}.experts")
        if layer is None:
            yield name, value
        else:
            expert, projection, suffix = last.split(".")
            e = layer._map_global_expert_id_to_local_expert_id(int(expert))
            if e >= 0:
                layer.mopeq.load(e, projection.removesuffix("_proj"), suffix, value)


@torch.library.custom_op("mopeq::vllm_experts", mutates_args=())
def run_experts(x_TH: Tensor, weight_TK: Tensor, index_TK: Tensor, layer: str) -> Tensor:
    """The experts' function of one layer, [T, H]; `layer` is its name in `_layers`."""
    return _layers[layer].run(x_TH, weight_TK, index_TK)


@run_experts.register_fake
def _(x_TH: Tensor, weight_TK: Tensor, index_TK: Tensor, layer: str) -> Tensor:
    return torch.empty_like(x_TH)


@register_quantization_config("mopeq")
class MopeqVllmConfig(QuantizationConfig):  # type: ignore[misc]
    """`quantization_config` of a packed checkpoint; see packed.quantization_config for its fields."""

    def __init__(self, fields: Mapping[str, Any]):
        super().__init__()
        check_version(fields)
        self.formats = expert_formats(fields["experts"], [Format.parse(name) for name in fields["formats"]])

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MopeqVllmConfig:
        return cls(config)

    def get_name(self) -> str:
        return "mopeq"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # of the GPU kernels

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        """Called before anything is read: BadInput unless the folder is whole by its manifest."""
        folder = Path(model_name)
        if folder.is_dir():  # what is fetched from a hub is checked by that
            check_sizes(folder)
            read_map(folder)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            return ExpertsMethod(layer, self.formats[on_disk(list(self.formats), prefix)])
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def on_disk(prefixes: list[str], name: str) -> str:
    """The stored prefix of the experts that vLLM calls `name`: the same numbers, and most words in common."""
    numbers = re.findall(r"\d+", name)
    alike = [prefix for prefix in prefixes if re.findall(r"\d+", prefix) == numbers]
    if not alike:
        raise MopeqError(f"{name} has no counterpart among the checkpoint's experts", "please report this model")
    words = set(name.split("."))
    return max(alike, key=lambda prefix: len(words & set(prefix.split("."))))


class ExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """How vLLM makes, loads and runs one layer's routed experts. `formats`: {projection: Format of each expert}."""

    def __init__(self, layer: Any, formats: Mapping[str, list[Format]]):
        super().__init__(layer.moe_config)
        self.formats = formats
        activation = layer.activation.value
        for refused, what in (
            (activation not in (*ACTIVATIONS, CLAMPED), f"the activation {activation}"),
            (set(formats) != set(PROJECTION.values()), "experts without a gate"),
            (layer.apply_router_weight_on_input, "router weights on the experts' inputs"),
            (layer.swiglu_limit is not None, "a clamped gate of this kind"),
        ):
            if refused:
                raise MopeqError(
                    f"mopeq's vLLM plug-in does not run {what} yet ({layer.layer_name})",
                    "serve this model with transformers",
                )

    def maybe_roundup_sizes(self, hidden_size: int, inner_size: int, *_: Any, **__: Any) -> tuple[int, int]:
        return hidden_size, inner_size

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        places = [layer._map_global_expert_id_to_local_expert_id(e) for e in range(len(self.formats["down"]))]
        held = sorted((place, e) for e, place in enumerate(places) if place >= 0)
        assert [place for place, _ in held] == list(range(num_experts))
        parallel = layer.moe_config.moe_parallel_config
        activation, biases = layer.activation.value, params_dtype if layer.moe_config.has_bias else None
        flat = FlatLayer(
            {p: [row[e] for _, e in held] for p, row in self.formats.items()},
            hidden_size,
            intermediate_size_per_partition * parallel.tp_size,
            ClampedGate(biases) if activation == CLAMPED else Gate(ACTIVATIONS[activation], biases),
            parallel.tp_rank,
            parallel.tp_size,
        )
        for name, value in flat.parameters().items():
            parameter = nn.Parameter(value, requires_grad=False)
            layer.register_parameter(name, parameter)
            parameter.weight_loader = partial(take, layer, flat)  # type: ignore[attr-defined]
        flat.bind(held_by(layer))
        layer.mopeq = flat
        layer.mopeq_name = add_layer(layer.layer_name, flat)

    def process_weights_after_loading(self, layer: Any) -> None:
        flat: FlatLayer = layer.mopeq
        flat.bind(held_by(layer))  # vLLM may have moved them
        flat.finish()
        like = layer.w2_qweight.new_empty(0, dtype=layer.params_dtype)
        if like.is_cuda and not triton.refuses(flat.experts, like):
            triton.layer_of(flat.experts)  # in the order that the GPU kernels read, before any graph is captured
        elif like.is_cpu and not refusal("cpu", flat.experts, like):
            flat.experts.use_tiles()
        else:
            return
        for name in held_by(layer):
            delattr(layer, name)

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        index = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids]
        out: Tensor = run_experts(x, topk_weights, index, layer.mopeq_name)
        return out


def take(
    layer: Any,
    flat: FlatLayer,
    param: Tensor,
    loaded_weight: Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """vLLM's weight loader of the flat parameters."""
    e = layer._map_global_expert_id_to_local_expert_id(expert_id)
    if e >= 0:
        flat.load(e, PROJECTION[shard_id], weight_name.rpartition("_")[2], loaded_weight)
    return e >= 0 if return_success else None


def held_by(layer: Any) -> dict[str, Tensor]:
    return {name: p.data for name, p in layer.named_parameters(recurse=False) if name.startswith(("w13_", "w2_"))}


def add_layer(prefix: str, flat: FlatLayer) -> str:
    """A name under which the operator finds a layer: its own, or that and a number where another model has it."""
    name, copies = prefix, 0
    while name in _layers:
        copies += 1
        name = f"{prefix}#{copies}"
    _layers[name] = flat
    return name
