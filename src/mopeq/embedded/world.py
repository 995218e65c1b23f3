"""A small world of pictures and questions: what mopeq's embedded model was trained on, and is measured on.

Pictures are 96 × 96 palette indices, drawn from bitmaps (glyphs.py); questions and answers are plain English. All
follows from a seed and an index, and only `random.Random.random` (whose stream Python promises to keep) decides, so
that the evaluation file can be rebuilt bit for bit anywhere. Tasks stand in the order of `TASKS`; the first five are
meant to be easy for a model of six million parameters, the others lie near the edge of what it can do.

Left out: photographs, curved or small print, pictures of other sizes.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import numpy as np

from mopeq.embedded import glyphs, png
from mopeq.embedded.words import CITIES, COLOURS, GOODS, GREY, LANDS, NAMES, PALETTE_C3, PAPERS, SIGNS, SILVER, WHITE

SIDE = 96  # pixels
EVALUATION_SEED = 2  # training draws from stream 0, calibration from 1: the three never share a stream
CALIBRATION_SEED = 1
TRAINING_SEED = 0
ITEMS_PER_TASK = 240
EASY = ("counting", "colour", "position", "yesno", "emblem")
HARD = ("words", "document", "chart", "diagram", "caption")
TASKS = EASY + HARD
SHAPES = tuple(glyphs.SHAPES)
COLOUR_NAMES = tuple(COLOURS)
YESNO = " Please answer yes or no."
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One question about a picture. `choices` makes it multiple choice: then `answer` is a letter."""

    task: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    kind: str = ""  # finer category of a yes/no question
    also: tuple[str, ...] = ()  # other right answers, for captions


@dataclass(frozen=True)
class Picture:
    pixels_HW: np.ndarray  # uint8 palette indices [96, 96]
    questions: tuple[Question, ...]


class Dice:
    """Seeded draws built on `random.Random.random` alone."""

    def __init__(self, seed: int, index: int):
        self.random = Random((seed << 40) + index).random

    def below(self, count: int) -> int:
        return int(self.random() * count)

    def between(self, low: int, high: int) -> int:
        return low + self.below(high - low + 1)

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items, in random order."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def chance(self, probability: float) -> bool:
        return self.random() < probability


# ---------------------------------------------------------------- drawing


def _paper(dice: Dice) -> np.ndarray:
    return np.full((SIDE, SIDE), dice.pick(PAPERS), np.uint8)


def _stamp(pixels_HW: np.ndarray, mask: np.ndarray, x: int, y: int, ink: int) -> None:
    pixels_HW[y : y + mask.shape[0], x : x + mask.shape[1]][mask] = ink


def _write(pixels_HW: np.ndarray, text: str, x: int, y: int, scale: int, ink: int) -> None:
    """Letters in cells of 8 × scale pixels."""
    for place, char in enumerate(text):
        _stamp(pixels_HW, glyphs.letter(char, scale), x + place * 8 * scale + scale, y, ink)


def _box(pixels_HW: np.ndarray, x: int, y: int, width: int, height: int, ink: int, line: int = 2) -> None:
    area = pixels_HW[y : y + height, x : x + width]
    area[:line], area[-line:], area[:, :line], area[:, -line:] = ink, ink, ink, ink


# ---------------------------------------------------------------- scenes of shapes


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


def _a(noun: object) -> str:
    return ("an " if str(noun)[0] in "aeio" else "a ") + str(noun)


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x", "ch")) else "s")


def _scatter(dice: Dice, things: Sequence[Thing]) -> np.ndarray:
    """Up to nine things in the cells of a 3 × 3 grid; the grid as a whole is moved by up to one patch."""
    pixels_HW = _paper(dice)
    left, top = dice.below(2) * 8, dice.below(2) * 8
    for thing, cell in zip(things, dice.some(range(9), len(things)), strict=True):
        x, y = cell % 3 * 32 + left, cell // 3 * 32 + top
        _stamp(pixels_HW, glyphs.shape(thing.shape, 2), x, y, COLOURS[thing.colour])
    return pixels_HW


