"""Whatever a checkpoint's layout, what is streamed, packed and run are the model's own weights.

Tiny models of five families, as transformers saves them and as Qwen3-VL-MoE was released; bf16, fp16, float32; sharded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from made import DTYPES, packed, payload, room, source, stored
from warm import SOURCES

from mopeq.checkpoint import open_checkpoint
from mopeq.families.standard import read_spec
from mopeq.models import load_model
from mopeq.nouns import Format
from mopeq.packed import read_map
from mopeq.readback import load_dense, some_tokens
from mopeq.seam import bias, experts_modules, model_layers, weights
from mopeq.stream import read_biases, read_layer

LAYOUTS = [(kind, "own") for kind in ("olmoe", "qwen3_vl_moe", "gpt_oss", "deepseek_v2", "mixtral")]
LAYOUTS.insert(2, ("qwen3_vl_moe", "released"))
BITS = "2,3,4"
NEW_TOKENS = 12


def spec_of(folder: Path) -> Any:
    return read_spec(open_checkpoint(folder))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "order"), LAYOUTS)
def test_streamed_is_the_models_own(kind: str, order: str, dtype: str) -> None:
    folder = source(kind, dtype, order)
    spec, model = spec_of(folder), load_model(folder, DTYPES[dtype], "cpu")
    assert len(list(folder.glob("*.safetensors"))) > 1
    pairs = model_layers(spec, model)
    assert len(pairs) == len(spec.layers) == 2
    for layer, module in pairs:
        streamed, own = read_layer(folder, spec, layer), weights(module)
        assert list(streamed) == list(own) == ["gate", "up", "down"]
        for p, w in streamed.items():
            assert w.dtype == DTYPES[dtype] and tuple(w.shape) == (layer.experts, *layer.shapes[p])
            assert torch.equal(w, own[p])
        biases = read_biases(folder, spec, layer)
        assert bool(biases) == module.has_bias
        for p, b in biases.items():
            own_bias = bias(module, p)
            assert own_bias is not None and torch.equal(b, own_bias)


def test_both_orders_on_disk_are_really_two() -> None:
    shapes = [
        next(
            t.shape for t in open_checkpoint(source("qwen3_vl_moe", "bf16", order)).tensors.values() if "down" in t.name
        )
        for order in ("own", "released")
    ]
    assert shapes[0] == (6, 64, 40) and shapes[1] == (6, 40, 64)


# --------------------------------------------------------------------------------------------- the whole line


def dense_reference(kind: str, order: str, dtype: str = "bf16", **options: Any) -> Any:
    """The source's model with the values that the packed folder holds."""
    out, _ = packed(kind, dtype, order, **options)
    changes = {k.removeprefix("model_"): v for k, v in options.items() if k.startswith("model_")}
    folder = source(kind, dtype, order, **changes)
    bits = options.get("other_bits", 16)
    return load_dense(folder, out, spec_of(folder), read_map(out), None if bits == 16 else Format(bits, 64))


def generate(model: Any) -> list[int]:
    """Greedy tokens after a fixed prompt."""
    ids = some_tokens(model.config, 7)[:, :9]
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    return list(out[0].tolist())


def make(kind: str, order: str) -> Path:
    """A packed checkpoint whose experts have several widths, by projection."""
    out, facts = packed(kind, "bf16", order, bits=BITS, avg_bits=2.6, per="projection", allocate="random")
    assert len(facts["counts"]) > 1
    return out


FRESH = """
import json, sys
sys.path[:0] = {paths!r}
{imports}
import torch
assert "transformers" in sys.modules and "mopeq" in sys.modules
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging
logging.set_verbosity_error()
torch.set_num_threads(1)
found = {{}}
for name, (folder, ids) in json.load(sys.stdin).items():
    auto = AutoModelForImageTextToText if name.startswith("qwen3_vl") else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    kinds = sorted({{type(m).__name__ for m in model.modules() if "Experts" in type(m).__name__}})
    out = model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                         max_new_tokens={tokens}, do_sample=False)
    found[name] = [kinds, out[0].tolist()]
making = {{"plan", "stream", "sense", "alloc", "quant", "data", "evaluate", "report", "stages", "job", "checks"}}
making |= {{"deciding", "making", "assemble", "verbs"}}
loaded = {{name.split(".")[1] for name in sys.modules if name.startswith("mopeq.")}}
assert not making & loaded, making & loaded  # serving never imports making
print(json.dumps(found))
"""


