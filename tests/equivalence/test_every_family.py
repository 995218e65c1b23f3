"""Every MoE family of the installed transformers, packed at mixed widths, answers as its dense reference does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from family_trial import TOLERANCE, Trial, other_bits, try_family
from headers import checkpoint
from made import quantize
from tiny_families import families, model_of

from mopeq import readback
from mopeq.errors import BadInput, MopeqError
from mopeq.families import ADAPTERS, FAMILIES, WHERE_TO_ADD
from mopeq.families.standard import read_spec
from mopeq.models import generating, quiet_transformers
from mopeq.progress import silence
from mopeq.seam import match_names
from mopeq.verbs import evaluate, run
from mopeq.verbs.generation import generation

RECORD = Path(__file__).resolve().parents[2] / "docs" / "families.json"


@pytest.mark.parametrize("family", families())
def test_packed_agrees_with_the_dense_reference(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back with a few of the experts, as a model is that has many."""
    monkeypatch.setattr(readback, "FEW", 2)
    quiet_transformers()
    made = try_family(family, tmp_path)
    assert made.text < TOLERANCE and made.watched < TOLERANCE
    assert made.picture is None or made.picture < TOLERANCE
    assert made.moved > 100 * TOLERANCE  # the packed values differ from the source's, and that shows
    assert FAMILIES[made.model_type].adapted == bool(made.adapter)
    check_record(made)


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_other_bits_as_recorded(family: str, tmp_path: Path) -> None:
    """Where the record says `--other-bits 8` works it works; elsewhere it is not silently wrong."""
    quiet_transformers()
    if json.loads(RECORD.read_text())["families"][family]["other_bits_8"] == "works":
        other_bits(family, tmp_path)
    else:
        with pytest.raises(Exception):  # noqa: B017, PT011 - transformers' own errors among them
            other_bits(family, tmp_path)


@pytest.mark.parametrize(
    ("family", "matrix"),
    [
        ("gemma4", "embed_tokens.qweight cannot be packed: Gemma4TextScaledWordEmbedding"),
        ("deepseek_v4", "wo_a.qweight cannot be packed: DeepseekV4GroupedLinear"),
        ("qwen3_omni_moe", "several models in one"),
    ],
)
def test_other_bits_are_refused_before_any_work(family: str, matrix: str, tmp_path: Path) -> None:
    quiet_transformers()
    with pytest.raises(BadInput, match=matrix) as error:
        other_bits(family, tmp_path)
    assert "--other-bits 16" in error.value.hint
    assert not [*tmp_path.rglob("spec.json"), *tmp_path.rglob("*.npz")]


def packed_with_tokenizer(family: str, room: Path) -> Path:
    """A family's tiny model, packed without data."""
    model_of(family).to(torch.bfloat16).save_pretrained(room / "source")
    tiny.write_tokenizer(room / "source")
    with silence():
        quantize(room / "source", room / "packed")
    return room / "packed"


def test_a_classifier_of_tokens_neither_generates_nor_has_a_perplexity(tmp_path: Path) -> None:
    out = packed_with_tokenizer("openai_privacy_filter", tmp_path)
    for work in (lambda: run.answer(out, "a"), lambda: evaluate.evaluate(out), lambda: generation(out, 2, "cpu")):
        with pytest.raises(BadInput, match="predicts no next token"):
            work()


def test_a_translator_has_no_perplexity_of_one_text(tmp_path: Path) -> None:
    out = packed_with_tokenizer("nllb_moe", tmp_path)
    assert run.answer(out, "a", max_new_tokens=2)["new_tokens"]
    for work in (lambda: evaluate.evaluate(out), lambda: generation(out, 2, "cpu")):
        with pytest.raises(BadInput, match="does not read text as a causal"):
            work()


def test_what_transformers_generation_raises_is_told_as_its_own() -> None:
    with pytest.raises(MopeqError, match="does not generate with this model: the cache is of no use"), generating():
        raise ValueError("the cache is of no use")
    with pytest.raises(BadInput, match="ours"), generating():
        raise BadInput("ours", "stays")


def check_record(made: Trial) -> None:
    """The table in the docs says of this family what came out here."""
    said = json.loads(RECORD.read_text())["families"].get(made.family, {})
    assert "failed" not in said, said
    assert (said["model_class"], said["adapter"]) == (made.model_class, made.adapter)
    assert (said["picture"] is None) == (made.picture is None)


def test_the_record_names_every_family() -> None:
    record = json.loads(RECORD.read_text())
    if record["transformers"] != transformers.__version__:
        pytest.skip(f"recorded with transformers {record['transformers']}")
    assert sorted(record["families"]) == sorted(families())


def test_every_adapter_serves_a_class_of_transformers() -> None:
    recorded = {result.get("adapter") for result in json.loads(RECORD.read_text())["families"].values()} - {""}
    assert recorded == set(ADAPTERS)


@pytest.mark.parametrize("named", ["experts", "block_sparse_moe"])
def test_an_unknown_family_is_refused_by_file_and_row(named: str) -> None:
    shapes = {f"model.layers.0.{named}.input_linear.weight": ("BF16", (4, 24, 16))}
    with pytest.raises(BadInput) as error:
        read_spec(checkpoint(shapes, {"model_type": "next_moe", "num_local_experts": 4}))
    assert "'next_moe'" in error.value.line and WHERE_TO_ADD in error.value.hint
    assert WHERE_TO_ADD.startswith("src/mopeq/families/__init__.py") and "FAMILIES" in WHERE_TO_ADD


def test_a_module_without_the_shared_interface_is_refused_by_file_and_row() -> None:
    with pytest.raises(MopeqError) as error:
        match_names(["model.layers.0.mlp.experts"], [])
    assert "src/mopeq/families/__init__.py" in error.value.hint and "ADAPTERS" in error.value.hint


def test_names_are_matched_by_number_and_by_words() -> None:
    """Two towers with the same layer numbers, an encoder beside a decoder, a wrapper's longer names."""
    prefixes = ["decoder.block.1.layer.2.mlp.experts", "encoder.block.1.layer.1.mlp.experts"]
    assert match_names(prefixes, prefixes[::-1]) == {p: p for p in prefixes}
    found = match_names(
        ["model.layers.1.mlp.experts", "vision_encoder.blocks.1.mlp.experts", "model.layers.2.mlp.experts"],
        ["model.vision_tower.blocks.1.mlp.experts", "model.language_model.layers.1.mlp.experts"],
    )
    assert found == {
        "model.vision_tower.blocks.1.mlp.experts": "vision_encoder.blocks.1.mlp.experts",
        "model.language_model.layers.1.mlp.experts": "model.layers.1.mlp.experts",
    }
    with pytest.raises(MopeqError, match="has no counterpart"):
        match_names(["model.layers.1.mlp.experts"], ["model.layers.2.mlp.experts"])
