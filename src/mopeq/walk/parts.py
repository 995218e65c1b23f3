"""A model without weights, and its parts: submodules whose weights are read from the shards, used and freed.

A part is an entry of a ModuleList (a decoder layer, a block of a vision tower), the input embedding, or the output
head. What remains (norms, projections, single parameters) is small: it is resident. Renaming, splitting and merging of
stored tensors is transformers' own; routed experts come through `stream.read_layer`, so each stored byte is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.errors import MopeqError
from mopeq.models import load_config, model_class, quiet_transformers
from mopeq.nouns import MoELayer, MoESpec
from mopeq.seam import Adapted, bias, model_layers, renamer, weights
from mopeq.stream import read_biases, read_layer, read_tensor, refuse_sick

# the order of a forward pass, as far as it is known: what feeds the layers, they, the head
FIRST, LAYER, HEAD = range(3)
TOGETHER = 1 << 26  # bytes of stored tensors put into a model at a time: each time takes a look at all of the model


class CannotWalk(MopeqError):
    """This model's layers cannot be run apart: `why`."""

    def __init__(self, why: str):
        super().__init__(f"this model cannot run layer by layer: {why}", "it needs memory for the whole model")
        self.why = why


@dataclass(frozen=True)
class Part:
    """A submodule that is run as one. `streamed`: its weights are there only while it is `loaded`.

    `layers` are the MoE layers in it, with their experts modules; `order` sorts parts as a forward pass meets them.
    """

    name: str
    module: nn.Module
    streamed: bool
    order: tuple[int, int]
    layers: tuple[tuple[MoELayer, Any], ...]


def empty_model(config: Any, dtype: torch.dtype, attention: str | None = None) -> Any:
    """The config's model in eval mode with every parameter on meta; buffers that no checkpoint stores are computed.

    Its experts run one after another: functions for all at once copy the weights they use.
    """
    from transformers.utils.generic import ContextManagers

    quiet_transformers()
    config._experts_implementation = "eager"
    if attention is not None:
        config._attn_implementation = attention
    for scope in (config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))):
        if scope is not None:
            scope.dtype = dtype
    cls = model_class(config)
    with ContextManagers(cls.get_init_context(dtype, False, False, None)):
        model = cls(config)
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for name, buffer in model.named_non_persistent_buffers():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner)._buffers[last] = torch.empty_like(buffer, device="cpu")
    with torch.no_grad():
        model.initialize_weights()
    return model.eval().requires_grad_(False)


def find_parts(model: Any, pairs: Sequence[tuple[MoELayer, Any]], whole: bool = False) -> list[Part]:
    """The parts of a model: they cover every submodule that has parameters, and none lies within another.

    whole=True: all are resident. CannotWalk where an MoE layer lies in no list of layers, or the model is several.
    """
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except NotImplementedError:
        raise CannotWalk("it is several models in one") from None
    shared = head is not None and not any(True for _ in head.parameters())  # a head that borrows a packed embedding
    ends = {id(head): HEAD} if shared else {id(embedding): FIRST, id(head): HEAD}
    experts = {id(module): (layer, module) for layer, module in pairs}
    found: list[Part] = []

    def add(name: str, module: nn.Module, streamed: bool) -> None:
        inside = tuple(experts[id(m)] for m in module.modules() if id(m) in experts)
        kind = LAYER if inside or name.rpartition(".")[0] in decoders else ends.get(id(module), FIRST)
        found.append(Part(name, module, streamed, (kind, len(found)), inside))

    def visit(name: str, module: nn.Module) -> None:
        if isinstance(module, nn.ModuleList):
            for key, entry in module.named_children():
                add(f"{name}.{key}", entry, any(True for _ in entry.parameters()))
        elif id(module) in ends:
            add(name, module, True)
        elif name and not any(isinstance(m, nn.ModuleList) or id(m) in ends for m in module.modules()):
            if any(True for _ in module.parameters()):
                add(name, module, False)
        else:
            for key, child in module.named_children():
                visit(f"{name}.{key}" if name else key, child)

    decoders = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(id(m) in experts for m in module.modules())
    }
    visit("", model)
    if whole:
        return [replace(part, streamed=False) for part in found]
    if stray := set(experts) - {id(module) for part in found if part.streamed for _, module in part.layers}:
        raise CannotWalk(f"{len(stray)} of its MoE layers lie in no list of layers")
    return found


