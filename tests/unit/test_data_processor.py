"""Processors of folders like the published ones: pictures without torchvision, and never a checkpoint's own code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_data
import torch
from PIL import Image

from mopeq.data.processor import load_processor, reads_pictures, tokenizer_of
from mopeq.errors import BadInput
from mopeq.mending import mend_torchvision


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen")
    tiny_data.qwen3_vl_moe(path)
    return path


def asked(processor, size: tuple[int, int] = (40, 24)) -> dict:
    content = [{"type": "image", "image": Image.new("RGB", size)}, {"type": "text", "text": "What colour?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )


def test_qwen3_vl_reads_a_picture(folder: Path) -> None:
    """Holds for transformers 5.23: its processor class loads without its video half."""
    processor = load_processor(folder)
    assert reads_pictures(processor) and tokenizer_of(processor) is processor.tokenizer
    batch = asked(processor)
    ids, grid = batch["input_ids"][0], batch["image_grid_thw"]
    assert grid.tolist() == [[1, 2, 4]] or grid.prod() * 64 >= 256  # 24 x 40 pixels in patches of 8, in pairs
    assert (ids == processor.image_token_id).sum() == grid.prod() // 4
    assert batch["pixel_values"].shape == (int(grid.prod()), 3 * 2 * 8 * 8)
    assert (batch["mm_token_type_ids"][0] == (ids == processor.image_token_id)).all()


def test_the_batch_is_what_the_model_takes(folder: Path) -> None:
    from transformers import AutoModelForImageTextToText

    batch = asked(load_processor(folder))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape[:2] == batch["input_ids"].shape and logits.isfinite().all()


@pytest.mark.parametrize("named", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"])
@pytest.mark.parametrize("files", ["preprocessor", "no processor_class", "saved again"])
def test_whichever_files_say_so(folder: Path, tmp_path: Path, named: str, files: str) -> None:
    tiny_data.tokenizer(tmp_path)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    said = json.loads((folder / "preprocessor_config.json").read_text()) | {"image_processor_type": named}
    if files == "no processor_class":
        del said["processor_class"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    if files == "saved again":
        load_processor(tmp_path).save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").unlink()
    ours, first = asked(load_processor(tmp_path)), asked(load_processor(folder))
    assert all(torch.equal(ours[key], first[key]) for key in first)


def test_a_text_folder_gives_its_tokenizer(tmp_path: Path) -> None:
    tiny_data.tokenizer(tmp_path)
    processor = load_processor(tmp_path)
    assert not reads_pictures(processor) and tokenizer_of(processor) is processor
    assert processor.decode(processor("red and blue")["input_ids"]) == "red and blue"


def test_no_tokenizer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadInput) as caught:
        load_processor(tmp_path)
    assert "no tokenizer" in caught.value.line and "--sensitivity hessian --method rtn" in caught.value.hint


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BadInput) as caught:
        load_processor(tmp_path)
    assert caught.value.hint and "\n" not in caught.value.line


def test_a_checkpoints_own_code_never_runs(tmp_path: Path) -> None:
    tiny_data.tokenizer(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass P: pass\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing", "auto_map": {"AutoConfig": "evil.P"}}))
    said = {"processor_class": "P", "auto_map": {"AutoProcessor": "evil.P", "AutoImageProcessor": "evil.P"}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(BadInput):
        load_processor(tmp_path)
    assert not (tmp_path / "ran").exists()


FAKE = """
import torch
@torch.library.register_fake("torchvision::nms")
def meta_nms(dets, scores, iou_threshold):
    return scores
from torchvision import extra
"""


def test_a_torchvision_built_for_another_torch_is_mended(tmp_path: Path) -> None:
    """A package that dies on import as PyPI's torchvision does beside CPU-only torch; in an interpreter of its own."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(FAKE)
    (tmp_path / "torchvision" / "extra.py").write_text("answer = 42\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from mopeq.mending import mend_torchvision\n"
        "assert mend_torchvision() is True and mend_torchvision() is False\n"
        "import torchvision.extra\n"
        "assert torchvision.extra.answer == 42\n"
    )
    broken = subprocess.run([sys.executable, "-c", code.replace("mend_torchvision()", "False")], capture_output=True)
    assert b"AssertionError" in broken.stderr
    alone = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torchvision"]
    assert b"torchvision::nms does not exist" in subprocess.run(alone, capture_output=True).stderr
    mended = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert mended.returncode == 0, mended.stderr.decode()


def test_nothing_to_mend_without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    assert mend_torchvision() is False
