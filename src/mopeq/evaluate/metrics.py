"""Metrics: (predictions, items, rules) -> Scored. One function a row of METRICS; no torch.

`rules` names whose rules are meant where they differ: "paper" (the VLMEvalKit copy in the MoPEQ authors' repository)
or "vlmeval-0.0.20" (the package). They differ in three places:
  choices   0.0.20 reads a letter only near the end, and quotes only from short answers (text.chosen)
  ChartQA   the paper's copy measures the 5 % against the prediction, 0.0.20 against the right answer
  MME       the sums over categories: 0.0.20 adds what there is, the paper's copy needs all (so there are none here)
Tables carry the kit's names and scales: percent, except for choices (0 to 1), MME (0 to 200 a category) and OCRBench
(a count). A split's rows are named "split/name" if the data has splits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase

from mopeq.data.readers import Item, accepted
from mopeq.evaluate import captions
from mopeq.evaluate.text import PAPER, chosen, edit_share, nearly, normal_form, says_yes_or_no

Table = dict[str, float]
PERCEPTION = (
    *("OCR", "artwork", "celebrity", "color", "count"),
    *("existence", "landmark", "position", "posters", "scene"),
)
REASONING = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
FORMULAS = "Handwritten Mathematical Expression Recognition"
OCR_GROUPS = {
    "Text Recognition": (
        *("Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition"),
        *("Handwriting Recognition", "Digit String Recognition", "Non-Semantic Text Recognition"),
    ),
    "Scene Text-centric VQA": ("Scene Text-centric VQA",),
    "Doc-oriented VQA": ("Doc-oriented VQA",),
    "Key Information Extraction": ("Key Information Extraction",),
    FORMULAS: (FORMULAS,),
}
MMBENCH_NAMES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
BLANK = {  # what pandas reads as no value
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
NUMERIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Scored:
    """score_of: for each item, 0 to 1. table: the metric's named values. units: what an interval is made of
    (0 to 1 each), where that is not the items, as with rotations of one question."""

    score_of: list[float]
    table: Table
    units: list[float] | None = None


# ------------------------------------------------------------------------------------------------------ plain answers


def exact(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """1 if an accepted answer is said, letter case and outer blanks aside."""
    return _best(predictions, items, lambda said, wanted: float(said.strip().lower() == wanted.strip().lower()))


def words(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """1 if an accepted answer is said, in the VQA challenge's normal form."""
    return _best(predictions, items, lambda said, wanted: float(normal_form(said) == normal_form(wanted)))