@dataclass(frozen=True)
class Resident:
    """A model that is in memory already, as far as a walk asks for its parts."""

    model: Any
    parts: list[Part]
    device: str

    def loaded(self, part: Part) -> AbstractContextManager[None]:
        return nullcontext()


def resident(model: Any, spec: MoESpec) -> Resident:
    return Resident(
        model, find_parts(model, model_layers(spec, model), whole=True), str(next(model.parameters()).device)
    )


class Parts:
    """A model, its parts, and where each part's weights come from.

    `pairs` are its MoE layers (seam.model_layers); `names` the stored tensors' names, `read(name)` gives one of them.
    `fill_experts(layer, module)` gives an experts module its weights, or says False where these come by name like all
    others. `quantizer`: that of a packed model, which completes what it replaced, and has it let go of its weights.
    """

    def __init__(
        self,
        model: Any,
        pairs: Sequence[tuple[MoELayer, Any]],
        names: Iterable[str],
        read: Callable[[str], Tensor],
        fill_experts: Callable[[MoELayer, Any], bool] = lambda layer, module: False,
        device: str = "cpu",
        whole: bool = False,
        quantizer: Any = None,
    ):
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.model, self.read, self.fill_experts, self.device = model, read, fill_experts, device
        self.quantizer, self.mapping = quantizer, get_model_conversion_mapping(model, None, quantizer)
        self.parts = find_parts(model, pairs, whole)
        ties = (getattr(model, "all_tied_weights_keys", None) or {}).items()
        self.twin = dict(ties) | {b: a for a, b in ties}
        self.sources = self.find_sources(names)
        for name, buffer in model.named_non_persistent_buffers():
            owner, _, last = name.rpartition(".")
            if not buffer.is_meta:
                model.get_submodule(owner)._buffers[last] = buffer.to(device)
        self.fill([name for name in model.state_dict() if not self.part_of(name)])
        for part in self.parts:
            if not part.streamed:
                self.fill_part(part)

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to, or "" for those of no part."""
        return next((part.name for part in self.parts if name.startswith(part.name + ".")), "")

    def find_sources(self, names: Iterable[str]) -> dict[str, list[str]]:
        """{parameter: the stored tensors it is made of}; of several parameters made together, the first stands for
        all. Tensors that the model does not build are left out."""
        renamed, state = renamer(self.model, self.mapping), self.model.state_dict()
        found: dict[str, list[str]] = {}
        for name in names:
            target, _ = renamed(name)
            target = target if target in state else name
            if target in state:
                found.setdefault(target, []).append(name)
        return found

    @contextmanager
    def loaded(self, part: Part) -> Iterator[None]:
        """Within the block the part has its weights."""
        if not part.streamed:
            yield
            return
        modules = list(part.module.modules())
        real = {(id(m), name) for m in modules for name, buffer in m._buffers.items() if not is_meta(buffer)}
        self.fill_part(part)
        try:
            yield
        finally:
            if self.quantizer is not None:
                self.quantizer.let_go(self.model, part.name + ".")
            for module in modules:
                free(module)
                for name, buffer in module._buffers.items():
                    if (id(module), name) not in real:
                        module._buffers[name] = None if buffer is None else buffer.to("meta")

    def fill_part(self, part: Part) -> None:
        routed: set[int] = set()
        for layer, module in part.layers:
            if self.fill_experts(layer, module):
                routed |= {id(p) for p in module.parameters(recurse=False)}
        held = self.model.state_dict(keep_vars=True)
        self.fill([name for name in held if name.startswith(part.name + ".") and id(held[name]) not in routed])
        if self.quantizer is not None:
            self.quantizer.complete(self.model, part.name + ".")
        part.module.requires_grad_(False)

    def fill(self, wanted: list[str]) -> None:
        """Give the parameters (and stored buffers) their values. CannotWalk where one has none in the checkpoint."""
        waiting: dict[str, Tensor] = {}
        for name in wanted:
            sources = self.sources.get(name, [])
            if len(sources) == 1:
                waiting |= self.stored(sources)
            else:  # merged by itself: meanwhile stored tensors are held twice and thrice
                self.convert(self.stored(sources))
            if sum(t.nbytes for t in waiting.values()) > TOGETHER:
                self.convert(waiting)
                waiting = {}
        self.convert(waiting)
        held = self.model.state_dict(keep_vars=True)
        for name in wanted:
            if not held[name].is_meta:
                continue
            twin = self.twin.get(name)
            if twin is None or twin not in self.sources:
                raise CannotWalk(f"{name} is missing")
            value = held[twin]
            if value.is_meta:
                self.convert(self.stored(self.sources[twin]))
                value = self.model.get_parameter(twin)
                free(self.model.get_submodule(twin.rpartition(".")[0]))
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, value)

    def stored(self, names: list[str]) -> dict[str, Tensor]:
        return {name: refuse_sick(name, self.read(name)) for name in names}

    def convert(self, stored: dict[str, Tensor]) -> None:
        """Put stored tensors into the model, as transformers renames, splits and merges them."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        if not stored:
            return
        dtype = self.model.config.dtype
        how = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=self.model._get_dtype_plan(dtype),
            weight_mapping=self.mapping,
            device_map={"": self.device},
            hf_quantizer=self.quantizer,
        )
        info, _ = convert_and_load_state_dict_in_model(self.model, stored, how)
        if wrong := sorted(map(str, (*info.mismatched_keys, *info.conversion_errors))):
            raise MopeqError(f"{wrong[0]} does not fit", "the checkpoint does not fit the model its config describes")


