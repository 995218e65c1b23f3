"""From headers to a MoESpec: which tensors are routed experts, and in which layout, by the family's row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mopeq.checkpoint import Checkpoint
from mopeq.errors import BadInput
from mopeq.families import FAMILIES, WHERE_TO_ADD, Family
from mopeq.nouns import FLOATS, PROJECTIONS, MoELayer, MoESpec, Place, TensorInfo

EACH_NAME = re.compile(
    r"(?P<prefix>.*\bexperts)\.(?P<e>\d{1,9})\.(?P<p>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<what>weight|bias)"
)
PROJECTION_OF = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def read_spec(checkpoint: Checkpoint) -> MoESpec:
    """What the headers of a checkpoint tell. BadInput for a dense, unknown, pre-quantized or incomplete one."""
    config = checkpoint.config
    refuse_quantized(config)
    model_type, family = find_family(config, checkpoint.tensors)
    tensors = dict(checkpoint.tensors)
    if tied(config) and any(name.endswith("embed_tokens.weight") for name in tensors):
        # a copy of the tied matrix is no second matrix
        tensors = {name: t for name, t in tensors.items() if not name.endswith("lm_head.weight")}
    layers = per_expert_layers(tensors) if family.per_expert else stacked_layers(tensors, family, hidden_size(config))
    if not layers:
        raise BadInput(
            f"no routed expert found: {model_type} checkpoints should hold them as {described(family)}",
            "is this checkpoint dense, or saved by an unusual tool?",
        )
    check_expert_count(config, layers)
    return MoESpec(model_type, layers, tensors, roles(tensors, layers), config, checkpoint.digest)


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
    if not any("expert" in name for name in tensors):
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
        return "…experts.<e>.{gate,up,down}_proj.weight or w1, w3, w2"
    return f"…{family.block}.{family.gate_up} and …{family.block}.{family.down}"


# ------------------------------------------------------------------------------- one tensor per expert


def per_expert_layers(tensors: Mapping[str, TensorInfo]) -> tuple[MoELayer, ...]:
    """Layers of checkpoints where every expert's projections are tensors of their own."""
    found: dict[str, dict[tuple[str, str], dict[int, TensorInfo]]] = {}
    words: dict[tuple[str, str], str] = {}
    for name, tensor in tensors.items():
        if match := EACH_NAME.fullmatch(name):
            projection = PROJECTION_OF[match["p"]]
            slot = found.setdefault(match["prefix"], {}).setdefault((projection, match["what"]), {})
            slot[int(match["e"])] = tensor
            words[match["prefix"], projection] = match["p"]
    layers = []
    for number, prefix in numbered(found):
        slots = found[prefix]
        experts = 1 + max(max(slot) for slot in slots.values())
        shapes, places, bias_places = {}, {}, {}
        for (projection, what), slot in slots.items():
            missing = next((e for e in range(experts) if e not in slot), None)  # lazily: a name can claim any number
            if missing is not None:
                raise BadInput(f"{prefix}.{missing} has no {projection} {what}", "fetch the checkpoint again")
            first = check_alike(slot.values(), 2 if what == "weight" else 1)
            name = f"{prefix}.{{e}}.{words[prefix, projection]}.{what}"
            if what == "weight":
                shapes[projection], places[projection] = (first.shape[0], first.shape[1]), Place(name)
            else:
                bias_places[projection] = Place(name)
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


