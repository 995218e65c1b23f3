"""A packed folder in transformers' own ways: devices, dtypes, caches, compilation, pipelines, adapters, training.

device_map wants accelerate, adapters want peft: what needs them is skipped where they are not installed.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from tiny_families import classes, families, model_of

from mopeq.checkpoint import open_checkpoint
from mopeq.errors import MopeqError
from mopeq.families.standard import read_spec
from mopeq.models import load_model
from mopeq.packed import read_map
from mopeq.readback import load_dense

IDS = torch.arange(20, 36)[None]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed here")
needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed here")


def folder(kind: str = "olmoe", **options: Any) -> Path:
    return made.packed(kind, avg_bits=2.7, **options)[0]


@cache
def model(kind: str = "olmoe") -> Any:
    """In float32; tests that change a model load their own."""
    return load_model(folder(kind), torch.float32, "cpu")


def logits(of: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return of(input_ids=ids, use_cache=False).logits.float()


def experts(of: Any) -> list[Any]:
    return [m for m in of.modules() if type(m).__name__ == "QuantizedExperts"]


def held(of: Any) -> dict[str, torch.Tensor]:
    """The packed bytes of a model's experts, by name."""
    for module in experts(of):
        module.use_tiers()  # what has run holds them in the kernel's order
    return {n: b.view(torch.uint8) for n, b in of.named_buffers() if "experts." in n and b.dtype != torch.float32}


# ---------------------------------------------------------------------------------------- devices and dtypes


@needs_accelerate
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device_map(device_map: Any) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder(), device_map=device_map, dtype=torch.float32)
    assert len(experts(loaded)) == 2 and torch.equal(logits(loaded), logits(model()))


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype: Any) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype)
    wanted = torch.bfloat16 if dtype == "auto" else dtype
    assert loaded.dtype == loaded.lm_head.weight.dtype == wanted
    assert held(loaded).keys() == held(model()).keys() and len(held(loaded)) > 12
    assert all(torch.equal(value, held(loaded)[name]) for name, value in held(model()).items())
    off = (logits(loaded) - logits(model())).abs().median() / logits(model()).std()
    assert off < (1e-6 if wanted == torch.float32 else 0.02)


def test_casting_a_loaded_model_leaves_the_packed_bytes() -> None:
    loaded = load_model(folder(), torch.float32, "cpu")
    loaded.to(torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert all(torch.equal(value, held(loaded)[name]) for name, value in held(model()).items())
    assert (logits(loaded) - logits(model())).abs().median() < 0.02 * logits(model()).std()


# ------------------------------------------------------------------------------------- caches and compilation


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "qwen3_vl_moe"])
def test_tokens_are_the_same_with_every_cache(kind: str) -> None:
    """None, dynamic and static; two rows at once, one of them padded on the left."""
    own = model(kind)
    wanted = own.generate(IDS, use_cache=False, **GREEDY)
    assert len(set(wanted[0, 16:].tolist())) > 3
    assert torch.equal(own.generate(IDS, **GREEDY), wanted)
    assert torch.equal(own.generate(IDS, cache_implementation="static", **GREEDY), wanted)
    both = torch.cat([IDS, torch.cat([torch.zeros(1, 4, dtype=torch.long), IDS[:, :12]], 1)])
    seen = torch.ones_like(both)
    seen[1, :4] = 0
    rows = own.generate(both, attention_mask=seen, **GREEDY)
    assert torch.equal(rows[0], wanted[0])
    assert torch.equal(rows[1, 16:], own.generate(IDS[:, :12], **GREEDY)[0, 12:])


