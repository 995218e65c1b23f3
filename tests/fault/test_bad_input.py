"""What a wrong input gets: exit 2 (1 for a failing machine), one line, one hint, no stdout, nothing half-written.

Every case goes through the real command line in a process of its own.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made import copy, header_of, packed, payload, source, stored, write_shard
from warm import Ended, mopeq

MANIFEST = "mopeq_manifest.json"
ABSENT = object()
ROOT = os.geteuid() == 0


def nothing_written(out: Path) -> None:
    """No file that could be taken for a checkpoint's, and none that was left half-way."""
    seen = [p for p in out.rglob("*") if p.is_file()] if out.exists() else []
    assert [p.name for p in seen if p.name.endswith(".part") or ".mopeq" not in p.parts] == []


def quantize(folder: Path, out: Path, *more: object, **limits: Any) -> Ended:
    return mopeq("quantize", folder, "-o", out, *more, **limits)


def both(folder: Path, out: Path, *said: str) -> None:
    """`plan` and `quantize` refuse a source alike, and OUT does not come into being."""
    for ended in (mopeq("plan", folder, "--json"), quantize(folder, out, "--json")):
        error, _ = ended.refused()
        for word in said:
            assert word in error, error
    assert not out.exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a tiny checkpoint, to spoil."""
    return copy(source("olmoe"), tmp_path / "model")


def config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(body)))


def shard_with(folder: Path, tensor: str) -> Path:
    return next(p for p in sorted(folder.glob("*.safetensors")) if tensor in header_of(p))


def drop(folder: Path, tensor: str) -> None:
    """Take a tensor out of a checkpoint: of its shard and the index."""
    from safetensors.torch import load_file, save_file

    path = shard_with(folder, tensor)
    save_file({n: t for n, t in load_file(path).items() if n != tensor}, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    index.write_text(json.dumps(body | {"weight_map": {n: f for n, f in body["weight_map"].items() if n != tensor}}))


def poke(folder: Path, tensor: str, at: int, value: bytes) -> None:
    """Overwrite bytes of a stored tensor."""
    path = shard_with(folder, tensor)
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    start = 8 + length + header_of(path)[tensor]["data_offsets"][0] + at
    raw[start : start + len(value)] = value
    path.write_bytes(raw)


# ------------------------------------------------------------------------------------------ what is no source


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    both(tmp_path / "empty", tmp_path / "out", "no config.json")
    both(tmp_path / "none", tmp_path / "out", "does not exist")
    (tmp_path / "file").write_text("x")
    both(tmp_path / "file", tmp_path / "out", "is a file")


def test_pickled_weights_are_never_opened(model: Path, tmp_path: Path) -> None:
    for path in (*model.glob("*.safetensors"), *model.glob("*.index.json")):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    both(model, tmp_path / "out", "pickled")


def test_a_dense_model(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    write_shard(
        folder / "model.safetensors",
        {"model.layers.0.mlp.up_proj.weight": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}},
        bytes(8),
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    both(folder, tmp_path / "out", "dense")


def test_an_unknown_family(model: Path, tmp_path: Path) -> None:
    config(model, lambda c: c | {"model_type": "quite_new_moe"})
    both(model, tmp_path / "out", "quite_new_moe")
    config(model, lambda c: {k: v for k, v in c.items() if k != "model_type"})
    both(model, tmp_path / "out", "model_type")


def test_remote_code_is_never_run(model: Path, tmp_path: Path) -> None:
    """The tiny models carry an auto_map to a file that ends the process; an unknown type with one is refused."""
    assert "SystemExit" in (model / "modeling_code.py").read_text()
    out = tmp_path / "out"
    assert quantize(model, out).code == 0
    assert "auto_map" not in (out / "config.json").read_text() and not list(out.glob("*.py"))


def test_other_expert_counts(model: Path, tmp_path: Path) -> None:
    config(model, lambda c: c | {"num_experts": 60})
    both(model, tmp_path / "out", "num_experts = 60")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 32}, "in the weights"),
        ({"vocab_size": 999}, "[999, 64] by config.json"),
        ({"intermediate_size": 44}, "gate is [40, 64] in the weights, [44, 64] by config.json"),
        ({"hidden_size": "64"}, "expected int, got str"),
        ({"num_experts_per_tok": ABSENT}, "does not say num_experts_per_tok, 8 where it is left out"),
        ({"num_hidden_layers": 3}, "model.layers.2.mlp.experts has no counterpart"),
        ({"hidden_act": "nonesuch"}, "cannot build the model"),
    ],
)
def test_a_config_of_another_checkpoint(change: dict[str, Any], said: str, model: Path, tmp_path: Path) -> None:
    """Whatever `plan` cannot see of it is refused before any work."""
    config(model, lambda c: {k: v for k, v in (c | change).items() if v is not ABSENT})
    ended = quantize(model, tmp_path / "out")
    assert said in ended.refused()[0] and "check:" not in ended.err
    nothing_written(tmp_path / "out")


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
def test_a_tensor_that_the_config_asks_for(lost: str, model: Path, tmp_path: Path) -> None:
    """Named before any work, whether data is shown or not."""
    drop(model, lost)
    for more in ((), ("--sensitivity", "error", "--method", "gptq")):
        ended = quantize(model, tmp_path / "out", *more)
        assert f"becomes {lost}" in ended.refused()[0] and "check:" not in ended.err
        nothing_written(tmp_path / "out")


def test_an_attention_of_another_machine(model: Path, tmp_path: Path) -> None:
    """Some authors leave the attention they trained with in config.json; its package need not be here."""
    config(model, lambda c: c | {"_attn_implementation": "flash_attention_2"})
    made = quantize(model, tmp_path / "out", "--sensitivity", "error", "--method", "gptq", "--calib-tokens", 99)
    assert made.code == 0, made.err


def test_a_vocabulary_of_special_tokens_alone(tmp_path: Path) -> None:
    made = quantize(source("olmoe", vocab_size=3), tmp_path / "out")
    assert made.code == 0, made.err


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    """Its ids would lie outside the embedding."""
    small = source("olmoe", vocab_size=100)
    ended = quantize(small, tmp_path / "out", "--sensitivity", "error", "--method", "gptq", "--calib-tokens", 99)
    assert "the model has 100 tokens" in ended.refused()[0]
    assert quantize(small, tmp_path / "out").code == 0
    (tmp_path / "text.txt").write_text("the quick brown fox")
    ended = mopeq("eval", tmp_path / "out", "--data", tmp_path / "text.txt")
    assert "the model has 100 tokens" in ended.refused()[0]


def test_shards_without_their_index(model: Path, tmp_path: Path) -> None:
    """`plan` reads them, and so does what runs the model, though transformers would not find them."""
    (model / "model.safetensors.index.json").unlink()
    made = quantize(model, tmp_path / "out", "--sensitivity", "error", "--method", "gptq", "--calib-tokens", 99)
    assert made.code == 0, made.err


def test_what_may_be_missing(model: Path, tmp_path: Path) -> None:
    """A tied head, which is the embedding."""
    drop(model, "lm_head.weight")
    config(model, lambda c: c | {"tie_word_embeddings": True})
    assert quantize(model, tmp_path / "out").code == 0


@pytest.mark.parametrize("nothing", [{}, None])
def test_an_empty_quantization_config(nothing: Any, model: Path, tmp_path: Path) -> None:
    config(model, lambda c: c | {"quantization_config": nothing})
    made = quantize(model, tmp_path / "out", "--sensitivity", "error", "--method", "gptq", "--calib-tokens", 99)
    assert made.code == 0, made.err


def test_a_pointer_in_the_place_of_a_shard(model: Path, tmp_path: Path) -> None:
    """What git leaves where Git LFS is not installed."""
    path = sorted(model.glob("*.safetensors"))[0]
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 4100\n")
    both(model, tmp_path / "out", path.name, "Git LFS")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mopeq"])
def test_a_source_quantized_already(method: str, model: Path, tmp_path: Path) -> None:
    config(model, lambda c: c | {"quantization_config": {"quant_method": method, "bits": 4}})
    both(model, tmp_path / "out", "already quantized", method)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "fp8"])
def test_quantized_tensors_that_mopeq_does_not_read(method: str, tmp_path: Path) -> None:
    """Integer codes under another name than any matrix's; float8 whose scales are of another kind."""
    folder, code = tmp_path / "model", "F8_E4M3" if method == "fp8" else "I32"
    name, size = "model.layers.0.mlp.experts.0.gate_proj", 64 * 8 * (1 if method == "fp8" else 4)
    header = {
        f"{name}.{'weight' if method == 'fp8' else 'qweight'}": (code, [64, 8], 0, size),
        f"{name}.weight_scale": ("F32", [64], size, size + 256),
    }
    entries = {n: {"dtype": d, "shape": s, "data_offsets": [a, b]} for n, (d, s, a, b) in header.items()}
    write_shard(folder / "model.safetensors", entries, bytes(size + 256))
    body = {"model_type": "olmoe", "hidden_size": 8, "quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(body))
    both(folder, tmp_path / "out", f"already quantized ({method})")


@pytest.mark.parametrize(
    ("shape", "dtype", "says"),
    [([1, 2], "F32", "[1, 1] scales belong to"), ([1, 1], "I32", "does not read"), (None, "F32", "no scales belong")],
)
def test_float8_whose_scales_do_not_fit(shape: Any, dtype: str, says: str, tmp_path: Path) -> None:
    folder, name = tmp_path / "model", "model.layers.0.mlp.experts.0.{}_proj.weight"
    entries: dict[str, Any] = {}
    at = 0
    for p in ("gate", "up", "down"):
        rows = [(name.format(p), "F8_E4M3", [8, 8], 64)]
        if p != "up":
            rows.append((f"{name.format(p)}_scale_inv", "F32", [1, 1], 4))
        elif shape is not None:
            rows.append((f"{name.format(p)}_scale_inv", dtype, shape, 4 * shape[0] * shape[1]))
        for key, kind, sides, size in rows:
            entries[key] = {"dtype": kind, "shape": sides, "data_offsets": [at, at + size]}
            at += size
    write_shard(folder / "model.safetensors", entries, bytes(at))
    body = {"model_type": "olmoe", "hidden_size": 8, "num_experts": 1, "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(body))
    both(folder, tmp_path / "out", "experts.0.up_proj.weight", says)


def test_mopeqs_own_output_as_a_source(tmp_path: Path) -> None:
    out, _ = packed("olmoe")
    both(out, tmp_path / "out", "already quantized (mopeq)")


def test_a_tie_that_is_none(tmp_path: Path) -> None:
    """The config ties what is stored twice: dropping the copy is right only while it is one."""
    folder = copy(source("olmoe", tie_word_embeddings=True), tmp_path / "model")
    shard = shard_with(folder, "model.embed_tokens.weight")
    raw, header = shard.read_bytes(), header_of(shard)
    (length,) = struct.unpack("<Q", raw[:8])
    start, end = header["model.embed_tokens.weight"]["data_offsets"]
    data = raw[8 + length :]
    copied = {
        "dtype": "BF16",
        "shape": header["model.embed_tokens.weight"]["shape"],
        "data_offsets": [len(data), len(data) + end - start],
    }
    write_shard(shard, header | {"lm_head.weight": copied}, data + data[start:end])
    out = tmp_path / "out"
    assert quantize(folder, out).code == 0
    assert "lm_head.weight" not in stored(out) and payload(out) == payload(
        packed("olmoe", model_tie_word_embeddings=True)[0]
    )
    poke(folder, "lm_head.weight", 100, b"\x40\x40")
    error, hint = quantize(folder, tmp_path / "other").refused()
    assert "lm_head.weight" in error and "tie_word_embeddings" in hint
    nothing_written(tmp_path / "other")


# --------------------------------------------------------------------------------- headers that are cut or lie


def change_header(folder: Path, change: Callable[[dict[str, Any]], Any], length: int | None = None) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    raw = path.read_bytes()
    (old,) = struct.unpack("<Q", raw[:8])
    write_shard(path, change(json.loads(raw[8 : 8 + old])), raw[8 + old :], length)


def entry(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], Any]:
    """Change the entry of the first tensor."""

    def changed(header: dict[str, Any]) -> dict[str, Any]:
        name = next(n for n in header if n != "__metadata__")
        return header | {name: header[name] | change(header[name])}

    return changed


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], int | None]] = {
    "header longer than the file": (lambda h: h, 10**7),
    "header of 2^63 bytes": (lambda h: h, 2**63),
    "no JSON": (lambda h: b"{" * 500, None),
    "deep JSON": (lambda h: b"[" * 200_000, None),
    "no object": (lambda h: [h], None),
    "entry no object": (lambda h: h | {"x": 1}, None),
    "offset beyond": (entry(lambda e: {"data_offsets": [10**9, 10**9 + e["data_offsets"][1]]}), None),
    "offset negative": (entry(lambda e: {"data_offsets": [-8, e["data_offsets"][1] - 8]}), None),
    "overlap": (entry(lambda e: {"data_offsets": [x + 2 for x in e["data_offsets"]]}), None),
    "shape too large": (entry(lambda e: {"shape": [2**40, 2**40]}), None),
    "shape real": (entry(lambda e: {"shape": [float(x) for x in e["shape"]]}), None),
    "unknown dtype": (entry(lambda e: {"dtype": "F17"}), None),
    "dtype a list": (entry(lambda e: {"dtype": [1]}), None),
    "duplicate keys": (lambda h: json.dumps(h)[:-1].encode() + b"," + json.dumps(h)[1:].encode(), None),
}


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers(lie: str, model: Path, tmp_path: Path) -> None:
    change, length = LIES[lie]
    change_header(model, change, length)
    both(model, tmp_path / "out", "model-00001-of-00002.safetensors")