def counting(dice: Dice) -> Picture:
    asked, other = dice.some(SHAPES, 2)
    hue, other_hue = dice.some(COLOUR_NAMES, 2)
    count = dice.between(1, 6)
    others = dice.below(min(3, 9 - count) + 1)
    by_colour = dice.chance(0.35)
    things = [Thing(dice.pick(SHAPES) if by_colour else asked, hue) for _ in range(count)]
    things += [Thing(dice.pick(SHAPES) if by_colour else other, other_hue) for _ in range(others)]
    first = f"How many {hue} shapes are there?" if by_colour else f"How many {_plural(asked)} are there?"
    return Picture(
        _scatter(dice, things),
        (
            Question("counting", first, str(count)),
            Question("counting", "How many shapes are there in total?", str(count + others)),
        ),
    )


def colour(dice: Dice) -> Picture:
    shapes = dice.some(SHAPES, dice.between(2, 4))
    things = [Thing(shape, dice.pick(COLOUR_NAMES)) for shape in shapes]
    asked = [Question("colour", f"What colour is the {thing.shape}?", thing.colour) for thing in things]
    return Picture(_scatter(dice, things), tuple(asked[:2]))


SIDES = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
CORNERS = ("top left", "top right", "bottom left", "bottom right")


def _pair(dice: Dice) -> tuple[np.ndarray, Thing, Thing, str]:
    """Two large things, and on which side of the second the first one is."""
    shapes, hues = dice.some(SHAPES, 2), dice.some(COLOUR_NAMES, 2)
    first, second = Thing(shapes[0], hues[0]), Thing(shapes[1], hues[1])
    side = dice.pick(tuple(SIDES))
    near, far, across = 4 + dice.below(2) * 4, 52 + dice.below(2) * 4, dice.below(8) * 8
    along = (near, far) if side in ("left", "above") else (far, near)
    drift = min(max(across + (dice.below(3) - 1) * 4, 0), 60)
    pixels_HW = _paper(dice)
    for thing, place, offset in ((first, along[0], across), (second, along[1], drift)):
        x, y = (place, offset) if side in ("left", "right") else (offset, place)
        _stamp(pixels_HW, glyphs.shape(thing.shape, 3), x, y, COLOURS[thing.colour])
    return pixels_HW, first, second, side


def _cornered(dice: Dice) -> tuple[np.ndarray, Thing, str]:
    thing, corner = Thing(dice.pick(SHAPES), dice.pick(COLOUR_NAMES)), dice.below(4)
    pixels_HW = _paper(dice)
    x, y = corner % 2 * 48 + 4 + dice.below(2) * 4, corner // 2 * 48 + 4 + dice.below(2) * 4
    _stamp(pixels_HW, glyphs.shape(thing.shape, 3), x, y, COLOURS[thing.colour])
    return pixels_HW, thing, CORNERS[corner]


def position(dice: Dice) -> Picture:
    if dice.chance(0.3):
        pixels_HW, thing, corner = _cornered(dice)
        return Picture(pixels_HW, (Question("position", f"In which corner is the {thing.shape}?", corner),))
    pixels_HW, first, second, side = _pair(dice)
    ask = "Is the {} left, right, above or below the {}?"
    return Picture(
        pixels_HW,
        (
            Question("position", ask.format(first.shape, second.shape), side),
            Question("position", ask.format(second.shape, first.shape), OPPOSITE[side]),
        ),
    )


