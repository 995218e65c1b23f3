"""Read the finished folder back and compare: exit 0 with a broken model is the commonest fault of this field.

Both models are the whole packed folder and the whole source's architecture, and every router answers; but what it
answers is taken modulo a few experts of each layer, among which every format of every projection is found. So the
reference has to hold no more than those, in float32, and reading back costs a fraction of making.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mopeq.assemble import PackedReader, dense_layer, dense_tensor, dense_tensors
from mopeq.checkpoint import shard_files
from mopeq.errors import BadInput, MopeqError, first_line
from mopeq.families.standard import TOP_K_KEYS
from mopeq.memory import FEW
from mopeq.models import load_config, load_model, logits_of, model_class, quiet_transformers
from mopeq.nouns import Format, LinearId, MoELayer, MoESpec, PrecisionMap
from mopeq.packed import unsealed_allowed
from mopeq.plan import other_outputs
from mopeq.progress import say
from mopeq.seam import Adapted, model_layers, renamer, weights
from mopeq.stream import read_tensor
from mopeq.walk.parts import CannotWalk, Parts, empty_model
from mopeq.walk.walking import Walk

TOKENS = 16
TOLERANCE = 1e-3  # of the logits' spread, float32: widths, names or layouts gone wrong miss it by far


def some_tokens(config: Any, seed: int) -> Tensor:
    """A row of random token ids without special ones, which may stand for pictures."""
    text = config.get_text_config()
    special = {v for c in (config, text) for k, v in vars(c).items() if k.endswith("_id") and isinstance(v, int)}
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(min(text.vocab_size, 30000), generator=generator).tolist()
    plain = [i for i in ids if i not in special]
    return torch.tensor((plain or ids)[:TOKENS])[None]


def check_model(source: Path, spec: MoESpec, other: Format | None) -> tuple[str, ...]:
    """BadInput, before any work, where the config's model cannot be made of the source's tensors, or not with all other
    matrices packed in `other`; else what a user should know. What only the loader finds shows when the folder is read
    back."""
    from mopeq.plugins.hf import MopeqConfig, MopeqQuantizer

    config = load_config(source)
    try:
        model = empty_model(config, torch.float32)
    except Exception as problem:  # a config class takes anything; its model raises whatever that leads to
        raise BadInput(
            f"transformers cannot build the model of {source}/config.json: {first_line(problem)}",
            "the file is damaged, or of another checkpoint",
        ) from None
    try:
        refuse_unfit_experts(spec, model)
        refuse_unfit(spec, model)
        refuse_missing(spec, model)
        if other is not None:
            experts: dict[str, Any] = {layer.prefix: {} for layer in spec.layers}
            quantizer = MopeqQuantizer(MopeqConfig(format_version=1, formats=[], experts=experts, other=other.name))
            quantizer.pack_others(model, {t.name for t in other_outputs(spec, other)}, other)
    except MopeqError as problem:
        raise BadInput(problem.line, problem.hint) from None
    refuse_unfit_choice(spec, config)
    run = {layer.layer for layer, _ in model_layers(spec, model)}
    idle = [layer.layer for layer in spec.layers if layer.layer not in run]
    said = f"config.json's model has no layer for the experts of {idle} in the weights: they are packed, and never run"
    return (said,) if idle else ()


def refuse_unfit_choice(spec: MoESpec, config: Any) -> None:
    """BadInput where the experts a token is sent to are left to a default that is more than there are."""
    text, most = config.get_text_config(), max(layer.experts for layer in spec.layers)
    for key in TOP_K_KEYS:
        count = getattr(text, key, None)
        if isinstance(count, int) and count > most:
            raise BadInput(
                f"config.json does not say {key}, {count} where it is left out, and a layer has {most} experts",
                f"add {key} to config.json",
            )


def refuse_unfit_experts(spec: MoESpec, model: Any) -> None:
    """BadInput naming the first experts of the source whose shapes are not those that the model's module has."""
    for layer, module in model_layers(spec, model):
        for p, w in weights(module).items():
            have, by_config = layer.shapes[p], tuple(w.shape[1:])
            if have != by_config:
                raise BadInput(
                    f"{layer.prefix}: {p} is {list(have)} in the weights, {list(by_config)} by config.json",
                    "config and weights belong to different checkpoints",
                )


