"""VLMEvalKit's benchmarks: which kind of question a dataset name stands for, and the kit's default prompt for it.

A TSV is known by its file name (`ChartQA_TEST.tsv`), as in the kit; `_…` suffixes are allowed, so that a cut-down
copy may be called `ChartQA_TEST_100.tsv`. A name that is not here is asked as it stands, with its options (if it has
any that the question does not already show) in the kit's multiple-choice form.
Prompts are checked against the kit's own in tests/equivalence/test_vlmeval_metrics.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mopeq.errors import BadInput

# (pattern of the whole name, kind); kinds are the names of the rows of mopeq.evaluate.METRICS
BENCHMARKS = (
    (r"(AI2D|MMStar|RealWorldQA|ScienceQA|SEEDBench|AOKVQA|A-OKVQA)(_.*)?", "mcq"),
    (r"(MMBench|CCBench)(?!-Video)(_.*)?", "circular"),
    (r"MMMU(_(?!Pro).*)?", "mmmu"),
    (r"MME", "mme"),
    (r"POPE", "pope"),
    (r"ChartQA(_.*)?", "relaxed"),
    (r"(DocVQA|InfoVQA)(_.*)?", "anls"),
    (r"OCRVQA(_.*)?", "exact"),
    (r"TextVQA(_.*)?", "vqa"),
    (r"OCRBench(_MINI)?", "ocrbench"),
    (r"COCO(_.*)?", "coco"),
)
ONE_WORD = "\nAnswer the question using a single word or phrase."
DESCRIBE = (
    "Please describe this image in general. Directly provide the description, "
    'do not include prefix like "This image depicts". '
)
SELECT = "Please select the correct answer from the options above. \n"


def kind_of(dataset: str) -> str | None:
    """The kind of questions in the kit's `dataset`; None for a name that is not the kit's."""
    return next((kind for pattern, kind in BENCHMARKS if re.fullmatch(pattern, dataset)), None)


def choices_text(question: str, options: Mapping[str, str], hint: str = "") -> str:
    """A multiple-choice question as the kit words it."""
    lines = [f"Hint: {hint}\n"] if hint else []
    lines.append(f"Question: {question}\n")
    if options:
        lines += ["Options:\n", *(f"{letter}. {text}\n" for letter, text in options.items()), SELECT]
    return "".join(lines)


def prompt(
    kind: str | None, question: str | None, options: Mapping[str, str], hint: str = "", images: int = 1, where: str = ""
) -> list[dict]:
    """The content parts of the user's message: [{"type": "image"}, {"type": "text", "text": …}].

    where: "file:line", for errors. BadInput if there is nothing to ask, or a marker `<image k>` names no picture.
    """
    if question is None:
        if kind != "coco":
            raise BadInput(f"{where}: no question", "give the row a question")
        question = DESCRIBE
    pictures = [{"type": "image"} for _ in range(images)]
    if kind in ("mcq", "circular", "mmmu"):
        text = choices_text(question, options, hint)
    elif kind in ("relaxed", "anls", "exact", "vqa"):
        text = question + ONE_WORD
    elif kind is None and not all(option in question for option in options.values()):
        text = choices_text(question, options, hint)
    else:
        text = question
    return interleave(text, images, where) if kind == "mmmu" else [*pictures, {"type": "text", "text": text}]


def interleave(text: str, images: int, where: str = "") -> list[dict]:
    """MMMU writes `<image k>` where picture k belongs. The parts in that order; `picture` is its number from 0.

    Without a marker the pictures come first. A picture may be shown twice, or not at all, as the text says.
    """
    pieces = re.split(r"<image (\d+)>", text)
    if len(pieces) == 1:
        return [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
    parts: list[dict] = [{"type": "text", "text": pieces[0]}]
    for number, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if not 1 <= int(number) <= images:
            raise BadInput(f"{where}: the text shows <image {number}>, the row has {images}", "is a picture missing?")
        parts += [{"type": "image", "picture": int(number) - 1}, {"type": "text", "text": piece}]
    return parts
