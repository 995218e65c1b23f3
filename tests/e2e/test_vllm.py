"""vLLM: a layer's flat parameters by themselves, then whole models served; the latter want vLLM's own environment
(`make vllm`) and are skipped elsewhere. Greedy tokens are compared with transformers running the same folder."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import torch
from tiny_ports import SIDE, VL2_ADDED, VL2_SPECIAL, WIDTH, tokenizer, write_tiny
from torch.nn.functional import silu

from mopeq.errors import BadInput, MopeqError
from mopeq.mending import mend_torchvision
from mopeq.nouns import PADDING, Format, guard_name
from mopeq.plugins.vllm_layer import ClampedGate, FlatLayer, Gate, cut_bits
from mopeq.tensors import QWeight, pack_bits
from mopeq.verbs import serve as serving

mend_torchvision()  # where the CUDA build stands beside a CPU-only torch, as vLLM's requirements may bring it
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here: make vllm")

PLAIN: dict[str, Any] = {"sensitivity": "hessian", "method": "rtn", "per": "projection"}  # quick to make

# ------------------------------------------------------------------------------- one layer, without vLLM


def random_matrix(fmt: Format, out_features: int, in_features: int, generator: torch.Generator) -> QWeight:
    groups = fmt.groups(in_features)
    codes = torch.randint(0, fmt.max_code + 1, (out_features, in_features), generator=generator).byte()
    scales = (torch.rand(out_features, groups, generator=generator) * 0.1 + 0.01).half()
    zeros = torch.randint(0, fmt.max_code + 1, (out_features, groups), generator=generator).byte()
    return QWeight(codes, scales, zeros if fmt.scheme == "a" else None, fmt)


def random_layer(hidden: int, inner: int, experts: int, seed: int) -> dict[str, list[QWeight]]:
    """Every matrix in a format of its own."""
    generator, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {
        p: [
            random_matrix(Format(dice.randint(1, 8), dice.choice((16, 32, 64)), dice.choice("as")), *shape, generator)
            for _ in range(experts)
        ]
        for p, shape in shapes.items()
    }


Biases = dict[str, torch.Tensor]  # {projection: [E, out]}


def flat_layer(
    layer: dict[str, list[QWeight]], rank: int, ranks: int, gate: Gate | None = None, biases: Biases | None = None
) -> FlatLayer:
    """A rank's part of a layer, loaded tensor by tensor into memory that holds rubbish before."""
    gate = gate or Gate(silu)
    hidden, inner = layer["down"][0].shape
    flat = FlatLayer({p: [q.format for q in row] for p, row in layer.items()}, hidden, inner, gate, rank, ranks)
    parameters = flat.parameters()
    for tensor in parameters.values():
        assert tensor.ndim == 1
        tensor.fill_(77)
    flat.bind(parameters)
    for p, row in layer.items():
        for e, q in enumerate(row):
            for suffix, value in q.pack().items():
                flat.load(e, p, suffix, value)
            if biases:
                flat.load(e, p, "bias", biases[p][e])
    flat.finish()
    return flat


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate) * up


def clamped_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """GPT-OSS's."""
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate / (1 + torch.exp(-1.702 * gate)) * (1 + up)


def by_hand(
    layer: dict[str, list[QWeight]],
    x: torch.Tensor,
    weight: torch.Tensor,
    index: torch.Tensor,
    act: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = silu_gate,
    biases: Biases | None = None,
) -> torch.Tensor:
    out = torch.zeros_like(x)
    b = biases or {p: torch.zeros(len(row), row[0].shape[0], dtype=x.dtype) for p, row in layer.items()}
    w = {p: [q.dequantize(x.dtype) for q in row] for p, row in layer.items()}
    for t in range(x.shape[0]):
        for e, share in zip(index[t].tolist(), weight[t], strict=True):
            if 0 <= e < len(layer["down"]):
                h = act(w["gate"][e] @ x[t] + b["gate"][e], w["up"][e] @ x[t] + b["up"][e])
                out[t] += share * (w["down"][e] @ h + b["down"][e])
    return out