def is_meta(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_meta


def free(module: nn.Module) -> None:
    """Put a module's own parameters back on meta."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def source_parts(
    folder: Path,
    spec: MoESpec,
    device: str = "cpu",
    attention: str | None = None,
    whole: bool = False,
    exact: bool = True,
) -> Parts:
    """The source's model in float32, in parts; all of them resident if `whole`.

    `attention="eager"` for what differentiates twice (SDPA on CPU has no double backward). exact=False: routed
    experts stay in the source's dtype, which halves what a layer takes; whoever multiplies with them casts.
    """
    model = empty_model(load_config(folder), torch.float32, attention)

    pairs = model_layers(spec, model)
    by_name = {id(module) for _, module in pairs if isinstance(module, Adapted)}
    apart = {
        place.name(e)
        for layer, module in pairs
        for place in (*layer.places.values(), *layer.bias_places.values())
        for e in range(layer.experts if id(module) not in by_name else 0)
    }

    def fill_experts(layer: MoELayer, module: Any) -> bool:
        if id(module) in by_name:
            return False
        fill_layer(folder, spec, layer, module, device, torch.float32 if exact else None)
        return True

    names = [name for name in spec.tensors if name not in apart]
    return Parts(model, pairs, names, lambda name: read_tensor(folder, spec.tensors[name]), fill_experts, device, whole)


def fill_layer(
    folder: Path, spec: MoESpec, layer: MoELayer, module: Any, device: str, dtype: torch.dtype | None
) -> None:
    """Give an experts module its weights, each projection where the module keeps it, and its biases."""
    stored = read_layer(folder, spec, layer)
    kept = dtype or stored["down"].dtype
    for name, parameter in list(module._parameters.items()):
        if parameter is not None:
            kind = torch.float32 if name.endswith("_bias") else kept
            module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=kind, device=device), False)
    for p in list(stored):
        weights(module)[p].copy_(stored.pop(p))
    for p, rows in read_biases(folder, spec, layer).items():
        bias(module, p).copy_(rows)  # type: ignore[union-attr]
