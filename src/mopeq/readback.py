"""Read the finished folder back and compare: exit 0 with a broken model is the commonest fault of this field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.assemble import dense_tensors
from mopeq.errors import MopeqError
from mopeq.models import load_config, load_model, model_class, quiet_transformers
from mopeq.nouns import Format, MoESpec, PrecisionMap
from mopeq.packed import unsealed_allowed

TOKENS = 16
TOLERANCE = 1e-3  # of the logits' spread, float32: widths, names or layouts gone wrong miss it by far


def some_tokens(config: Any, seed: int) -> Tensor:
    """A row of random token ids without special ones, which may stand for pictures."""
    text = config.get_text_config()
    special = {v for c in (config, text) for k, v in vars(c).items() if k.endswith("_id") and isinstance(v, int)}
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(min(text.vocab_size, 30000), generator=generator)
    return torch.tensor([i for i in ids.tolist() if i not in special][:TOKENS])[None]


def load_dense(source: Path, out: Path, spec: MoESpec, map_: PrecisionMap, other: Format | None) -> Any:
    """The source's model with the packed folder's values put in its own tensors, loaded by transformers' own path."""
    quiet_transformers()
    config = load_config(source)
    state = dict(dense_tensors(out, spec, map_, other))
    model, info = model_class(config).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        raise MopeqError(
            f"{source}: {sorted(map(str, info['missing_keys']))[0]} is missing", "please report this model"
        )
    return model.eval()


def read_back(source: Path, out: Path, spec: MoESpec, map_: PrecisionMap, other: Format | None, seed: int) -> float:
    """Largest logit difference between the packed model and the dequantized reference, relative to the logits'
    spread. MopeqError if it exceeds TOLERANCE or is not finite."""
    with unsealed_allowed(), torch.no_grad():
        packed = load_model(out, torch.float32, "cpu")
        ids = some_tokens(packed.config, seed)
        found = packed(input_ids=ids, use_cache=False).logits.double()
        del packed
    with torch.no_grad():
        wanted = load_dense(source, out, spec, map_, other)(input_ids=ids, use_cache=False).logits.double()
    return compare_logits(found, wanted)


def compare_logits(found: Tensor, wanted: Tensor) -> float:
    spread = float(wanted.std())
    worst = float((found - wanted).abs().max()) / max(spread, 1e-30)
    if not torch.isfinite(found).all() or not worst <= TOLERANCE:
        raise MopeqError(
            f"the packed model's logits differ from the dequantized reference by {worst:.2g} of their spread",
            "the checkpoint was not sealed and will not load; please report this model",
        )
    return worst
