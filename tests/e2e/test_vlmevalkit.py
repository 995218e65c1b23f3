"""A packed model behind VLMEvalKit's model interface: driven by a stand-in for its inference loop, and by the kit
itself where it is installed (ms-vlmeval, slow).
"""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import made
import pytest
from PIL import Image
from shared_files import shared
from vlmeval_kit import flat, run_kit, write_table

from mopeq.data.readers import read
from mopeq.data.wordings import worded
from mopeq.embedded import model_dir
from mopeq.errors import BadInput
from mopeq.evaluate.generate import answerer
from mopeq.harness.vlmevalkit import PackedVLM
from mopeq.progress import silence
from mopeq.verbs.evaluate import evaluate

KIT = importlib.util.find_spec("vlmeval") is not None
ROWS = [
    {"index": 0, "question": "How many stars are there?", "answer": "0", "split": "test_human"},
    {"index": 1, "question": "What colour is the square?", "answer": "red", "split": "test_human"},
    {"index": 2, "question": "Is there a circle?", "answer": "no", "split": "test_augmented"},
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    with silence():
        made.quantize(model_dir(), out, bits="4", allocate="uniform", avg_bits=4.0)
    return out


def png(number: int) -> bytes:
    made_ = io.BytesIO()
    Image.new("RGB", (64, 64), [(200, 20, 20), (20, 200, 20), (20, 20, 200)][number]).save(made_, "PNG")
    return made_.getvalue()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ChartQA_TEST.tsv in the official layout."""
    rows = [row | {"image": base64.b64encode(png(number)).decode()} for number, row in enumerate(ROWS)]
    return write_table(tmp_path_factory.mktemp("tsv") / "ChartQA_TEST.tsv", rows)


class Row:
    """As much of a pandas row as the kit's code hands to a model: columns by name, an empty cell is no number."""

    def __init__(self, cells: dict[str, Any]):
        self.cells = cells

    def __getitem__(self, name: str) -> Any:
        return self.cells[name]

    def __contains__(self, name: str) -> bool:
        return name in self.cells

    def keys(self) -> Iterator[str]:
        return iter(self.cells)


class Dataset:
    """The kit's side of the bargain: rows, pictures put on the disk when asked for, prompts in its own words."""

    def __init__(self, name: str, folder: Path):
        self.dataset_name, self.folder = name, folder
        self.rows = [Row(row | {"image": png(n), "hint": float("nan")}) for n, row in enumerate(ROWS)]

    def dump_image(self, line: Row) -> list[str]:
        path = self.folder / f"{line['index']}.png"
        path.write_bytes(line["image"])
        return [str(path)]

    def build_prompt(self, line: Row) -> list[dict[str, str]]:
        pictures = [{"type": "image", "value": path} for path in self.dump_image(line)]
        return [*pictures, {"type": "text", "value": line["question"]}]


def infer(build: Callable[..., Any], dataset: Dataset) -> dict[int, str]:
    """One pass of the kit's loop for models that run here: who words a question, who is asked what, in which order."""
    model = build(use_vllm=False)
    assert not model.is_api
    assert not model.INSTALL_REQ
    model.set_dump_image(dataset.dump_image)
    answers = {}
    for line in dataset.rows:
        if model.use_custom_prompt(dataset.dataset_name):
            message = model.build_prompt(line, dataset=dataset.dataset_name)
        else:
            message = dataset.build_prompt(line)
        answers[line["index"]] = model.generate(message=message, dataset=dataset.dataset_name)
    return answers


def test_the_kits_loop_gets_the_answers_of_mopeq_eval(packed: Path, table: Path, tmp_path: Path) -> None:
    model = PackedVLM(packed, device="cpu")
    items = [worded(item, "qwen3_vl_moe") for item in read(table)]
    wanted = answerer(model.model, model_processor(packed))(items)
    found = infer(partial(PackedVLM, packed, device="cpu"), Dataset("ChartQA_TEST", tmp_path))
    assert [found[row["index"]] for row in ROWS] == wanted
    assert all(isinstance(text, str) for text in wanted)
    assert any(wanted)
    # a dataset that is none of the benchmarks is worded by the kit
    assert not model.use_custom_prompt("MyOwnData")
    assert not model.use_custom_prompt(None)
    other = infer(lambda **_: model, Dataset("MyOwnData", tmp_path))
    assert set(other) == {0, 1, 2}


def model_processor(folder: Path) -> Any:
    from mopeq.data.processor import load_processor

    return load_processor(folder)


def test_every_form_of_a_message(packed: Path, tmp_path: Path) -> None:
    model = PackedVLM(packed, device="cpu", new_tokens=4)
    picture = tmp_path / "p.png"
    picture.write_bytes(png(1))
    text = "What colour is the square?"
    parts = [{"type": "image", "value": str(picture)}, {"type": "text", "value": text}]
    said = model.generate(parts)
    assert said == model.generate([str(picture), text]) == model.generate_inner(parts, dataset=None)
    assert model.generate(text) == model.generate({"type": "text", "value": text})
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And now?"},
    ]
    assert isinstance(model.chat(turns), str)
    assert model.chat(turns[:1]) == said
    with pytest.raises(BadInput, match="video"):
        model.generate([{"type": "video", "value": "a.mp4"}])