def test_a_name_with_a_line_break_stays_on_one_line(model: Path, tmp_path: Path) -> None:
    change_header(model, lambda h: h | {"a\nhint: none\nb": {"dtype": "Q\n4", "shape": [0], "data_offsets": [0, 0]}})
    both(model, tmp_path / "out", "a hint: none b")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_truncated_shards(keep: int, model: Path, tmp_path: Path) -> None:
    path = sorted(model.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:keep])
    both(model, tmp_path / "out", path.name)


def test_missing_shards(model: Path, tmp_path: Path) -> None:
    path = sorted(model.glob("*.safetensors"))[-1]
    path.unlink()
    both(model, tmp_path / "out", path.name, "missing")
    (model / "model.safetensors.index.json").unlink()
    both(model, tmp_path / "out", "1 of 2 shards")


def test_an_index_that_promises_too_much(model: Path, tmp_path: Path) -> None:
    path = model / "model.safetensors.index.json"
    body = json.loads(path.read_text())
    body["weight_map"]["model.extra.weight"] = sorted(body["weight_map"].values())[0]
    path.write_text(json.dumps(body))
    both(model, tmp_path / "out", "model.extra.weight")
    path.write_text("{")
    both(model, tmp_path / "out", "index.json")


# ------------------------------------------------------------------------------------------ weights that are ill

