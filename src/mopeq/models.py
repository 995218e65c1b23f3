"""Models of transformers, loaded whole: for sensing, evaluating, generating. No remote code, no missing weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from mopeq.checkpoint import INDEX, open_checkpoint, read_json
from mopeq.errors import BadInput, MopeqError, first_line
from mopeq.nouns import PackedTensor, TensorInfo
from mopeq.seam import spare_odd_widths
from mopeq.sources import KINDS, quantization_of, unpacked
from mopeq.stream import read_tensor


def quiet_transformers() -> None:
    """mopeq speaks for itself; transformers' bars and advice stay out of the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def model_class(config: Any) -> Any:
    """The class of a config's full model: image-text-to-text where there is one, else what it has, best first."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    )

    for mapping in (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    ):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise BadInput(
        f"transformers has no generating model for {config.model_type!r}", "is this checkpoint a language model?"
    )


def logits_of(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """A model's logits in one pass over token ids. Of several models in one the first that has logits speaks (the
    thinker before its talker), and a decoder is given the encoder's ids too."""
    speaks = model
    if type(model).forward is torch.nn.Module.forward:
        speaks = next(child for child in model.children() if type(child).forward is not torch.nn.Module.forward)
    if "decoder_input_ids" in signature(speaks.forward).parameters:
        more = {"decoder_input_ids": ids} | more
    logits: torch.Tensor = speaks(input_ids=ids, use_cache=False, **more).logits
    return logits


def check_reads_text(config: Any, hint: str = "use what needs no data: --sensitivity hessian --method rtn") -> None:
    """BadInput for a model that token ids alone do not run: a translator, or several models in one."""
    forward = model_class(config).forward
    if forward is torch.nn.Module.forward or "decoder_input_ids" in signature(forward).parameters:
        raise BadInput(
            f"{config.model_type} does not read text as a causal language model does, so it cannot be shown any", hint
        )


def check_generates(config: Any) -> None:
    """BadInput for a model that predicts no next token: a classifier of tokens, say."""
    if not model_class(config).can_generate():
        raise BadInput(
            f"{config.model_type} predicts no next token: it is no language model",
            "mopeq packs it; use it by transformers, after `import mopeq`",
        )


@contextmanager
def generating() -> Iterator[None]:
    """MopeqError for whatever transformers' own generation raises, which many a model's config leads to."""
    try:
        yield
    except (MopeqError, MemoryError):
        raise
    except Exception as problem:
        raise MopeqError(
            f"transformers does not generate with this model: {first_line(problem)}",
            "does the original generate? --debug shows where it ends",
        ) from problem


def load_config(folder: Path) -> Any:
    """The model's config; of a source that mopeq unpacks itself (sources.py), as it was before it was packed."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} has no config.json", "give the folder of a checkpoint")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        unpacks = bool(packed_tensors(folder))
        for scope in (config, *vars(config).values()):  # an empty one says nothing, and is none to transformers' loader
            if hasattr(scope, "quantization_config") and (unpacks or not scope.quantization_config):
                del scope.quantization_config
            if getattr(scope, "_attn_implementation", None) not in (None, "eager", "sdpa"):
                scope._attn_implementation = None  # a package of its authors' machine; what it computes is the same
        return config
    except MopeqError:
        raise
    except Exception as problem:  # transformers raises whatever its config classes raise
        raise BadInput(
            f"transformers cannot read {folder}/config.json: {first_line(problem)}",
            "is the file whole, and the family known to transformers?",
        ) from None


def packed_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a source stored packed in a way that mopeq unpacks itself; {} for every other checkpoint."""
    config = read_json(folder / "config.json")
    found = quantization_of(config) if isinstance(config, dict) else None
    if not isinstance(found, dict) or str(found.get("quant_method")) not in KINDS:
        return {}
    tensors = unpacked(config, open_checkpoint(folder).tensors)[1]
    return tensors if any(isinstance(t, PackedTensor) for t in tensors.values()) else {}


def unnamed_tensors(folder: Path) -> Mapping[str, TensorInfo]:
    """The tensors of a source whose shards transformers would not find: other names than its own, or many and no index;
    {} for every other."""
    if any((folder / name).exists() for name in ("model.safetensors", INDEX)):
        return {}
    return open_checkpoint(folder).tensors


def load_model(folder: Path, dtype: torch.dtype, device: str, attention: str | None = None) -> Any:
    """The checkpoint's model in eval mode. MopeqError if a tensor of it is missing or does not fit.

    `attention="eager"` for what differentiates twice (SDPA on CPU has no double backward).
    """
    quiet_transformers()
    config = load_config(folder)
    options: dict[str, Any] = {"config": config} | ({} if attention is None else {"attn_implementation": attention})
    tensors = packed_tensors(folder) or unnamed_tensors(folder)
    if tensors:
        options |= {"state_dict": {name: widened(folder, t, dtype) for name, t in tensors.items()}}
    place = None if tensors else folder
    options |= {"local_files_only": True, "output_loading_info": True}
    try:
        model, info = model_class(config).from_pretrained(place, dtype=dtype, **options)
    except MopeqError:
        raise
    except Exception as problem:  # transformers raises whatever its loader raises
        raise MopeqError(
            f"{folder} does not load: {first_line(problem)}", "are its config, index and weights of one checkpoint?"
        ) from None
    for kind in ("missing_keys", "mismatched_keys"):
        keys = info.get(kind)
        if keys:
            raise MopeqError(
                f"{folder}: {len(keys)} tensors are {kind.split('_')[0]}, {sorted(map(str, keys))[0]} the first",
                "the checkpoint does not fit the model its config describes",
            )
    spare_odd_widths(model)
    if tensors and (folder / "generation_config.json").exists():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval().to(device)


def widened(folder: Path, tensor: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
    """A source's tensor, in float32 at once where the model will be, so that it is not held twice."""
    value = read_tensor(folder, tensor)
    return value.float() if dtype == torch.float32 and value.is_floating_point() else value


def pick_device(wanted: str) -> str:
    """`auto` is cuda where present, else cpu."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: no CUDA device is present", "try --device cpu")
    if wanted not in ("cpu", "cuda"):
        raise BadInput(f"--device {wanted} is not offered", "choose auto, cpu or cuda")
    return wanted