# ------------------------------------------------------------------------------------------------- the kit itself

ASK = """
import json, os, sys
from mopeq.mending import mend_torchvision
mend_torchvision()
import vlmeval.dataset as kit
from vlmeval.inference import infer_data_job
from vlmeval.smp import md5
from mopeq.harness.vlmevalkit import PackedVLM
out, work, *names = sys.argv[1:]
model, found = PackedVLM(out, device="cpu"), {}
for name in names:
    for known in kit.DATASET_CLASSES:
        if name in getattr(known, "DATASET_URL", {}):  # else it would fetch the whole table
            known.DATASET_MD5[name] = md5(os.path.join(os.environ["LMUData"], name + ".tsv"))
    dataset = kit.build_dataset(name)
    infer_data_job(model=model, work_dir=work, model_name="packed", dataset=dataset)
    path = next(os.path.join(work, f) for f in sorted(os.listdir(work)) if f.startswith(f"packed_{name}."))
    score = dataset.evaluate(path, model="exact_matching", nproc=1)
    found[name] = json.loads(score.to_json(orient="records")) if hasattr(score, "to_json") else score
print("FOUND " + json.dumps(found))
"""
TASKS = ("AI2D_TEST", "ChartQA_TEST", "DocVQA_VAL", "InfoVQA_VAL", "MME", "MMMU_DEV_VAL", "OCRBench", "OCRVQA_TESTCORE")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not KIT, reason="needs VLMEvalKit (pip install ms-vlmeval)")
def test_the_kit_itself_runs_it_and_finds_the_same_scores(packed: Path, tmp_path: Path) -> None:
    """VLMEvalKit asks, scores and tabulates; `mopeq eval` by its own code finds the same table."""
    folder, data, work = shared("fixtures/vlmeval"), tmp_path / "data", tmp_path / "work"
    data.mkdir()
    work.mkdir()
    for name in TASKS:
        lossless(folder / f"{name}.tsv", data / f"{name}.tsv")

    kit = run_kit(ASK, data, str(packed), str(work), *TASKS, timeout=900)
    result = evaluate(packed, data=[data / f"{name}.tsv" for name in TASKS], window=128)
    assert result["wording"] == "qwen3_vl_moe"
    for name in TASKS:
        wanted = flat(kit[name])
        ours = {key: result["tasks"][name][key] for key in wanted}
        assert ours == pytest.approx(wanted, rel=1e-9, abs=1e-9), name


def lossless(table: Path, to: Path) -> None:
    """A table as it is but for its pictures' names: the kit saves a picture under its name (`image_path`), which for
    a .jpg changes its pixels, and shows the first of a name for all."""
    csv.field_size_limit(2**31 - 1)
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    first: dict[str, str] = {}
    for row in rows:
        if "image_path" in row:
            row["image"] = first.setdefault(row["image_path"], row["image"])
            row["image_path"] = row["image_path"].replace(".jpg", ".png")
    write_table(to, rows)