def refuse_unfit(spec: MoESpec, model: Any) -> None:
    """BadInput naming the first tensor of the source whose shape is not the one it has in the model, of those that
    transformers only renames."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    renamed, state = renamer(model, get_model_conversion_mapping(model, None, None)), model.state_dict()
    for name, tensor in spec.tensors.items():
        if spec.roles[name] == "routed expert":
            continue
        key, pattern = renamed(name)
        if pattern is None and key in state and tuple(state[key].shape) != tensor.shape:
            raise BadInput(
                f"{name} is {list(tensor.shape)} in the weights, {list(state[key].shape)} by config.json",
                "config and weights belong to different checkpoints",
            )


def refuse_missing(spec: MoESpec, model: Any) -> None:
    """BadInput naming the first tensor of the model, of those outside its routed experts, that transformers makes of
    nothing in the source."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping = get_model_conversion_mapping(model, None, None)
    renamed, state = renamer(model, mapping), model.state_dict(keep_vars=True)
    made = {id(p) for _, module in model_layers(spec, model) for p in module.parameters()}
    for name in spec.tensors:
        if spec.roles[name] == "routed expert":
            continue
        key, pattern = renamed(name)
        found = {key if key in state else name}
        for converter in (x for x in mapping if pattern in x.source_patterns):  # one that splits makes several
            stem, first, end = key.rpartition(converter.target_patterns[0])
            found |= {f"{stem}{other}{end}" for other in converter.target_patterns if first}
        made |= {id(state[each]) for each in found if each in state}
    ties = (getattr(model, "all_tied_weights_keys", None) or {}).items()
    made |= {id(state[b]) for pair in ties for a, b in (pair, pair[::-1]) if a in state and id(state[a]) in made}
    spared = model._keys_to_ignore_on_load_missing or ()
    for name, tensor in state.items():
        if id(tensor) not in made and not any(re.search(pattern, name) for pattern in spared):
            raise BadInput(
                f"no tensor in the weights becomes {name}, which the model of config.json has",
                "fetch the checkpoint again; or are config and weights of different checkpoints?",
            )


def load_dense(source: Path, out: Path, spec: MoESpec, map_: PrecisionMap, other: Format | None) -> Any:
    """The source's model with the packed folder's values put in its own tensors, loaded by transformers' own path."""
    quiet_transformers()
    config = load_config(source)
    state = dict(dense_tensors(out, spec, map_, other))
    model, info = model_class(config).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        raise MopeqError(
            f"{source}: {sorted(map(str, info['missing_keys']))[0]} is missing",
            "are config.json and the weights of one checkpoint? else please report this model",
        )
    return model.eval()


Few = Mapping[int, Sequence[int]]  # the experts of each layer that take part


def few_experts(pairs: Sequence[tuple[MoELayer, Any]], map_: PrecisionMap, seed: int) -> Few:
    """Some experts of each layer: every format of every projection is among them, and what more there are is drawn.

    All of those whose weights are no stacks, or longer ones: their modules ask for all.
    """
    found: dict[int, list[int]] = {}
    generator = torch.Generator().manual_seed(seed)
    for layer, module in pairs:
        drawn = torch.randperm(layer.experts, generator=generator).tolist()
        if not is_stacked(layer, module):
            found[layer.layer] = sorted(drawn)
            continue
        new = [e for e in drawn if any(is_first(map_, layer, e, p, drawn) for p in layer.projections)]
        rest = [e for e in drawn if e not in new]
        found[layer.layer] = sorted(new + rest[: max(0, FEW - len(new))])
    return found


def is_stacked(layer: MoELayer, module: Any) -> bool:
    return not isinstance(module, Adapted) and module.down_proj.shape[0] == layer.experts


