"""Ways out: every exported folder is read by what it is for, and says what the packed model says.

`pip install auto-round compressed-tensors gguf xllamacpp` (the last is llama.cpp) runs what is skipped without them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import tiny
import torch
from family_trial import load, logits, read_all
from safetensors.torch import load_file
from tiny_families import classes, families, model_of, text_inputs
from warm import SOURCES

from mopeq.assemble import dense_tensors
from mopeq.checkpoint import open_checkpoint
from mopeq.cli import run_command
from mopeq.errors import BadInput, MopeqError
from mopeq.export import EXPORTERS, dense
from mopeq.export.blocks import LOWEST, block_type, fill
from mopeq.export.opened import Packed
from mopeq.families.standard import read_spec
from mopeq.models import load_model, logits_of, model_class
from mopeq.nouns import Format
from mopeq.packed import read_map
from mopeq.progress import silence
from mopeq.readback import some_tokens
from mopeq.tensors import QWeight
from mopeq.verbs.export import export

ALL = {"model_num_experts_per_tok": 6}  # every expert is chosen: a rounding cannot turn a near tie of the router
WHOLE_WORDS = {  # shapes of whole words and blocks, which other tools ask for
    "olmoe": ALL | {"model_intermediate_size": 64, "model_num_key_value_heads": 4},
    "mixtral": ALL | {"model_intermediate_size": 64},
    "qwen3_vl_moe": ALL | {"model_moe_intermediate_size": 64},
    "deepseek_v2": ALL | {"model_moe_intermediate_size": 64, "model_kv_lora_rank": 32},
}


def wide(kind: str, **options: Any) -> Path:
    """A packed tiny model at 2, 3 and 4 bits, mixed within each layer unless `per` ties it (2 layers, so 2 widths)."""
    options = {"allocate": "kmeans", "per": "projection", "group_size": 32} | WHOLE_WORDS[kind] | options
    out, facts = made.packed(kind, **options)
    assert len(facts["counts"]) == (3 if options["per"] != "layer" else 2)
    return out


@cache
def written(to: str, out: Path) -> tuple[Path, dict[str, Any]]:
    directory = made.room() / "exported" / f"{out.name}-{to}"
    with silence():
        facts = export(out, to, directory)
    return directory, facts


def is_folder_for_others(directory: Path) -> None:
    """Nothing in it asks for mopeq."""
    config = json.loads((directory / "config.json").read_text())
    assert config.get("quantization_config", {}).get("quant_method") != "mopeq"
    assert not {"mopeq_manifest.json", "precision_map.json", "mopeq_run.json"} & {p.name for p in directory.iterdir()}
    assert "import mopeq" not in (directory / "README.md").read_text()
    assert (directory / "tokenizer.json").exists()


# --------------------------------------------------------------------------------------------------- dense


def rounded(source: Path, out: Path, other: Format | None) -> dict[str, torch.Tensor]:
    """The source's tensors with the packed folder's values, rounded to bf16 where they were packed."""
    spec = read_spec(open_checkpoint(source))
    values = dict(dense_tensors(out, spec, read_map(out), other))
    packed = [n for n, t in values.items() if t.dtype == torch.float32 and spec.tensors[n].dtype == "BF16"]
    assert packed
    return values | {name: values[name].bfloat16() for name in packed}


@pytest.mark.parametrize(
    ("kind", "other_bits"),
    [("olmoe", 4), ("qwen3_vl_moe", 16), ("gpt_oss", 16), ("deepseek_v2", 8), ("mixtral", 16)],
)
def test_dense_has_the_originals_tensors_with_the_packed_values(kind: str, other_bits: int) -> None:
    source, out = made.source(kind), made.packed(kind, avg_bits=2.7, other_bits=other_bits)[0]
    directory, facts = written("dense", out)
    assert facts["compared"] == len(read_map(out).formats) and facts["bytes_weights"] == made.payload(directory)
    is_folder_for_others(directory)
    wanted = rounded(source, out, None if other_bits == 16 else Format(other_bits))
    found = read_all(directory)
    assert found.keys() == wanted.keys() == read_all(source).keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    model = load(model_class(load_model(out, torch.float32, "cpu").config), directory)
    reference = load(type(model), None, config=model.config, state_dict=wanted)
    ids = {"input_ids": some_tokens(model.config, 3)}
    assert torch.equal(logits(model, ids), logits(reference, ids))


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_dense_of_every_family(family: str, tmp_path: Path) -> None:
    """Loaded by transformers, its logits are to the last bit those of the reference, by transformers too."""
    model_of(family).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    with silence():
        made.quantize(tmp_path / "source", tmp_path / "out", avg_bits=3)
        export(tmp_path / "out", "dense", tmp_path / "dense")
    wanted = rounded(tmp_path / "source", tmp_path / "out", None)
    assert {n: (t.dtype, t.shape) for n, t in read_all(tmp_path / "dense").items()} == {
        n: (t.dtype, t.shape) for n, t in wanted.items()
    }
    model_class = classes(family)[1]
    dense_model = load(model_class, tmp_path / "dense")
    reference = load(model_class, None, config=dense_model.config, state_dict=wanted)
    inputs = text_inputs(dense_model)
    assert torch.equal(logits(dense_model, inputs), logits(reference, inputs))


WITHOUT_MOPEQ = """
import sys, torch, transformers
transformers.utils.logging.disable_progress_bar()
folder, family, dtype = sys.argv[1:4]
auto = transformers.AutoModelForImageTextToText if "vl" in family else transformers.AutoModelForCausalLM
model, info = auto.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert "mopeq" not in sys.modules
with torch.no_grad():
    logits = model.eval()(input_ids=torch.load(f"{sys.argv[4]}/ids.pt"), use_cache=False).logits
