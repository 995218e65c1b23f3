"""The whole line on tiny random models of the paper's four layouts, pictures and all: plan, sense, allocate, quantize,
load packed, answer about a picture, measure; against the dequantized reference at every end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made  # sets the number of threads before torch is imported
import numpy as np
import pytest
import torch
from made import quantize
from PIL import Image
from tiny_ports import WHICH, write_json, write_tiny

import mopeq
from mopeq.data.encode import encode_prompt, model_inputs
from mopeq.data.processor import load_processor
from mopeq.data.readers import Item
from mopeq.errors import BadInput
from mopeq.job import open_job
from mopeq.models import load_model
from mopeq.nouns import PrecisionMap
from mopeq.options import Options
from mopeq.progress import silence
from mopeq.readback import load_dense
from mopeq.verbs.run import answer
from mopeq.verbs.verify import verify

QUESTION = "What is the red circle?"
LINES: dict[str, dict[str, Any]] = {  # what differs between the two runs of each model
    "fisher": dict(sensitivity="fisher", per="projection", method="rtn", avg_bits=2.7, other_bits=16),
    "frequency": dict(sensitivity="frequency", per="expert", method="gptq", avg_bits=3.3, other_bits=4),
}


@pytest.fixture(scope="module", autouse=True)
def quietly() -> Iterator[None]:
    with silence():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about small random pictures, with answers, and a little text."""
    room = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(5)
    rows: list[dict[str, str]] = [{"text": "The answer is the red circle and the picture. " * 12}]
    for n, (width, height) in enumerate(((60, 40), (42, 42), (30, 90))):
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(room / f"{n}.png")
        rows.append({"image": f"{n}.png", "question": QUESTION, "answer": "the red circle"})
    (room / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return room


@pytest.fixture(scope="module", params=WHICH)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp(request.param) / "source", request.param, seed=11, shards=2)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs, use_cache=False).logits


def picture_inputs(folder: Path, data: Path) -> dict[str, torch.Tensor]:
    """The model's inputs for a question about a picture."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    item = Item(None, [{"role": "user", "content": content}], (data / "0.png",), None, {"source": "a test"})
    return model_inputs(encode_prompt(item, load_processor(folder)))


@pytest.mark.parametrize("line", LINES)
def test_the_whole_line(source: Path, data: Path, line: str, tmp_path: Path) -> None:
    asked, out = LINES[line], tmp_path / "out"
    sizes = {k: v for k, v in asked.items() if k != "method" and k != "sensitivity"}
    ahead = mopeq.plan(source, **sizes)
    facts = quantize(source, out, calib=(data / "data.jsonl",), calib_tokens=400, seed=2, **asked)
    # plan, quantize and the file are of one mind; widths are mixed
    assert ahead["predicted_bytes"] == facts["predicted_bytes"] == facts["bytes_weights"] == made.payload(out)
    assert ahead["bytes_source"] == ahead["bytes_bf16"] == made.payload(source)
    assert len(facts["counts"]) > 1 and facts["read_back"] < 1e-4
    assert asked["avg_bits"] - 0.1 < facts["avg_expert_bits"] <= asked["avg_bits"]
    assert verify(out)["whole"]
    same = made.stored(source).keys() & made.stored(out).keys()
    assert all(made.stored(source)[name] == made.stored(out)[name] for name in same)
    assert any("vision" in name and name.endswith("bias") for name in same)
    # a question about a picture, by the packed model and by the dequantized reference
    job = open_job(source, Options(**sizes))
    map_ = PrecisionMap.from_json(json.loads((out / "precision_map.json").read_text()))
    packed, dense = load_model(out, torch.float32, "cpu"), load_dense(source, out, job.spec, map_, job.options.other)
    inputs = picture_inputs(out, data)
    assert any(value.is_floating_point() for value in inputs.values())  # pixels are among them
    found, wanted = logits(packed, inputs), logits(dense, inputs)
    assert (found - wanted).abs().max() < 1e-3 * wanted.std()
    original = logits(load_model(source, torch.float32, "cpu"), inputs)
    assert (found - original).abs().max() > 1e-2 * wanted.std()  # the reference is no copy of the original
    blind = inputs | {k: torch.zeros_like(v) for k, v in inputs.items() if v.is_floating_point() and v.ndim > 2}
    assert (logits(packed, blind) - found).abs().max() > 1e-3 * wanted.std()  # it sees the picture
    start = inputs["input_ids"].shape[1]
    ids = [
        model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=cache)[0, start:].tolist()
        for model, cache in ((packed, True), (packed, False), (dense, True))
    ]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) > 0
    spoken = answer(out, QUESTION, images=[data / "0.png"], max_new_tokens=6, device="cpu")
    assert spoken["new_tokens"] == len(ids[0])
    # and measured, text and pictures apart
    shown = mopeq.evaluate(out, against=source, data=[data / "data.jsonl"], window=64, device="cpu")
    assert 1e-4 < shown["kl"] < 10 and shown["tokens"] > 100 and shown["tasks"]
    assert {"text", "image"} <= shown["by_modality"].keys()


def test_widths_follow_the_data(source: Path, data: Path, tmp_path: Path) -> None:
    """Another seed's data is the same here, so the same job gives the same bytes; kmeans stays between its bounds."""
    asked = dict(sensitivity="frequency", allocate="kmeans", calib=(data / "data.jsonl",), calib_tokens=400)
    ahead = mopeq.plan(source, allocate="kmeans")
    facts = [quantize(source, tmp_path / name, **asked) for name in "ab"]
    assert ahead["minimum_bytes"] <= facts[0]["bytes_weights"] <= ahead["maximum_bytes"]
    assert made.stored(tmp_path / "a") == made.stored(tmp_path / "b") and facts[0]["map"] == facts[1]["map"]


@pytest.mark.parametrize("which", ["vl2-tiny", "molmoe"])
def test_a_float32_source(which: str, tmp_path: Path) -> None:
    """Matrices are written as bf16, norms and biases as they were; the packed model still equals its reference."""
    source = write_tiny(tmp_path / "source", which, seed=12, dtype=torch.float32)
    ahead = mopeq.plan(source)
    facts = quantize(source, tmp_path / "out")
    assert ahead["bytes_source"] == 2 * ahead["bytes_bf16"] == made.payload(source)
    assert (
        facts["bytes_weights"] == ahead["predicted_bytes"] == made.payload(tmp_path / "out")
        and facts["read_back"] < 1e-4
    )


@pytest.mark.parametrize("which", WHICH)
def test_without_processor_files(which: str, tmp_path: Path) -> None:
    """The line without data needs only config and weights, and asks for nothing more."""
    source = write_tiny(tmp_path / "source", which, seed=13)
    for path in source.glob("*.json"):
        if path.name != "config.json":
            path.unlink()
    config = json.loads((source / "config.json").read_text())
    write_json(source / "config.json", config | {"transformers_version": "4.38.2"})
    facts = quantize(source, tmp_path / "out", other_bits=4)
    assert facts["read_back"] < 1e-4 and verify(tmp_path / "out")["whole"]
    named = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]  # VL2's own names none
    assert named == (config.get("architectures") or ["DeepseekVLV2ForCausalLM"])
    with pytest.raises(BadInput) as error:
        quantize(source, tmp_path / "again", sensitivity="fisher")
    assert "--sensitivity hessian --method rtn" in error.value.hint
