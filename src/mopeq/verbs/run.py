"""`mopeq run`: generate from a packed checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mopeq.checkpoint import check_has_config, find_folder
from mopeq.data.encode import encode_prompt, model_inputs
from mopeq.data.processor import load_processor, reads_pictures, tokenizer_of
from mopeq.data.readers import Item
from mopeq.errors import BadInput
from mopeq.evaluate.generate import refuse_no_numbers
from mopeq.models import check_generates, generating, load_config, load_model, pick_device
from mopeq.packed import check_if_sealed
from mopeq.progress import say


def answer(
    out: str | Path, prompt: str, images: Sequence[str | Path] = (), max_new_tokens: int = 128, device: str = "auto"
) -> dict[str, Any]:
    """Greedy answer to a prompt, with pictures where the model reads them; a base model without a chat template
    continues the text. float32 on CPU, bf16 on cuda. BadInput for an unreadable picture, MopeqError where the logits
    are not numbers."""
    if max_new_tokens < 1:
        raise BadInput(f"--max-new-tokens {max_new_tokens} is not positive", "try --max-new-tokens 128")
    folder, _ = find_folder(out)
    check_if_sealed(folder)
    check_has_config(folder)
    processor = load_processor(folder)
    for image in images:
        if not Path(image).is_file():
            raise BadInput(f"{image} does not exist", "give --image the path of a picture")
    if images and not reads_pictures(processor):
        raise BadInput(f"{out} reads text only", "leave --image out")
    check_generates(load_config(folder))
    chosen = pick_device(device)
    model = load_model(folder, torch.bfloat16 if chosen == "cuda" else torch.float32, chosen)
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
    item = Item(
        None, [{"role": "user", "content": content}], tuple(Path(i) for i in images), None, {"source": "--prompt"}
    )
    inputs = model_inputs(encode_prompt(item, processor))
    started = time.monotonic()
    with torch.inference_mode(), generating():
        ids = model.generate(
            **{k: v.to(chosen) for k, v in inputs.items()},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            logits_processor=[refuse_no_numbers],
        )
    seconds = time.monotonic() - started
    new = ids[0, inputs["input_ids"].shape[1] :]
    text = tokenizer_of(processor).decode(new, skip_special_tokens=True)
    if not text.strip():
        say("the model ended its answer before the first word")
    return {"answer": text.strip(), "new_tokens": len(new), "seconds": round(seconds, 3)}
