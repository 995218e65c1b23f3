"""What judges calibrated matrices, and what maps are tried on: other rows of the same data, as far as there are any."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch

import mopeq.embedded
from mopeq.data.calibration import Batch, Calibration, calibrate_with, count
from mopeq.models import load_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("olmoe"), "olmoe", dtype=torch.float32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 30,000 tokens, no two lines alike."""
    path, draw = tmp_path_factory.mktemp("text") / "calib.txt", random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(400)]
    path.write_text("\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(150)))
    return path


def shown(folder: Path, text: Path, tokens: int, judging: bool, trying: int) -> Calibration:
    return calibrate_with(folder, load_config(folder), [text], tokens, 0, judging, trying)


def rows(batches: tuple[Batch, ...]) -> set[bytes]:
    """Rows' ids, with the pixels of those with a picture."""
    found = set()
    for batch in batches:
        pixels = batch["pixel_values"].chunk(len(batch["input_ids"])) if "pixel_values" in batch else None
        for i, row in enumerate(batch["input_ids"]):
            found.add(row.numpy().tobytes() + (b"" if pixels is None else pixels[i].numpy().tobytes()))
    return found


def test_three_sets_have_no_row_in_common(folder: Path, text: Path) -> None:
    found = shown(folder, text, 4096, True, 1024)
    sets = [rows(b) for b in (found.batches, found.judges, found.tries)]
    assert all(sets) and not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert found.tokens == count(found.batches) <= count(found.judges) < found.tokens + 2048
    assert 1024 <= count(found.tries) < 1024 + 2048 and not found.notes
    again = shown(folder, text, 4096, True, 1024)
    assert found.judged_digest == again.judged_digest != found.digest
    assert [rows(b) for b in (again.judges, again.tries)] == sets[1:]


def test_each_modality_is_judged_by_its_own() -> None:
    model = Path(mopeq.embedded.__file__).parent / "model"
    found = calibrate_with(model, load_config(model), [], 4096, 0, True, 1024)
    for image in (True, False):
        own, judges, tries = (
            tuple(b for b in of if ("image_mask" in b) == image) for of in (found.batches, found.judges, found.tries)
        )
        assert count(own) > 1000 and 0.9 * count(own) <= count(judges) < count(own) + 4096 and count(tries) > 256
        assert not rows(own) & rows(judges) and not rows(tries) & (rows(own) | rows(judges))


def test_trying_takes_no_less_where_little_is_shown(folder: Path, text: Path) -> None:
    found = shown(folder, text, 512, True, 4096)
    assert count(found.tries) >= 4096 and count(found.judges) >= 512


def test_who_need_no_fitting_judges_all(folder: Path, text: Path) -> None:
    found = shown(folder, text, 4096, False, 1024)
    assert [id(b) for b in found.judges] == [id(b) for b in found.batches]
    assert found.judged_digest == found.digest and not rows(found.tries) & rows(found.batches)


@pytest.mark.parametrize("judging", [True, False])
def test_what_judges_do_not_need_is_tried_on(judging: bool, folder: Path, text: Path) -> None:
    whole = count(calibrate_with(folder, load_config(folder), [text], 10**6, 0).batches)
    found = shown(folder, text, 512, judging, 10**5)
    assert count(found.tries) > whole - (1 + judging) * 512 - 256 and (not judging or count(found.judges) == 512)


def test_of_too_little_data_the_fitted_judge_themselves(folder: Path, text: Path) -> None:
    whole = count(calibrate_with(folder, load_config(folder), [text], 10**6, 0).batches)
    all_of_it = shown(folder, text, whole, True, 1024)
    assert all_of_it.judged_digest == all_of_it.digest and not all_of_it.tries
    assert "little other data" in all_of_it.notes[-1]
    most = shown(folder, text, int(0.8 * whole), True, 10**5)
    assert rows(most.judges) & rows(most.batches) and rows(most.judges) - rows(most.batches)
    assert not rows(most.tries) & (rows(most.batches) | rows(most.judges))
    assert count(most.judges) >= most.tokens and "little other data" in most.notes[-1]