@cache
def asked() -> dict[str, tuple[str, list[int]]]:
    """{layout: (packed folder, prompt ids)} for the fresh interpreters."""
    result = {}
    for kind, order in LAYOUTS:
        out = make(kind, order)
        ids = some_tokens(load_model(out, torch.float32, "cpu").config, 7)[0, :9].tolist()
        result[f"{kind}-{order}"] = (str(out), ids)
    return result


@pytest.mark.parametrize(
    "imports",
    ["import mopeq\nimport transformers", "import transformers\nimport transformers.quantizers\nimport mopeq"],
)
def test_fresh_interpreters_generate_the_references_tokens(imports: str) -> None:
    """from_pretrained after `import mopeq`, in either import order, runs from packed codes."""
    code = FRESH.format(paths=SOURCES, imports=imports, tokens=NEW_TOKENS)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(asked()), capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    for kind, order in LAYOUTS:
        classes, tokens = found[f"{kind}-{order}"]
        assert classes == ["QuantizedExperts"]
        assert tokens == reference_tokens(kind, order), (kind, order)


@cache
def reference_tokens(kind: str, order: str) -> list[int]:
    make(kind, order)
    tokens = generate(dense_reference(kind, order, bits=BITS, avg_bits=2.6, per="projection", allocate="random"))
    assert len(set(tokens)) > 3  # not the same token for ever: an agreement that says something
    return tokens


@pytest.mark.parametrize(("kind", "order"), LAYOUTS)
def test_logits_agree_and_memory_is_the_packed_size(kind: str, order: str) -> None:
    out = make(kind, order)
    model = load_model(out, torch.float32, "cpu")
    reference = dense_reference(kind, order, bits=BITS, avg_bits=2.6, per="projection", allocate="random")
    ids = some_tokens(model.config, 3)
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, use_cache=False).logits.double() for m in (model, reference))
    assert float((found - wanted).abs().max() / wanted.std()) < 1e-4
    on_disk = sum(len(v) for k, v in stored(out).items() if ".experts." in k)
    tags = sum(
        len(v) - v_bytes for v, v_bytes in ((v, tensor_part(v)) for k, v in stored(out).items() if ".experts." in k)
    )
    for m in model.modules():
        if type(m).__name__ == "QuantizedExperts":
            m.use_tiers()  # in the CPU kernel's order such tiny matrices are filled up
    resident = sum(
        t.numel() * t.element_size()
        for _, m in model.named_modules()
        if type(m).__name__ == "QuantizedExperts"
        for t in (*m.buffers(), *m.parameters())
    )
    biases_widened = sum(  # bf16 on disk, float32 in this model
        2 * t.numel()
        for n, t in model.named_buffers()
        if n.endswith("proj_bias") or n.endswith(("up_bias", "gate_bias", "down_bias"))
    )
    assert resident - biases_widened == on_disk - tags
    assert not experts_modules(model) or all(type(m).__name__ == "QuantizedExperts" for _, m in experts_modules(model))


def tensor_part(tagged: bytes) -> int:
    """Bytes of a `stored` entry without its dtype and shape."""
    return len(tagged) - (tagged.index(b"] ") + 2)


@pytest.mark.parametrize(("kind", "order"), LAYOUTS)
def test_save_pretrained_writes_the_same_tensors(kind: str, order: str) -> None:
    out = make(kind, order)
    model = load_model(out, torch.bfloat16, "cpu")
    again = room() / "again" / f"{kind}-{order}"
    model.save_pretrained(again)
    first, second = stored(out), stored(again)
    assert sorted(first) == sorted(second)
    assert [name for name in first if first[name] != second[name]] == []
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (out, again)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(("kind", "order"), LAYOUTS)
def test_casting_the_model_leaves_packed_values_alone(kind: str, order: str) -> None:
    model = load_model(make(kind, order), torch.float32, "cpu")
    before = packed_values(model)
    model = model.to(torch.bfloat16)
    after = packed_values(model)
    assert before and all(torch.equal(before[k], after[k]) for k in before)
    with torch.no_grad():
        logits = model(input_ids=some_tokens(model.config, 1), use_cache=False).logits
    assert logits.dtype == torch.bfloat16 and bool(torch.isfinite(logits).all())