NAN, INF = struct.pack("<H", 0x7FC0), struct.pack("<H", 0x7F80)  # bf16
EXPERT, OTHER = "model.layers.1.mlp.experts.4.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(("value", "word"), [(NAN, "NaN"), (INF, "infinite")])
@pytest.mark.parametrize("tensor", [EXPERT, OTHER, "lm_head.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(tensor: str, value: bytes, word: str, model: Path, tmp_path: Path) -> None:
    poke(model, tensor, 6, value)
    out = tmp_path / "out"
    for more in ((), ("--other-bits", "8", "--allocate", "uniform")):
        error, _ = quantize(model, out, *more).refused()
        assert tensor in error and word in error
        nothing_written(out)


@pytest.mark.parametrize("tensor", [EXPERT, OTHER, "model.norm.weight"])
def test_ill_weights_are_refused_before_any_work(tensor: str, model: Path, tmp_path: Path) -> None:
    """What is written last is looked at first; so are the experts where the whole model runs on data."""
    poke(model, tensor, 6, NAN)
    text = tmp_path / "text.txt"
    text.write_text("a text " * 200)
    more = ("--sensitivity", "frequency", "--calib", text, "--calib-tokens", "64") if tensor == EXPERT else ()
    ended = quantize(model, tmp_path / "out", *more)
    assert tensor in ended.refused()[0]
    assert "sense:" not in ended.err
    assert not list((tmp_path / "out" / ".mopeq").rglob("*.npz"))


def test_weights_beyond_any_scale(model: Path, tmp_path: Path) -> None:
    poke(model, EXPERT, 6, struct.pack("<H", 0x7F00))  # 1.7e38
    error, _ = quantize(model, tmp_path / "out").refused()
    assert "beyond fp16" in error and "experts.4.up" in error  # which matrix: "named", says the format
    poke(model, EXPERT, 6, struct.pack("<H", 0x4B00))  # 8e6: too far for few bits only, so sensing meets it first
    text = tmp_path / "text.txt"
    text.write_text("a text " * 200)
    for method in ("rtn", "gptq"):
        shown = ("--sensitivity", "error", "--calib", text, "--calib-tokens", "64", "--method", method)
        error, _ = quantize(model, tmp_path / method, *shown).refused()
        assert "beyond fp16" in error and "experts.4.up" in error
    nothing_written(tmp_path / "out")


# -------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("other", ["16", "8"])
@pytest.mark.parametrize("fit", ["1000", "10kB", "1%"])
def test_a_budget_that_cannot_be_met(fit: str, other: str, tmp_path: Path) -> None:
    """The hint names the smallest that can, and following it works."""
    folder, out = source("olmoe"), tmp_path / "out"
    for verb in (("plan", folder), ("quantize", folder, "-o", out)):
        _, hint = mopeq(*verb, "--fit", fit, "--other-bits", other).refused()
    assert not out.exists()
    smallest = hint.removeprefix("try --fit ").split(",")[0]
    plan = mopeq("plan", folder, "--fit", smallest, "--other-bits", other, "--json")
    assert plan.code == 0 and json.loads(plan.out)["predicted_bytes"] == int(smallest)
    if (fit, other) == ("1000", "16"):
        assert quantize(folder, out, "--fit", smallest).code == 0 and payload(out) == int(smallest)


def test_averages(tmp_path: Path) -> None:
    folder, out = source("olmoe"), tmp_path / "out"
    _, hint = quantize(folder, out, "--bits", "3,4", "--avg-bits", "2.5").refused()
    assert "--avg-bits 3" in hint
    for more in (("--avg-bits", "0"), ("--avg-bits", "nan"), ("--avg-bits", "9"), ("--avg-bits", "-2")):
        quantize(folder, out, *more).refused()
    quantize(folder, out, "--allocate", "uniform", "--avg-bits", "2.5").refused()
    quantize(folder, out, "--allocate", "kmeans", "--avg-bits", "2.5").refused()
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--bits", "2,9"), "9 bits"),
        (("--bits", "0"), "0 bits"),
        (("--bits", "two"), "--bits two"),
        (("--group-size", "0"), "group size 0"),
        (("--other-bits", "3"), "--other-bits 3"),
        (("--fit", "plenty"), "plenty"),
        (("--fit", "inf%"), "inf%"),
        (("--shard-size", "0"), "--shard-size"),
        (("--max-memory", "much"), "much"),
        (("--seed", "-1"), "--seed -1"),
        (("--device", "tpu"), "--device tpu"),
        (("--calib-tokens", "0"), "--calib-tokens"),
        (("--scope", "layer"), "--scope layer"),
        (("--map", "/nowhere.json"), "/nowhere.json"),
    ],
)
def test_options(more: tuple[str, ...], said: str, tmp_path: Path) -> None:
    error, _ = quantize(source("olmoe"), tmp_path / "out", *more).refused()
    assert said in error
    assert not (tmp_path / "out").exists()