def yesno(dice: Dice) -> Picture:
    """Two questions on one picture, the first with the answer Yes, the second with No."""
    kind = dice.pick(("existence", "count", "colour", "position"))
    if kind == "position":
        pixels_HW, first, second, side = _pair(dice)
        wrong = OPPOSITE[side] if dice.chance(0.5) else dice.pick([s for s in SIDES if s != side])
        texts = [f"Is the {first.shape} {SIDES[s]} the {second.shape}?" for s in (side, wrong)]
    elif kind == "count":
        thing, count = Thing(dice.pick(SHAPES), dice.pick(COLOUR_NAMES)), dice.between(1, 6)
        pixels_HW = _scatter(dice, [thing] * count)
        wrong_count = dice.pick([n for n in range(1, 8) if n != count and abs(n - count) <= 3])
        texts = [f"Is the number of {_plural(thing.shape)} {n}?" for n in (count, wrong_count)]
    else:
        shapes = dice.some(SHAPES, 5)
        things = [Thing(shape, dice.pick(COLOUR_NAMES)) for shape in shapes[: dice.between(2, 4)]]
        pixels_HW = _scatter(dice, things)
        if kind == "existence":
            texts = [f"Is there {_a(shape)} in this picture?" for shape in (shapes[0], shapes[4])]
        else:
            wrong_hue = dice.pick([hue for hue in COLOUR_NAMES if hue != things[0].colour])
            texts = [f"Is the {shapes[0]} {hue}?" for hue in (things[0].colour, wrong_hue)]
    return Picture(
        pixels_HW,
        (Question("yesno", texts[0] + YESNO, "Yes", kind=kind), Question("yesno", texts[1] + YESNO, "No", kind=kind)),
    )


# ---------------------------------------------------------------- flags

FIELDS = ("plain", "halves", "stacked", "pales", "bars", "border", "cross", "corner")


def _flag(number: int) -> np.ndarray:
    """The flag [48, 64] of land `number`: its field, colours and charge follow from the number alone."""
    dice = Dice(TRAINING_SEED, (1 << 39) + number)
    field = FIELDS[number % len(FIELDS)]
    first, second, third = (COLOURS[hue] for hue in dice.some(COLOUR_NAMES, 3))
    flag = np.full((48, 64), first, np.uint8)
    if field == "halves":
        flag[:, 32:] = second
    elif field == "stacked":
        flag[24:] = second
    elif field == "pales":
        flag[:, :16], flag[:, 48:] = second, second
    elif field == "bars":
        flag[:12], flag[36:] = second, second
    elif field == "border":
        _box(flag, 0, 0, 64, 48, second, line=8)
    elif field == "cross":
        flag[20:28], flag[:, 28:36] = second, second
    elif field == "corner":
        flag[:24, :32] = second
    if field != "cross":
        _stamp(flag, glyphs.shape(dice.pick(SHAPES), 2), 20, 12, third if field != "plain" else second)
    else:
        _stamp(flag, glyphs.shape(dice.pick(SHAPES), 1), 8, 4, third)
    return flag


_FLAGS = [_flag(number) for number in range(len(LANDS))]


def emblem(dice: Dice) -> Picture:
    number = dice.below(len(LANDS))
    pixels_HW = _paper(dice)
    x, y = dice.below(9) * 4, dice.below(13) * 4
    pixels_HW[y : y + 48, x : x + 64] = _FLAGS[number]
    text = dice.pick(("Which land has this flag?", "Whose flag is this?"))
    return Picture(pixels_HW, (Question("emblem", text, LANDS[number]),))


# ---------------------------------------------------------------- reading


