"""Loading that fails where transformers only warns; for the native ports."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from mopeq.errors import BadInput


class FatalMissingKeys(PreTrainedModel):
    """A model whose `from_pretrained` refuses a checkpoint that lacks a tensor, instead of inventing it at random."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing:
            raise BadInput(
                f"{pretrained_model_name_or_path}: {len(missing)} tensors are missing, {missing[0]} first",
                "is a shard absent, or do config.json and weights belong to different checkpoints?",
            )
        # without a generation_config.json transformers looks for these at the top of config.json only
        said = getattr(model, "generation_config", None)
        for key in ("bos_token_id", "eos_token_id") if said is not None else ():
            if getattr(said, key) is None:
                setattr(said, key, getattr(model.config, key, None))
        return (model, info) if output_loading_info else model
