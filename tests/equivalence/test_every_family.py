"""Every MoE family of the installed transformers, packed at mixed widths, answers as its dense reference does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from family_trial import TOLERANCE, Trial, other_bits, try_family
from headers import checkpoint
from tiny_families import families

from mopeq.errors import BadInput, MopeqError
from mopeq.families import ADAPTERS, FAMILIES, WHERE_TO_ADD
from mopeq.families.standard import read_spec
from mopeq.models import quiet_transformers
from mopeq.seam import match_names

RECORD = Path(__file__).resolve().parents[2] / "docs" / "families.json"


@pytest.mark.parametrize("family", families())
def test_packed_agrees_with_the_dense_reference(family: str, tmp_path: Path) -> None:
    quiet_transformers()
    made = try_family(family, tmp_path)
    assert made.text < TOLERANCE and made.watched < TOLERANCE
    assert made.picture is None or made.picture < TOLERANCE
    assert made.moved > 100 * TOLERANCE  # the packed values differ from the source's, and that shows
    assert made.model_type in FAMILIES
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
