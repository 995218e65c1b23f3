"""Experts modules that transformers did not give the shared interface: a small class each, mixed into the module's own.

Each says where the weights lie (`stored`, `arranged`, `stacked_biases`, `parts`), and states the module's own call in
terms of the shared one (`share`). Rows of ADAPTERS in `__init__.py` name them; `seam.py` does the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mopeq.seam import Adapted, Run


class Step3p7(Adapted):
    """gate_up_proj [E, 2I, H] and down_proj [E, H, I], with a clamp of its own behind `_apply_gate`."""

    parts = ("gate_up_proj", "down_proj")

    def share(self, run: Run, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return run(x_TH, index_TK, weight_TK)


class Longcat(Adapted):
    """As the shared interface, but experts from `num_routed_experts` on hand their input on unchanged."""

    parts = ("gate_up_proj", "down_proj")
    keeps = ("num_routed_experts",)
    num_routed_experts: int

    def arranged(self, stored: list[Tensor]) -> dict[str, Tensor]:
        gate, up = stored[0][: self.num_routed_experts].chunk(2, 1)  # it has rows for the others too
        return {"gate": gate, "up": up, "down": stored[1]}

    def share(self, run: Run, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        handed_on = (weight_TK * (index_TK >= self.num_routed_experts)).sum(-1, keepdim=True)
        return run(x_TH, index_TK, weight_TK) + (x_TH * handed_on).to(x_TH.dtype)


class Llama4(Adapted):
    """Called with a copy of all tokens for each expert [E * T, H], scaled by the router: zero where not chosen.

    Only the chosen copies run here, T rows at a time for each of a token's choices (one, in every released model). The
    caller sums over the copies, so each token's sum is put into its first.
    """

    parts = ("gate_up_proj", "down_proj")
    is_transposed = True
    keeps = ("hidden_size",)
    hidden_size: int

    def share(self, run: Run, copies: Tensor) -> Tensor:
        x_ETH = copies.view(self.num_experts, -1, self.hidden_size)
        k = self.config.num_experts_per_tok
        index_TK = (x_ETH != 0).any(-1).T.to(torch.uint8).topk(k, -1).indices
        tokens = torch.arange(len(index_TK), device=copies.device)
        ones_T1 = copies.new_ones(len(index_TK), 1)
        out_ETH = torch.zeros_like(x_ETH)
        for index_T in index_TK.unbind(1):
            out_ETH[0] += run(x_ETH[index_T, tokens], index_T[:, None], ones_T1)
        return out_ETH.view(copies.shape)


class Dbrx(Adapted):
    """w1 (gate), v1 (up) and w2 (down), each [E * I, H]; batches of tokens come and go in three dimensions."""

    parts = ("mlp",)
    mlp: Any
    keeps = ("hidden_size",)
    hidden_size: int

    def adopted(self) -> None:
        self.act_fn = self.mlp.activation_fn

    def stored(self) -> list[Tensor]:
        return [self.mlp.w1, self.mlp.v1, self.mlp.w2]

    def arranged(self, stored: list[Tensor]) -> dict[str, Tensor]:
        gate, up, down = (w.unflatten(0, (self.num_experts, -1)) for w in stored)
        return {"gate": gate, "up": up, "down": down.transpose(1, 2)}

    def share(self, run: Run, x_BTH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return run(x_BTH.reshape(-1, self.hidden_size), index_TK, weight_TK).view(x_BTH.shape)


class JetMoe(Adapted):
    """Router, experts and a bias after their sum, in one module."""

    parts = ("input_linear", "output_linear")
    input_linear: Any
    output_linear: Any
    router: Any
    activation: Any
    bias: Tensor

    def adopted(self) -> None:
        self.act_fn = self.activation

    def stored(self) -> list[Tensor]:
        return [self.input_linear.weight, self.output_linear.weight]

    def share(self, run: Run, x_BTH: Tensor) -> Tensor:
        x_TH = x_BTH.reshape(-1, x_BTH.shape[-1])
        top_TK, index_TK = self.router.layer(x_TH).float().topk(self.router.top_k, dim=1)
        return run(x_TH, index_TK, top_TK.softmax(1).type_as(x_TH)).view(x_BTH.shape) + self.bias


class ModulePerExpert(Adapted):
    """A dict of modules `expert_<e>`, each of two linear layers, `words`, with an activation between."""

    has_gate = False
    words: tuple[str, str]

    def adopted(self) -> None:
        self.parts = tuple(f"expert_{e}" for e in range(self.num_experts))
        self.act_fn = self.get_submodule("expert_0").act

    def linears(self, word: str) -> list[nn.Linear]:
        return [self.get_submodule(f"{part}.{word}") for part in self.parts]  # type: ignore[misc]

    def stored(self) -> list[Tensor]:
        return [linear.weight for word in self.words for linear in self.linears(word)]

    def arranged(self, stored: list[Tensor]) -> dict[str, Tensor]:
        return {"up": torch.stack(stored[: self.num_experts]), "down": torch.stack(stored[self.num_experts :])}


class Switch(ModulePerExpert):
    """One expert a token, as a mask [T, 1, E]; a token beyond an expert's capacity has none."""

    words = ("wi", "wo")

    def share(self, run: Run, x_TH: Tensor, mask_T1E: Tensor, weight_TK: Tensor) -> Tensor:
        index_TK = mask_T1E.argmax(-1).masked_fill(mask_T1E.sum(-1) == 0, self.num_experts)
        return run(x_TH, index_TK, weight_TK)


class Scale(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Nllb(ModulePerExpert):
    """Chosen by a mask [T, E] of a token's first choice, with the router's weights [T, E] for both choices.

    transformers 5.23 takes the mask's values for experts' numbers: every first choice runs as expert 1, every second
    one as expert 0. That is what its users get, so it is what is computed here.
    """

    words = ("fc1", "fc2")
    moe_token_dropout: float
    has_bias = True
    has_post_expert_norm = True

    def adopted(self) -> None:
        super().adopted()
        self.post_expert_norm = Scale(1 - self.moe_token_dropout)

    def stacked_biases(self) -> dict[str, Tensor]:
        return {
            p: torch.stack([x.bias for x in self.linears(w)]) for p, w in zip(("up", "down"), self.words, strict=True)
        }

    def share(self, run: Run, x_TH: Tensor, mask_TE: Tensor, weight_TE: Tensor) -> Tensor:
        return run(x_TH, mask_TE.masked_fill(weight_TE == 0, self.num_experts), weight_TE)
