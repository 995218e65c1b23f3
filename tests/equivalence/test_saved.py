"""A packed model loaded and saved again is the packed checkpoint it was, bit for bit; and in memory it is no larger."""

from __future__ import annotations

import copy as copying
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made import copy, digests, packed, payload, stored
from warm import SOURCES

from mopeq.errors import BadInput
from mopeq.models import load_model
from mopeq.packed import content_digest, read_manifest, write_manifest
from mopeq.readback import some_tokens
from mopeq.verbs.verify import verify

MADE: dict[str, dict[str, Any]] = {  # name -> (model and options)
    "olmoe": {"kind": "olmoe", "shard_size": "60kB"},
    "qwen3_vl_moe": {"kind": "qwen3_vl_moe"},
    "gpt_oss": {"kind": "gpt_oss"},
    "deepseek_v2": {"kind": "deepseek_v2", "other_bits": 4},
    "mixtral": {"kind": "mixtral", "avg_bits": 2.5, "allocate": "random"},
    "tied": {"kind": "olmoe", "model_tie_word_embeddings": True},
    "tied, packed": {"kind": "qwen3_vl_moe", "other_bits": 4, "model_tie_word_embeddings": True},
    "float32": {"kind": "gpt_oss", "dtype": "fp32"},
}


def make(name: str) -> Path:
    return packed(**MADE[name])[0]


def logits(model: Any, seed: int = 3) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=some_tokens(model.config, seed), use_cache=False).logits


def files_of(out: Path) -> dict[str, str]:
    """{file: sha256} of all that may not differ, without the manifest, which lists what the model's own files are."""
    return {name: sha for name, sha in digests(out).items() if name != "mopeq_manifest.json"}


@pytest.mark.parametrize("name", MADE)
def test_saved_is_what_was_loaded(name: str, tmp_path: Path) -> None:
    out, again = make(name), tmp_path / "again"
    model = load_model(out, torch.float32, "cpu")
    model.save_pretrained(again)
    assert files_of(again) == files_of(out)
    assert content_digest(again) == content_digest(out)
    assert (again / "mopeq_run.json").read_bytes() == (out / "mopeq_run.json").read_bytes()
    rows = {row["name"]: row for row in read_manifest(out)}
    assert all(rows[row["name"]] == row for row in read_manifest(again))
    assert verify(again)["bytes_weights"] == payload(out)
    assert torch.equal(logits(load_model(again, torch.float32, "cpu")), logits(model))


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "tied, packed"])
def test_saved_in_other_shards(name: str, tmp_path: Path) -> None:
    out, again = make(name), tmp_path / "again"
    model = load_model(out, torch.bfloat16, "cpu")
    model.save_pretrained(again, max_shard_size="40kB")
    assert len(list(again.glob("model-*.safetensors"))) > 3
    assert stored(again) == stored(out)
    assert verify(again)["whole"]
    assert torch.equal(logits(load_model(again, torch.bfloat16, "cpu")), logits(model))
    model.save_pretrained(again, max_shard_size=10**9)  # into the same folder: the shards before are no more
    assert [p.name for p in again.glob("*.safetensors*")] == ["model.safetensors"]
    assert stored(again) == stored(out) and verify(again)["whole"]


def test_a_tokenizer_saved_after_the_model(tmp_path: Path) -> None:
    """The usual order of the two calls; the tokenizer's files may come out otherwise than they were copied."""
    from transformers import AutoTokenizer

    model, tokenizer = load_model(make("olmoe"), torch.bfloat16, "cpu"), AutoTokenizer.from_pretrained(make("olmoe"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text((tmp_path / "tokenizer_config.json").read_text() + "\n")
    assert verify(tmp_path)["whole"]
    load_model(tmp_path, torch.bfloat16, "cpu")


def test_what_was_changed_is_saved(tmp_path: Path) -> None:
    out = make("olmoe")
    model = load_model(out, torch.bfloat16, "cpu")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.config.max_position_embeddings = 300
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    before, after = stored(out), stored(tmp_path)
    assert [n for n in before if before[n] != after[n]] == ["model.norm.weight"] and list(before) == list(after)
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 300
    assert json.loads((tmp_path / "generation_config.json").read_text())["max_new_tokens"] == 7
    assert verify(tmp_path)["whole"] and content_digest(tmp_path) != content_digest(out)
    assert torch.equal(logits(load_model(tmp_path, torch.bfloat16, "cpu")), logits(model))


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    twin = copying.deepcopy(load_model(make("olmoe"), torch.bfloat16, "cpu"))
    with torch.no_grad():
        twin.model.norm.weight.mul_(2)
    twin.save_pretrained(tmp_path)
    assert stored(tmp_path)["model.norm.weight"] != stored(make("olmoe"))["model.norm.weight"]


def test_norms_that_loading_rounded_are_saved_as_they_were(tmp_path: Path) -> None:
    """float32 on disk, bf16 in this model: unchanged, they are read again; changed, they are what the model has."""
    out = copy(make("float32"), tmp_path / "out")
    sharpen(out, "model.norm.weight")
    model = load_model(out, torch.bfloat16, "cpu")
    model.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(out)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "changed")
    (saved,) = torch.frombuffer(bytearray(stored(tmp_path / "changed")["model.norm.weight"][-4:]), dtype=torch.float32)
    assert saved == model.model.norm.weight[-1].float()


def sharpen(out: Path, name: str) -> None:
    """Give a float32 tensor digits that bf16 has not."""
    from safetensors.torch import load_file, save_file

    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name] = torch.linspace(0.5, 1.5, tensors[name].numel())
            save_file(tensors, shard, metadata={"format": "pt"})
    write_manifest(out)


