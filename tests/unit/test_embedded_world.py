"""The embedded model's world: the same bits anywhere, answers that the picture bears out, streams that never meet."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
import sys
from base64 import b64decode
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mopeq.embedded import glyphs, heldout_text, model_dir, png, world
from mopeq.embedded.words import COLOURS, LANDS, PALETTE_C3, PAPERS

csv.field_size_limit(10**9)


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_evaluation_table_is_the_one_of_the_training_record(tmp_path):
    record = json.loads((model_dir() / "training.json").read_text())["evaluation"]
    assert world.evaluation_tsv(tmp_path / "evaluation.tsv") == record
    assert hashlib.sha256((tmp_path / "evaluation.tsv").read_bytes()).hexdigest() == record["sha256"]


def test_evaluation_table_has_every_task_and_yesno_in_pairs(tmp_path):
    world.evaluation_tsv(tmp_path / "t.tsv", per_task=20)
    rows = table(tmp_path / "t.tsv")
    assert Counter(row["category"].split("-")[0] for row in rows) == dict.fromkeys(world.TASKS, 20)
    assert [row["index"] for row in rows] == [str(i) for i in range(len(rows))]
    pairs: dict[str, list[str]] = {}
    for row in rows:
        if row["category"].startswith("yesno-"):
            pairs.setdefault(row["image_path"], []).append(row["answer"])
    assert len(pairs) == 10
    assert all(answers == ["Yes", "No"] for answers in pairs.values())
    choices = [row for row in rows if row["A"]]
    assert {row["category"] for row in choices} == {"diagram"}
    assert all(len({row[letter] for letter in "ABCD"}) == 4 and row["answer"] in "ABCD" for row in choices)


def test_table_holds_the_pictures(tmp_path):
    world.evaluation_tsv(tmp_path / "t.tsv", per_task=2)
    items = list(world.items(world.EVALUATION_SEED, 2))
    for row, item in zip(table(tmp_path / "t.tsv"), items, strict=True):
        decoded = np.asarray(Image.open(io.BytesIO(b64decode(row["image"]))).convert("RGB"))
        assert np.array_equal(decoded, PALETTE_C3[item.pixels_HW])
        assert np.array_equal(decoded, np.asarray(item.image()))


def test_png_of_random_pixels_reads_back():
    pixels_HW = np.random.default_rng(3).integers(0, len(PALETTE_C3), (7, 12)).astype(np.uint8)
    back = Image.open(io.BytesIO(png.encode(pixels_HW, PALETTE_C3))).convert("RGB")
    assert np.array_equal(np.asarray(back), PALETTE_C3[pixels_HW])


@pytest.mark.parametrize("task", world.TASKS)
def test_a_picture_follows_from_seed_and_index_alone(task):
    first, again, other = world.draw(task, 5, 11), world.draw(task, 5, 11), world.draw(task, 5, 12)
    assert np.array_equal(first.pixels_HW, again.pixels_HW)
    assert first.questions == again.questions
    assert not (np.array_equal(first.pixels_HW, other.pixels_HW) and first.questions == other.questions)
    assert first.pixels_HW.shape == (96, 96)
    assert all(q.task == task and q.text and q.answer for q in first.questions)


def islands(pixels_HW, ink):
    """How many groups of touching pixels of one colour there are, by flooding."""
    left = {tuple(place) for place in np.argwhere(pixels_HW == ink)}
    count = 0
    while left:
        count, edge = count + 1, [left.pop()]
        while edge:
            y, x = edge.pop()
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            edge.extend(near)
    return count


def test_counts_are_what_the_picture_shows():
    asked = 0
    for index in range(60):
        picture = world.draw("counting", 9, index)
        inks = set(np.unique(picture.pixels_HW)) - set(PAPERS)
        total = sum(islands(picture.pixels_HW, ink) for ink in inks)
        assert str(total) == picture.questions[1].answer
        words = picture.questions[0].text.split()
        if "shapes" in words:
            asked += 1
            assert str(islands(picture.pixels_HW, COLOURS[words[2]])) == picture.questions[0].answer
    assert asked


def test_bars_are_as_high_as_told():
    for index in range(60):
        for question in world.draw("chart", 9, index).questions:
            if question.text.startswith("What is the value of the"):
                hue = question.text.split()[6]
                column = (world.draw("chart", 9, index).pixels_HW[:80] == COLOURS[hue]).any(1).sum()
                assert column == 8 * int(question.answer)


def test_diagram_answers_point_at_a_box_that_an_arrow_reaches():
    for index in range(40):
        for question in world.draw("diagram", 9, index).questions:
            named = [shape for shape in world.SHAPES if shape in question.text.split() or f"{shape}?" in question.text]
            right = world.open_ended(question).answer
            assert right in world.SHAPES
            assert right not in named


def test_flags_differ():
    flags = {world._FLAGS[number].tobytes() for number in range(len(LANDS))}
    assert len(flags) == len(LANDS) == len(set(LANDS))


def test_glyphs_differ():
    assert len({glyphs.letter(char, 1).tobytes() for char in glyphs.LETTERS}) == len(glyphs.LETTERS) == 36
    assert len({glyphs.shape(name, 1).tobytes() for name in glyphs.SHAPES}) == len(glyphs.SHAPES)
    assert all(glyphs.shape(name, 2).shape == (24, 24) for name in glyphs.SHAPES)


def test_calibration_takes_tasks_in_turn_and_never_the_evaluation_stream():
    items = world.calibration(25)
    assert len(items) == 25
    assert [item.question.task for item in items[:10]] == list(world.TASKS)
    assert items[3].pixels_HW.tobytes() == world.calibration(25)[3].pixels_HW.tobytes()
    with pytest.raises(AssertionError):
        world.calibration(5, seed=world.EVALUATION_SEED)


def test_prompt_writes_choices():
    question = world.Question("diagram", "Which?", "B", ("star", "moon", "ring", "heart"))
    assert world.prompt(question).startswith("Question: Which?\nOptions:\nA. star\nB. moon\n")
    assert world.open_ended(question).answer == "moon"
    assert world.prompt(world.Question("colour", "What colour is the star?", "red")) == "What colour is the star?"


def test_heldout_text_is_not_in_the_calibration_text():
    """Pieces of 200 characters: the dictionary repeats a gloss under each synonym, but passages do not recur."""
    builtin = (heldout_text().parent.parent / "data" / "builtin" / "text.jsonl").read_text().splitlines()
    shown = "\n".join(json.loads(line)["text"] for line in builtin)
    texts = [json.loads(line)["text"] for line in heldout_text().read_text().splitlines()]
    pieces = [text[start : start + 200] for text in texts for start in range(0, len(text) - 200, 200)]
    assert len(pieces) > 250
    assert sum(piece in shown for piece in pieces) <= len(pieces) // 50


def test_model_folder_is_whole_and_small():
    names = {path.name for path in model_dir().iterdir()}
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "README.md"}
    wanted |= {"video_preprocessor_config.json", "chat_template.jinja", "generation_config.json", "training.json"}
    assert wanted <= names
    assert (model_dir() / "model.safetensors").stat().st_size <= 12_000_000
    text = json.loads((model_dir() / "config.json").read_text())["text_config"]
    assert (text["num_experts"], text["num_hidden_layers"], text["norm_topk_prob"]) == (24, 5, True)


def test_drawing_imports_no_torch():
    code = "import sys, mopeq.embedded.world; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