torch.save(logits.float(), f"{sys.argv[4]}/logits.pt")
"""


def without_mopeq(folder: Path, kind: str, dtype: str, room: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a model loaded by transformers in an interpreter that never hears of mopeq."""
    torch.save(ids, room / "ids.pt")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_MOPEQ, str(folder), kind, dtype, str(room)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: torch.Tensor = torch.load(room / "logits.pt")
    return found


def packed_logits(out: Path, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    model = load_model(out, dtype, "cpu")
    with torch.no_grad():
        return logits_of(model, ids).float()


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.std())


IDS = torch.arange(20, 36)[None]


def says_the_same(folder: Path, out: Path, kind: str, room: Path, limit: float = 0.06) -> None:
    """In bf16, whose own rounding is what is allowed; the model before packing lies much farther off."""
    want = packed_logits(out, torch.bfloat16, IDS)
    assert far(without_mopeq(folder, kind, "bfloat16", room, IDS), want) < limit
    changes = {k.removeprefix("model_"): v for k, v in WHOLE_WORDS[kind].items()}
    original = packed_logits(made.source(kind, **changes), torch.bfloat16, IDS)
    assert far(original, want) > 5 * limit


def test_dense_needs_no_mopeq(tmp_path: Path) -> None:
    out = wide("olmoe")
    says_the_same(written("dense", out)[0], out, "olmoe", tmp_path)


def test_dense_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopeq.export.folder.SHARD_BYTES", 60_000)
    out = made.packed("olmoe", avg_bits=2.7)[0]
    with silence():
        export(out, "dense", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert made.stored(tmp_path / "out") == made.stored(written("dense", out)[0])


def test_dense_sees_a_wrong_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is read again before the command says that it is done."""
    right = dense.fill

    def wrong(packed: Packed, experts: Any) -> None:
        right(packed, experts)
        dense.weights(experts.module)["down"].data[3, 0, 0] += 1

    monkeypatch.setattr(dense, "fill", wrong)
    with pytest.raises(MopeqError, match="layer 0 expert 3 down: the dense weights differ"):
        export(made.packed("olmoe", avg_bits=2.7)[0], "dense", tmp_path / "out")


PEAK = """
import resource, sys
from pathlib import Path
import mopeq.readback
from mopeq.export.opened import Packed
from mopeq.models import quiet_transformers
from mopeq.verbs.export import export
quiet_transformers()
Packed(Path(sys.argv[2])).layers  # what is imported once is not weights
open("/proc/self/clear_refs", "w").write("5")
status = lambda: {x.split(":")[0]: int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("Vm")}
before = status()["VmRSS"]
export(sys.argv[2], sys.argv[1], sys.argv[3])
print((status()["VmHWM"] - before) * 1024)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to measure memory")
@pytest.mark.slow
@pytest.mark.parametrize("to", ["dense", "autoround"])
def test_an_export_never_holds_the_model(to: str, tmp_path: Path) -> None:
    """53 MB of experts in twelve layers, in bf16: less than half of that is ever resident. The least of three runs: of
    the same code some take 22 MB and some 32, as the memory's holes come to lie."""
    shape = dict(hidden_size=256, intermediate_size=128, num_hidden_layers=12, num_experts=24)
    out = made.packed("olmoe", allocate="random", **{f"model_{k}": v for k, v in shape.items()})[0]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES), "OMP_NUM_THREADS": "1"}
    peaks = []
    for i in range(3):
        command = [sys.executable, "-c", PEAK, to, str(out), str(tmp_path / f"out{i}")]
        ran = subprocess.run(command, capture_output=True, text=True, env=environment | {"MALLOC_ARENA_MAX": "1"})
        assert ran.returncode == 0, ran.stderr[-2000:]
        peaks.append(int(ran.stdout.splitlines()[-1]))
    whole = made.payload(tmp_path / "out0") if to == "dense" else 60_000_000
    assert whole > 50_000_000 and min(peaks) < 0.5 * whole