def is_first(map_: PrecisionMap, layer: MoELayer, e: int, p: str, drawn: list[int]) -> bool:
    """Whether an expert is the first drawn that has its format of a projection."""
    fmt = map_[LinearId(layer.layer, e, p)]
    return e == next(other for other in drawn if map_[LinearId(layer.layer, other, p)] == fmt)


def route_to(module: Any, experts: Sequence[int]) -> None:
    """Have an experts module use these alone: the router's choices are taken modulo their number."""
    own, chosen = module.forward, torch.tensor(experts)
    module.forward = lambda x_TH, index_TK, weight_TK: own(x_TH, chosen[index_TK % len(chosen)], weight_TK)


class FewReader(PackedReader):
    """A packed folder that seems to hold a few experts of each layer alone, counted from 0."""

    def __init__(self, out: Path, spec: MoESpec, few: Few):
        super().__init__(out)
        self.numbers = {f"{layer.prefix}.": few[layer.layer] for layer in spec.layers if layer.layer in few}

    def read(self, name: str) -> Tensor:
        for prefix, experts in self.numbers.items():
            if name.startswith(prefix):
                number, _, rest = name.removeprefix(prefix).partition(".")
                if number.isdigit() and int(number) < len(experts):  # beyond are experts without matrices
                    return super().read(f"{prefix}{experts[int(number)]}.{rest}")
        return super().read(name)


def few_of(spec: MoESpec, map_: PrecisionMap, few: Few) -> tuple[MoESpec, PrecisionMap]:
    """The source and the map as if there were no other experts."""
    layers, tensors, formats = [], dict(spec.tensors), dict(map_.formats)
    for layer in spec.layers:
        chosen = few.get(layer.layer, range(layer.experts))
        layers.append(replace(layer, experts=len(chosen)))
        for place in (*layer.places.values(), *layer.bias_places.values()):
            for e in range(len(chosen), layer.experts) if place.per_expert else ():
                tensors.pop(place.name(e), None)
            if not place.per_expert:
                info = spec.tensors[place.tensor]
                rows = info.shape[0] * len(chosen) // layer.experts
                tensors[place.tensor] = replace(info, shape=(rows, *info.shape[1:]))
        for p in layer.projections:
            for e in range(layer.experts):
                del formats[LinearId(layer.layer, e, p)]
            for e, original in enumerate(chosen):
                formats[LinearId(layer.layer, e, p)] = map_[LinearId(layer.layer, original, p)]
    return replace(spec, layers=tuple(layers), tensors=tensors), replace(map_, formats=formats)


def keep_few(module: Any, all_: int, count: int) -> None:
    """Shrink an experts module on meta to its first `count` experts."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.shape[0] == all_:
            module._parameters[name] = nn.Parameter(parameter[:count], requires_grad=False)
            module._parameters[name]._is_hf_initialized = True
    route_to(module, range(count))


def dense_parts(
    source: Path, out: Path, spec: MoESpec, map_: PrecisionMap, other: Format | None, seed: int
) -> tuple[Parts, Few]:
    """As `load_dense`, one layer at a time, with a few experts a layer, and which."""
    model = empty_model(load_config(source), torch.float32)
    pairs = model_layers(spec, model)
    few = few_experts(pairs, map_, seed)
    for layer, module in pairs:
        if len(few[layer.layer]) < layer.experts:
            keep_few(module, layer.experts, len(few[layer.layer]))
    reader = FewReader(out, spec, few)
    spec, map_ = few_of(spec, map_, few)
    layer_of = {
        place.name(e): layer
        for layer in spec.layers
        for place in (*layer.places.values(), *layer.bias_places.values())
        for e in range(layer.experts)
    }

    def read(name: str) -> Tensor:
        if name in layer_of:
            return next(value for _, value in dense_layer(reader, spec, layer_of[name], map_, name))
        return dense_tensor(reader, spec, other, name)

    return Parts(model, model_layers(spec, model), spec.tensors, read), few


def route_packed(model: Any, quantizer: Any, spec: MoESpec, few: Few) -> None:
    """Have a packed model use those experts alone."""
    layers = {layer.prefix: layer for layer in spec.layers}
    modules = {id(m): (m, layers[prefix]) for n, prefix in quantizer.prefixes.items() for m in [model.get_submodule(n)]}
    for module, layer in modules.values():  # once each, where two parts of a model share one
        if len(few[layer.layer]) < layer.experts:
            route_to(module, few[layer.layer])


def packed_parts(out: Path, spec: MoESpec, few: Few) -> Parts:
    """The packed folder's model, one layer at a time, by the modules and the code that serve it."""
    from mopeq.plugins.hf import MopeqConfig, MopeqQuantizer

    config = load_config(out)
    fields = config.quantization_config
    quantizer = MopeqQuantizer(fields if isinstance(fields, MopeqConfig) else MopeqConfig.from_dict(fields))
    model = empty_model(config, torch.float32)
    quantizer.preprocess_model(model=model, dtype=torch.float32, checkpoint_files=[str(f) for f in shard_files(out)])
    route_packed(model, quantizer, spec, few)
    experts = tuple(f"{prefix}." for prefix in quantizer.prefixes.values())
    names = [name for name in quantizer.tensors if not name.startswith(experts)]
    return Parts(model, (), names, lambda name: read_tensor(out, quantizer.tensors[name]), quantizer=quantizer)


