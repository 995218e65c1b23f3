"""What the native ports share of generating: logits from a decoder's output, and pictures that go in once."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast


class PicturesOnce:
    """Stands before GenerationMixin among a model's bases. `picture_inputs`: the forward's arguments that hold
    pictures."""

    picture_inputs: ClassVar[tuple[str, ...]]
    loss_function: Any  # PreTrainedModel's

    def causal_output(
        self, out: Any, head: nn.Module, labels: Tensor | None, logits_to_keep: int | Tensor
    ) -> MoeCausalLMOutputWithPast:
        """The decoder's output with logits [B, kept, V] of its last hidden states, and the loss where labels are."""
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = head(out.last_hidden_state[:, last])
        loss = None if labels is None else self.loss_function(logits, labels, logits.shape[-1])
        return MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            router_logits=getattr(out, "router_logits", None),
        )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The pictures go in with the prompt only; without a cache every step is the prompt again."""
        parent: Any = super()
        inputs = parent.prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for key in self.picture_inputs:
                inputs.pop(key, None)
        return inputs
