"""From headers to a MoESpec: which tensors are routed experts, and in which layout, by the family's row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mopeq.checkpoint import Checkpoint
from mopeq.errors import BadInput
from mopeq.families import FAMILIES, WHERE_TO_ADD, Family
from mopeq.nouns import FLOATS, PROJECTIONS, MoELayer, MoESpec, Place, TensorInfo
from mopeq.sources import unpacked

TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k")
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LAYER_COUNT_KEYS = ("num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers", "decoder_layers")
MANY_LAYERS = 1000  # more than any model has


def read_spec(checkpoint: Checkpoint) -> MoESpec:
    """What the headers of a checkpoint tell. BadInput for a dense, unknown, pre-quantized or incomplete one."""
    config, tensors = unpacked(checkpoint.config, checkpoint.tensors)
    refuse_quantized(config)
    check_layer_count(config, tensors)
    model_type, family = find_family(config, tensors)
    if tied(config) and any(name.endswith("embed_tokens.weight") for name in tensors):
        # a copy of the tied matrix is no second matrix
        tensors = {name: t for name, t in tensors.items() if not name.endswith("lm_head.weight")}
    if family.per_expert:
        layers = per_expert_layers(tensors, family, zero_experts(config, family))
    else:
        layers = stacked_layers(tensors, family, config)
    if not layers:
        raise BadInput(
            f"no routed expert found: {model_type} checkpoints should hold them as {described(family)}",
            "is this checkpoint dense, or saved by an unusual tool?",
        )
    check_expert_count(config, layers)
    return MoESpec(model_type, layers, tensors, roles(tensors, layers), config, checkpoint.digest, family.adapted)


def refuse_quantized(config: Mapping[str, Any]) -> None:
    """BadInput for a source that is quantized already, mopeq's own outputs among them."""
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, dict) else "unknown"
        raise BadInput(
            f"the source is already quantized ({method})",
            "give the original checkpoint in bf16, fp16 or float32"
            if method != "mopeq"
            else "this is a mopeq checkpoint; give the checkpoint it was made from",
        )


def find_family(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> tuple[str, Family]:
    """(model_type, row): the config's own model_type, else that of the language model it wraps."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise BadInput("config.json has no model_type", "MODEL must be a checkpoint transformers knows")
    text = config.get("text_config")
    names = [model_type, str(text.get("model_type", "")) if isinstance(text, dict) else ""]
    for name in (*names, *(n.removesuffix("_text") for n in names)):
        if name in FAMILIES:
            return name, FAMILIES[name]
    counts = any(count > 1 for _, count in config_counts(config))
    if not counts and not any("expert" in name for name in tensors):
        raise BadInput(
            f"{model_type} is a dense model: no tensor of it belongs to a routed expert",
            "mopeq is for Mixture-of-Experts models; a uniform quantizer serves a dense one",
        )
    raise BadInput(f"the family {model_type!r} is not known", f"add a row to {WHERE_TO_ADD}, and a tiny test model")


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the config says that input and output embeddings are one matrix."""
    text = config.get("text_config")
    return (
        config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None) is True
    )


def described(family: Family) -> str:
    if family.per_expert:
        return f"…experts.{family.numbered.format(e='<e>')}.<{', '.join(family.names)}>.weight"
    return f"…{family.block}.{family.gate_up} and …{family.block}.{family.down}"


def zero_experts(config: Mapping[str, Any], family: Family) -> int:
    """How many of a layer's experts have no weights that count, and stand last."""
    found = config.get(family.zero_experts) if family.zero_experts else 0
    return found if type(found) is int else 0


# ------------------------------------------------------------------------------- one tensor per expert


def each_name(family: Family) -> re.Pattern[str]:
    """What the name of one expert's tensor looks like."""
    number = re.escape(family.numbered.format(e="EXPERT")).replace("EXPERT", r"(?P<e>\d{1,9})")
    words = "|".join(map(re.escape, family.names))
    return re.compile(rf"(?P<prefix>.*\bexperts)\.{number}\.(?P<p>{words})\.(?P<what>weight|bias)")


