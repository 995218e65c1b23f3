"""Ways out: a packed folder written in the formats of other tools. Each row is a file beside this one.

A function `export(packed, directory)` writes the folder and returns what it says of it; a matrix at a time is in memory
(of `dense`, a layer's experts). What a format cannot say is refused before anything is written.
"""

from __future__ import annotations

from mopeq.tables import Row

EXPORTERS: dict[str, Row] = {
    "dense": Row("mopeq.export.dense:export", "bf16 in the original's layout, for any tool"),
    "autoround": Row("mopeq.export.autoround:export", "GPTQ-style codes, a width a module: transformers + auto-round"),
    "compressed-tensors": Row(
        "mopeq.export.compressed:export", "its pack-quantized format, where groups, widths and shapes allow"
    ),
    "gguf": Row("mopeq.export.gguf:export", "llama.cpp's file; one width a layer and projection"),
}
