"""Models of transformers, loaded whole: for sensing, evaluating, generating. No remote code, no missing weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mopeq.errors import BadInput, MopeqError, first_line


def quiet_transformers() -> None:
    """mopeq speaks for itself; transformers' bars and advice stay out of the terminal."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def model_class(config: Any) -> Any:
    """The class of a config's full model: image-text-to-text where there is one, else causal."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise BadInput(
        f"transformers has no generating model for {config.model_type!r}", "is this checkpoint a language model?"
    )


def load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except MopeqError:
        raise
    except Exception as problem:  # transformers raises whatever its config classes raise
        raise BadInput(
            f"transformers cannot read {folder}/config.json: {first_line(problem)}",
            "is the family known to transformers?",
        ) from None


def load_model(folder: Path, dtype: torch.dtype, device: str, attention: str | None = None) -> Any:
    """The checkpoint's model in eval mode. MopeqError if a tensor of it is missing or does not fit.

    `attention="eager"` for what differentiates twice (SDPA on CPU has no double backward).
    """
    quiet_transformers()
    config = load_config(folder)
    options = {} if attention is None else {"attn_implementation": attention}
    model, info = model_class(config).from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    for kind in ("missing_keys", "mismatched_keys"):
        keys = info.get(kind)
        if keys:
            raise MopeqError(
                f"{folder}: {len(keys)} tensors are {kind.split('_')[0]}, {sorted(map(str, keys))[0]} the first",
                "the checkpoint does not fit the model its config describes",
            )
    return model.eval().to(device)


def pick_device(wanted: str) -> str:
    """`auto` is cuda where present, else cpu."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: no CUDA device is present", "try --device cpu")
    if wanted not in ("cpu", "cuda"):
        raise BadInput(f"--device {wanted} is not offered", "choose auto, cpu or cuda")
    return wanted
