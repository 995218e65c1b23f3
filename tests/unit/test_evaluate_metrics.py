"""Metrics by hand-worked cases, and against slow definitions on random strings."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopeq.data.readers import Item
from mopeq.evaluate import METRICS, captions, metrics
from mopeq.evaluate.text import (
    KIT,
    PAPER,
    chosen,
    common_subsequence,
    edit_distance,
    edit_share,
    nearly,
    normal_form,
    says_yes_or_no,
)
from mopeq.tables import pick


def items(*answers: object, **columns: list) -> list[Item]:
    made = []
    for place, answer in enumerate(answers):
        meta = {"answer": answer, "index": str(place), "options": {}} | {k: v[place] for k, v in columns.items()}
        made.append(Item(messages=[], answer=str(answer), meta=meta))
    return made


def test_every_row_of_the_table_names_a_function() -> None:
    for name in METRICS:
        scored = pick(METRICS, name, "metric")(["A"], items("A", options=[{"A": "x"}], category=["c"]), KIT)
        assert len(scored.score_of) == 1 and 0 <= scored.score_of[0] <= 1, name
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in scored.table.values()), name


# --------------------------------------------------------------------------------------------------------- strings


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The  Dog!", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("U.S.", "us"),
        ("3.5 m", "3.5 m"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("x-y, z", "x y z"),
    ],
)
def test_normal_form(text: str, form: str) -> None:
    assert normal_form(text) == form


@pytest.mark.parametrize(
    ("text", "said"),
    [("Yes, it is.", "Yes"), ("no", "No"), ("NO!", "No"), ("Yes and no", "Unknown"), ("", "Unknown")],
)
def test_yes_or_no(text: str, said: str) -> None:
    assert says_yes_or_no(text) == said


OPTIONS = {"A": "A cat", "B": "a dog", "C": "a cow"}


@pytest.mark.parametrize(
    ("text", "paper", "kit"),
    [
        ("B", "B", "B"),
        ("(C) a cow", "C", "C"),
        ("The answer is C.", "C", "C"),
        ("C because it has four legs and gives milk", "C", "Z"),
        ("B or C", "Z", "Z"),
        ("it looks like a dog", "B", "B"),
        ("it looks to me, from where I stand, very much like a dog", "B", "Z"),
        ("a cat and a dog", "Z", "Z"),
        ("", "Z", "Z"),
        ("E", "Z", "Z"),
    ],
)
def test_the_chosen_letter(text: str, paper: str, kit: str) -> None:
    assert (chosen(text, OPTIONS, PAPER), chosen(text, OPTIONS, KIT)) == (paper, kit)


@pytest.mark.parametrize(
    ("said", "wanted", "right"),
    [("95", "100", True), ("94.9", "100", False), ("105", "100", True), ("0.45", "45%", True), ("45", "45%", False)]
    + [("0", "0", True), ("0.0", "0", False), ("Red", "red", True), ("x", "1", False), ("-4.1", "-4", True)],
)
def test_relaxed(said: str, wanted: str, right: bool) -> None:
    assert nearly(said, wanted) is right


def test_relaxed_both_ways_round() -> None:
    """95.1 for 100 is within 5 % of 100 and not of 95.1: the paper's rule measures against the prediction."""
    asked = items("100", "95.1", "95.2")
    said = ["95.1", "100", "100"]
    assert metrics.relaxed(said, asked, KIT).score_of == [1.0, 0.0, 0.0]
    assert metrics.relaxed(said, asked, PAPER).score_of == [0.0, 1.0, 1.0]


def slow_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    same = slow_distance(a[1:], b[1:])
    return same if a[0] == b[0] else 1 + min(same, slow_distance(a[1:], b), slow_distance(a, b[1:]))


@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_edit_distance_equals_its_definition(a: str, b: str) -> None:
    assert edit_distance(a, b) == slow_distance(a, b) == edit_distance(b, a)


@given(st.text("ab", max_size=8), st.text("ab", max_size=8))
def test_common_subsequence_equals_its_definition(a: str, b: str) -> None:
    def subsequences(text: str) -> set[str]:
        return {"".join(c for i, c in enumerate(text) if mask >> i & 1) for mask in range(1 << len(text))}

    assert common_subsequence(a, b) == max(map(len, subsequences(a) & subsequences(b)))


def test_anls() -> None:
    assert edit_share(" ITC  limited ", "ITC Limited") == 0.0  # blanks and case are no edits
    assert metrics.anls(["hello wrld"], items("['hello world', 'Hello']"), KIT).score_of == [pytest.approx(10 / 11)]
    assert metrics.anls(["a b c"], items("a b c d e f"), KIT).score_of == [0.0]  # 5 of 11 is below one half
    assert metrics.anls([""], items("x"), KIT).score_of == [0.0]


# ---------------------------------------------------------------------------------------------------------- tables


def test_exact_and_words() -> None:
    assert metrics.exact([" john SMITH "], items("['John Smith']"), KIT).score_of == [1.0]
    assert metrics.exact(["Yes."], items("Yes"), KIT).score_of == [0.0]
    assert metrics.words(["Yes.", "the red one", "two"], items("yes", "red 1", "2"), KIT).score_of == [1.0, 1.0, 1.0]


