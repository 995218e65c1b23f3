"""From headers to a spec: layouts by the family's row, roles, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from headers import Shapes, checkpoint, olmoe, olmoe_config, olmoe_shapes

from mopeq.errors import BadInput
from mopeq.families import FAMILIES
from mopeq.families.standard import read_spec
from mopeq.nouns import ROLES, MoESpec, Place

E, H, I = 4, 16, 12  # noqa: E741


def refused(shapes: Shapes, config: dict[str, Any]) -> BadInput:
    with pytest.raises(BadInput) as error:
        read_spec(checkpoint(shapes, config))
    assert error.value.hint and "\n" not in error.value.line
    return error.value


def stacked(model_type: str, up: tuple[int, ...], down: tuple[int, ...], **more: Any) -> MoESpec:
    stem = "model.layers.5.mlp.experts"
    shapes: Shapes = {f"{stem}.gate_up_proj": ("BF16", up), f"{stem}.down_proj": ("BF16", down), **more}
    return read_spec(checkpoint(shapes, {"model_type": model_type, "hidden_size": H, "num_local_experts": E}))


# ------------------------------------------------------------------------------------------------- layouts


def test_one_tensor_an_expert() -> None:
    spec = olmoe(layers=2, experts=3, hidden=16, inner=12)
    assert [layer.prefix for layer in spec.layers] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    layer = spec.layer(1)
    assert layer.layer == 1 and layer.experts == 3
    assert dict(layer.shapes) == {"gate": (12, 16), "up": (12, 16), "down": (16, 12)}
    assert layer.places["up"] == Place("model.layers.1.mlp.experts.{e}.up_proj.weight")
    assert spec.expert_params == 2 * 3 * 3 * 16 * 12 and len(spec.linears) == 18


def test_w1_w2_w3_are_gate_down_up() -> None:
    shapes: Shapes = {}
    for e in range(E):
        for word, shape in (("w1", (I, H)), ("w2", (H, I)), ("w3", (I, H))):
            shapes[f"model.layers.0.block_sparse_moe.experts.{e}.{word}.weight"] = ("F16", shape)
    layer = read_spec(checkpoint(shapes, {"model_type": "mixtral", "num_local_experts": E})).layers[0]
    assert {p: place.tensor.rpartition("{e}.")[2] for p, place in layer.places.items()} == {
        "gate": "w1.weight",
        "up": "w3.weight",
        "down": "w2.weight",
    }


def test_experts_without_a_gate() -> None:
    shapes: Shapes = {}
    for e in range(E):
        shapes[f"backbone.layers.1.mixer.experts.{e}.up_proj.weight"] = ("BF16", (I, H))
        shapes[f"backbone.layers.1.mixer.experts.{e}.down_proj.weight"] = ("BF16", (H, I))
    layer = read_spec(checkpoint(shapes, {"model_type": "nemotron_h"})).layers[0]
    assert layer.projections == ("up", "down")


def test_fused_and_transposed_and_interleaved() -> None:
    layer = stacked("gpt_oss", (E, H, 2 * I), (E, I, H)).layers[0]
    assert layer.layer == 5 and layer.experts == E
    assert dict(layer.shapes) == {"gate": (I, H), "up": (I, H), "down": (H, I)}
    assert [(p.transposed, p.rows) for p in layer.places.values()] == [(True, "even"), (True, "odd"), (True, "all")]


@pytest.mark.parametrize(("up_turned", "down_turned"), [(False, False), (True, True), (False, True), (True, False)])
def test_qwen3_vl_moe_in_any_order(up_turned: bool, down_turned: bool) -> None:
    """Released checkpoints are transposed, re-saved ones are not; each tensor is judged by itself."""
    up = (E, H, 2 * I) if up_turned else (E, 2 * I, H)
    down = (E, I, H) if down_turned else (E, H, I)
    layer = stacked("qwen3_vl_moe", up, down).layers[0]
    assert dict(layer.shapes) == {"gate": (I, H), "up": (I, H), "down": (H, I)}
    assert [p.transposed for p in layer.places.values()] == [up_turned, up_turned, down_turned]
    assert [p.rows for p in layer.places.values()] == ["first", "second", "all"]


def test_biases_are_split_like_their_weights() -> None:
    stem = "model.layers.5.mlp.experts"
    biases = {f"{stem}.gate_up_proj_bias": ("BF16", (E, 2 * I)), f"{stem}.down_proj_bias": ("BF16", (E, H))}
    layer = stacked("gpt_oss", (E, H, 2 * I), (E, I, H), **biases).layers[0]
    assert {p: place.rows for p, place in layer.bias_places.items()} == {"gate": "even", "up": "odd", "down": "all"}
    assert not any(place.transposed for place in layer.bias_places.values())


def test_layers_are_sorted_by_number_not_by_name() -> None:
    spec = olmoe(layers=12)
    assert [layer.layer for layer in spec.layers] == list(range(12))


def test_the_wrapped_language_models_type_counts_too() -> None:
    config = {"model_type": "some_new_wrapper", "text_config": {"model_type": "olmoe_text", "num_experts": 3}}
    assert read_spec(checkpoint(olmoe_shapes(), config)).model_type == "olmoe"


# --------------------------------------------------------------------------------------------------- roles


def test_roles() -> None:
    shapes = olmoe_shapes(experts=3) | {
        "model.visual.blocks.0.attn.qkv.weight": ("BF16", (9, 9)),
        "model.layers.0.mlp.shared_expert.up_proj.weight": ("BF16", (12, 16)),
        "model.layers.0.mlp.shared_expert_gate.weight": ("BF16", (1, 16)),
        "model.layers.0.mlp.gate.e_score_correction_bias": ("F32", (3,)),
        "model.layers.0.mlp.router.weight": ("BF16", (3, 16)),
    }
    spec = read_spec(checkpoint(shapes, olmoe_config()))
    wanted = {
        "model.embed_tokens.weight": "embedding",
        "lm_head.weight": "embedding",
        "model.layers.0.self_attn.q_proj.weight": "attention",
        "model.layers.0.mlp.gate.weight": "router",
        "model.layers.0.mlp.router.weight": "router",
        "model.layers.0.mlp.shared_expert_gate.weight": "router",
        "model.layers.0.mlp.gate.e_score_correction_bias": "router",
        "model.layers.0.mlp.experts.1.up_proj.weight": "routed expert",
        "model.layers.0.mlp.shared_expert.up_proj.weight": "shared expert",
        "model.visual.blocks.0.attn.qkv.weight": "vision tower",
        "model.norm.weight": "other",
    }
    assert {name: spec.roles[name] for name in wanted} == wanted
    assert set(spec.roles) == set(spec.tensors) and set(spec.roles.values()) <= set(ROLES)


def test_a_tie_is_one_matrix() -> None:
    """Some tied checkpoints store the output head too."""
    for where in ({"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}):
        spec = read_spec(checkpoint(olmoe_shapes(), olmoe_config() | where))
        assert "lm_head.weight" not in spec.tensors and "model.embed_tokens.weight" in spec.tensors
    kept = read_spec(checkpoint(olmoe_shapes(), olmoe_config() | {"tie_word_embeddings": False}))
    assert "lm_head.weight" in kept.tensors
    only_head = {k: v for k, v in olmoe_shapes().items() if "embed_tokens" not in k}
    assert "lm_head.weight" in read_spec(checkpoint(only_head, olmoe_config(tie_word_embeddings=True))).tensors


# ------------------------------------------------------------------------------------------------ refusals


def without(shapes: Shapes, *parts: str) -> Shapes:
    return {name: v for name, v in shapes.items() if not any(part in name for part in parts)}


def test_dense_models() -> None:
    dense = without(olmoe_shapes(), ".experts.", ".mlp.gate.")
    assert "dense" in refused(dense, {"model_type": "llama"}).line
    assert "no routed expert found" in refused(dense, olmoe_config()).line


def test_unknown_families() -> None:
    error = refused(olmoe_shapes(), {"model_type": "brand_new_moe"})
    assert "brand_new_moe" in error.line and "families/__init__.py" in error.hint
    for config in ({}, {"model_type": 5}, {"model_type": None}, {"model_type": ["olmoe"]}):
        assert "model_type" in refused(olmoe_shapes(), config).line


@pytest.mark.parametrize("quantized", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "mopeq"}, {"x": 1}, "fp8"])
@pytest.mark.parametrize("where", ["top", "text"])
def test_sources_quantized_already(quantized: Any, where: str) -> None:
    config = olmoe_config()
    config |= (
        {"quantization_config": quantized} if where == "top" else {"text_config": {"quantization_config": quantized}}
    )
    error = refused(olmoe_shapes(), config)
    assert "already quantized" in error.line
    if isinstance(quantized, dict) and "quant_method" in quantized:
        assert quantized["quant_method"] in error.line
    assert ("made from" in error.hint) == (quantized == {"quant_method": "mopeq"})


@pytest.mark.parametrize("dtype", ["I32", "I8", "U8", "F8_E4M3", "F4"])
def test_integer_experts_without_a_word_in_the_config(dtype: str) -> None:
    shapes = olmoe_shapes() | {"model.layers.1.mlp.experts.0.gate_proj.weight": (dtype, (12, 16))}
    line = refused(shapes, olmoe_config()).line
    assert "differs" in line or "not a floating matrix" in line
    everywhere = {n: (dtype if ".experts." in n else d, s) for n, (d, s) in olmoe_shapes().items()}
    assert "quantized already" in refused(everywhere, olmoe_config()).hint


def test_missing_experts_and_projections() -> None:
    name = "model.layers.1.mlp.experts.{}.{}_proj.weight"
    assert "experts.1 has no up" in refused(without(olmoe_shapes(), name.format(1, "up")), olmoe_config()).line
    assert "lacks its down" in refused(without(olmoe_shapes(), ".down_proj."), olmoe_config()).line
    assert "lacks its up" in refused(without(olmoe_shapes(), ".up_proj."), olmoe_config()).line
    fewer = without(olmoe_shapes(), ".experts.2.")
    assert "num_experts = 3, the tensors hold 2" in refused(fewer, olmoe_config()).line
    only_last = without(olmoe_shapes(), ".experts.0.", ".experts.1.")
    assert "experts.0 has no" in refused(only_last, olmoe_config()).line


def test_an_expert_of_an_absurd_number_is_told_at_once() -> None:
    name = "model.layers.0.mlp.experts.{}.gate_proj.weight"
    shapes = olmoe_shapes() | {name.format(999_999_999): ("BF16", (12, 16))}
    assert "experts.3 has no gate" in refused(shapes, olmoe_config()).line
    read_spec(checkpoint(olmoe_shapes() | {name.format("9" * 5000): ("BF16", (12, 16))}, olmoe_config()))


def test_experts_that_do_not_fit() -> None:
    odd = {
        "experts.1.up_proj": (13, 16),
        "experts.0.down_proj": (16, 13),
        "experts.2.gate_proj": (12,),
        "experts.0.gate_proj": (12, 16, 1),
    }
    for part, shape in odd.items():
        name = f"model.layers.0.mlp.{part}.weight"
        assert "model.layers.0" in refused(olmoe_shapes() | {name: ("BF16", shape)}, olmoe_config()).line
    empty = {
        n: (d, (0, 16) if "gate_proj" in n or "up_proj" in n else (16, 0) if "down_proj" in n else s)
        for n, (d, s) in olmoe_shapes().items()
    }
    assert "empty" in refused(empty, olmoe_config()).line


@pytest.mark.parametrize(
    ("up", "down"),
    [
        ((E, 2 * I, H), (E, H, I + 1)),
        ((E, 2 * I + 1, H), (E, H, I)),
        ((E, 2 * I, H), (E + 1, H, I)),
        ((E, 2 * I), (E, H, I)),
        ((E, 2 * I, H, 1), (E, H, I)),
    ],
)
def test_stacks_that_do_not_fit(up: tuple[int, ...], down: tuple[int, ...]) -> None:
    for family in ("qwen3_vl_moe", "gpt_oss"):
        with pytest.raises(BadInput):
            stacked(family, up, down)


def test_a_stack_without_its_other_half() -> None:
    stem = "model.layers.0.mlp.experts"
    for name, shape in (("gate_up_proj", (E, H, 2 * I)), ("down_proj", (E, I, H))):
        assert "lacks" in refused({f"{stem}.{name}": ("BF16", shape)}, {"model_type": "gpt_oss"}).line


def test_expert_counts_elsewhere_in_the_config() -> None:
    for key in ("num_local_experts", "n_routed_experts", "moe_num_experts"):
        assert key in refused(olmoe_shapes(), {"model_type": "olmoe", "text_config": {key: 5}}).line
    read_spec(checkpoint(olmoe_shapes(), {"model_type": "olmoe", "num_experts": True, "vision_config": None}))


@pytest.mark.parametrize("where", ["", "text_config", "vision_config"])
def test_absurdly_many_layers(where: str) -> None:
    """transformers would list and build them all before it looks at a weight."""
    said = {"num_hidden_layers": 10**9}
    config = {"model_type": "olmoe"} | ({where: said} if where else said)
    assert "num_hidden_layers = 1000000000" in refused(olmoe_shapes(), config).line


def test_every_row_is_a_name_transformers_or_a_port_would_use() -> None:
    assert all(name == name.lower() and " " not in name for name in FAMILIES)
    assert {"olmoe", "qwen3_vl_moe", "gpt_oss", "deepseek_v2", "mixtral"} <= set(FAMILIES)