def test_the_folder_may_be_gone(tmp_path: Path) -> None:
    out = copy(make("mixtral"), tmp_path / "out")
    model = load_model(out, torch.float32, "cpu")
    shutil.rmtree(out)
    model.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(make("mixtral")) and verify(tmp_path / "again")["whole"]


def test_a_model_without_its_head_is_saved_with_it(tmp_path: Path) -> None:
    """What the model does not build is taken from the folder, and named where that is gone."""
    from transformers import AutoModel

    out = copy(make("olmoe"), tmp_path / "out")
    model = AutoModel.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(out) and content_digest(tmp_path / "again") == content_digest(out)
    shutil.rmtree(out)
    with pytest.raises(BadInput, match=r"lm_head.weight is no part of this model"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / "mopeq_manifest.json").exists()


@pytest.mark.parametrize("name", MADE)
def test_a_state_dict_is_taken_back(name: str, tmp_path: Path) -> None:
    model, other = (load_model(make(name), torch.float32, "cpu") for _ in range(2))
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert not torch.equal(logits(other), logits(model))
    for taken in (copying.deepcopy(other), other):
        assert not any(taken.load_state_dict(state))
        assert torch.equal(logits(taken), logits(model))


def test_a_state_dict_of_other_widths_is_refused() -> None:
    state = load_model(packed("olmoe", avg_bits=4)[0], torch.float32, "cpu").state_dict()
    model = load_model(packed("olmoe", avg_bits=2)[0], torch.float32, "cpu")
    before = logits(model)
    with pytest.raises(RuntimeError, match="gate: qweight came as"):
        model.load_state_dict(state)
    some = {name: tensor for name, tensor in state.items() if not name.endswith("0.mlp.experts.1.up_proj.scales")}
    with pytest.raises(RuntimeError, match="Missing key.*0.mlp.experts.1.up_proj.scales"):
        model.load_state_dict(some)
    assert torch.equal(logits(model), before)


def test_what_save_pretrained_refuses(tmp_path: Path) -> None:
    out = copy(make("olmoe"), tmp_path / "out")
    model, before = load_model(out, torch.bfloat16, "cpu"), digests(out)
    with pytest.raises(BadInput, match="the folder this model was loaded from"):
        model.save_pretrained(out)
    for name in ("variant", "push_to_hub", "state_dict", "distributed_checkpoint"):
        with pytest.raises(BadInput, match=f"takes no {name}"):
            model.save_pretrained(tmp_path / "no", **{name: True})
    with pytest.raises(BadInput, match="takes no save_original_format"):
        model.save_pretrained(tmp_path / "no", save_original_format=False)
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists() and digests(out) == before


# ------------------------------------------------------------------------------------------------ memory

MEASURE = """
import gc, json, sys
import torch, mopeq
from transformers import AutoModelForCausalLM
import mopeq.plugins.hf
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM

def status(key):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(key))

def held(skip=()):
    parts = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in skip}
    seen = {}
    for t in gc.get_objects():
        if isinstance(t, torch.Tensor) and not t.is_meta and t.untyped_storage().data_ptr() not in parts:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(seen.values())

small = AutoModelForCausalLM.from_pretrained(sys.argv[1])  # first: what is imported and set up once is not weights
with torch.no_grad():
    small(torch.arange(8)[None], use_cache=False)
del small
gc.collect()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
peak, after = status("VmHWM") - before, status("VmRSS") - before
own = [*model.parameters(), *model.buffers()]
facts = {"own": sum(t.numel() * t.element_size() for t in own), "peak": peak, "after": after}
del own
with torch.no_grad():
    model(torch.arange(8)[None], use_cache=False)
gc.collect()
own = [*model.parameters(), *model.buffers()]  # now in the order that the kernel reads
facts["ran"] = sum(t.numel() * t.element_size() for t in own)
facts["resident"] = status("VmRSS") - before
print(json.dumps(facts | {"left": held(own)}))
"""


def measure(small: Path, large: Path) -> dict[str, int]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES), "OMP_NUM_THREADS": "1"}
    environment |= {"MALLOC_ARENA_MAX": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return dict(json.loads(ran.stdout.splitlines()[-1]))


LARGE = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=4, num_experts=32, vocab_size=1000)
LARGER = dict(hidden_size=512, intermediate_size=512, num_hidden_layers=6, num_experts=32, vocab_size=2000)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize(
    ("changes", "allowed"),
    [pytest.param(LARGE, 0.25, id="56 MB in bf16"), pytest.param(LARGER, 0.1, id="316 MB", marks=pytest.mark.slow)],
)
def test_memory_is_the_packed_size(changes: dict[str, int], allowed: float) -> None:
    """Resident, and at its highest while loading: the payload and little else; nothing dequantized stays after use.

    The allowance is for what does not grow with the weights: module objects, the files' headers, malloc's slack.
    """
    out, facts = packed("olmoe", allocate="random", **{f"model_{k}": v for k, v in changes.items()})
    found, size = measure(make("olmoe"), out), facts["bytes_weights"]
    assert size <= found["own"] <= 1.001 * size  # (the rotary embedding's frequencies are computed, not stored)
    assert 0.5 * size <= found["peak"] <= (1 + allowed) * size, found  # (other weights are mapped until they are used)
    assert found["after"] <= (1 + allowed) * size, found
    assert found["ran"] == found["own"] and found["left"] <= 0.01 * size, found
    # a pass leaves 4 to 9 MB more, whatever the model's size: malloc's slack and what libraries set up
    assert found["resident"] <= (1 + allowed) * size + (12 << 20), found
