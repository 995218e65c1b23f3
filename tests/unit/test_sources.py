"""Sources stored packed (float8 blocks, MXFP4): folded by their headers, read as the values they stand for, and the
whole line from them gives the bytes that the plain twin gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import made  # sets the number of threads before torch is imported
import pytest
import tiny
import torch
from headers import Shapes, checkpoint, olmoe_config, olmoe_shapes
from made import quantize
from packed_sources import FLOAT8, MXFP4, deepseek_v3, float8_blocks, mxfp4, twins, write_all

from mopeq.errors import BadInput
from mopeq.families.standard import read_spec
from mopeq.models import load_model
from mopeq.nouns import MoESpec, PackedTensor
from mopeq.progress import silence
from mopeq.sources import unpacked
from mopeq.stages import plan
from mopeq.stream import dequantize_float8, dequantize_mxfp4
from mopeq.verbs.evaluate import evaluate
from mopeq.verbs.verify import verify

GATE = "model.layers.0.mlp.experts.0.gate_proj.weight"


# --------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (200, 300), (3, 1000), (256, 5)])
@pytest.mark.parametrize("block", [128, 7])
def test_float8_blocks_come_out_value_for_value(shape: tuple[int, int], block: int) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1
    codes, scales, value = float8_blocks(w, block)
    assert torch.equal(dequantize_float8(codes, scales, (block, block), torch.float32), value)
    assert torch.equal(dequantize_float8(codes, scales, (block, block), torch.bfloat16), value.bfloat16())
    assert (value - w).abs().max() < 0.07 * w.abs().max()  # the reference is right itself
    stacked = dequantize_float8(codes[None].repeat(2, 1, 1), torch.stack([scales, 2 * scales]), (block,) * 2, w.dtype)
    assert torch.equal(stacked[0], value) and torch.equal(stacked[1], 2 * value)


def test_one_scale_for_a_whole_matrix() -> None:
    codes = torch.tensor([[1.0, -2.0, 448.0]]).to(torch.float8_e4m3fn)
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])):
        assert dequantize_float8(codes, scale, (1, 3), torch.float32).tolist() == [[0.5, -1.0, 224.0]]


def test_float8_scales_that_are_powers_of_two() -> None:
    scales = torch.tensor([[124, 130]], dtype=torch.uint8).view(torch.float8_e8m0fnu)  # 2^(byte - 127)
    codes = torch.ones(2, 3).to(torch.float8_e4m3fn)
    assert dequantize_float8(codes, scales, (2, 2), torch.float32).tolist() == [[0.125, 0.125, 8.0]] * 2


def test_mxfp4_comes_out_value_for_value() -> None:
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(5, 96, generator=generator) * torch.rand(5, 1, generator=generator).mul(12).exp2()
    blocks, scales, value = mxfp4(w)
    found = dequantize_mxfp4(torch.stack([blocks, blocks]), torch.stack([scales, scales + 3]), torch.bfloat16)
    assert found.shape == (2, 96, 5)
    assert torch.equal(found[0].float(), value.T) and torch.equal(found[1].float(), 8 * value.T)
    assert ((value - w).abs() <= 0.26 * w.abs().reshape(5, 3, 32).amax(-1).repeat_interleave(32, 1)).all()


def test_every_mxfp4_code_and_the_ends_of_its_scales() -> None:
    """The sixteen values of the OCP format, low half first; scales of 2^-127 and 2^125 are exact, 255 is NaN."""
    blocks = (torch.arange(16) + 16 * torch.arange(16).flip(0)).to(torch.uint8).reshape(1, 1, 1, 16).repeat(1, 1, 4, 1)
    scales = torch.tensor([127, 0, 252, 255], dtype=torch.uint8).reshape(1, 1, 4)
    found = dequantize_mxfp4(blocks, scales, torch.bfloat16).double()[0, :, 0].reshape(4, 32)
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values = torch.tensor(positive + [-v for v in positive]).double()
    assert torch.equal(found[0, 0::2], values) and torch.equal(found[0, 1::2], values.flip(0))
    assert torch.equal(found[1], found[0] * 2.0**-127) and torch.equal(found[2], found[0] * 2.0**125)
    assert found[3].isnan().all()


# ------------------------------------------------------------------------------------------------------ headers


def float8_shapes(scale: tuple[int, ...] = (1, 1), scale_dtype: str = "F32", code: str = "F8_E4M3") -> Shapes:
    shapes: Shapes = {}
    for name, (dtype, shape) in olmoe_shapes().items():
        packs = len(shape) == 2 and ("_proj" in name)
        shapes[name] = (code, shape) if packs else (dtype, shape)
        if packs:
            shapes[f"{name}_scale_inv"] = (scale_dtype, scale)
    return shapes


def test_headers_count_what_the_codes_stand_for() -> None:
    plain = read_spec(checkpoint(olmoe_shapes(), olmoe_config()))
    packed = read_spec(checkpoint(float8_shapes(), olmoe_config(quantization_config=FLOAT8)))
    assert packed.params == plain.params and packed.expert_params == plain.expert_params
    assert list(packed.tensors) == list(plain.tensors) and packed.roles == plain.roles
    assert {n: (t.dtype, t.shape) for n, t in packed.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in plain.tensors.items()
    }
    matrices = [t for t in packed.tensors.values() if isinstance(t, PackedTensor)]
    assert packed.nbytes == plain.nbytes - sum(t.count for t in matrices) + 4 * len(matrices)
    assert "quantization_config" not in packed.config


def test_the_dtype_of_the_values_is_the_models() -> None:
    for named, dtype in (("float32", "F32"), ("bfloat16", "BF16"), ("float16", "BF16"), (None, "BF16")):
        spec = read_spec(checkpoint(float8_shapes(), olmoe_config(quantization_config=FLOAT8, torch_dtype=named)))
        assert spec.tensors[GATE].dtype == dtype


def test_a_wrapped_language_models_own_quantization_config() -> None:
    config = {"model_type": "x", "text_config": {"quantization_config": FLOAT8, "hidden_size": 16}}
    plain, tensors = unpacked(config, checkpoint(float8_shapes(), config).tensors)
    assert plain == {"model_type": "x", "text_config": {"hidden_size": 16}} and isinstance(tensors[GATE], PackedTensor)
    assert "quantization_config" in config["text_config"]  # what was given is left alone


def gpt_oss_spec(**changes: tuple[str, tuple[int, ...]]) -> MoESpec:
    e, inner, hidden, stem = 4, 96, 64, "model.layers.0.mlp.experts"
    shapes: Shapes = {
        f"{stem}.gate_up_proj_blocks": ("U8", (e, 2 * inner, hidden // 32, 16)),
        f"{stem}.gate_up_proj_scales": ("U8", (e, 2 * inner, hidden // 32)),
        f"{stem}.gate_up_proj_bias": ("BF16", (e, 2 * inner)),
        f"{stem}.down_proj_blocks": ("U8", (e, hidden, inner // 32, 16)),
        f"{stem}.down_proj_scales": ("U8", (e, hidden, inner // 32)),
        f"{stem}.down_proj_bias": ("BF16", (e, hidden)),
        "model.layers.0.mlp.router.weight": ("BF16", (e, hidden)),
    }
    shapes |= {f"{stem}.{name}": value for name, value in changes.items()}
    shapes = {name: value for name, value in shapes.items() if value[0]}
    config = {"model_type": "gpt_oss", "hidden_size": hidden, "num_local_experts": e, "quantization_config": MXFP4}
    return read_spec(checkpoint(shapes, config))


def test_gpt_oss_under_its_released_names() -> None:
    spec = gpt_oss_spec()
    (layer,) = spec.layers
    assert (layer.experts, dict(layer.shapes)) == (4, {"gate": (96, 64), "up": (96, 64), "down": (64, 96)})
    assert spec.expert_params == 4 * 3 * 96 * 64 and spec.params == spec.expert_params + 4 * (2 * 96 + 64 + 64)
    assert set(layer.bias_places) == {"gate", "up", "down"}
    assert spec.nbytes == spec.expert_params * 17 // 32 + 2 * 4 * (2 * 96 + 64 + 64)


# ----------------------------------------------------------------------------------------------------- refusals


def refused(shapes: Shapes, quantization: Any) -> BadInput:
    with pytest.raises(BadInput) as error:
        read_spec(checkpoint(shapes, olmoe_config(quantization_config=quantization)))
    return error.value


def test_broken_float8_is_refused_by_name() -> None:
    lacking = {n: v for n, v in float8_shapes().items() if n != f"{GATE}_scale_inv"}
    assert GATE in refused(lacking, FLOAT8).line and "no scales" in refused(lacking, FLOAT8).line
    assert "belongs to no tensor" in refused({n: v for n, v in float8_shapes().items() if n != GATE}, FLOAT8).line
    assert "[1, 1] scales belong to" in refused(float8_shapes((2, 1)), FLOAT8).line
    for dtype, code in (("I32", "F8_E4M3"), ("F32", "I8"), ("F32", "BF16")):
        assert "does not read" in refused(float8_shapes((1, 1), dtype, code), FLOAT8).line
    for size in ([128], "128", [0, 128], [128, 2.5], 128):
        assert "weight_block_size" in refused(float8_shapes(), FLOAT8 | {"weight_block_size": size}).line
    assert "already quantized (fp8)" in refused(olmoe_shapes(), FLOAT8).line  # the config says so, no tensor does


def test_broken_mxfp4_is_refused_by_name() -> None:
    for change, word in (
        ({"gate_up_proj_scales": ("", ())}, "has no"),
        ({"gate_up_proj_scales": ("U8", (4, 192, 3))}, "no MXFP4"),
        ({"down_proj_blocks": ("U8", (4, 64, 3, 15))}, "no MXFP4"),
        ({"down_proj_blocks": ("I8", (4, 64, 3, 16))}, "no MXFP4"),
        ({"down_proj": ("BF16", (4, 96, 64))}, "packed and plain"),
    ):
        with pytest.raises(BadInput) as error:
            gpt_oss_spec(**change)
        assert word in error.value.line


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "modelopt", 5])
def test_other_kinds_are_refused_by_name(method: Any) -> None:
    error = refused(float8_shapes(), {"quant_method": method})
    assert "already quantized" in error.line and str(method) in error.line


def test_nan_codes_are_refused_by_name(tmp_path: Path) -> None:
    packed, _ = twins(tmp_path, "mxfp4")
    from packed_sources import read_all

    tensors = read_all(packed)
    tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 5, 1] = 255
    write_all(packed, tensors, MXFP4)
    with pytest.raises(BadInput, match=r"layers\.1\.mlp\.experts\.down_proj holds NaN"), silence():
        quantize(packed, tmp_path / "out")
    assert not (tmp_path / "out" / "mopeq_manifest.json").exists()


# ------------------------------------------------------------------------------------------------ the whole line


@pytest.fixture(scope="module", params=["fp8", "mxfp4"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return twins(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("other", [16, 4])
def test_the_line_gives_the_plain_twins_bytes(pair: tuple[Path, Path], other: int, tmp_path: Path) -> None:
    packed, plain = pair
    text = tiny.write_text(tmp_path / "text.txt", lines=1)
    with silence():
        ahead, twin = plan(packed, other_bits=other), plan(plain, other_bits=other)
        facts = quantize(packed, tmp_path / "a", other_bits=other)
        quantize(plain, tmp_path / "b", other_bits=other)
        measured = evaluate(tmp_path / "a", against=packed, data=[text], window=64, limit=1)
        again = evaluate(packed, against=plain, data=[text], window=64, limit=1)
    differ = {"bytes_source", "header_bytes_source", "bytes_by_role"}
    assert {k: v for k, v in ahead.items() if k not in differ} == {k: v for k, v in twin.items() if k not in differ}
    assert ahead["bytes_source"] == made.payload(packed) < made.payload(plain) == ahead["bytes_bf16"]
    assert (
        facts["bytes_weights"] == facts["predicted_bytes"] == ahead["predicted_bytes"] == made.payload(tmp_path / "a")
    )
    assert made.stored(tmp_path / "a") == made.stored(tmp_path / "b") and facts["read_back"] < 1e-4
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mopeq" and "weight_block_size" not in str(config)
    assert verify(tmp_path / "a")["whole"]
    assert 1e-3 < measured["kl"] < 5
    assert abs(again["kl"]) < 1e-7 and again["top1_agreement"] == 1  # the packed source is the model it stands for


def test_methods_that_show_data_see_the_dequantized_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    text = tiny.write_text(tmp_path / "text.txt", lines=1)
    asked = dict(sensitivity="fisher", method="gptq", per="projection", calib=(text,), calib_tokens=128)
    with silence():
        facts = [quantize(folder, tmp_path / name, **asked) for name, folder in zip("ab", pair, strict=True)]
    # the prediction head, which transformers does not build, is named
    assert any("layer 2: the model does not build it" in n for n in facts[0]["notes"]) == (pair[0].name == "fp8")
    assert made.stored(tmp_path / "a") == made.stored(tmp_path / "b")
    maps = [json.loads((tmp_path / name / "precision_map.json").read_text()) for name in "ab"]
    assert maps[0] == maps[1]


# ------------------------------------------------------------------------------- official folders as they are


def test_extra_tensors_are_carried_and_counted(tmp_path: Path) -> None:
    """A layer for multi-token prediction, which transformers does not build: packed like the others, and unharmful."""
    tensors = deepseek_v3(tmp_path / "v3")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # older files have such buffers
    tensors["model.counter"] = torch.tensor(3)
    folder = write_all(tmp_path / "v3", tensors, None)
    for other in (16, 4):
        out = tmp_path / f"out{other}"
        with silence():
            facts = quantize(folder, out, other_bits=other)
        names = made.stored(out)
        assert facts["bytes_weights"] == made.payload(out) and facts["read_back"] < 1e-4
        assert "model.layers.2.mlp.experts.3.down_proj.qweight" in names
        assert ("model.layers.2.eh_proj.weight" in names) == (other == 16)
        assert len(list(load_model(out, torch.float32, "cpu").model.layers)) == 2


@pytest.mark.parametrize("copied", [False, True])
def test_tied_embeddings_stored_once_or_twice(copied: bool, tmp_path: Path) -> None:
    from packed_sources import read_all

    folder = tiny.write(tmp_path / "tied", "olmoe", tie_word_embeddings=True)
    tensors = read_all(folder)
    tensors.pop("lm_head.weight", None)
    once = plan(write_all(folder, tensors, None))
    if copied:
        write_all(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, None)
    assert plan(folder)["params"] == once["params"] == sum(t.numel() for t in tensors.values())
    for other in (16, 4):
        with silence():
            facts = quantize(folder, tmp_path / f"out{other}", other_bits=other)
        assert facts["bytes_weights"] == made.payload(tmp_path / f"out{other}") and facts["read_back"] < 1e-4


def test_a_vision_model_without_its_processor(tmp_path: Path) -> None:
    """What shows no data to the model needs no processor; what does is refused with what does not."""
    folder = tiny.write(tmp_path / "vl", "qwen3_vl_moe")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    with silence():
        facts = quantize(folder, tmp_path / "out")
        with pytest.raises(BadInput) as error:
            quantize(folder, tmp_path / "again", sensitivity="fisher")
    assert facts["read_back"] < 1e-4 and verify(tmp_path / "out")["whole"]
    assert "--sensitivity hessian --method rtn" in error.value.hint


def test_pickled_weights_get_the_hint_how_to_convert(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(olmoe_config()))
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04.")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(BadInput) as error:
        plan(folder)
    assert "pickled" in error.value.line and "save_pretrained" in error.value.hint


def test_unrelated_files_beside_the_shards_stay_out(tmp_path: Path) -> None:
    """An index names its shards; an `original/` folder or a consolidated copy beside them is nobody's business."""
    packed, _ = twins(tmp_path, "mxfp4")
    (packed / "original").mkdir()
    shutil.copyfile(next(packed.glob("model-*.safetensors")), packed / "original" / "model.safetensors")
    shutil.copyfile(next(packed.glob("model-*.safetensors")), packed / "consolidated.safetensors")
    with silence():
        facts = quantize(packed, tmp_path / "out")
    assert facts["bytes_source"] < made.payload(packed) and not (tmp_path / "out" / "original").exists()
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