def test_too_little_memory(tmp_path: Path) -> None:
    """One layer must fit; methods that run the model need all of it."""
    folder, out = source("olmoe"), tmp_path / "out"
    error, hint = quantize(folder, out, "--max-memory", "10kB").refused()
    assert "--max-memory" in error and "--max-memory" in hint
    nothing_written(out)
    error, hint = quantize(folder, out, "--max-memory", "500kB", "--sensitivity", "frequency").refused()
    assert "--sensitivity frequency" in error and "--sensitivity hessian --method rtn" in hint
    nothing_written(out)


def test_no_tokenizer_where_data_is_shown(model: Path, tmp_path: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    for more in (("--sensitivity", "frequency"), ("--method", "signround")):
        error, hint = quantize(model, tmp_path / "out", *more).refused()
        assert "tokenizer" in error and "--sensitivity hessian --method rtn" in hint
        nothing_written(tmp_path / "out")
    assert quantize(model, tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none.jsonl", None),
        ("bad.jsonl", "{not json"),
        ("empty.jsonl", ""),
        ("odd.parquet", "x"),
        ("no.jsonl", '{"a": 1}'),
    ],
)
def test_calibration_that_is_none(name: str, text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    asked = ("--sensitivity", "frequency", "--calib", tmp_path / name)
    quantize(source("olmoe"), tmp_path / "out", *asked).refused()
    nothing_written(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------ maps


def map_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "precision_map.json").read_text()))


MAPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda m: [1],
    "another file": lambda m: {"model_type": "olmoe"},
    "newer": lambda m: m | {"format_version": 2},
    "a digit too far": lambda m: m | {"experts": {p: r | {"up": "z" * 6} for p, r in m["experts"].items()}},
    "an expert short": lambda m: m | {"experts": {p: r | {"up": r["up"][:-1]} for p, r in m["experts"].items()}},
    "an expert over": lambda m: m | {"experts": {p: r | {"up": r["up"] + "0"} for p, r in m["experts"].items()}},
    "a layer short": lambda m: m | {"experts": dict(list(m["experts"].items())[1:])},
    "a format that is none": lambda m: m | {"formats": ["2bits"]},
    "a width that is none": lambda m: m | {"formats": ["9g64a"]},
}


@pytest.mark.parametrize("what", MAPS)
def test_maps_that_do_not_fit(what: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(MAPS[what](map_of(packed("olmoe")[0]))))
    error, _ = quantize(source("olmoe"), tmp_path / "out", "--map", path).refused()
    assert str(path) in error and "Error" not in error
    assert not (tmp_path / "out").exists()


def test_another_models_map(tmp_path: Path) -> None:
    path = packed("qwen3_vl_moe")[0] / "precision_map.json"
    other = packed("olmoe")[0] / "precision_map.json"
    quantize(source("deepseek_v2"), tmp_path / "out", "--map", other).refused()
    assert not (tmp_path / "out").exists() and path.exists()