def per_expert_layers(tensors: Mapping[str, TensorInfo], family: Family, zero: int = 0) -> tuple[MoELayer, ...]:
    """Layers of checkpoints where every expert's projections are tensors of their own."""
    found: dict[str, dict[tuple[str, str], dict[int, TensorInfo]]] = {}
    words: dict[tuple[str, str], str] = {}
    pattern = each_name(family)
    for name, tensor in tensors.items():
        if match := pattern.fullmatch(name):
            projection = family.names[match["p"]]
            slot = found.setdefault(match["prefix"], {}).setdefault((projection, match["what"]), {})
            slot[int(match["e"])] = tensor
            words[match["prefix"], projection] = match["p"]
    if zero:
        for slots in found.values():
            last = max(slots["down", "weight"], default=0) if ("down", "weight") in slots else 0
            for kind, slot in slots.items():
                slots[kind] = {e: t for e, t in slot.items() if e <= last or e > last + zero}
    groups = {
        f"{prefix.rpartition('.')[0]}.{module}.experts" if module else prefix: (prefix, i)
        for prefix in found
        for i, module in enumerate(family.modules or ("",))
    }
    layers = []
    for number, prefix in numbered(groups):
        on_disk, group = groups[prefix]
        slots = found[on_disk]
        every = 1 + max(max(slot, default=0) for slot in slots.values())
        if every % len(family.modules or ("",)):
            raise BadInput(f"{on_disk} has {every} experts for {len(family.modules)} modules", "fetch it again")
        experts = every // len(family.modules or ("",))
        first = group * experts
        shapes, places, bias_places = {}, {}, {}
        for (projection, what), slot in slots.items():
            mine = range(first, first + experts)
            missing = next((e for e in mine if e not in slot), None)  # lazily: a name can claim any number
            if missing is not None:
                raise BadInput(f"{on_disk}.{missing} has no {projection} {what}", "fetch the checkpoint again")
            one = check_alike((slot[e] for e in mine), 2 if what == "weight" else 1)
            name = f"{on_disk}.{family.numbered}.{words[on_disk, projection]}.{what}"
            if what == "weight":
                shapes[projection], places[projection] = (one.shape[0], one.shape[1]), Place(name, first=first)
            else:
                bias_places[projection] = Place(name, first=first)
        layers.append(make_layer(number, prefix, experts, shapes, places, bias_places))
    return tuple(layers)


def check_alike(tensors: Any, rank: int) -> TensorInfo:
    """The first of some tensors that must share shape and dtype, be floating and have `rank` dimensions."""
    first, *rest = tensors
    if first.dtype not in FLOATS or len(first.shape) != rank:
        raise BadInput(
            f"{first.name} is {first.dtype} {list(first.shape)}, not a floating matrix",
            "the source seems quantized already; give the original checkpoint in bf16, fp16 or float32",
        )
    for other in rest:
        if other.shape != first.shape or other.dtype != first.dtype:
            raise BadInput(f"{other.name} differs in shape or dtype from {first.name}", "the checkpoint is damaged")
    return first


# -------------------------------------------------------------------------- experts stacked in one tensor


def hidden_size(config: Mapping[str, Any]) -> int | None:
    """The language model's hidden size, if the config tells."""
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("hidden_size")
    return found if type(found) is int else None


def stacked_layers(
    tensors: Mapping[str, TensorInfo], family: Family, config: Mapping[str, Any]
) -> tuple[MoELayer, ...]:
    """Layers of checkpoints where one tensor holds a projection (or gate and up together) of all experts."""
    ends = {family.gate_up: "gate_up", family.gate: "gate", family.up: "up", family.down: "down"}
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        if stem.rpartition(".")[2] == family.block and last.removesuffix("_bias") in ends:
            kind = ends[last.removesuffix("_bias")] + ("_bias" if last.endswith("_bias") else "")
            found.setdefault(stem, {})[kind] = tensor
    if not family.flat:  # a dense layer's matrices may have the same names
        found = {stem: slots for stem, slots in found.items() if any(len(t.shape) == 3 for t in slots.values())}
    stems = {
        stem if stem.endswith("experts") else f"{stem.removesuffix('.experts.mlp')}.experts": stem for stem in found
    }
    return tuple(
        stacked_layer(number, prefix, found[stems[prefix]], family, config) for number, prefix in numbered(stems)
    )


