"""How far the native ports are from the original code: python tools/equivalence_table.py [page]

The fixtures are what the original code of each model made of small random weights in float32 (inputs, router choices,
features, logits, greedy ids); the port reads the same folders and pictures. Prints variant x what x greatest
difference and writes it into docs/seed-models.md. The folder with `fixtures/` is $MOPEQ_SHARED, else `shared` beside
the repository. tests/equivalence/ asserts the same on every run.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import mopeq

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(os.environ.get("MOPEQ_SHARED") or ROOT.parent / "shared") / "fixtures"
sys.path.insert(0, str(ROOT / "bench"))

from seed_sizes import PAGE, between, head, row  # noqa: E402

VARIANTS = {
    "DeepSeek-VL2-Tiny": "deepseek_vl2_tiny",
    "DeepSeek-VL2-Small": "deepseek_vl2_small",
    "DeepSeek-VL2": "deepseek_vl2_base",
    "MolmoE-1B": "molmoe_1b",
}
PIXELS, FEATURES = "pixels", "image features"
WHATS = {
    "cases": "cases: a picture, text alone, several pictures, two turns, a batch",
    "tokens": "token ids and masks that differ",
    PIXELS: "pixels, greatest difference",
    FEATURES: "image features (tower, projector)",
    "choices": "router choices that differ",
    "chosen": "of so many",
    "weights": "router weights",
    "hidden": "hidden states, first and last",
    "logits": "logits",
    "original": "greedy answers that differ from the original's",
    "cached": "greedy answers that differ without a cache",
}
COUNTS = ("cases", "tokens", "choices", "chosen", "original", "cached")  # the others are differences


def cases_of(name: str, folder: Path, meta: dict[str, Any], processor: Any) -> Iterator[tuple[str, Any, list[Any]]]:
    """(case, inputs, the original's greedy ids) as the port's own processor makes the inputs."""
    cases = {case["name"]: case for case in meta["cases"]}
    for key, case in cases.items():
        of = [cases[one] for one in case.get("batch_of", [key])]
        if "images" not in of[0] or (name == "molmoe_1b" and "batch_of" in case):
            continue  # MolmoE's batches were padded by hand on the other side, which the tests go through
        pictures = [[Image.open(folder / image) for image in one["images"]] for one in of]
        if name == "molmoe_1b":
            inputs = processor(text=case["text"], images=pictures[0] or None)
        else:
            inputs = processor(conversations=[one["conversation"] for one in of], images=pictures)
        yield key, inputs, [one["greedy_ids"] for one in of]


def run(model: Any, inputs: Any) -> tuple[Any, dict[str, Tensor], dict[str, tuple[Tensor, ...]]]:
    """The model's output, the image features under their fixtures' names, and what each router answered."""
    features: dict[str, Tensor] = {}
    routers: dict[str, tuple[Tensor, ...]] = {}
    towers = {"vision": "vision_features", "projector": "projector_features"}
    towers |= {"model.vision_backbone": "image_features"}
    hooks = []
    for name, module in model.named_modules():
        if name in towers:
            keep = lambda m, a, out, key=towers[name]: features.__setitem__(key, out)  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
        elif type(module).__name__.endswith("Router"):
            keep = lambda m, a, out, key=name: routers.__setitem__(key, out)  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
    out = model(**inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return out, features, routers


def measure(name: str) -> dict[str, float]:
    """{what: greatest difference, or a count} of one variant over all its cases."""
    folder = FIXTURES / name
    expected, meta = load_file(folder / "expected.safetensors"), json.loads((folder / "meta.json").read_text("utf-8"))
    processor = transformers.AutoProcessor.from_pretrained(folder)
    options = {} if name == "molmoe_1b" else {"attn_implementation": "eager"}  # as the original's, in padding too
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options)
    worst: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))

    def far(what: str, found: Tensor, wanted: Tensor) -> None:
        worst[what] = max(worst.get(what, 0.0), float((found.double() - wanted.double()).abs().max()))

    for case, inputs, answers in cases_of(name, folder, meta, processor):
        worst["cases"] += 1
        for key, value in inputs.items():
            if f"{case}.{key}" in expected and not value.is_floating_point():
                worst["tokens"] += int((value != expected[f"{case}.{key}"]).sum())
        if f"{case}.images_u8" in expected:
            far(PIXELS, inputs["images"], (expected[f"{case}.images_u8"].float() / 255 - 0.5) / 0.5)
        elif f"{case}.images" in expected:
            far(PIXELS, inputs["images"], expected[f"{case}.images"])
        out, features, routers = run(model, inputs)
        for key, value in features.items():
            if f"{case}.{key}" in expected:
                far(FEATURES, value, expected[f"{case}.{key}"])
        for key, answer in routers.items():
            stem = key if f"{case}.{key}.topk_idx_sorted" in expected else key.removesuffix(".gate")
            index_TK, order = answer[2].sort(-1)
            wanted = expected[f"{case}.{stem}.topk_idx_sorted"]
            worst["choices"] += int((index_TK != wanted).sum())
            worst["chosen"] += wanted.numel()
            far("weights", answer[1].gather(1, order), expected[f"{case}.{stem}.topk_weight_sorted"])
        last = "last" if f"{case}.hidden.last" in expected else str(len(out.hidden_states) - 1)
        far("hidden", out.hidden_states[0], expected[f"{case}.hidden.0"])
        far("hidden", out.hidden_states[-1], expected[f"{case}.hidden.{last}"])
        far("logits", out.logits, expected[f"{case}.logits"])
        start = inputs["input_ids"].shape[1]
        asked = dict(inputs) | {"max_new_tokens": len(answers[0]), "do_sample": False}
        cached, plain = (model.generate(**asked, use_cache=cache)[:, start:].tolist() for cache in (True, False))
        worst["original"] += sum(a != b for a, b in zip(cached, answers, strict=True))
        worst["cached"] += sum(a != b for a, b in zip(cached, plain, strict=True))
    assert worst["chosen"] and set(worst) == set(WHATS), f"not compared: {set(WHATS) - set(worst)}"
    return dict(worst)


def main() -> None:
    if not FIXTURES.is_dir():
        sys.exit(f"error: {FIXTURES} does not exist\nhint: set MOPEQ_SHARED to the folder that holds fixtures/")
    transformers.utils.logging.disable_progress_bar()
    with torch.no_grad():
        found = {label: measure(name) for label, name in VARIANTS.items()}
    lines = head("", *found)
    for what, label in WHATS.items():
        cells = [f"{m[what]:,}" if what in COUNTS else f"{m[what]:.1e}" if m[what] else "0" for m in found.values()]
        lines.append(row(label, *cells))
    versions = f"mopeq {mopeq.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    body = "\n".join([*lines, "", f"Made by `python tools/equivalence_table.py` with {versions.partition('+')[0]}."])
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    page.write_text(between(page.read_text(), "equivalence", body))
    print(body)


if __name__ == "__main__":
    main()