@pytest.mark.parametrize(
    ("hidden", "inner", "ranks"), [(64, 40, 1), (64, 40, 2), (48, 96, 2), (80, 36, 2), (32, 48, 4)]
)
def test_ranks_parts_add_up_to_the_layer(hidden: int, inner: int, ranks: int) -> None:
    for seed in range(3):
        layer = random_layer(hidden, inner, 5, seed)
        generator = torch.Generator().manual_seed(100 + seed)
        x = torch.randn(7, hidden, generator=generator, dtype=torch.float64)
        weight = torch.rand(7, 3, generator=generator, dtype=torch.float64)
        index = torch.randint(-1, 5, (7, 3), generator=generator)  # -1: not of this rank's experts
        want = by_hand(layer, x, weight, index)
        got = sum(flat_layer(layer, rank, ranks).run(x, weight, index) for rank in range(ranks))
        assert isinstance(got, torch.Tensor)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ranks", [1, 2])
def test_biases_and_a_clamped_gate(ranks: int) -> None:
    """down's bias is added once, whatever the number of ranks; some values lie beyond the clamp."""
    layer, generator = random_layer(64, 40, 5, 7), torch.Generator().manual_seed(8)
    biases = {p: torch.randn(5, row[0].shape[0], generator=generator).double() * 4 for p, row in layer.items()}
    x = torch.randn(7, 64, generator=generator, dtype=torch.float64)
    weight = torch.rand(7, 3, generator=generator, dtype=torch.float64)
    index = torch.randint(-1, 5, (7, 3), generator=generator)
    want = by_hand(layer, x, weight, index, clamped_gate, biases)
    parts = [flat_layer(layer, rank, ranks, ClampedGate(torch.float64), biases) for rank in range(ranks)]
    got = torch.stack([part.run(x, weight, index) for part in parts]).sum(0)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with pytest.raises(MopeqError, match=r"expert 1 up: a bias of shape \[3\]"):
        parts[0].load(1, "up", "bias", torch.zeros(3))


def test_nothing_is_held_twice() -> None:
    layer = random_layer(64, 40, 4, 0)
    flat = flat_layer(layer, 0, 1)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in flat.experts.buffers()}
    stored = sum(q.format.nbytes(*q.shape) for row in layer.values() for q in row)
    assert len(held) <= 6 and sum(held.values()) == stored


def test_cuts_between_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in range(1, 9):
        codes = torch.randint(0, 2**bits, (3, 36), generator=generator).byte()
        for start, end in ((0, 18), (18, 36), (8, 16), (5, 9), (0, 36)):
            assert torch.equal(
                cut_bits(pack_bits(codes, bits), bits, 36, start, end), pack_bits(codes[:, start:end], bits)
            )


def test_what_does_not_fit_or_come_is_named() -> None:
    layer = random_layer(64, 40, 2, 0)
    hidden, inner = 64, 40
    flat = FlatLayer({p: [q.format for q in row] for p, row in layer.items()}, hidden, inner, Gate(silu))
    flat.bind(flat.parameters())
    with pytest.raises(MopeqError, match="expert 1 up: qweight"):
        flat.load(1, "up", "qweight", torch.zeros(3, 3, dtype=torch.uint8))
    with pytest.raises(MopeqError, match="did not come, 0.down_proj"):
        flat.finish()
    with pytest.raises(MopeqError, match="do not divide among 3 ranks"):
        FlatLayer({p: [q.format for q in row] for p, row in layer.items()}, hidden, inner, Gate(silu), 0, 3)


# ------------------------------------------------------------------------------------------ the verb alone


def test_serve_picks_vllm_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = made.packed("olmoe", **PLAIN)
    have = {"vllm"}
    monkeypatch.setattr(serving, "find_spec", lambda name: name if name in have else None)
    monkeypatch.setattr(serving.metadata, "version", lambda name: "0.33" if name == "vllm" else "")
    command = serving.command_line(out, "auto", "127.0.0.1", 8123, ["--max-model-len", "64"])
    assert command[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"]
    assert command[4:] == [str(out), "--host", "127.0.0.1", "--port", "8123", "--max-model-len", "64"]
    have.clear()
    have |= {"accelerate", "fastapi", "uvicorn", "openai"}
    assert "import mopeq" in serving.command_line(out, "auto", "127.0.0.1", 8123, [])[2]
    with pytest.raises(BadInput, match="vLLM is not installed"):
        serving.command_line(out, "vllm", "127.0.0.1", 8123, [])
    have.clear()
    with pytest.raises(BadInput, match="accelerate, fastapi"):
        serving.command_line(out, "transformers", "127.0.0.1", 8123, [])


def test_serve_knows_what_vllm_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: name)
    made.quantize(write_tiny(tmp_path / "source", "molmoe", seed=1), tmp_path / "out", **PLAIN)
    assert "import mopeq" in serving.command_line(tmp_path / "out", "auto", "127.0.0.1", 8123, [])[2]
    with pytest.raises(BadInput, match="its Molmo has no experts"):
        serving.command_line(tmp_path / "out", "vllm", "127.0.0.1", 8123, [])