def stacked_layers(tensors: Mapping[str, TensorInfo], family: Family, hidden: int | None) -> tuple[MoELayer, ...]:
    """Layers of checkpoints where one tensor holds a projection (or gate and up together) of all experts."""
    ends = {family.gate_up: "gate_up", "up_proj": "up", family.down: "down"}
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        if stem.rpartition(".")[2] == family.block and last.removesuffix("_bias") in ends:
            kind = ends[last.removesuffix("_bias")] + ("_bias" if last.endswith("_bias") else "")
            found.setdefault(stem, {})[kind] = tensor
    layers = []
    for number, prefix in numbered(found):
        slots = found[prefix]
        top = "gate_up" if "gate_up" in slots else "up"
        if top not in slots or "down" not in slots:
            raise BadInput(f"{prefix} lacks {family.gate_up if 'down' in slots else family.down}", "fetch it again")
        halves = ("even", "odd") if family.interleaved else ("first", "second")
        parts = {"gate": halves[0], "up": halves[1]} if top == "gate_up" else {"up": "all"}
        up, down = check_alike([slots[top]], 3), check_alike([slots["down"]], 3)
        if family.transposed is None:  # each tensor by itself, as transformers decides when it loads
            up_transposed, down_transposed = up.shape[2] != hidden, down.shape[1] != hidden
        else:
            up_transposed = down_transposed = family.transposed
        outs, ins = (up.shape[2], up.shape[1]) if up_transposed else (up.shape[1], up.shape[2])
        down_shape = (down.shape[2], down.shape[1]) if down_transposed else (down.shape[1], down.shape[2])
        if down.shape[0] != up.shape[0] or outs % len(parts) or down_shape != (ins, outs // len(parts)):
            raise BadInput(
                f"{prefix}: {list(up.shape)} and {list(down.shape)} do not fit together as stacked experts",
                f"is the layout of this family as its row in {WHERE_TO_ADD} says?",
            )
        shapes = {p: (outs // len(parts), ins) for p in parts} | {"down": down_shape}
        places = {p: Place(up.name, up_transposed, rows) for p, rows in parts.items()}
        places["down"] = Place(down.name, down_transposed)
        bias_places = {}
        if f"{top}_bias" in slots:
            bias_places = {p: Place(slots[f"{top}_bias"].name, rows=rows) for p, rows in parts.items()}
        if "down_bias" in slots:
            bias_places["down"] = Place(slots["down_bias"].name)
        layers.append(make_layer(number, prefix, up.shape[0], shapes, places, bias_places))
    return tuple(layers)


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


def check_expert_count(config: Mapping[str, Any], layers: tuple[MoELayer, ...]) -> None:
    """BadInput where the config promises another number of experts than every layer has."""
    for scope in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in EXPERT_COUNT_KEYS:
            if type(scope.get(key)) is int and all(layer.experts != scope[key] for layer in layers):
                raise BadInput(
                    f"config.json says {key} = {scope[key]}, the tensors hold {layers[0].experts} experts a layer",
                    "config and weights belong to different checkpoints, or a shard is missing",
                )


VISION = re.compile(r"(^|\.)(visual|vision|vision_\w+|vit|image_\w+|\w*projector|view_seperator|audio\w*)(\.|$)")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|lm_head|embed_out)(\.|$)")


def roles(tensors: Mapping[str, TensorInfo], layers: tuple[MoELayer, ...]) -> dict[str, str]:
    """Each tensor's role, one of nouns.ROLES, by its name and by the MoE blocks found."""
    routed = {
        place.tensor.format(e=e)
        for layer in layers
        for place in (*layer.places.values(), *layer.bias_places.values())
        for e in range(layer.experts if place.per_expert else 1)
    }
    blocks = tuple(layer.prefix.rpartition(".")[0] + "." for layer in layers)
    counts = {layer.experts for layer in layers}

    def role(t: TensorInfo) -> str:
        parts = t.name.split(".")
        if t.name in routed:
            return "routed expert"
        if VISION.search(t.name):
            return "vision tower"
        if any("router" in part or part in ("shared_expert_gate", "e_score_correction_bias") for part in parts):
            return "router"
        if any("shared_expert" in part or "shared_mlp" in part for part in parts):
            return "shared expert"
        if t.name.startswith(blocks) and ("gate" in parts or (len(t.shape) > 0 and t.shape[0] in counts)):
            return "router"
        if EMBEDDING.search(t.name):
            return "embedding"
        return "attention" if any("attn" in part or "attention" in part for part in parts) else "other"

    return {name: role(t) for name, t in tensors.items()}
