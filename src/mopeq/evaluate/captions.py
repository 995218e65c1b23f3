"""Captions against reference captions: Bleu, ROUGE-L, CIDEr-D and word F1, on words as split at blanks.

As in VLMEvalKit, nothing is tokenized or lower-cased first (the usual COCO tools do both), so its numbers are met.
Papineni 2002 (Bleu), Lin 2004 (ROUGE-L), Vedantam 2015 (CIDEr-D: clipped counts and a length penalty).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from mopeq.evaluate.text import common_subsequence, normal_form

ORDERS = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # words; width of CIDEr-D's length penalty
BETA = 1.2  # weight of recall in ROUGE-L
SMALL, TINY = 1e-9, 1e-15  # the reference's guards: a score of 0 / 0 is 0
Grams = Counter[tuple[str, ...]]


def grams(text: str) -> Grams:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Bleu-1 … Bleu-4 of the whole corpus, 0 to 1. Reference length: the closest, of two the shorter."""
    correct, guessed, length, wanted = [0] * ORDERS, [0] * ORDERS, 0, 0
    for text, refs in zip(texts, references, strict=True):
        size, sizes = len(text.split()), [len(ref.split()) for ref in refs]
        length += size
        wanted += min((abs(other - size), other) for other in sizes)[1]
        most: Grams = Counter()
        for ref in refs:
            most |= grams(ref)
        for gram, count in grams(text).items():
            correct[len(gram) - 1] += min(count, most[gram])
        for n in range(ORDERS):
            guessed[n] += max(0, size - n)
    ratio = (length + TINY) / (wanted + SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, scores = 1.0, []
    for n in range(ORDERS):
        product *= (correct[n] + TINY) / (guessed[n] + SMALL)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores


def rouge_l(text: str, references: Sequence[str]) -> float:
    """F-measure of the longest common subsequence, best precision and best recall over the references, 0 to 1."""
    said = text.split(" ")  # one blank parts words here, so a double blank makes an empty word
    pairs = [(common_subsequence(said, ref.split(" ")), len(ref.split(" "))) for ref in references]
    precision = max(common / len(said) for common, _ in pairs)
    recall = max(common / size for common, size in pairs)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def cider(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each text, 0 to 10, with document frequencies from these references. One item alone gives 0."""
    cooked = [[grams(ref) for ref in refs] for refs in references]
    documents: Grams = Counter()
    for refs in cooked:
        documents.update({gram for ref in refs for gram in ref})
    log_items = math.log(len(texts))

    def weigh(counts: Grams) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """(tf-idf of each order, its norm, how many pairs of words)"""
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * (log_items - math.log(max(1, documents[gram])))
        norms = [math.sqrt(sum(value * value for value in one.values())) for one in weights]
        return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    scores = []
    for text, refs in zip(texts, cooked, strict=True):
        said, said_norms, said_size = weigh(grams(text))
        total = 0.0
        for ref in refs:
            want, want_norms, want_size = weigh(ref)
            penalty = math.exp(-((said_size - want_size) ** 2) / (2 * SIGMA**2))
            for n in range(ORDERS):
                shared = [(value, want[n].get(gram, 0.0)) for gram, value in said[n].items()]
                dot = sum(min(mine, theirs) * theirs for mine, theirs in shared)
                norm = said_norms[n] * want_norms[n]
                total += penalty * (dot / norm if norm else dot)
        scores.append(10 * total / ORDERS / len(refs))
    return scores


def word_f1(text: str, references: Sequence[str]) -> float:
    """F1 of the bags of words in normal form, against the best reference, 0 to 1 (Rajpurkar 2016)."""
    return max((_f1(normal_form(text).split(), normal_form(ref).split()) for ref in references), default=0.0)


def _f1(said: list[str], wanted: list[str]) -> float:
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0