# ------------------------------------------------------------------------------- codes by a loop of the test's own


def bits_of(words: np.ndarray, width: int, count: int) -> list[int]:
    """`count` codes of a little-endian stream of 32-bit words."""
    stream = int.from_bytes(words.astype("<u4").tobytes(), "little")
    return [stream >> i * width & 2**width - 1 for i in range(count)]


def matrices(out: Path) -> list[tuple[str, QWeight]]:
    """[(its name by transformers, the packed matrix)] of a packed folder."""
    packed = Packed(out)
    return [
        (f"{x.name}.{e}.{p}_proj", packed.matrix(x, e, p))
        for x in packed.layers
        for e in range(x.count)
        for p in x.shapes
    ]


def test_autorounds_codes_are_the_packed_ones() -> None:
    out = wide("olmoe")
    directory, _ = written("autoround", out)
    is_folder_for_others(directory)
    stored = load_file(directory / "model.safetensors")
    said = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert {said["bits"], *(x["bits"] for x in said["extra_config"].values())} == {2, 3, 4}
    for name, q in matrices(out)[::5]:
        bits, (rows, columns) = q.format.bits, q.shape
        assert said["extra_config"].get(name, said)["bits"] == bits
        assert q.zeros is not None and torch.equal(stored[f"{name}.scales"], q.scales.T)
        codes, zeros = stored[f"{name}.qweight"].numpy().view(np.uint32), stored[f"{name}.qzeros"].numpy()
        for n in (0, 17, rows - 1):
            assert bits_of(codes[:, n], bits, columns) == q.codes[n].tolist()
        for g in range(q.scales.shape[1]):
            assert bits_of(zeros[g].view(np.uint32), bits, rows) == q.zeros[:, g].tolist()


def test_compressed_tensors_values_are_the_packed_ones() -> None:
    out = wide("mixtral")
    directory, facts = written("compressed-tensors", out)
    is_folder_for_others(directory)
    stored = load_file(directory / "model.safetensors")
    [group] = json.loads((directory / "config.json").read_text())["quantization_config"]["config_groups"].values()
    width = group["weights"]["num_bits"]
    assert width == 5 and "5-bit symmetric" in facts["notes"][0]
    words = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name, q in matrices(out)[::5]:
        stem, _, last = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
        parts = {s: stored[f"{stem}.{words[last]}.weight_{s}"] for s in ("packed", "scale", "shape")}
        assert parts["shape"].tolist() == list(q.shape)
        scale = parts["scale"].float().repeat_interleave(q.format.group_size, 1)
        for n in (0, 17, q.shape[0] - 1):
            codes = torch.tensor(bits_of(parts["packed"][n].numpy().view(np.uint32), width, q.shape[1]))
            assert torch.equal((codes - 2 ** (width - 1)) * scale[n], q.dequantize()[n])