def packed_values(model: Any) -> dict[str, torch.Tensor]:
    """Every packed matrix of a model, dequantized to float32."""
    found = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "QuantizedExperts":
            for p in module.projections:
                for e in range(module.num_experts):
                    found[f"{name}.{e}.{p}"] = module.qweight(e, p).dequantize()
        elif type(module).__name__ in ("PackedLinear", "PackedEmbedding"):
            found[name] = module.rows(slice(None), torch.float32)
    return found


# ------------------------------------------------------------------------------------------------- --other-bits


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("kind", ["olmoe", "qwen3_vl_moe"])
def test_other_bits(kind: str, bits: int, tie: bool) -> None:
    """All other 2-D weights packed, ties kept as ties; quantize itself compares logits before it returns."""
    out, facts = packed(kind, other_bits=bits, model_tie_word_embeddings=tie)
    assert facts["predicted_bytes"] == facts["bytes_weights"] == payload(out)
    names = set(stored(out))
    assert any(n.endswith("embed_tokens.qweight") for n in names) == (bits < 16)
    assert any("lm_head" in n for n in names) == (not tie)
    assert any("router" in n or ".gate.weight" in n for n in names)  # routers stay as they are
    assert not any(n.startswith("model.layers.0.mlp.gate.q") for n in names)
    model = load_model(out, torch.float32, "cpu")
    assert any(getattr(m, "joined", None) for m in model.modules()) == (bits < 16)
    assert any("forward" in vars(m) for m in model.modules())  # norms, for GPUs
    reference = dense_reference(kind, "own", other_bits=bits, model_tie_word_embeddings=tie)
    assert generate(model) == generate(reference)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert torch.equal(head.weight, embedding.weight) == tie
    second = room() / "again" / f"{kind}-{bits}-{tie}"
    load_model(out, torch.bfloat16, "cpu").save_pretrained(second)
    assert stored(second) == stored(out)


@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v2", "mixtral"])
def test_other_bits_in_the_other_families(kind: str) -> None:
    out, facts = packed(kind, other_bits=8)
    assert facts["bytes_weights"] == payload(out)
    assert generate(load_model(out, torch.float32, "cpu")) == generate(dense_reference(kind, "own", other_bits=8))


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_vl_moe", "deepseek_v2"])
def test_a_fully_packed_model_can_be_cast(kind: str) -> None:
    """Embeddings and linears follow `.to(bfloat16)` in what they return, not in what they store."""
    model = load_model(packed(kind, other_bits=8)[0], torch.float32, "cpu")
    before = packed_values(model)
    model = model.to(torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in packed_values(model).items())
    assert model.get_input_embeddings()(torch.tensor([5])).dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(input_ids=some_tokens(model.config, 1), use_cache=False).logits
    assert logits.dtype == torch.bfloat16 and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "qwen3_vl_moe"])
def test_other_source_dtypes(kind: str, dtype: str) -> None:
    """fp16 stays fp16, float32 matrices become bf16 (routers and 1-D tensors keep their precision)."""
    out, facts = packed(kind, dtype)
    assert facts["predicted_bytes"] == payload(out)
    wide = "F16" if dtype == "fp16" else "F32"
    for name, value in stored(out).items():
        if name.endswith(("qweight", "zeros")):
            assert value.startswith(b"U8 ")
        elif name.endswith("scales"):
            assert value.startswith(b"F16 ")
        elif name.endswith(("q_proj.weight", "embed_tokens.weight")):
            assert value.startswith(b"F16 " if dtype == "fp16" else b"BF16 ")
        elif name.endswith(("norm.weight", "gate.weight", "router.weight", ".bias")):
            assert value.startswith(wide.encode() + b" "), name
    assert generate(load_model(out, torch.float32, "cpu")) == generate(dense_reference(kind, "own", dtype))
