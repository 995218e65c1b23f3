"""Data for calibration and for evaluation: files become `Item`s, items become tensors.

    readers.py      a file -> items (no torch)
    benchmarks.py   VLMEvalKit's dataset names and default prompts (no torch)
    processor.py    a checkpoint folder -> its processor or tokenizer
    encode.py       items -> tensors: one item, windows of text, batches

Left out: audio, video, streaming from a hub. A new kind of file is a reader and a row here.
"""

from __future__ import annotations

from mopeq.tables import Row

DATASETS = {
    ".jsonl": Row(
        "mopeq.data.readers:read_jsonl",
        'one object a line: {"text"}, {"messages", "images"} or {"image", "question", "answer"}',
    ),
    ".tsv": Row("mopeq.data.readers:read_tsv", "VLMEvalKit's layout: base64 image, question, answer, options A..Z"),
    ".txt": Row("mopeq.data.readers:read_txt", "plain text, one document"),
}