def walked_logits(parts: Parts, ids: Tensor) -> Tensor:
    found: list[Tensor] = []
    for visit in Walk(parts).forward([lambda: found.append(logits_of(parts.model, ids).double())]):
        visit.run()
    return found[0]


def read_back(
    source: Path, out: Path, spec: MoESpec, map_: PrecisionMap, other: Format | None, seed: int, loads: bool
) -> float:
    """Largest logit difference between the packed model and the dequantized reference, relative to the logits'
    spread. MopeqError if it exceeds TOLERANCE or is not finite.

    `loads`: there is memory to load the packed model as its users will, by plain `from_pretrained`. Else, and for the
    reference, one layer's weights are in memory at a time, where the model can be walked.
    """
    ids = some_tokens(load_config(source), seed)
    try:
        with unsealed_allowed():
            parts, few = dense_parts(source, out, spec, map_, other, seed)
            found = loaded_logits(out, ids, spec, few) if loads else walked_logits(packed_parts(out, spec, few), ids)
        wanted = walked_logits(parts, ids)
    except CannotWalk as problem:
        say(f"read back: with the whole model in memory, since {problem.why}")
        with unsealed_allowed(), torch.no_grad():
            found = loaded_logits(out, ids, spec, {})
            wanted = logits_of(load_dense(source, out, spec, map_, other), ids).double()
    except MopeqError as problem:
        if other is None:
            raise
        raise MopeqError(problem.line, "it was not sealed; make it with --other-bits 16") from None
    except Exception as problem:  # whatever a model's own code raises where its config does not fit its weights
        raise MopeqError(
            f"the packed checkpoint does not run: {first_line(problem)}",
            "it was not sealed; try --other-bits 16, and please report this model",
        ) from None
    return compare_logits(found, wanted)


@torch.no_grad()
def loaded_logits(out: Path, ids: Tensor, spec: MoESpec, few: Few) -> Tensor:
    """By plain `from_pretrained`. `few` may be empty: all experts take part."""
    model = load_model(out, torch.float32, "cpu")
    if few:
        route_packed(model, model.hf_quantizer, spec, few)
    return logits_of(model, ids).double()


def compare_logits(found: Tensor, wanted: Tensor) -> float:
    if not torch.isfinite(wanted).all():
        raise MopeqError(
            "the model's logits are not finite, with its own weights rounded as they were packed",
            "the source is damaged: some of its weights overflow when they are used",
        )
    spread = float(wanted.std())
    worst = float((found - wanted).abs().max()) / max(spread, 1e-30)
    if not torch.isfinite(found).all() or not worst <= TOLERANCE:
        raise MopeqError(
            f"the packed model's logits differ from the dequantized reference by {worst:.2g} of their spread",
            "the checkpoint was not sealed and will not load; please report this model",
        )
    return worst
