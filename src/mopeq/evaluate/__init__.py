"""How much was lost: packed against original by logits (compare.py), and by answers (metrics.py, tasks.py).

    compare.py    KL, perplexity and agreement from two callables, streamed
    metrics.py    scores of answers, VLMEvalKit's among them (no torch)
    generate.py   greedy answers from a model and a processor
    tasks.py      items + a way to answer them -> a score for each task

Nothing here knows how a model is loaded or packed: it takes callables and tensors, and is tested without a model.
"""

from __future__ import annotations

from mopeq.tables import Row

METRICS = {
    "exact": Row("mopeq.evaluate.metrics:exact", "same words: lower case, outer blanks aside (OCRVQA)"),
    "words": Row("mopeq.evaluate.metrics:words", "same words: case, articles, punctuation and number words aside"),
    "mcq": Row("mopeq.evaluate.metrics:mcq", "multiple choice: the letter, or the one option that is quoted"),
    "circular": Row("mopeq.evaluate.metrics:circular", "multiple choice, right in every rotation (MMBench)"),
    "mmmu": Row("mopeq.evaluate.metrics:mmmu", "multiple choice, open questions as A or not A (MMMU)"),
    "yesno": Row("mopeq.evaluate.metrics:yesno", "the answer says yes or no, and not both"),
    "mme": Row("mopeq.evaluate.metrics:mme", "yes or no: accuracy and both-right per picture (MME)"),
    "pope": Row("mopeq.evaluate.metrics:pope", "yes or no: F1, accuracy, precision, recall (POPE)"),
    "relaxed": Row("mopeq.evaluate.metrics:relaxed", "numbers within 5 %, words the same (ChartQA)"),
    "anls": Row("mopeq.evaluate.metrics:anls", "normalized edit similarity, 0 below one half (DocVQA, InfoVQA)"),
    "vqa": Row("mopeq.evaluate.metrics:vqa", "agreement with ten people's answers (TextVQA)"),
    "ocrbench": Row("mopeq.evaluate.metrics:ocrbench", "an accepted answer appears in what is said (OCRBench)"),
    "coco": Row("mopeq.evaluate.metrics:coco", "captions: Bleu, ROUGE-L, CIDEr (COCO)"),
    "caption": Row("mopeq.evaluate.metrics:caption", "one caption against another: F1 of words, and ROUGE-L"),
}