def test_serve_refuses_an_unfinished_folder(tmp_path: Path) -> None:
    folder = made.copy(made.packed("olmoe", **PLAIN)[0], tmp_path / "cut")
    (folder / "mopeq_manifest.json").unlink()
    with pytest.raises(BadInput, match="no finished mopeq checkpoint"):
        serving.command_line(folder, "auto", "127.0.0.1", 8000, [])


# -------------------------------------------------------------------------------------- whole models in vLLM

WIDE: dict[str, dict[str, Any]] = {  # what vLLM's attention on a CPU asks of the tiny models
    "olmoe": {"model_hidden_size": 128},
    "mixtral": {"model_hidden_size": 128},
    "gpt_oss": {  # its own yarn, which vLLM takes for granted
        "model_hidden_size": 128, "model_head_dim": 32, "model_num_key_value_heads": 4, "model_rope_parameters": None,
    },
    "deepseek_v2": {"model_kv_lora_rank": 512, "model_qk_rope_head_dim": 64, "model_n_group": 1, "model_topk_group": 1},
}  # fmt: skip
PROMPTS = ("the quick brown fox", "each expert keeps its own width, and the router", "A scale")
LENGTH = 24
DRIVER = """
import base64, io, json, sys
job = json.load(sys.stdin)
if job["tower"]:  # vLLM takes DeepSeek-VL2's from timm, at its full size whatever the config says
    import timm
    from functools import partial
    timm.create_model = partial(timm.create_model, **job["tower"])
from PIL import Image
from vllm import LLM, SamplingParams
llm = LLM(job["folder"], dtype="float32", max_num_seqs=4, **job["options"])
asked = []
for one in job["asked"]:
    if isinstance(one, list):
        asked.append({"prompt_token_ids": one})
    else:
        pictures = [Image.open(io.BytesIO(base64.b64decode(p))).convert("RGB") for p in one["pictures"]]
        asked.append({"prompt": one["text"], "multi_modal_data": {"image": pictures}})
outs = llm.generate(asked, SamplingParams(temperature=0, ignore_eos=True, max_tokens=job["length"]), use_tqdm=False)
print("TOKENS", json.dumps([[list(o.prompt_token_ids), list(o.outputs[0].token_ids)] for o in outs]), flush=True)
"""
SITE = """
import sys
class Declare:  # PyPI's torchvision, built for CUDA, wants its operators declared beside a CPU-only torch
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            import torch
            sys.torchvision_library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                sys.torchvision_library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.meta_path.insert(0, Declare())
"""


@cache
def environment() -> dict[str, str]:
    """Of a process with vLLM on a CPU; where torchvision is the CUDA build, with its operators declared."""
    found = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    if find_spec("torchvision") and torch.version.cuda is None and "+cpu" not in metadata.version("torchvision"):
        site = made.room() / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(SITE)
        found["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return found


def by_vllm(
    folder: Path, asked: list[Any], tower: dict[str, Any] | None = None, **options: Any
) -> list[list[list[int]]]:
    """[[prompt's tokens, new tokens]] of each prompt (tokens, or a text with pictures), greedily, by vLLM.

    `tower`: what timm is told of the picture tower beside its name.
    """
    options = {"enforce_eager": True, "max_model_len": 256} | options
    job = json.dumps({"folder": str(folder), "asked": asked, "options": options, "length": LENGTH, "tower": tower})
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER], input=job, capture_output=True, text=True, env=environment(), timeout=580
    )
    said = [line for line in ran.stdout.splitlines() if line.startswith("TOKENS ")]
    assert said, ran.stdout[-2000:] + ran.stderr[-4000:]
    return json.loads(said[0].removeprefix("TOKENS "))  # type: ignore[no-any-return]