# ----------------------------------------------------------------------------------------------- where to write


def test_out_within_the_source(model: Path) -> None:
    before = sorted(model.rglob("*"))
    for out in (model, model / "packed", model / "deep" / "er", model / "." / "x" / ".." / "y"):
        error, _ = quantize(model, out).refused()
        assert "source folder" in error
    (model.parent / "link").symlink_to(model)
    quantize(model, model.parent / "link" / "packed").refused()
    quantize(model, model.parent / "out", "--run", model / "run").refused()
    assert sorted(model.rglob("*")) == before


def test_out_that_is_not_empty(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    error, _ = quantize(source("olmoe"), out).refused()
    assert "not empty" in error
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("x")
    assert "is a file" in quantize(source("olmoe"), tmp_path / "file").refused()[0]


def test_out_that_holds_another_checkpoint(tmp_path: Path) -> None:
    out = copy(packed("olmoe")[0], tmp_path / "out")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    error, _ = quantize(source("olmoe"), out, "--avg-bits", "2.5").refused()
    assert "another finished checkpoint" in error
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_run_directory_where_out_is_sealed(tmp_path: Path) -> None:
    """Its log goes on growing, which the manifest would not bear."""
    out = tmp_path / "out"
    for run in (out, out / "run", out / "x" / ".." / "run"):
        quantize(source("olmoe"), out, "--run", run).refused()
        assert not out.exists()
    assert quantize(source("olmoe"), out, "--run", out / ".mopeq").code == 0
    assert mopeq("verify", out).code == 0
    (tmp_path / "file").write_text("x")
    assert "is a file" in quantize(source("olmoe"), tmp_path / "new", "--run", tmp_path / "file").refused()[0]


def test_out_that_cannot_be_written(tmp_path: Path) -> None:
    """A folder without the right to write; for root, who has every right, a disk mounted read-only."""
    if ROOT:
        home = small_disk(tmp_path, 1_048_576)
        subprocess.run(["mount", "-o", "remount,ro", home], check=True)
    else:
        home = tmp_path / "home"
        home.mkdir(mode=0o555)
    try:
        error, _ = quantize(source("olmoe"), home / "out").refused()
        assert "cannot be written" in error and ("Read-only" in error or "Permission" in error)
    finally:
        if ROOT:
            subprocess.run(["umount", home], check=True)


# --------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("file_bytes", [1_000, 20_000, 100_000, 170_000])
def test_a_disk_that_fills_up(file_bytes: int, tmp_path: Path) -> None:
    """No file may grow beyond the limit: writing fails half-way, at each kind of file in turn."""
    out = tmp_path / "out"
    error, hint = quantize(source("olmoe"), out, file_bytes=file_bytes).refused(1)
    assert "File too large" in error and hint
    assert not list(out.rglob("*.part")) and not (out / "mopeq_manifest.json").exists()
    assert quantize(source("olmoe"), out).code == 0
    assert mopeq("verify", out).code == 0
    clean = packed("olmoe")[0]
    assert stored(out) == stored(clean)


def small_disk(tmp_path: Path, nbytes: int) -> Path:
    """A tmpfs of that size, or a skip where this user may mount none."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", place], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("this user may mount no tmpfs")
    return place


def test_a_small_disk_is_refused_before_any_work(tmp_path: Path) -> None:
    place = small_disk(tmp_path, 200_704)
    try:
        error, _ = quantize(source("olmoe"), place / "out").refused()
        assert "free" in error and "0.3" in error
        nothing_written(place / "out")
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_disk_that_others_fill(tmp_path: Path) -> None:
    """Room at the start, none when the shards are written: the machine's fault (1), and resumable."""
    place = small_disk(tmp_path, 1_048_576)
    try:
        from warm import server

        running = server().start(
            "quantize", source("olmoe"), "-o", place / "out", pause="mopeq.assemble:write_shards", release=True
        )
        assert running.wait_until(running.stem.with_suffix(".paused").exists)
        hog = place / "hog"
        stats = os.statvfs(place)
        hog.write_bytes(bytes((stats.f_bavail - 3) * stats.f_frsize))
        running.stem.with_suffix(".go").touch()
        error, hint = running.wait().refused(1)
        assert "No space left" in error and "free some space" in hint
        assert not list((place / "out").rglob("*.part"))
        hog.unlink()
        assert quantize(source("olmoe"), place / "out").code == 0
        assert stored(place / "out") == stored(packed("olmoe")[0])
    finally:
        subprocess.run(["umount", place], check=True)


# ------------------------------------------------------------------------------------------ damaged outputs

READERS = (("verify",), ("run", "--prompt", "x"), ("eval",))


def all_refuse(out: Path, code: int = 2) -> list[str]:
    """What `verify`, `run` and `eval` say of a damaged folder."""
    found = []
    for verb, *more in READERS:
        found.append(mopeq(verb, out, *more).refused(code)[0])
    return found


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A copy of a finished checkpoint, to spoil."""
    return copy(packed("olmoe", avg_bits=2.5)[0], tmp_path / "out")


def test_a_newer_format_version(out: Path) -> None:
    for name in ("config.json", MANIFEST):
        text = (out / name).read_text()
        assert '"format_version": 1' in text
        (out / name).write_text(text.replace('"format_version": 1', '"format_version": 7'))
        said = [
            mopeq(verb, out, *more).refused()[0]
            for verb, *more in (*READERS[1:], ("map",))
            if name != MANIFEST or verb != "map"
        ]
        assert all("format version 7" in line for line in said), said
        if name == MANIFEST:
            assert "format version 7" in mopeq("verify", out).refused()[0]
        (out / name).write_text(text)
    text = (out / "precision_map.json").read_text()
    (out / "precision_map.json").write_text(text.replace('"format_version": 1', '"format_version": 7'))
    assert all("format version 7" in said or "sha256" in said for said in [mopeq("map", out).refused()[0]])


def test_an_edited_precision_map(out: Path) -> None:
    body = map_of(out)
    prefix = next(iter(body["experts"]))
    row = body["experts"][prefix]["up"]
    body["experts"][prefix]["up"] = row.translate(str.maketrans("01", "10"))
    assert body["experts"][prefix]["up"] != row
    (out / "precision_map.json").write_text(json.dumps(body, indent=1) + "\n")
    for verb, *more in (*READERS, ("map",)):
        error, _ = mopeq(verb, out, *more).refused(1 if verb == "verify" else 2)
        assert "precision_map.json" in error


DAMAGE = [  # what a reader must see at once; damage of the right size is for `verify`
    ("model.safetensors", "missing"), ("model.safetensors", "cut"), ("config.json", "missing"),
    ("config.json", "empty"), ("tokenizer.json", "missing"), ("tokenizer.json", "grown"), (MANIFEST, "missing"),
    (MANIFEST, "empty"), (MANIFEST, "no JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_damaged_files(name: str, damage: str, out: Path) -> None:
    raw = (out / name).read_bytes()
    changed = {"cut": raw[:-1], "empty": b"", "no JSON": b"{" * len(raw), "grown": raw + b" "}
    if damage == "missing":
        (out / name).unlink()
    else:
        (out / name).write_bytes(changed[damage])
    for said in all_refuse(out):
        assert name in said or "manifest" in said, said


def test_verify_sees_one_flipped_bit(out: Path) -> None:
    for name in ("model.safetensors", "tokenizer.json", "LICENSE"):
        raw = bytearray((out / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (out / name).write_bytes(raw)
        error, _ = mopeq("verify", out).refused(1)
        assert name in error and "sha256" in error
        raw[len(raw) // 2] ^= 1
        (out / name).write_bytes(raw)
    assert mopeq("verify", out).code == 0


def reseal(out: Path) -> None:
    from mopeq.packed import write_manifest

    write_manifest(out)


def test_verify_looks_into_the_tensors(out: Path) -> None:
    """Whoever edits and seals again must still make sense: scales finite and positive, shapes of the format."""
    name = next(n for n in header_of(out / "model.safetensors") if n.endswith(".scales"))
    for value in (np.float16("nan"), np.float16("inf"), np.float16(-1), np.float16(0)):
        poke(out, name, 0, value.tobytes())
        reseal(out)
        error, _ = mopeq("verify", out).refused(1)
        assert name in error
    assert mopeq("verify", copy(packed("olmoe")[0], out.parent / "other")).code == 0


def test_folders_that_are_no_output(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none", source("olmoe")):
        for verb in ("verify", "map", "report"):
            mopeq(verb, folder, *(("-o", tmp_path / "r.html") if verb == "report" else ())).refused()
    assert not (tmp_path / "r.html").exists()


def test_a_stray_shard(out: Path) -> None:
    """Two files of weights: whoever globs would load both."""
    other = next(source("olmoe").glob("*.safetensors"))
    (out / "model-00009-of-00009.safetensors").write_bytes(other.read_bytes())
    assert all("model-00009-of-00009" in said for said in all_refuse(out))


# ----------------------------------------------------------------------------------------------- other verbs


def test_pictures(tmp_path: Path) -> None:
    out = packed("olmoe", avg_bits=2.5)[0]
    error, _ = mopeq("run", out, "--prompt", "x", "--image", tmp_path / "none.png").refused()
    assert "none.png" in error
    (tmp_path / "bad.png").write_bytes(b"no picture")
    error, _ = mopeq("run", out, "--prompt", "x", "--image", tmp_path / "bad.png").refused()
    assert "text only" in error


def test_eval_data(tmp_path: Path) -> None:
    out = packed("olmoe", avg_bits=2.5)[0]
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "text.txt").write_text("words and words " * 20)
    for more in (
        ("--data", tmp_path / "none.jsonl"),
        ("--data", tmp_path / "bad.jsonl"),
        ("--data", tmp_path / "text.txt", "--window", "1"),
        ("--data", tmp_path / "text.txt", "--tasks", "nothing"),
        ("--data", tmp_path / "text.txt", "--against", tmp_path / "none"),
        ("--data", tmp_path / "text.txt", "--device", "tpu"),
    ):
        mopeq("eval", out, *more).refused()


def test_maps_for_budgets_that_cannot_be_met() -> None:
    out = packed("olmoe", avg_bits=2.5)[0]
    _, hint = mopeq("map", out, "--fit", "1kB").refused()
    assert "--fit" in hint
    mopeq("map", out, "--avg-bits", "1").refused()
    mopeq("map", out, "--avg-bits", "3", "--fit", "1GB").refused()
    mopeq("map", out, "--against", "/nowhere").refused()