BY_HAND: dict[str, Callable[[bytes], list[int]]] = {
    "Q4_0": lambda b: [(b[2 + i % 16] >> 4 * (i // 16) & 15) - 8 for i in range(32)],
    "Q5_0": lambda b: [
        ((b[6 + i % 16] >> 4 * (i // 16) & 15) | (int.from_bytes(b[2:6], "little") >> i & 1) << 4) - 16
        for i in range(32)
    ],
    "Q8_0": lambda b: [int.from_bytes(b[2 + i : 3 + i], "little", signed=True) for i in range(32)],
}


@pytest.mark.parametrize(
    "name", ["1g32a", "2g64a", "3g32a", "3g128s", "4g32s", "4g64a", "5g32s", "5g96a", "7g32a", "8g32s"]
)
def test_blocks_hold_the_very_values(name: str) -> None:
    fmt = Format.parse(name)
    kind = block_type(fmt, 96)
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, fmt.max_code + 1, (5, 96), generator=generator).byte()
    codes[0, :2] = torch.tensor([0, fmt.max_code])
    groups = fmt.groups(96)
    zeros = torch.randint(0, fmt.max_code + 1, (5, groups), generator=generator).byte()
    zeros[0, 0] = fmt.max_code
    scales = (torch.rand(5, groups, generator=generator) * 0.1 + 0.001).half()
    q = QWeight(codes, scales, zeros if fmt.scheme == "a" else None, fmt)
    assert kind is not None
    rows = fill(q, kind)
    size = rows.shape[1] // 3
    for n, row in enumerate(rows):
        for b in range(3):
            block = row[b * size : (b + 1) * size].tobytes()
            d = float(np.frombuffer(block[:2], np.float16)[0])
            wanted = q.dequantize(torch.float64)[n, 32 * b : 32 * b + 32]
            assert [d * v for v in BY_HAND[kind](block)] == wanted.tolist()


def test_what_no_block_holds() -> None:
    assert list(LOWEST) == list(BY_HAND)
    assert block_type(Format(3), 64) == block_type(Format(4, 32, "s"), 64) == "Q4_0"
    assert block_type(Format(4), 64) == block_type(Format(5, 64, "s"), 64) == "Q5_0"
    assert block_type(Format(7), 64) == "Q8_0"
    assert block_type(Format(3, 128), 96) == "Q4_0"  # one group, shorter than its size
    for fmt, columns in ((Format(8), 64), (Format(3), 40), (Format(3, 48), 96), (Format(3, 16), 64)):
        assert block_type(fmt, columns) is None


# ------------------------------------------------------------------------------------- in the tools themselves

needs = {name: pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed here")
         for name in ("auto_round", "compressed_tensors", "gguf", "xllamacpp")}  # fmt: skip


@needs["auto_round"]
@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "qwen3_vl_moe", "deepseek_v2"])
def test_auto_round_says_what_mopeq_says(kind: str, tmp_path: Path) -> None:
    out = wide(kind, other_bits=4 if kind == "olmoe" else 16)
    says_the_same(written("autoround", out)[0], out, kind, tmp_path)


@needs["compressed_tensors"]
@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "deepseek_v2"])
def test_compressed_tensors_says_what_mopeq_says(kind: str, tmp_path: Path) -> None:
    out = wide(kind)
    says_the_same(written("compressed-tensors", out)[0], out, kind, tmp_path)


GGUF = ["olmoe", "qwen3_vl_moe", "mixtral", "deepseek_v2"]


@needs["gguf"]
@pytest.mark.parametrize("kind", GGUF)
def test_gguf_holds_the_packed_weights(kind: str) -> None:
    import gguf

    out = wide(kind, per="layer-projection", other_bits=4)
    directory, facts = written("gguf", out)
    tensors = {t.name: t for t in gguf.GGUFReader(directory / "model.gguf").tensors}
    packed = Packed(out)
    assert facts["compared"] == len(packed.map.formats)
    assert facts["bytes_weights"] == sum(t.n_bytes for t in tensors.values())
    for x in packed.layers:
        for p in x.shapes:
            found = tensors[f"blk.{x.layer}.ffn_{p}_exps.weight"]
            values = gguf.dequantize(found.data, found.tensor_type)
            wanted = torch.stack([packed.matrix(x, e, p).dequantize() for e in range(x.count)])
            assert np.array_equal(values, wanted.numpy())
    query = next(i for i in packed.others() if i.name.endswith("layers.1.self_attn.q_proj.qweight"))
    found = tensors["blk.1.attn_q.weight"]
    wanted = packed.other_matrix(query).dequantize().numpy()
    if kind == "mixtral":  # row 2 i of a head is its row i, row 2 i + 1 the one half a head further on
        heads = packed.model.config.num_attention_heads
        half = wanted.shape[0] // heads // 2
        wanted = wanted[[h * 2 * half + i % 2 * half + i // 2 for h in range(heads) for i in range(2 * half)]]
    assert found.tensor_type.name == "Q5_0"
    assert np.array_equal(gguf.dequantize(found.data, found.tensor_type), wanted)


LLAMA = """
import json, sys
import xllamacpp as llama
params = llama.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 64, 1, False
params.cpuparams.n_threads = 1
server = llama.Server(params)
for ids in json.loads(sys.argv[2]):
    asked = {"prompt": ids, "n_predict": 1, "n_probs": 20, "temperature": -1.0, "cache_prompt": False}
    made = server.handle_completions(asked | json.loads(sys.argv[3]))
    made = json.loads(made) if isinstance(made, str) else made
    said = made["choices"][0]["logprobs"]
    print("SAID", json.dumps(said and {t["id"]: t["logprob"] for t in said["content"][0]["top_logprobs"]}), flush=True)
"""


def by_llama_cpp(directory: Path, prompts: list[Any], **more: Any) -> list[dict[str, float] | None]:
    """{token: log-probability} of the 20 likeliest after each prompt, a text or numbers; None where the likeliest is no
    whole letter."""
    command = [sys.executable, "-c", LLAMA, str(directory / "model.gguf"), json.dumps(prompts), json.dumps(more)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    said = [json.loads(x.removeprefix("SAID ")) for x in ran.stdout.splitlines() if x.startswith("SAID ")]
    assert len(said) == len(prompts), ran.stderr[-3000:]
    return said


@needs["gguf"]
@needs["xllamacpp"]
@pytest.mark.parametrize("kind", GGUF)
def test_llama_cpp_says_what_mopeq_says(kind: str) -> None:
    """The 20 likeliest next tokens. llama.cpp rounds the activations to 8 bits, and shows no token that is half a
    letter; so several prompts."""
    out = wide(kind, per="layer-projection", other_bits=4)
    llama_cpp_agrees(out, written("gguf", out)[0], 9)


def llama_cpp_agrees(out: Path, directory: Path, length: int) -> None:
    asked = [list(range(at, at + length)) for at in (20, 60, 100, 140, 180)]
    shown = 0
    for ids, found in zip(asked, by_llama_cpp(directory, asked), strict=True):
        wanted = packed_logits(out, torch.float32, torch.tensor([ids]))[0, -1].log_softmax(-1)
        shown += found is not None
        assert all(abs(value - float(wanted[int(token)])) < 0.1 for token, value in (found or {}).items())
    assert shown >= 2


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
        "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip


@needs["gguf"]
@needs["xllamacpp"]
def test_llama_cpp_stretches_deepseek_as_transformers_does(tmp_path: Path) -> None:
    """By yarn, as the released ones are; with queries in two factors. A yarn that llama.cpp scales otherwise is
    refused."""
    changes = {k.removeprefix("model_"): v for k, v in WHOLE_WORDS["deepseek_v2"].items()} | {"q_lora_rank": 32}
    for name, scales in (("with", {"mscale": 0.707, "mscale_all_dim": 0.707}), ("without", {})):
        tiny.write(tmp_path / name, "deepseek_v2", rope_parameters=YARN | scales, **changes)
        with silence():
            made.quantize(tmp_path / name, tmp_path / f"{name}-out", avg_bits=3, per="layer", group_size=32)
    with silence():
        export(tmp_path / "with-out", "gguf", tmp_path / "gguf")
    llama_cpp_agrees(tmp_path / "with-out", tmp_path / "gguf", 40)
    refused("gguf", tmp_path / "without-out", "does not compute a yarn whose mscale", tmp_path)


def write_pieces(folder: Path) -> None:
    """A tokenizer as Llama's and Mixtral's are: pieces of sentencepiece's kind, and bytes for what they lack."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = ["▁t h", "▁th e", "q u", "i c", "qu ic", "quic k", "▁ b", "r o", "ro w", "▁b row", "▁brow n"]
    pairs = [(a, b) for a, _, b in (pair.partition(" ") for pair in ["▁ t", *merges])]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(a + b for a, b in pairs)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *"▁abcdefghijklmnopqrstuvwxy"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"add_bos_token": False}))


@needs["gguf"]
@needs["xllamacpp"]
def test_llama_cpp_splits_into_pieces_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    changes = {k.removeprefix("model_"): v for k, v in WHOLE_WORDS["mixtral"].items()}
    source = made.copy(made.source("mixtral", **changes), tmp_path / "source")
    write_pieces(source)
    with silence():
        made.quantize(source, tmp_path / "out", avg_bits=3, per="layer", group_size=32)
        assert not any("tokenizer" in note for note in export(tmp_path / "out", "gguf", tmp_path / "gguf")["notes"])
    texts = ["the quick brown fox", "the thick bow, and zoë", "brown", "quicker than the row of them", "a b c d"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = [tokenizer(text).input_ids for text in texts]
    assert all(max(row) > 259 for row in ids) and min(min(row) for row in ids) > 2 and any(3 <= i < 259 for i in ids[1])
    said = by_llama_cpp(tmp_path / "gguf", [*texts, *ids], logit_bias=[[i, False] for i in range(259)])
    assert said[: len(texts)] == said[len(texts) :] and sum(x is not None for x in said) >= 4


# ------------------------------------------------------------------------------------------------- refusals


def refused(to: str, out: Path, match: str, room: Path) -> BadInput:
    with pytest.raises(BadInput, match=match) as caught:
        export(out, to, room / "no")
    assert not (room / "no" / "config.json").exists() and not any((room / "no").glob("*"))
    assert "\n" not in caught.value.line and caught.value.hint
    return caught.value


def test_what_a_format_cannot_say_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, mixed, biased = (
        made.packed("olmoe", avg_bits=2.7)[0],
        wide("olmoe"),
        made.packed("gpt_oss", avg_bits=2.7)[0],
    )
    refused("autoround", narrow, "AutoRound's format cannot hold .* it packs 32 values at a time", tmp_path)
    refused("autoround", made.packed("olmoe", bits="1,2", avg_bits=1.5, group_size=32, model_intermediate_size=64)[0],
            "no width of 1 bit", tmp_path)  # fmt: skip
    refused("compressed-tensors", narrow, "40 inputs are no whole groups of 64", tmp_path)
    refused("compressed-tensors", wide("qwen3_vl_moe"), "stores a layer's experts in one tensor", tmp_path)
    refused("autoround", biased, "it packs 32 values at a time", tmp_path)
    monkeypatch.setattr("mopeq.export.gguf.find_spec", lambda name: None)
    assert refused("gguf", mixed, "needs the gguf package", tmp_path).hint == "pip install gguf"


@needs["gguf"]
def test_what_gguf_cannot_say_is_refused(tmp_path: Path) -> None:
    assert "--per layer" in refused("gguf", wide("olmoe"), "one type for a layer's experts", tmp_path).hint
    refused("gguf", made.packed("olmoe", avg_bits=3, per="layer", model_num_key_value_heads=4)[0],
            "no type of GGUF holds", tmp_path)  # fmt: skip
    refused("gguf", made.packed("gpt_oss", avg_bits=3, per="layer")[0], "knows olmoe", tmp_path)
    refused("gguf", made.packed("olmoe", avg_bits=3, per="layer")[0], "fewer keys than queries", tmp_path)


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    out, to = made.packed("olmoe", avg_bits=2.7)[0], tmp_path / "dense"
    arguments = ["export", str(out), "--to", "dense", "-o", str(to)]
    assert run_command([*arguments, "--json"], False) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["to"], facts["directory"]) == ("dense", str(to)) and facts["bytes_weights"] == made.payload(to)
    assert run_command(arguments, False) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert run_command([*arguments[:3], "nonsense", *arguments[4:]], False) == 2
    assert ", ".join(EXPORTERS) in capsys.readouterr().err
    assert run_command(["export", str(made.source("olmoe")), "--to", "dense", "-o", str(tmp_path / "x")], False) == 2
    assert "no finished mopeq checkpoint" in capsys.readouterr().err
    assert run_command(["export", "--help"], False) == 0
    help_text = capsys.readouterr().out
    assert all(name in help_text for name in EXPORTERS) and "Example:" in help_text