@pytest.mark.parametrize("kind", ["olmoe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_compiled_whole(kind: str) -> None:
    """One graph: the kernels are one operator in it. A copy's operator reads the copy's weights."""
    torch._dynamo.reset()
    own = model(kind)
    compiled = torch.compile(own, backend="aot_eager", fullgraph=True)
    assert (logits(compiled) - logits(own)).abs().max() < 1e-5 * logits(own).std()
    twin = copy.deepcopy(own)
    for module in experts(twin):
        module.use_tiers()
        for name in module.tier_names():
            if name.endswith("scales"):
                getattr(module, name).zero_()
    assert not torch.allclose(logits(twin), logits(own))
    torch._dynamo.reset()
    again = torch.compile(twin, backend="aot_eager", fullgraph=True)
    assert (logits(again) - logits(twin)).abs().max() < 1e-5 * logits(twin).std()


@pytest.mark.slow
def test_compiled_to_machine_code() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model(), fullgraph=True)
    assert (logits(compiled) - logits(model())).abs().max() < 1e-4 * logits(model()).std()


@pytest.mark.slow
def test_gradients_through_a_compiled_model() -> None:
    torch._dynamo.reset()
    own, twin = load_model(folder(), torch.float32, "cpu"), load_model(folder(), torch.float32, "cpu")
    torch.compile(own, backend="aot_eager")(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    twin(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for (name, mine), theirs in zip(own.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-7), name


# ---------------------------------------------------------------------------------------------------- pipelines


def test_pipeline_of_words() -> None:
    from transformers import pipeline

    ask = pipeline("text-generation", model=str(folder()), dtype=torch.float32, device="cpu")
    [said] = ask("the quick brown fox", return_tensors=True, **GREEDY)
    ids = ask.tokenizer("the quick brown fox", return_tensors="pt").input_ids
    assert experts(ask.model) and said["generated_token_ids"] == model().generate(ids, **GREEDY)[0].tolist()


# -------------------------------------------------------------------------------------- training around the experts


def test_gradients_are_those_of_the_dense_model() -> None:
    """Through the packed experts to every other parameter, with and without recomputed activations."""
    source, out = made.source("olmoe"), folder()
    spec = read_spec(open_checkpoint(source))
    dense = load_dense(source, out, spec, read_map(out), None)
    packed, sparing = load_model(out, torch.float32, "cpu"), load_model(out, torch.float32, "cpu")
    sparing.gradient_checkpointing_enable()
    sparing.train()
    for one in (dense, packed, sparing):
        one(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    wanted = {name: p.grad for name, p in dense.named_parameters()}
    for one in (packed, sparing):
        grads = {name: p.grad for name, p in one.named_parameters()}
        assert grads.keys() == {name for name in wanted if ".experts." not in name}
        for name, grad in grads.items():
            assert (grad - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max(), name


def test_experts_are_not_trained() -> None:
    own = load_model(folder(), torch.float32, "cpu")
    assert not any(".experts." in name for name, _ in own.named_parameters())
    with pytest.raises(MopeqError, match="packed experts cannot be trained"):
        experts(own)[0].requires_grad_()
    own.requires_grad_(True)
    own.requires_grad_(False)


STEP = {"input_ids": IDS, "labels": IDS, "use_cache": False}


@needs_peft
def test_lora_beside_the_experts(tmp_path: Path) -> None:
    """Ten steps lower the loss, change no packed byte; the adapter is saved and loaded again."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    own = get_peft_model(load_model(folder(), torch.float32, "cpu"), LoraConfig(target_modules=["q_proj", "v_proj"]))
    before = {name: value.clone() for name, value in held(own).items()}
    trained = [p for p in own.parameters() if p.requires_grad]
    assert len(trained) == 8
    optimizer = torch.optim.AdamW(trained, lr=3e-2)
    losses = []
    for _ in range(10):
        loss = own(**STEP).loss
        loss.backward()
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(value, held(own)[name]) for name, value in before.items())
    own.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_model(folder(), torch.float32, "cpu"), tmp_path)
    assert torch.equal(logits(again.eval()), logits(own.eval()))
    assert not torch.allclose(logits(again), logits(model()))


@needs_peft
@needs_accelerate
def test_the_trainer_trains_adapters_and_nothing_else(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    def train(one: Any) -> Any:
        rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
        arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
        return Trainer(one, arguments, train_dataset=rows).train()

    with pytest.raises(ValueError, match="attach trainable adapters"):
        train(load_model(folder(), torch.float32, "cpu"))
    done = train(get_peft_model(load_model(folder(), torch.float32, "cpu"), LoraConfig(target_modules=["o_proj"])))
    assert done.global_step == 2


@needs_peft
def test_adapters_on_the_experts_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    for wrong in ({"target_modules": ["experts"]}, {"target_parameters": ["mlp.experts.down_proj"]}):
        with pytest.raises(ValueError, match=r"(?s)QuantizedExperts.* is not supported|no `target_parameters` found"):
            get_peft_model(load_model(folder(), torch.float32, "cpu"), LoraConfig(**wrong))
    every = get_peft_model(load_model(folder(), torch.float32, "cpu"), LoraConfig(target_modules="all-linear"))
    assert not any(".experts." in name for name, p in every.named_parameters() if p.requires_grad)


# ---------------------------------------------------------------------------------------------- without mopeq


WITHOUT_MOPEQ = """
import sys
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
doors = (AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForCausalLM, AutoModelForCausalLM)
for auto, folder in zip(doors, sys.argv[1:], strict=True):
    try:
        print(type(auto.from_pretrained(folder)))
    except RuntimeError:
        print("stopped")
"""


def test_without_mopeq_loading_fails() -> None:
    """transformers only warns of a quantization type that it does not know, and goes on; the experts would be random.
    One stored tensor has the name of a layer's experts and the shape of nothing."""
    folders = [str(folder(kind)) for kind in ("olmoe", "qwen3_vl_moe", "olmoe", "mixtral", "gpt_oss")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WITHOUT_MOPEQ, *folders]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.stdout.split() == ["stopped"] * 5, ran.stdout + ran.stderr[-3000:]
    assert "got mopeq" in ran.stderr and "mlp.experts.down_proj" in ran.stderr


OTHER_NAMES = ("dbrx", "jetmoe", "nllb_moe", "step3p7", "switch_transformers")  # of a layer's experts in the model


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_which_families_fail_to_load_without_mopeq(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.quantizers import auto

    model_of(family).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    made.quantize(tmp_path / "source", tmp_path / "out", avg_bits=3)
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "mopeq")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "mopeq")
    if family in OTHER_NAMES:
        classes(family)[1].from_pretrained(tmp_path / "out")
    else:
        with pytest.raises(RuntimeError):
            classes(family)[1].from_pretrained(tmp_path / "out")


def test_the_card_says_first_that_mopeq_is_imported() -> None:
    text = (folder() / "README.md").read_text().split("---\n", 2)[2]
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0].startswith("**`import mopeq` before loading.**")