def stacked_layer(
    number: int, prefix: str, slots: Mapping[str, TensorInfo], family: Family, config: Mapping[str, Any]
) -> MoELayer:
    """One layer from its stacked tensors: {"gate_up", "gate", "up", "down", and each with "_bias": tensor}."""
    halves = ("even", "odd") if family.interleaved else ("first", "second")
    if "gate_up" in slots:
        kinds = {"gate": ("gate_up", halves[0]), "up": ("gate_up", halves[1])}
    else:
        kinds = {p: (p, "all") for p in ("gate", "up") if p in slots}
    if "up" not in kinds or "down" not in slots:
        raise BadInput(f"{prefix} lacks {family.gate_up if 'down' in slots else family.down}", "fetch it again")
    kinds["down"] = ("down", "all")
    shapes, places, bias_places, counts = {}, {}, {}, set()
    for p, (kind, rows) in kinds.items():
        tensor = check_alike([slots[kind]], 2 if family.flat else 3)
        experts, *matrix = flat_shape(tensor, config) if family.flat else tensor.shape
        if family.transposed is None:  # each tensor by itself, as transformers decides when it loads
            transposed = matrix[0 if p == "down" else 1] != hidden_size(config)
        else:
            transposed = family.transposed is True or p in (family.transposed or ())
        outs, ins = matrix[::-1] if transposed else matrix
        if rows != "all" and outs % 2:
            raise BadInput(f"{tensor.name}: {list(tensor.shape)} has no two halves", "the checkpoint is damaged")
        shapes[p] = (outs if rows == "all" else outs // 2, ins)
        places[p] = Place(tensor.name, transposed, rows, flat=family.flat)
        if f"{kind}_bias" in slots:
            bias_places[p] = Place(slots[f"{kind}_bias"].name, rows=rows)
        counts.add(experts)
    if len(counts) > 1 or shapes["down"] != shapes["up"][::-1]:
        raise BadInput(
            f"{prefix}: {' and '.join(str(list(slots[kind].shape)) for kind, _ in kinds.values())}"
            " do not fit together as stacked experts",
            f"is the layout of this family as its row in {WHERE_TO_ADD} says?",
        )
    return make_layer(number, prefix, experts, shapes, places, bias_places)


def flat_shape(tensor: TensorInfo, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(experts, rows, columns) of a matrix in which a layer's experts follow one another; the config counts them."""
    experts = next((count for _, count in config_counts(config)), 0)
    if not experts or tensor.shape[0] % experts:
        raise BadInput(
            f"{tensor.name}: {tensor.shape[0]} rows do not make {experts} experts",
            f"config.json should say how many there are, as {' or '.join(EXPERT_COUNT_KEYS)}",
        )
    return experts, tensor.shape[0] // experts, tensor.shape[1]


# ------------------------------------------------------------------------------------------- both layouts


def make_layer(
    number: int,
    prefix: str,
    experts: int,
    shapes: dict[str, tuple[int, int]],
    places: dict[str, Place],
    bias_places: dict[str, Place],
) -> MoELayer:
    """A layer whose projections fit together; an empty matrix or a missing projection is refused."""
    if "up" not in shapes or "down" not in shapes:
        raise BadInput(f"{prefix} lacks its {'up' if 'up' not in shapes else 'down'} projection", "fetch it again")
    if any(0 in shape for shape in shapes.values()):
        raise BadInput(f"{prefix} holds empty matrices", "the checkpoint is damaged")
    if shapes["down"] != shapes["up"][::-1] or shapes.get("gate", shapes["up"]) != shapes["up"]:
        raise BadInput(f"{prefix}: gate, up and down do not fit together {shapes}", "the checkpoint is damaged")

    def ordered(d: dict[str, Any]) -> dict[str, Any]:
        return {p: d[p] for p in PROJECTIONS if p in d}

    return MoELayer(number, prefix, experts, ordered(shapes), ordered(places), ordered(bias_places))


def numbered(prefixes: Mapping[str, Any]) -> list[tuple[int, str]]:
    """(layer number, prefix) in layer order. The number is the prefix's last integer, as the checkpoint counts;
    where two prefixes share one (two towers), all are counted through instead."""

    def key(prefix: str) -> list[tuple[int, int | str]]:
        return [(0, int(part)) if part.isdigit() else (1, part) for part in prefix.split(".")]

    ordered = sorted(prefixes, key=key)
    numbers = [int((re.findall(r"\d+", prefix) or ["0"])[-1]) for prefix in ordered]
    if len(set(numbers)) < len(numbers):
        numbers = list(range(len(ordered)))
    return sorted(zip(numbers, ordered, strict=True))


def check_layer_count(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """BadInput where the config promises far more layers than there are tensors: transformers lists and builds them all
    before it looks at the weights, for hours and without end to the memory."""
    for key, count in config_counts(config, LAYER_COUNT_KEYS):
        if count > max(len(tensors), MANY_LAYERS):
            raise BadInput(
                f"config.json says {key} = {count}, and there are {len(tensors)} tensors",
                "the file is damaged, or of another checkpoint",
            )


def check_expert_count(config: Mapping[str, Any], layers: tuple[MoELayer, ...]) -> None:
    """BadInput where the config promises another number of experts than every layer has."""
    for key, count in config_counts(config):
        if all(layer.experts != count for layer in layers):
            raise BadInput(
                f"config.json says {key} = {count}, the tensors hold {layers[0].experts} experts a layer",
                "config and weights belong to different checkpoints, or a shard is missing",
            )
    for key, count in config_counts(config, TOP_K_KEYS):
        if not 0 < count <= max(layer.experts for layer in layers):
            raise BadInput(
                f"config.json says {key} = {count}, a layer has {layers[0].experts} experts to choose from",
                "the file is damaged; fetch it again",
            )


def config_counts(config: Mapping[str, Any], keys: tuple[str, ...] = EXPERT_COUNT_KEYS) -> list[tuple[str, int]]:
    """(key, number) wherever the config, or a config within it, counts what the keys name: experts."""
    scopes = (config, *(v for v in config.values() if isinstance(v, dict)))
    return [(key, scope[key]) for scope in scopes for key in keys if type(scope.get(key)) is int]


VISION = re.compile(r"(^|\.)(visual|vision|vision_\w+|vit|image_\w+|\w*projector|view_seperator|audio\w*)(\.|$)")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|lm_head|embed_out)(\.|$)")


def roles(tensors: Mapping[str, TensorInfo], layers: tuple[MoELayer, ...]) -> dict[str, str]:
    """Each tensor's role, one of nouns.ROLES, by its name and by the MoE blocks found."""
    routed = {
        place.name(e)
        for layer in layers
        for place in (*layer.places.values(), *layer.bias_places.values())
        for e in range(layer.experts if place.per_expert else 1)
    }
    places = [place for layer in layers for place in layer.places.values()]
    blocks = {f"{layer.prefix.rpartition('.')[0]}." for layer in layers}
    blocks |= {f"{place.tensor.partition('.experts.')[0]}." for place in places if ".experts." in place.tensor}
    counts = {layer.experts for layer in layers}

    def role(t: TensorInfo) -> str:
        parts = t.name.split(".")
        if t.name in routed:
            return "routed expert"
        inside = t.name.startswith(tuple(blocks))
        if VISION.search(t.name) and not inside:
            return "vision tower"
        if any("router" in part or part in ("shared_expert_gate", "e_score_correction_bias") for part in parts):
            return "router"
        if any("shared_expert" in part or "shared_mlp" in part for part in parts):
            return "shared expert"
        if inside and ("gate" in parts or (len(t.shape) > 0 and t.shape[0] in counts)):
            return "router"
        if VISION.search(t.name):
            return "vision tower"
        if EMBEDDING.search(t.name):
            return "embedding"
        return "attention" if any("attn" in part or "attention" in part for part in parts) else "other"

    return {name: role(t) for name, t in tensors.items()}