def by_transformers(folder: Path, inputs: list[dict[str, torch.Tensor]]) -> list[list[list[int]]]:
    from mopeq.models import load_model

    model = load_model(folder, torch.float32, "cpu")
    answers = []
    for one in inputs:
        new = model.generate(**one, max_new_tokens=LENGTH, do_sample=False, eos_token_id=None, pad_token_id=0)
        ids = one["input_ids"]
        answers.append([ids[0].tolist(), new[0, ids.shape[1] :].tolist()])
    return answers


def packed_text(kind: str, **options: Any) -> tuple[Path, list[list[int]]]:
    """A tiny packed model whose experts differ in width by projection too, and the prompts' tokens."""
    from mopeq.data.processor import load_processor

    out, _ = made.packed(kind, avg_bits=2.7, **PLAIN, **WIDE[kind], **options)
    widths = json.loads((out / "precision_map.json").read_text())["experts"].values()
    assert any(rows["gate"] != rows["down"] and len(set(rows["gate"])) > 1 for rows in widths)
    tokenizer = load_processor(out)
    return out, [tokenizer(prompt).input_ids for prompt in PROMPTS]


def check_text(kind: str, engine: dict[str, Any], **options: Any) -> None:
    out, prompts = packed_text(kind, **options)
    want = by_transformers(out, [{"input_ids": torch.tensor([ids])} for ids in prompts])
    assert len({tuple(new) for _, new in want}) == len(want)
    assert by_vllm(out, prompts, **engine) == want


def unpacked(out: Path, folder: Path) -> Path:
    """The same model, its experts as they were before packing, in float32."""
    from safetensors.torch import save_file

    from mopeq.packed import read_map
    from mopeq.plugins.stored import stored_tensors
    from mopeq.tensors import read_stored

    map_ = read_map(out)
    stems = {f"{map_.prefixes[i.layer]}.{i.expert}.{i.projection}_proj": fmt for i, fmt in map_.formats.items()}
    stored = {name: read_stored(out, info) for name, info in stored_tensors(sorted(out.glob("*.safetensors"))).items()}
    nothing = (PADDING, guard_name(map_.prefixes.values()))
    dense = {n: value for n, value in stored.items() if n.rpartition(".")[0] not in stems and n not in nothing}
    for stem, fmt in stems.items():
        parts = {suffix: stored[f"{stem}.{suffix}"] for suffix in fmt.shapes(1, 1)}
        codes = parts["qweight"]
        groups = parts["scales"].shape[1]
        in_features = min(codes.shape[1] * 8 // fmt.bits, groups * fmt.group_size)
        dense[f"{stem}.weight"] = QWeight.unpack(parts, fmt, codes.shape[0], in_features).dequantize()
    folder.mkdir()
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((out / name).read_bytes())
    return folder


@needs_vllm
def test_shared_experts_say_what_vllm_says_unpacked(tmp_path: Path) -> None:
    """Against vLLM itself: of a tiny random DeepSeek-V2 it says other things than transformers, packed or not."""
    out, prompts = packed_text("deepseek_v2")
    want = by_vllm(unpacked(out, tmp_path / "dense"), prompts)
    assert len({tuple(new) for _, new in want}) == len(want)
    assert by_vllm(out, prompts) == want


@needs_vllm
def test_what_vllm_reads_instead_of_packed_matrices() -> None:
    from mopeq.plugins.vllm import dense_others, on_disk

    fmt, generator = Format(4, 32), torch.Generator().manual_seed(0)
    q = random_matrix(fmt, 6, 80, generator)
    plain = torch.ones(3)
    parts = {f"a.q_proj.{suffix}": value for suffix, value in q.pack().items()}
    experts = {"a.experts.0.up_proj.qweight": plain, "a.experts.0.up_proj.scales": plain}
    stream = [*parts.items(), *experts.items(), ("a.norm.weight", plain), ("mopeq.padding", plain)]
    seen = dict(dense_others(stream, fmt.name, ("a.experts",), torch.float32))
    assert list(seen) == ["a.q_proj.weight", *experts, "a.norm.weight"]
    assert torch.equal(seen["a.q_proj.weight"], q.dequantize())
    assert list(dict(dense_others(stream, None, ("a.experts",), torch.float32))) == [*parts, *experts, "a.norm.weight"]
    with pytest.raises(MopeqError, match=r"of a\.q_proj only qweight"):
        dict(dense_others(stream[:1], fmt.name, ("a.experts",), torch.float32))
    layers = [f"model.language_model.layers.{i}.mlp.experts" for i in (1, 11)] + ["model.talker.layers.1.mlp.experts"]
    assert on_disk(layers, "language_model.model.layers.1.mlp.experts") == layers[0]
    assert on_disk(layers, "talker.model.layers.1.mlp.experts") == layers[2]
    with pytest.raises(MopeqError, match="no counterpart"):
        on_disk(layers, "language_model.model.layers.2.mlp.experts")


@needs_vllm
@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "gpt_oss"])
def test_text_models_say_what_transformers_says(kind: str) -> None:
    check_text(kind, {})