def _free_word(dice: Dice) -> str:
    return "".join(dice.pick("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(dice.between(3, 6)))


def words(dice: Dice) -> Picture:
    """One word or two, known or of free letters."""
    pixels_HW = _paper(dice)
    count = 2 if dice.chance(0.35) else 1
    texts = [_free_word(dice) if dice.chance(0.35) else dice.pick(SIGNS) for _ in range(count)]
    ink = COLOURS[dice.pick(COLOUR_NAMES)]
    for place, text in enumerate(texts):
        x = dice.below((SIDE - 16 * len(text)) // 8 + 1) * 8
        y = 1 + (dice.below(11) * 8 if count == 1 else place * 48 + dice.below(5) * 8)
        _write(pixels_HW, text, x, y, 2, ink)
    if count == 1:
        return Picture(pixels_HW, (Question("words", "What is written here?", texts[0]),))
    asked = [Question("words", f"What is the {row} word?", text) for row, text in zip(TWO_ROWS, texts, strict=True)]
    return Picture(pixels_HW, tuple(asked))


TWO_ROWS = ("top", "bottom")
FORM: dict[str, Callable[[Dice], str]] = {
    "NAME": lambda dice: dice.pick(NAMES),
    "CITY": lambda dice: dice.pick(CITIES),
    "ITEM": lambda dice: dice.pick(GOODS),
    "ROOM": lambda dice: str(dice.between(100, 999)),
    "COST": lambda dice: str(dice.between(10, 999)),
    "AGE": lambda dice: str(dice.between(10, 99)),
    "YEAR": lambda dice: str(dice.between(1900, 2029)),
    "CODE": lambda dice: dice.pick("KLMNPRSTVX") + str(dice.between(10, 99)),
}
SMALL_FORM: dict[str, Callable[[Dice], str]] = {
    **FORM,
    "ITEM": lambda dice: dice.pick(SIGNS),
    "COST": lambda dice: str(dice.between(1000, 99999)),
    "CODE": lambda dice: _free_word(dice),
}


def document(dice: Dice) -> Picture:
    """A form, a small key at the left of each line: three or four large values or, one in four, more and small ones."""
    pixels_HW = np.full((SIDE, SIDE), WHITE, np.uint8)
    small = dice.chance(0.25)
    form, height = (SMALL_FORM, 16) if small else (FORM, 24)
    keys = dice.some(tuple(form), dice.between(5, 6) if small else dice.between(3, 4))
    values = [form[key](dice) for key in keys]
    ink = COLOURS[dice.pick(("black", "black", "blue"))]
    for line, (key, value) in enumerate(zip(keys, values, strict=True)):
        y = line * height
        if small:
            _write(pixels_HW, key, 0, y, 1, COLOURS["black"])
            _write(pixels_HW, value, 40, y, 1, ink)
        else:
            _write(pixels_HW, key, 0, y + 8, 1, COLOURS["black"])
            _write(pixels_HW, value, 32, y + 1, 2, ink)
        pixels_HW[y + height - 5] = SILVER
    first, second = dice.some(range(len(keys)), 2)
    asked = [Question("document", f"What is the {keys[i].lower()}?", values[i]) for i in (first, second)]
    if dice.chance(0.25) and values.count(values[second]) == 1:
        asked[1] = Question("document", f"Which line says {values[second]}?", keys[second].lower())
    return Picture(pixels_HW, tuple(asked))


def chart(dice: Dice) -> Picture:
    """Three or four bars of whole heights 1 to 9 (8 pixels each), a letter below each."""
    pixels_HW = np.full((SIDE, SIDE), WHITE, np.uint8)
    count = dice.between(3, 4)
    labels, hues = dice.some("HKLMNPRSTUVX", count), dice.some(COLOUR_NAMES, count)
    values = dice.some(range(1, 10), count)
    pixels_HW[40], pixels_HW[80:82] = SILVER, GREY
    for bar in range(count):
        x = bar * 24
        pixels_HW[80 - 8 * values[bar] : 80, x : x + 16] = COLOURS[hues[bar]]
        _write(pixels_HW, labels[bar], x, 82, 2, COLOURS["black"])
    bar = dice.below(count)
    low, high = sorted(dice.some(range(count), 2), key=lambda i: values[i])
    which, best = dice.pick((("highest", max(values)), ("lowest", min(values))))
    found = values.index(best)
    asked = [
        Question("chart", f"What is the value of {labels[bar]}?", str(values[bar])),
        Question("chart", f"Which bar is the {which}?", labels[found]),
        Question("chart", f"What is the value of the {hues[bar]} bar?", str(values[bar])),
        Question("chart", f"What colour is the {which} bar?", hues[found]),
        Question("chart", f"How much higher is {labels[high]} than {labels[low]}?", str(values[high] - values[low])),
    ]
    return Picture(pixels_HW, tuple(dice.some(asked, 2)))


# Boxes of a diagram stand in the corners 0 1 / 2 3. Each gap: the two boxes, and where its arrow is drawn.
GAPS = ((0, 1, 36, 14), (2, 3, 36, 70), (0, 2, 14, 36), (1, 3, 70, 36))


def diagram(dice: Dice) -> Picture:
    """Four boxes with shapes and two or three arrows; no box has two arrows out or two arrows in."""
    pixels_HW = _paper(dice)
    shapes = dice.some(SHAPES, 5)
    for corner in range(4):
        x, y = 4 + corner % 2 * 56, 4 + corner // 2 * 56
        _box(pixels_HW, x, y, 32, 32, GREY)
        _stamp(pixels_HW, glyphs.shape(shapes[corner], 2), x + 4, y + 4, COLOURS[dice.pick(COLOUR_NAMES)])
    arrows: list[tuple[int, int]] = []
    for a, b, x, y in dice.some(GAPS, dice.between(2, 3)):
        start, end = (a, b) if dice.chance(0.5) else (b, a)
        if any(start == s or end == e for s, e in arrows):
            start, end = end, start
        if any(start == s or end == e for s, e in arrows):
            continue
        arrows.append((start, end))
        forward = start < end
        way = ("right" if forward else "left") if b - a == 1 else ("down" if forward else "up")
        _stamp(pixels_HW, glyphs.arrow(way, 2), x, y, COLOURS["black"])
    start, end = dice.pick(arrows)
    asked = []
    for text, right, self in (
        (f"Where does the arrow from the {shapes[start]} lead?", end, start),
        (f"From where does an arrow lead to the {shapes[end]}?", start, end),
    ):
        wrong = [shapes[i] for i in range(5) if i not in (right, self)]
        asked.append(_choose(Question("diagram", text, shapes[right]), wrong, dice))
    return Picture(pixels_HW, tuple(asked))


def _choose(question: Question, wrong: Sequence[str], dice: Dice) -> Question:
    """The question as multiple choice of its answer and three wrong ones."""
    choices = dice.some([question.answer, *dice.some(wrong, 3)], 4)
    return replace(question, answer="ABCD"[choices.index(question.answer)], choices=tuple(choices))


def caption(dice: Dice) -> Picture:
    ask = "Describe this picture."
    kind = dice.below(10)
    if kind < 5:
        pixels_HW, first, second, side = _pair(dice)
        forth = f"{_a(first)} {SIDES[side]} {_a(second)}"
        back = f"{_a(second)} {SIDES[OPPOSITE[side]]} {_a(first)}"
        told, other = (forth, back) if side in ("left", "above") else (back, forth)
        return Picture(pixels_HW, (Question("caption", ask, told, also=(other,)),))
    if kind < 7:
        pixels_HW, thing, corner = _cornered(dice)
        return Picture(pixels_HW, (Question("caption", ask, f"{_a(thing)} in the {corner} corner"),))
    thing, count = Thing(dice.pick(SHAPES), dice.pick(COLOUR_NAMES)), dice.between(2, 6)
    number = ("two", "three", "four", "five", "six")[count - 2]
    return Picture(_scatter(dice, [thing] * count), (Question("caption", ask, f"{number} {_plural(str(thing))}"),))


DRAW: dict[str, Callable[[Dice], Picture]] = {
    "counting": counting,
    "colour": colour,
    "position": position,
    "yesno": yesno,
    "emblem": emblem,
    "words": words,
    "document": document,
    "chart": chart,
    "diagram": diagram,
    "caption": caption,
}


def draw(task: str, seed: int, index: int) -> Picture:
    """The picture number `index` of a task in the stream `seed`."""
    return DRAW[task](Dice(seed * len(TASKS) + TASKS.index(task) + 1, index))


# ---------------------------------------------------------------- words for the model


def prompt(question: Question) -> str:
    """The text put to the model: the question, with its choices the way VLMEvalKit writes them."""
    if not question.choices:
        return question.text
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", question.choices, strict=True))
    return f"Question: {question.text}\nOptions:\n{options}Please select the correct answer from the options above. \n"


SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
DESCRIBE = (
    "Please describe this image in general. Directly provide the description, "
    'do not include prefix like "This image depicts". '
)


def reworded(question: Question, dice: Dice) -> str:
    """`prompt`, or one time in three another customary wording of the same request: for training only."""
    if question.task == "yesno" or not dice.chance(1 / 3):
        return prompt(question)
    if question.choices:
        lines = [f"{letter}. {choice}" for letter, choice in zip("ABCD", question.choices, strict=True)]
        return "\n".join([question.text, *lines])
    return DESCRIBE if question.task == "caption" else question.text + SHORT_ANSWER


def open_ended(question: Question) -> Question:
    """A multiple-choice question without its choices: for training only."""
    if not question.choices:
        return question
    return replace(question, answer=question.choices["ABCD".index(question.answer)], choices=())


OTHERS: dict[str, Sequence[str]] = {
    "counting": tuple("123456789"),
    "colour": COLOUR_NAMES,
}


def with_choices(question: Question, dice: Dice) -> Question:
    """A question of a task in `OTHERS` as multiple choice: for training only, to learn letters on easy ground."""
    if question.task not in OTHERS:
        return question
    return _choose(question, [other for other in OTHERS[question.task] if other != question.answer], dice)


# ---------------------------------------------------------------- sets of items


@dataclass(frozen=True)
class Item:
    """One row: a picture with one question."""

    pixels_HW: np.ndarray
    question: Question
    picture_name: str

    def png(self) -> bytes:
        return png.encode(self.pixels_HW, PALETTE_C3)

    def image(self) -> Any:
        """The picture as a PIL image in RGB."""
        from PIL import Image

        return Image.fromarray(PALETTE_C3[self.pixels_HW])


def items(seed: int, per_task: int, tasks: Sequence[str] = TASKS) -> Iterator[Item]:
    """`per_task` items of each task, task by task; yes/no questions come in pairs, the others one to a picture."""
    for task in tasks:
        for index in range(per_task // 2 if task == "yesno" else per_task):
            picture = draw(task, seed, index)
            asked = picture.questions if task == "yesno" else picture.questions[index % len(picture.questions) :][:1]
            for question in asked:
                yield Item(picture.pixels_HW, question, f"{task}/{index:05d}.png")


def calibration(count: int, seed: int = CALIBRATION_SEED) -> list[Item]:
    """`count` items from the distribution of the training data, tasks taken in turn. Never the evaluation's stream."""
    assert seed != EVALUATION_SEED
    rows = [list(items(seed, -(-count // len(TASKS)) + 1, (task,))) for task in TASKS]
    return [row[turn] for turn in range(len(rows[0])) for row in rows if turn < len(row)][:count]


COLUMNS = ("index", "image", "question", "A", "B", "C", "D", "answer", "category", "image_path")


def evaluation_tsv(path: str | Path, seed: int = EVALUATION_SEED, per_task: int = ITEMS_PER_TASK) -> dict[str, str]:
    """Write the held-out items as a VLMEvalKit table; return its digests: `sha256`, and `content_sha256` once decoded.

    `category` is the task; for yes/no questions it is `yesno-` and the kind, and the two questions of a picture share
    `image_path`. The answer of a caption is a list of right captions, as text.
    """
    table, content = io.StringIO(), hashlib.sha256()
    writer = csv.writer(table, delimiter="\t", lineterminator="\n")
    writer.writerow(COLUMNS)
    for index, item in enumerate(items(seed, per_task)):
        row = _row(index, item)
        writer.writerow(row)
        content.update(PALETTE_C3[item.pixels_HW].tobytes() + "\t".join(row[2:]).encode())
    data = table.getvalue().encode()
    Path(path).write_bytes(data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "content_sha256": content.hexdigest()}


def _row(index: int, item: Item) -> list[str]:
    question = item.question
    choices = list(question.choices) + [""] * (4 - len(question.choices))
    answer = str([question.answer, *question.also]) if question.task == "caption" else question.answer
    category = f"yesno-{question.kind}" if question.task == "yesno" else question.task
    image = base64.b64encode(item.png()).decode()
    return [str(index), image, question.text, *choices, answer, category, item.picture_name]