def test_vqa_leaves_one_out() -> None:
    asked = items("['two', 'two', 'two', 'a dog', 'x', 'x', 'x', 'x', 'x', 'x']")
    # of ten, the three that said 2 see two others, the seven see three
    assert metrics.vqa(["2"], asked, KIT).score_of == [pytest.approx((3 * 2 / 3 + 7 * 1) / 10)]
    assert metrics.vqa(["dog"], asked, KIT).score_of == [pytest.approx((1 * 0 + 9 * 1 / 3) / 10)]


def test_tables_go_by_split_else_by_category() -> None:
    asked = items("a", "b", "c", category=["k", "k", "m"])
    assert metrics.exact(["a", "x", "c"], asked, KIT).table == pytest.approx({"Overall": 200 / 3, "k": 50, "m": 100})
    asked = items("a", "b", split=["dev", "val"], category=["k", "k"])
    assert metrics.exact(["a", "x"], asked, KIT).table == {"Overall": 50.0, "dev": 100.0, "val": 0.0}


def test_choices_by_split_and_category() -> None:
    asked = items("A", "B", "A", options=[OPTIONS] * 3, split=["dev", "val", "val"], category=["k", "k", "m"])
    assert metrics.mcq(["A", "A", "A"], asked, KIT).table == {
        **{"dev/Overall": 1.0, "dev/k": 1.0},
        **{"val/Overall": 0.5, "val/k": 0.0, "val/m": 1.0},
    }


def test_mmmu_turns_open_questions_into_choices() -> None:
    asked = items("24/7", "42", "B", options=[{}, {}, {"A": "x", "B": "y"}])
    assert metrics.mmmu(["it is 24/7", "41", "B"], asked, KIT).score_of == [1.0, 0.0, 1.0]


def test_circular_wants_every_rotation() -> None:
    asked = items("A", "B", "A", "B", options=[OPTIONS] * 4)
    for item, index in zip(asked, ("1", "1000001", "2", "1000002"), strict=True):
        item.meta["index"] = index
    scored = metrics.circular(["A", "B", "A", "A"], asked, KIT)
    assert scored.score_of == [1.0, 1.0, 1.0, 0.0] and scored.units == [1.0, 0.0] and scored.table == {"Overall": 0.5}


def test_mme_pairs_and_sums() -> None:
    asked = items(*["Yes", "No"] * 2, category=["OCR"] * 4, image_path=["a", "a", "b", "b"])
    said = ["yes", "no", "yes", "yes"]
    assert metrics.mme(said, asked, KIT).table == {"perception": 125.0, "reasoning": 0.0, "OCR": 125.0}
    assert metrics.mme(said, asked, PAPER).table == {"OCR": 125.0}  # a sum over missing categories is no sum


def test_pope_counts_an_item_in_each_of_its_categories() -> None:
    asked = items("Yes", "No", "Yes", category=["random", "random,popular", "popular"])
    table = metrics.pope(["Yes", "Yes", "No"], asked, KIT).table
    # random: one right yes, one wrong yes; popular: one wrong yes, one missed
    assert table["random/precision"] == 50.0 and table["random/recall"] == 100.0 and table["popular/Overall"] == 0.0
    assert table["acc"] == 25.0 and table["precision"] == pytest.approx(100 / 3)


def test_ocrbench_adds_up() -> None:
    formula = "Handwritten Mathematical Expression Recognition"
    asked = items("['x ^ 2']", "['Stop']", category=[formula, "Digit String Recognition"])
    table = metrics.ocrbench(["so x^2 = 1", "it says STOP now"], asked, KIT).table
    assert (table[formula], table["Text Recognition"]) == (1, 1)
    assert (table["Final Score"], table["Final Score Norm"]) == (2, 0.2)


def test_captions() -> None:
    assert captions.word_f1("A red dog.", ["the red cat"]) == pytest.approx(0.5)
    assert captions.word_f1("nothing alike", ["red cat"]) == 0.0
    assert captions.rouge_l("a b c", ["a b c"]) == 1.0 and captions.rouge_l("a", ["b"]) == 0.0
    perfect = ["one two three four five", "six seven eight nine ten"]
    assert captions.bleu(perfect, [[text] for text in perfect]) == pytest.approx([1.0] * 4, abs=1e-6)
    assert captions.cider(perfect, [[text] for text in perfect]) == pytest.approx([10.0, 10.0])
    assert captions.bleu(["one two"], [["one two three four"]])[0] == pytest.approx(math.exp(1 - 4 / 2), rel=1e-6)
    scored = metrics.caption(["a red dog", "x"], items("['the red dog', 'y']", "x"), KIT)
    assert scored.score_of == [1.0, 1.0] and scored.table == {"word_f1": 100.0, "ROUGE_L": 100.0}


# ---------------------------------------------------------------------------------------------------- the kit's files


def test_columns_as_spreadsheets_give_them_back() -> None:
    def answers(*cells: str) -> list[str]:
        return [item.meta["answer"] for item in metrics.as_the_kit_loads(["x"] * len(cells), items(*cells))[1]]

    assert answers("12.50", "100") == ["12.5", "100.0"]
    assert answers("007", "3.0") == ["7", "3"]
    assert answers("12.50", "Red") == ["12.50", "Red"]
    assert answers("7", "None") == ["7.0", "nan"]
    assert metrics.as_the_kit_loads(["3.0", "7"], items("a", "b"))[0] == ["3.0", "7.0"]
    assert metrics.as_the_kit_loads(["null"], items("a"))[0] == ["nan"]
    (one,) = metrics.as_the_kit_loads(["A"], items("A", options=[{"A": "None", "B": "5", "C": "x"}]))[1]
    assert one.meta["options"] == {"B": "5", "C": "x"}