@needs_vllm
@pytest.mark.parametrize("bits", [4, 8])
def test_other_matrices_packed_too(bits: int) -> None:
    check_text("olmoe", {}, other_bits=bits)


@needs_vllm
@pytest.mark.slow
def test_compiled() -> None:
    check_text("olmoe", {"enforce_eager": False})


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("by_expert", [False, True])
def test_two_ranks(by_expert: bool, kind: str) -> None:
    """Each with half of every expert, or with half of the experts."""
    check_text(kind, {"tensor_parallel_size": 2, "enable_expert_parallel": by_expert})


@cache
def embedded(other_bits: int = 16) -> Path:
    from mopeq.embedded import model_dir
    from mopeq.stages import quantize

    out = made.room() / "packed" / f"embedded-{other_bits}"
    quantize(model_dir(), out, avg_bits=2.5, other_bits=other_bits, **PLAIN)
    return out


def questions(count: int) -> list[Any]:
    """Items about pictures, of tasks that differ."""
    from mopeq.data.readers import read
    from mopeq.embedded.world import evaluation_tsv

    table = made.room() / "questions.tsv"
    evaluation_tsv(table, per_task=1)
    return [item for item in read(table) if item.images][:count]


def png(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


TWO_RANKS = {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"}  # the tower has three heads: each rank has all


@needs_vllm
@pytest.mark.parametrize(
    ("other_bits", "engine"), [(16, {}), (4, {}), pytest.param(16, TWO_RANKS, marks=pytest.mark.slow)]
)
def test_embedded_model_with_pictures(other_bits: int, engine: dict[str, Any]) -> None:
    from mopeq.data.encode import _shown, encode_prompt, model_inputs
    from mopeq.data.processor import load_processor
    from mopeq.data.readers import picture

    out = embedded(other_bits)
    processor = load_processor(out)
    items = questions(6)
    assert len(items) == 6
    want = by_transformers(out, [model_inputs(encode_prompt(item, processor)) for item in items])
    asked = [
        {
            "text": processor.apply_chat_template(_shown(item, processor), tokenize=False, add_generation_prompt=True),
            "pictures": [png(picture(image)) for image in item.images],
        }
        for item in items
    ]
    assert by_vllm(out, asked, limit_mm_per_prompt={"image": 1, "video": 0}, **engine) == want


VL2 = {  # what vLLM's attention on a CPU asks of the tiny models, as WIDE
    "vl2-tiny": {"hidden_size": 128},
    "vl2-small": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64},
}
TOWER = {"depth": 2, "embed_dim": WIDTH, "num_heads": 4, "img_size": SIDE, "act_layer": "gelu_tanh"}


@needs_vllm
@pytest.mark.parametrize(
    ("which", "engine"),
    [("vl2-tiny", {}), pytest.param("vl2-small", {"enforce_eager": False}, marks=pytest.mark.slow)],
)
def test_deepseek_vl2_with_pictures(which: str, engine: dict[str, Any], tmp_path: Path) -> None:
    """A picture of one tile, one of two and one of three, and a text. Latent attention is compiled, as DeepSeek-V2's
    must be to say what transformers says. The tower is a tiny one here, with the original's GELU, which timm's is not.
    """
    pytest.importorskip("timm")
    from PIL import Image

    from mopeq.data.encode import encode_prompt, model_inputs
    from mopeq.data.processor import load_processor
    from mopeq.data.readers import Item

    source, out = write_tiny(tmp_path / "source", which, seed=11, **VL2[which]), tmp_path / "out"
    tokenizer(VL2_SPECIAL, VL2_ADDED).save(str(source / "tokenizer.json"))  # vLLM wants <image> to be in it
    made.quantize(source, out, avg_bits=2.7, **PLAIN)
    processor, draw = load_processor(out), np.random.default_rng(5)
    inputs: list[Any] = []
    asked: list[Any] = []
    for number, (width, height) in enumerate(((60, 40), (42, 42), (30, 90), (0, 0))):
        path = tmp_path / f"{number}.png"
        content = [{"type": "text", "text": f"What is the red circle {number}?"}]
        if width:
            Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
            content.insert(0, {"type": "image"})
        messages = [{"role": "user", "content": content}]
        item = Item(None, messages, (path,) if width else (), None, {"source": "a test"})
        inputs.append(model_inputs(encode_prompt(item, processor)))
        text = processor.tokenizer.bos_token + processor.apply_chat_template(messages)
        shown = {"text": text, "pictures": [png(Image.open(path))]} if width else None
        asked.append(shown or inputs[-1]["input_ids"][0].tolist())
    want = by_transformers(out, inputs)
    assert len({tuple(new) for _, new in want}) == len(want)
    assert by_vllm(out, asked, TOWER, max_model_len=512, limit_mm_per_prompt={"image": 1}, **engine) == want


# ------------------------------------------------------------------------------------- an endpoint, by its client


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_up(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(500):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def check_none_is_lost(client: Any) -> None:
    """32 requests at once, none lost: each is answered, and at its full length."""

    def ask(number: int) -> int:
        messages = [{"role": "user", "content": f"What is {number}?"}]
        reply = client.chat.completions.create(
            model=str(embedded()), messages=messages, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        return int(reply.usage.completion_tokens)

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(32))) == [8] * 32


def decodes_pictures() -> bool:
    """Whether torchvision's own library can be loaded, by which transformers' server reads pictures."""
    if find_spec("torchvision") is None:
        return False
    import torchvision.io  # noqa: F401

    return hasattr(torch.ops.image, "decode_image")


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param("vllm", marks=needs_vllm), "transformers"])
def test_endpoint_answers(engine: str) -> None:
    """`mopeq serve`, driven by the official client about a picture; the answer is that of `mopeq run`. transformers'
    server is asked in words alone where torchvision does not fit torch."""
    openai = pytest.importorskip("openai")
    for name in ("accelerate", "fastapi", "uvicorn"):  # transformers[serving]
        pytest.importorskip(name)
    from mopeq.data.readers import picture
    from mopeq.verbs.run import answer

    item, port, log = questions(1)[0], free_port(), made.room() / f"{engine}.log"
    text = next(part["text"] for part in item.messages[-1]["content"] if part["type"] == "text")
    content, shown, more = [{"type": "text", "text": text}], [], ["--dtype", "float32"]
    if engine == "vllm" or decodes_pictures():
        image, path = picture(item.images[0]), made.room() / "asked.png"
        image.save(path)
        shown = [path]
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(image)}"}})
    if engine == "vllm":
        more += ["--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"]
    want = answer(embedded(), text, shown, 16)["answer"]
    assert want
    command = [sys.executable, "-m", "mopeq.cli", "serve", str(embedded()), "--engine", engine, "--port", str(port)]
    with open(log, "wb") as file:
        server = subprocess.Popen(
            [*command, *more], stdout=file, stderr=file, env=environment(), start_new_session=True
        )
    try:
        wait_until_up(server, port, log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        reply = client.chat.completions.create(
            model=str(embedded()), messages=[{"role": "user", "content": content}], max_tokens=16, temperature=0
        )
        assert reply.choices[0].message.content.strip() == want
        if engine == "vllm":
            check_none_is_lost(client)
    except openai.APIError as error:
        raise AssertionError(log.read_text()[-4000:]) from error
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
