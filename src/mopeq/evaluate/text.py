"""How answers are made comparable: normal forms, edit distance, yes or no, the letter of a choice.

The rules are those of VLMEvalKit (and through it of the VQA challenge), told in our own words; where two of its
versions differ, `rules` says which is meant. tests/equivalence/test_vlmeval_metrics.py holds them to its numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

PAPER = "paper"  # the copy of VLMEvalKit in the MoPEQ authors' repository
KIT = "vlmeval-0.0.20"  # the package ms-vlmeval 0.0.20
RULES = (PAPER, KIT)

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {"none": "0"} | {word: str(number) for number, word in enumerate(DIGITS)}
ARTICLES = ("a", "an", "the")
# The VQA challenge mends a missing apostrophe: "dont" -> "don't", "couldnt've" and "couldn'tve" -> "couldn't've".
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
APOSTROPHES = {
    word[:i] + word[i + 1 :]: word for word in CONTRACTED.split() for i, char in enumerate(word) if char == "'"
}
APOSTROPHES["somebody'd"] = "somebodyd"  # the challenge's own slip, and so part of the rule
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
REFUSALS = (  # answers that choose nothing, whatever letters they contain
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
BRACKETS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def without_punctuation(text: str) -> str:
    """A mark that touches a space goes, others become a space; all go where a comma stands inside a number."""
    out = text
    for mark in PUNCTUATION:
        goes = mark + " " in text or " " + mark in text or COMMA_IN_NUMBER.search(text)
        out = out.replace(mark, "" if goes else " ")
    return LONE_PERIOD.sub("", out, count=32)  # the original hands re.UNICODE (32) over as the count


def normal_form(text: str) -> str:
    """Lower case, no punctuation, no articles, number words as digits, apostrophes mended (the VQA challenge)."""
    words = without_punctuation(text.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    kept = [word for word in (NUMBER_WORDS.get(word, word) for word in words) if word not in ARTICLES]
    return " ".join(APOSTROPHES.get(word, word) for word in kept)


def says_yes_or_no(text: str) -> str:
    """ "Yes", "No", or "Unknown" where neither or both are said."""
    words = without_punctuation(text.lower()).split()
    yes, no = "yes" in words, "no" in words
    return "Unknown" if yes == no else "Yes" if yes else "No"


def chosen(text: str, options: Mapping[str, str], rules: str) -> str:
    """The letter of the option that `text` chooses: the one letter in it, else the one option quoted. "Z" for none.

    vlmeval-0.0.20 wants the letter among the last four words, and quotes only from texts that are not more than twice
    as long as the options together.
    """
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = text.translate(BRACKETS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and (rules == PAPER or words.index(named[0]) > len(words) - 5):
        return named[0]
    if not named and "Z" in words:
        return "Z"
    lower = text.lower()
    if rules != PAPER and len(lower) > 2 * sum(map(len, options.values())):
        return "Z"
    quoted = [letter for letter, option in options.items() if option.lower() in lower]
    return quoted[0] if len(quoted) == 1 else "Z"


def nearly(prediction: str, target: str) -> bool:
    """Numbers (a percent sign divides by 100) within 5 % of the target; otherwise the same words in any case.

    A target of 0 is compared as a word. Masry et al. 2022 (ChartQA), section 5.1.
    """
    said, wanted = _number(prediction), _number(target)
    if said is not None and wanted:
        return abs(said - wanted) / abs(wanted) <= 0.05
    return prediction.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def edit_distance(left: str, right: str) -> int:
    """Insertions, deletions and substitutions between two strings (Levenshtein)."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            last, row[j] = row[j], min(last + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def edit_share(prediction: str, target: str) -> float:
    """Edits per character, of the strings without case and extra blanks, over the longer of them as they were given."""
    said, wanted = (" ".join(text.strip().lower().split()) for text in (prediction, target))
    length = max(len(prediction.upper()), len(target.upper()))
    return edit_distance(said, wanted) / length if length else 0.0


def common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for a in left:
        diagonal = 0
        for j, b in enumerate(right, 1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]
