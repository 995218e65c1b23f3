"""The model card of a packed checkpoint: what it is, what it was made from, and the one import it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mopeq.nouns import MoESpec, size_text


def front_matter(text: str) -> dict[str, str]:
    """The plain `key: value` lines of a card's YAML head."""
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    rows = re.findall(r"^([\w-]+):[ \t]*(\S.*)$", match[1], re.MULTILINE) if match else []
    return {key: value.strip() for key, value in rows}


def model_card(source: Path, spec: MoESpec, run: dict[str, Any]) -> str:
    """README.md of OUT: base model, licence, sizes, how it was made, and how it is loaded."""
    card = source / "README.md"
    head = front_matter(card.read_text(encoding="utf-8", errors="replace")) if card.exists() else {}
    result, options = run["result"], run["options"]
    name = run["source_name"]
    lines = ["---", f"base_model: {head.get('base_model', name)}", "library_name: transformers", "tags: [mopeq]"]
    if "license" in head:
        lines.insert(2, f"license: {head['license']}")
    asked = f"--avg-bits {options['avg_bits']}" if options["avg_bits"] is not None else f"--fit {options['fit']}"
    how = " ".join(f"--{name} {options[name]}" for name in ("sensitivity", "allocate", "per", "method"))
    counts = ", ".join(f"{n} × {name}" for name, n in result["counts"].items())
    lines += [
        "---",
        f"# {name}, packed by mopeq",
        "",
        "**`import mopeq` before loading.** Without it transformers warns of an unknown quantization type and stops at",
        "a size that does not fit, or, in a few families, fills the experts with random numbers.",
        "",
        "```python",
        "import mopeq",
        "from transformers import AutoModelForCausalLM  # AutoModelForImageTextToText for a vision-language model",
        "",
        'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| source | {name} ({spec.model_type}), {size_text(result['bytes_source'])} |",
        f"| weights | {size_text(result['bytes_weights'])} ({result['bytes_weights']:,} bytes of tensors) |",
        f"| routed experts | {result['avg_expert_bits']:.3f} code bits,"
        f" {result['avg_expert_bits_effective']:.3f} with scales and zero points |",
        f"| widths | {counts} (bits, group size, a: asymmetric) |",
        f"| all other 2-D weights | {options['other_bits']} bits |",
        f"| made by | mopeq {run['versions']['mopeq']}: {how} {asked if 'None' not in asked else ''} |",
        f"| licence | {head.get('license', 'that of the source')} |",
    ]
    lines += [f"\nNote: {note}." for note in (*result["notes"], *run["sensitivity_notes"])]
    return "\n".join(lines) + "\n"
