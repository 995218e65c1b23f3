"""Random tables and awkward answers scored by VLMEvalKit itself and by mopeq: every figure alike.

Slow, and only where the kit is installed (pip install ms-vlmeval pycocoevalcap). The kit runs in a process of its own.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vlmeval_kit import flat, run_kit, write_table

from mopeq.data.readers import read
from mopeq.evaluate.metrics import PERCEPTION, REASONING
from mopeq.evaluate.tasks import score
from mopeq.evaluate.text import KIT

HERE = all(importlib.util.find_spec(name) is not None for name in ("vlmeval", "pycocoevalcap"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HERE, reason="needs VLMEvalKit (pip install ms-vlmeval pycocoevalcap)"),
]
ROWS = 112  # four questions in pairs of each of the 14 categories of MME
NUMBERS = (
    *("12.5", "12.50", "100", "95", "95.2", "105", "0", "0.0", "45%", "0.45", "45", "-4", "-4.1", "1,000", "1e3"),
    *("3.", "007", "nan", "None", "N/A", "null", "$5", "5 dollars", "12.5.", "12 .5"),
)
WORDS = (
    *("Red", "red", "red.", "the red", "a cat", "two", "2", "two cats", "Yes", "No", "No, it is not", "yes and no"),
    *("don't", "dont", "U.S.", "red/blue", "red, blue", "Red\nblue", "  Red ", "", "ITC Limited", "itc  limited"),
    *("hello world", "hello wrld", "12/03/1999", "x ^ 2", "x^2", "so x^2 = 1", "STOP", "It says STOP now", "é", "日本"),
)
OPTIONS = ("A cat", "a dog", "B", "cow", "12", "none of these", "the left one", "A", "D", "5", "apple pie", "an apple")
CHOSEN = (
    *(
        "A",
        "B.",
        "(C)",
        "D)",
        "The answer is C.",
        "answer: b",
        "I think A cat",
        "a dog",
        "A or B",
        "None",
        "Z",
        "**A**",
    ),
    *(
        "C because it has four legs and gives milk",
        "Option D",
        "a",
        "{B}",
        "#C",
        "12",
        "",
        "Cannot determine the answer",
    ),
    *("it is the left one", "The correct option is the last one, which is D", "apple", "I can't process this file."),
)
POLAR = (
    "Yes",
    "No",
    "yes.",
    "no,",
    "Yes, it is",
    "NO!",
    "Unknown",
    "yes and no",
    "Yes/No",
    "it is not; no",
    "",
    "None",
)
KINDS = (
    *("Regular Text Recognition", "Digit String Recognition", "Scene Text-centric VQA", "Doc-oriented VQA"),
    *("Key Information Extraction", "Handwritten Mathematical Expression Recognition"),
)
CAPTIONS = ("a man riding a wave", "a surfer rides a wave", "man on a board in the sea", "Two dogs play.", "a  bus", "")
Row = dict[str, Any]


def said(dice: random.Random) -> str:
    text = dice.choice(WORDS + NUMBERS)
    text += " " + dice.choice(WORDS) if dice.random() < 0.2 else ""
    return text.upper() if dice.random() < 0.1 else text


def accepted(dice: random.Random, count: int) -> str:
    return str([dice.choice(WORDS + NUMBERS) for _ in range(count)])


def options(dice: random.Random, count: int) -> Row:
    return dict(zip("ABCD", [*dice.sample(OPTIONS, count), "", ""][:4], strict=True))


def mmmu(dice: random.Random, number: int) -> Row:
    row = {"question_type": "open" if dice.random() < 0.3 else "multiple-choice", "image_path": f"{number}_1.png"}
    row |= {"question": f"<image 1> what {number}?", "category": dice.choice(["Physics", "Art"])}
    row |= {"split": dice.choice(["dev", "validation"]), "l2-category": dice.choice(["Science", "Math"])}
    if row["question_type"] == "open":
        return row | dict.fromkeys("ABCD", "") | {"answer": dice.choice(["42", "24/7", "x^2"])}
    return row | options(dice, 3) | {"answer": dice.choice("ABC")}


def mme(dice: random.Random, number: int) -> Row:
    category = (*PERCEPTION, *REASONING)[number % 14]
    return {
        "image_path": f"{category}/{number // 28}.png",
        "category": category,
        "answer": ("Yes", "No")[number // 14 % 2],
    }


TABLES: dict[str, tuple[Callable[[random.Random, int], Row], Callable[[random.Random], str]]] = {
    "ChartQA_TEST": (
        lambda d, n: {"answer": d.choice(NUMBERS + WORDS[:16]), "split": d.choice(["test_human", "test_augmented"])},
        said,
    ),
    "DocVQA_VAL": (lambda d, n: {"answer": accepted(d, d.randint(1, 3))}, said),
    "InfoVQA_VAL": (lambda d, n: {"answer": accepted(d, 2), "category": d.choice("ab")}, said),
    "OCRVQA_TESTCORE": (lambda d, n: {"answer": accepted(d, 2)}, said),
    "TextVQA_VAL": (lambda d, n: {"answer": accepted(d, 10)}, said),
    "OCRBench": (lambda d, n: {"answer": accepted(d, 2), "category": d.choice(KINDS)}, said),
    "AI2D_TEST": (
        lambda d, n: options(d, 4) | {"answer": d.choice("ABCD"), "category": d.choice(["a", "b"])},
        lambda d: d.choice(CHOSEN),
    ),
    "MMMU_DEV_VAL": (mmmu, lambda d: d.choice((*CHOSEN, "42", "it is 24/7", "Other Answers", "x^2"))),
    "MME": (mme, lambda d: d.choice(POLAR)),
    "POPE": (
        lambda d, n: {"answer": d.choice(["Yes", "No"]), "category": d.choice(["random", "random,popular"]), "id": n},
        lambda d: d.choice(POLAR),
    ),
    "COCO_VAL": (
        lambda d, n: {"answer": str([d.choice(CAPTIONS[:-1]) for _ in range(5)])},
        lambda d: d.choice(CAPTIONS),
    ),
}
SCORE = """
import json, os, sys
from mopeq.mending import mend_torchvision
mend_torchvision()
import vlmeval.dataset as kit
from vlmeval.smp import dump, md5
folder, *names = sys.argv[1:]
found = {}
for name in names:
    for known in kit.DATASET_CLASSES:
        if name in getattr(known, "DATASET_URL", {}):  # else it would fetch the whole table
            known.DATASET_MD5[name] = md5(os.path.join(folder, name + ".tsv"))
    dataset = kit.build_dataset(name)
    said = json.load(open(os.path.join(folder, name + ".json")))
    data = dataset.data.drop(columns="image")
    data["prediction"] = [said[str(index)] for index in data["index"]]
    path = os.path.join(folder, f"packed_{name}.xlsx")
    dump(data, path)
    score = dataset.evaluate(path, model="exact_matching", nproc=1)
    found[name] = json.loads(score.to_json(orient="records")) if hasattr(score, "to_json") else score
print("FOUND " + json.dumps(found))
"""


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_every_figure_is_the_kits(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    buffer = io.BytesIO()
    Image.new("RGB", (48, 40), (9, 99, 199)).save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    for name, (row, answer) in TABLES.items():
        rows = [{"index": n, "image": picture, "question": f"q{n}?"} | row(dice, n) for n in range(ROWS)]
        if name == "COCO_VAL":
            rows = [{k: v for k, v in one.items() if k != "question"} for one in rows]
        write_table(tmp_path / f"{name}.tsv", rows)
        (tmp_path / f"{name}.json").write_text(json.dumps({str(n): answer(dice) for n in range(ROWS)}))
    for name, table in run_kit(SCORE, tmp_path, str(tmp_path), *TABLES, timeout=580).items():
        items, answers = read(tmp_path / f"{name}.tsv"), json.loads((tmp_path / f"{name}.json").read_text())
        ours = score([answers[item.meta["index"]] for item in items], items, KIT).table
        differ = {k: (v, ours.get(k)) for k, v in flat(table).items() if not near(v, ours.get(k))}
        assert differ == {}, name


def near(kit: float, ours: float | None) -> bool:
    return ours is not None and math.isclose(kit, ours, rel_tol=1e-9, abs_tol=1e-9)
