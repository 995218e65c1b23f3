"""RMS norms and routers found by trying: which are, and that what is put in their place computes the same."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pickle
from copy import deepcopy
from dataclasses import astuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mopeq.kernels import routers, triton
from mopeq.plugins import quick

SIZES = dict(hidden_size=100, num_experts_per_tok=3, num_experts=12, num_local_experts=12, n_routed_experts=12)
ONE_GROUP = dict(n_group=1, topk_group=1)
ROUTERS = [
    ("deepseek_v2", "DeepseekV2TopkRouter", dict(routed_scaling_factor=16.0, topk_method="greedy", **ONE_GROUP)),
    ("deepseek_v3", "DeepseekV3TopkRouter", dict(routed_scaling_factor=2.5, norm_topk_prob=True, **ONE_GROUP)),
    ("deepseek_v3", "DeepseekV3TopkRouter", dict(routed_scaling_factor=2.827, norm_topk_prob=False, **ONE_GROUP)),
    ("qwen3_moe", "Qwen3MoeTopKRouter", dict(norm_topk_prob=True)),
    ("olmoe", "OlmoeTopKRouter", dict(norm_topk_prob=False)),
    ("mixtral", "MixtralTopKRouter", {}),
]
OTHERS = [
    ("deepseek_v2", "DeepseekV2TopkRouter",
     dict(routed_scaling_factor=1.0, topk_method="group_limited_greedy", n_group=4, topk_group=2)),
    ("deepseek_v3", "DeepseekV3TopkRouter",
     dict(routed_scaling_factor=2.5, norm_topk_prob=True, n_group=4, topk_group=2)),
    ("gpt_oss", "GptOssTopKRouter", {}),
]  # fmt: skip


def router(family: str, name: str, more: dict[str, Any]) -> Any:
    made = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    module = made(SimpleNamespace(**SIZES, **more))
    nn.init.normal_(module.weight, std=0.3)
    if hasattr(module, quick.CORRECTION):
        module.e_score_correction_bias.data.normal_(0, 0.2)
    return module.eval()


def sorted_by_expert(answer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    index, order = answer[2].sort(-1)
    return index, answer[1].gather(-1, order).float()


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("which", range(len(ROUTERS)))
def test_routers(which: int, tokens: int, monkeypatch: Any) -> None:
    torch.manual_seed(which)
    module = router(*ROUTERS[which]).bfloat16()
    x = torch.randn(tokens, 100).bfloat16()
    with torch.no_grad():
        wanted = module(x)
        quick.quicken(module)
        assert "_rule" in vars(module) and torch.equal(module(x)[0], wanted[0])  # on a CPU its own
        monkeypatch.setattr(routers, "refuses", lambda x: False)
        monkeypatch.setattr(routers, "available", lambda device: False)  # Triton's interpreter gets bf16 wrong
        torch.compiler.reset()
        for way in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
            found = way(x)
            assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in wanted]
            for a, b in zip(sorted_by_expert(found), sorted_by_expert(wanted), strict=True):
                assert torch.allclose(a, b, rtol=2e-2)


@pytest.mark.parametrize("which", range(len(OTHERS)))
def test_routers_that_are_left_alone(which: int) -> None:
    module = router(*OTHERS[which])
    quick.quicken(module)
    assert "forward" not in vars(module)


def test_when_a_router_is_its_own(monkeypatch: Any) -> None:
    """float32 activations, training: no case for the kernel."""
    module = router(*ROUTERS[0])
    quick.quicken(module)
    monkeypatch.setattr(routers, "refuses", lambda x: False)
    monkeypatch.setattr(routers, "route", None)  # which would fail
    module(torch.randn(3, 100))
    module.bfloat16().train()(torch.randn(3, 100).bfloat16())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("which", range(len(ROUTERS)))
def test_the_kernel(which: int, monkeypatch: Any) -> None:
    """In Triton's interpreter, float32, memory poisoned; the counters are 0 again."""
    if os.environ.setdefault("TRITON_INTERPRET", "1") != "1" or not triton.interpreted():
        pytest.skip("kernels are compiled in this process")
    torch.manual_seed(which)
    module = router(*ROUTERS[which])
    rule = quick.rule_of(module)
    assert rule is not None
    x, correction = torch.randn(5, 100), getattr(module, quick.CORRECTION, None)
    made = torch.full((5, 12), torch.nan), torch.full((5, 3), torch.nan), torch.full((5, 3), -1)
    weight = module.weight.detach()
    routers.launch(x, weight, correction, *made, rule.softmax, rule.normalized, rule.scale)
    logits = x @ weight.T
    assert torch.allclose(made[0], logits, atol=1e-4)
    values, index = routers.formula(made[0], correction, rule.k, rule.softmax, rule.normalized, rule.scale)
    assert torch.equal(made[2], index) and torch.allclose(made[1], values, rtol=1e-4)
    assert int(routers._arrived[x.device, weight.data_ptr()].sum()) == 0
    assert astuple(rule)[0] == 3


class Shifted(nn.Module):
    """Gemma's norm: weights around 0, or around another number."""

    def __init__(self, size: int, around: int = 0):
        super().__init__()
        self.weight, self.eps, self.around = nn.Parameter(torch.zeros(size)), 1e-6, around

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), 1 - self.around + self.weight, self.eps)


def test_each_norm_of_a_class_is_tried() -> None:
    for kinds in ((0, 1), (1, 0)):
        module = nn.ModuleList(Shifted(40, around) for around in kinds)
        quick.quicken(module)
        assert ["forward" in vars(child) for child in module] == [around == 1 for around in kinds]


def test_norms(monkeypatch: Any) -> None:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2RMSNorm

    module = nn.ModuleDict({"is": DeepseekV2RMSNorm(40, eps=1e-5), "shifted": Shifted(40), "layer": nn.LayerNorm(40)})
    own: Any = module["is"]
    nn.init.normal_(own.weight)
    quick.quicken(module)
    assert [name for name, child in module.items() if "forward" in vars(child)] == ["is"]
    x = torch.randn(2, 3, 40).bfloat16()
    own.bfloat16()
    wanted = type(own).forward(own, x)
    assert torch.equal(own(x), wanted)  # its own on a CPU
    on_gpu = nn.functional.rms_norm(x, (40,), own.weight, 1e-5)
    again = pickle.loads(pickle.dumps(module))
    assert again["is"].forward.args[0] is again["is"] and torch.equal(again["is"](x), wanted)
    copy = deepcopy(own)
    assert copy.forward.args[0] is copy
    assert float((on_gpu - wanted).detach().float().norm() / wanted.detach().float().norm()) < 4e-3