def relaxed(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """ChartQA's relaxed accuracy: numbers within 5 %, words the same."""

    def near(said: str, wanted: str) -> float:
        return float(nearly(wanted, said.strip()) if rules == PAPER else nearly(said.strip(), wanted))

    return _best(predictions, items, near)


def anls(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """Average normalized Levenshtein similarity: 1 - edits per character, below one half 0 (Biten 2019)."""

    def similar(said: str, wanted: str) -> float:
        share = 1 - edit_share(said, wanted)
        return share if share >= 0.5 else 0.0

    return _best(predictions, items, similar)


def vqa(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """min(1, others who say the same / 3), averaged over leaving each of the accepted answers out (Antol 2015)."""
    scores = []
    for said, item in zip(predictions, items, strict=True):
        answers, mine = [normal_form(answer) for answer in _answers(item)], normal_form(said)
        same = answers.count(mine)
        scores.append(_mean([min(1.0, (same - (answer == mine)) / 3) for answer in answers]))
    return Scored(scores, _percent(scores, items))


def caption(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """Word F1 against the best accepted caption, and ROUGE-L of the normal forms."""
    scores = [captions.word_f1(said, _answers(item)) for said, item in zip(predictions, items, strict=True)]
    rouge = [
        captions.rouge_l(normal_form(said), [normal_form(answer) for answer in _answers(item)])
        for said, item in zip(predictions, items, strict=True)
    ]
    return Scored(scores, {"word_f1": 100 * _mean(scores), "ROUGE_L": 100 * _mean(rouge)})


def coco(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """Bleu 1 to 4, ROUGE-L and CIDEr-D of COCO's captions; an item's own score is its ROUGE-L."""
    references = [_answers(item) for item in items]
    rouge = [captions.rouge_l(said, refs) for said, refs in zip(predictions, references, strict=True)]
    table = {f"Bleu_{n}": 100 * value for n, value in enumerate(captions.bleu(predictions, references), 1)}
    table |= {"ROUGE_L": 100 * _mean(rouge), "CIDEr": 100 * _mean(captions.cider(predictions, references))}
    return Scored(rouge, table)


def ocrbench(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """1 if an accepted answer stands in what is said (case aside; for formulas blanks aside instead). Scores add up."""
    scores = []
    for said, item in zip(predictions, items, strict=True):
        form = _without_blanks if item.meta.get("category") == FORMULAS else _in_lower_case
        scores.append(float(any(form(answer) in form(said) for answer in _answers(item))))
    table = {
        group: sum(score for score, item in zip(scores, items, strict=True) if item.meta.get("category") in names)
        for group, names in OCR_GROUPS.items()
    }
    total = sum(table.values())
    return Scored(scores, table | {"Final Score": total, "Final Score Norm": total / 10})


def _in_lower_case(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _without_blanks(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


# ------------------------------------------------------------------------------------------------------------ choices


def mcq(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """1 if the chosen letter is the answer's (text.chosen)."""
    hits = [
        float(chosen(said, item.meta["options"], rules) == item.meta.get("answer"))
        for said, item in zip(predictions, items, strict=True)
    ]
    return Scored(hits, _choices_table(hits, items))


def mmmu(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """As mcq; a question without options has the right answer as A and 'Other Answers' as B."""

    def as_choice(item: Item) -> Item:
        answer, options = str(item.meta.get("answer", "")), item.meta["options"]
        if "A" not in options:
            options = {"A": answer, "B": "Other Answers"} | {k: v for k, v in options.items() if k not in "AB"}
        right = answer if answer in tuple(ascii_uppercase) else "A"
        return replace(item, meta=item.meta | {"options": options, "answer": right})

    return mcq(predictions, [as_choice(item) for item in items], rules)


def circular(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """As mcq, but a question counts once and only if it is answered rightly in every rotation of its options.

    Rotations share `g_index`, or index modulo a million; the question itself is the one whose index that is.
    """
    hits = mcq(predictions, items, rules).score_of
    groups: dict[int, list[int]] = {}
    for place, item in enumerate(items):
        group = item.meta.get("g_index") or int(float(item.meta["index"])) % 1_000_000
        groups.setdefault(int(float(group)), []).append(place)
    asked = {int(float(item.meta["index"])): item for item in items}
    whole = [(min(hits[place] for place in places), asked[group]) for group, places in groups.items() if group in asked]
    units, heads = [hit for hit, _ in whole], [head for _, head in whole]
    return Scored(hits, _choices_table(units, heads), units)


def _choices_table(hits: Sequence[float], items: Sequence[Item]) -> Table:
    table = {}
    for split, places in _groups(items, "split").items() if _has(items, "split") else [("", list(range(len(items))))]:
        name = f"{split}/" if split else ""
        table[name + "Overall"] = _mean([hits[place] for place in places])
        for key in ("l2-category", "category"):
            for group, inside in _groups([items[place] for place in places], key).items():
                group_name = MMBENCH_NAMES.get(group, group)
                table[name + group_name] = _mean([hits[places[place]] for place in inside])
    return table


# ---------------------------------------------------------------------------------------------------------- yes or no


def yesno(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """1 if the answer's yes or no is said, and not the other as well."""
    hits = _yes_no_hits(predictions, items)
    return Scored(hits, _percent(hits, items))


def mme(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """Per category: accuracy in percent, plus percent of pictures whose two questions are both right."""
    hits, table = _yes_no_hits(predictions, items), {}
    for category, places in _groups(items, "category").items():
        pictures: dict[str, list[float]] = {}
        for place in places:
            pictures.setdefault(items[place].meta.get("image_path", str(place)), []).append(hits[place])
        table[category] = 100 * _mean([hits[p] for p in places]) + 100 * _mean([min(h[:2]) for h in pictures.values()])
    sums = {"perception": PERCEPTION, "reasoning": REASONING}
    if rules == PAPER:
        sums = {name: parts for name, parts in sums.items() if {*PERCEPTION, *REASONING} <= set(table)}
    return Scored(hits, {name: sum(table.get(part, 0.0) for part in parts) for name, parts in sums.items()} | table)


def pope(predictions: Sequence[str], items: Sequence[Item], rules: str) -> Scored:
    """F1 of "Yes" ("Overall"), accuracy, precision and recall in percent, over all and by category.

    An item of several categories ("random,popular") counts once in each, in the whole too.
    """
    hits, said = _yes_no_hits(predictions, items), [says_yes_or_no(text) == "Yes" for text in predictions]
    places_of: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        for category in str(item.meta.get("category", "")).split(","):
            places_of.setdefault(category, []).append(place)
    table = _f1([place for places in places_of.values() for place in places], hits, said, items)
    for category in sorted(filter(None, places_of)):
        table |= {f"{category}/{k}": v for k, v in _f1(places_of[category], hits, said, items).items()}
    return Scored(hits, table)


def _f1(places: Sequence[int], hits: Sequence[float], said: Sequence[bool], items: Sequence[Item]) -> Table:
    truly = {place: items[place].meta.get("answer") == "Yes" for place in places}
    both = sum(said[place] and truly[place] for place in places)
    precision = both / (sum(said[place] for place in places) or 1)
    recall = both / (sum(truly[place] for place in places) or 1)
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    accuracy = _mean([hits[place] for place in places])
    return {"Overall": 100 * f1, "acc": 100 * accuracy, "precision": 100 * precision, "recall": 100 * recall}


def _yes_no_hits(predictions: Sequence[str], items: Sequence[Item]) -> list[float]:
    wanted = [str(item.meta.get("answer", "")).strip().lower() for item in items]
    return [float(says_yes_or_no(said).lower() == want) for said, want in zip(predictions, wanted, strict=True)]


# -------------------------------------------------------------------------------------------------------------- parts


def _best(predictions: Sequence[str], items: Sequence[Item], score: Callable[[str, str], float]) -> Scored:
    """The best score over each item's accepted answers."""
    scores = [
        max((score(said, answer) for answer in _answers(item)), default=0.0)
        for said, item in zip(predictions, items, strict=True)
    ]
    return Scored(scores, _percent(scores, items))


def _answers(item: Item) -> list[str]:
    return accepted(item.meta.get("answer", item.answer))


def _percent(scores: Sequence[float], items: Sequence[Item]) -> Table:
    """Overall, and by split if there are splits, else by category."""
    table = {"Overall": 100 * _mean(scores)}
    key = "split" if _has(items, "split") else "category"
    for name, places in _groups(items, key).items():
        table[name] = 100 * _mean([scores[place] for place in places])
    return table


def _groups(items: Sequence[Item], key: str) -> dict[str, list[int]]:
    """{value of a column: places of its items}, sorted by value; items without a value are in none."""
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        if item.meta.get(key):
            groups.setdefault(str(item.meta[key]), []).append(place)
    return dict(sorted(groups.items()))


def _has(items: Sequence[Item], key: str) -> bool:
    return any(item.meta.get(key) for item in items)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


# ------------------------------------------------------------------------------------------- what the kit's files do


def as_the_kit_loads(predictions: Sequence[str], items: Sequence[Item]) -> tuple[list[str], list[Item]]:
    """Predictions and items as VLMEvalKit scores them: after its spreadsheets, in which a column of numbers is numbers.

    There "12.50" comes back as "12.5", "100" beside an empty cell as "100.0", and "None" as an empty cell: an option
    so named is gone, an answer or prediction so named reads "nan".
    """
    letters = sorted({letter for item in items for letter in item.meta.get("options", {})})
    column = {letter: _loaded([item.meta["options"].get(letter, "") for item in items]) for letter in letters}
    answers = _loaded([str(item.meta.get("answer", "")) for item in items])
    out = []
    for place, item in enumerate(items):
        options = {letter: cells[place] for letter, cells in column.items() if cells[place] is not None}
        answer = "nan" if answers[place] is None else answers[place]
        out.append(replace(item, meta=item.meta | {"options": options, "answer": answer}))
    return ["nan" if cell is None else cell for cell in _loaded(list(predictions), text=True)], out


def _loaded(cells: list[str], text: bool = False) -> list[str | None]:
    """A column's cells as pandas reads them and str() writes them; None where it reads no value.

    text: the cells were strings before they were written (predictions). The others were numbers by then, and a
    spreadsheet stores 3.0 as 3; so a column of whole numbers comes back whole, however it was spelt.
    """
    filled = [cell for cell in cells if cell not in BLANK]
    if not filled or not all(NUMERIC.fullmatch(cell) for cell in filled):
        return [None if cell in BLANK else cell for cell in cells]
    whole = all(cell.lstrip("+-").isdigit() if text else float(cell).is_integer() for cell in filled)
    number = int if whole and len(filled) == len(cells) else float
    return [None if cell in BLANK else str(number(float(cell))) for cell in cells]
