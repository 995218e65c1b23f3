"""KL(original || packed), perplexity and top-1 agreement, streamed: no log-probability outlives its batch.

    for batch: original(batch), packed(batch) -> logits [B, T, V] -> per position: KL, next-token loss, first choice

Text and pictures are kept apart. In a row without pictures every position counts. In a row with pictures the
positions that predict the answer count; if it has no answer, those that hold text. Positions under a zero of
`attention_mask` never count. Numbers are float32 on the CPU, summed in float64; KL is in nats.
What is left out: which expert did it. That is `sense`'s business.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mopeq.data.encode import Batch, model_inputs
from mopeq.errors import BadInput, MopeqError
from mopeq.evaluate.paired import mean_of

Logits = Callable[[Batch], Tensor]
CHUNK_ELEMENTS = 2**23  # logits turned to float32 at a time: 32 MiB, a few such temporaries live at once


@dataclass(frozen=True)
class Part:
    """What was measured over some positions. KL in nats per position; None where it was not measured.

    kl_ci95: of the mean over rows (windows, items), weighted by their positions, by a bootstrap over rows, since
      positions of one row are not independent; None with fewer than two rows, and where all rows are alike.
    ppl: of the packed model, next tokens inside their row; ppl_against: of the original
    ppl_change: ppl / ppl_against - 1, with its 95 % interval from a paired bootstrap over rows
    top1_agreement: share of positions where both models' first choice is the same, with such an interval
    tokens: positions counted; predicted: next tokens in ppl; rows: windows or items
    """

    kl: float | None
    kl_median: float | None
    kl_p99: float | None
    kl_max: float | None
    kl_ci95: tuple[float, float] | None
    ppl: float | None
    ppl_against: float | None
    ppl_change: float | None
    ppl_change_ci95: tuple[float, float] | None
    top1_agreement: float | None
    top1_ci95: tuple[float, float] | None
    tokens: int
    predicted: int
    rows: int


@dataclass(frozen=True)
class Row:
    """One window's or item's sums, kept so that two checkpoints are compared without running again.

    id: a digest of its tokens. kl, nll (next tokens' loss), nll_against, same (first choices): sums over `tokens` or
    `predicted` positions; 0 where there was no original.
    """

    id: str
    modality: str
    tokens: int
    predicted: int
    kl: float
    nll: float
    nll_against: float
    same: int


@dataclass(frozen=True)
class Comparison:
    """The whole, its parts by modality: "text" and "image" (absent where there was none), and each row apart."""

    all: Part
    by_modality: dict[str, Part]
    rows: list[Row]

    def __getattr__(self, name: str) -> Any:
        """`comparison.kl` is `comparison.all.kl`."""
        if name in Part.__dataclass_fields__:
            return getattr(self.all, name)
        raise AttributeError(name)

    def to_json(self) -> dict[str, Any]:
        return asdict(self.all) | {"by_modality": {name: asdict(part) for name, part in self.by_modality.items()}}


@dataclass
class _Sums:
    """One modality's rows; KL is kept per position as 4 bytes, for the quantiles."""

    kl: list[Tensor] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def compare(batches: Iterable[Batch], original: Logits | None, packed: Logits, chunk: int | None = None) -> Comparison:
    """Measure `packed` against `original` over the batches; with original=None only perplexity.

    batches: dicts with input_ids [B, T], attention_mask [B, T] (all ones if absent), answer_mask and image_mask
      [B, T] bool (optional, kept from the model), and whatever else the models take
    original, packed: batch -> logits [B, T, V], any float dtype, any device
    chunk: positions turned to float32 at a time; as many as CHUNK_ELEMENTS allows if None. Changes no result
    MopeqError if a model gives NaN; BadInput if there is nothing to measure, or the two have not the same vocabulary.
    """
    sums = {"text": _Sums(), "image": _Sums()}
    with torch.no_grad():
        for batch in batches:
            inputs = model_inputs(batch)
            ours, theirs = packed(inputs), original(inputs) if original else None
            if theirs is not None and theirs.shape != ours.shape:
                raise BadInput(
                    f"the original has {theirs.shape[-1]:,} logits a token, the packed model {ours.shape[-1]:,}",
                    "--against is the model that it was made from",
                )
            for row in range(len(ours)):
                _add_row(sums, batch, row, ours[row], None if theirs is None else theirs[row], chunk)
    parts = {name: _part([one], original is not None) for name, one in sums.items() if one.rows}
    if not parts:
        raise BadInput("no position to measure: the data holds no text and no answers", "give more data")
    rows = [row for one in sums.values() for row in one.rows]
    return Comparison(_part(list(sums.values()), original is not None), parts, rows)


def _add_row(
    sums: dict[str, _Sums], batch: Batch, row: int, ours_TV: Tensor, theirs_TV: Tensor | None, chunk: int | None
) -> None:
    counted_T, predicts_T, modality = _positions(batch, row)
    if not counted_T.any():
        return
    into, ids_T = sums[modality], batch["input_ids"][row].cpu()
    target_T = torch.cat([ids_T[1:], ids_T[:1]])  # the last has none; predicts_T is False there
    step = chunk or max(1, CHUNK_ELEMENTS // ours_TV.shape[-1])
    kls: list[Tensor] = []
    nll = nll_against = 0.0
    same = predicted = 0
    for at_T in counted_T.nonzero()[:, 0].split(step):
        q_TV = _log_probabilities(ours_TV, at_T, "packed")
        predicts = predicts_T[at_T]
        nll += _nll(q_TV, target_T[at_T], predicts)
        predicted += int(predicts.sum())
        if theirs_TV is None:
            continue
        p_TV = _log_probabilities(theirs_TV, at_T, "original")
        nll_against += _nll(p_TV, target_T[at_T], predicts)
        same += int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
        kls.append(_kl(p_TV, q_TV))
    kl_T = torch.cat(kls) if kls else torch.zeros(0, dtype=torch.float64)
    into.kl.append(kl_T.float())
    name = hashlib.sha256(ids_T.numpy().tobytes()).hexdigest()[:16]
    tokens, kl = int(counted_T.sum()), float(kl_T.sum())
    into.rows.append(Row(name, modality, tokens, predicted, kl, nll, nll_against, same))


def _positions(batch: Batch, row: int) -> tuple[Tensor, Tensor, str]:
    """(positions that count [T], those whose next token counts in perplexity [T], "text" or "image")."""

    def mask(name: str, otherwise: Tensor) -> Tensor:
        return batch[name][row].bool().cpu() if name in batch else otherwise

    ids_T = batch["input_ids"][row]
    every_T = torch.ones(len(ids_T), dtype=torch.bool)
    valid_T, image_T = mask("attention_mask", every_T), mask("image_mask", ~every_T)
    followed_T = valid_T & _next(valid_T)
    if not image_T.any():
        return valid_T, followed_T, "text"
    answer_T = mask("answer_mask", ~every_T) & valid_T
    if answer_T.any():
        before_T = followed_T & _next(answer_T)
        return before_T, before_T, "image"
    return valid_T & ~image_T, followed_T & ~image_T & ~_next(image_T), "image"


def _next(mask_T: Tensor) -> Tensor:
    """mask at position t + 1; False for the last position."""
    return torch.cat([mask_T[1:], mask_T.new_zeros(1)])


def _log_probabilities(logits_TV: Tensor, at_T: Tensor, whose: str) -> Tensor:
    logits_tV = logits_TV[at_T.to(logits_TV.device)].to("cpu", torch.float32)
    logp_tV = torch.log_softmax(logits_tV, dim=-1)
    if logp_tV.isnan().any():
        raise MopeqError(f"the {whose} model's logits are not numbers (NaN or infinite)", "mopeq verify the checkpoint")
    return logp_tV


def _kl(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """KL(p || q) [T] in float64 sums of float32 terms, from log-probabilities. Where p is 0 the term is 0."""
    prob_TV = p_TV.exp()
    return torch.where(prob_TV > 0, prob_TV * (p_TV - q_TV), 0.0).sum(-1, dtype=torch.float64)


def _nll(logp_TV: Tensor, target_T: Tensor, predicts_T: Tensor) -> float:
    return -float(logp_TV.gather(1, target_T[:, None])[predicts_T].sum(dtype=torch.float64))


def _part(sums: list[_Sums], against: bool) -> Part:
    kl_T = torch.cat([kl for one in sums for kl in one.kl])
    rows = [row for one in sums for row in one.rows]
    tokens, predicted = sum(row.tokens for row in rows), sum(row.predicted for row in rows)
    mean = math.fsum(row.kl for row in rows) / tokens if against else None
    ordered = kl_T.sort().values
    longer = mean_of([r.nll - r.nll_against for r in rows], [r.predicted for r in rows]) if against else None
    alike = mean_of([row.same for row in rows], [row.tokens for row in rows]) if against else None
    return Part(
        kl=mean,
        kl_median=_quantile(ordered, 0.5) if against else None,
        kl_p99=_quantile(ordered, 0.99) if against else None,
        kl_max=_quantile(ordered, 1.0) if against else None,
        kl_ci95=_pair(mean_of([row.kl for row in rows], [row.tokens for row in rows]) if against else None, float),
        ppl=_perplexity(math.fsum(row.nll for row in rows), predicted),
        ppl_against=_perplexity(math.fsum(row.nll_against for row in rows), predicted) if against else None,
        ppl_change=None if longer is None else _expm1(longer["mean"]),
        ppl_change_ci95=_pair(longer, _expm1),
        top1_agreement=sum(row.same for row in rows) / tokens if against else None,
        top1_ci95=_pair(alike, float),
        tokens=tokens,
        predicted=predicted,
        rows=len(rows),
    )


def _pair(found: dict[str, Any] | None, turned: Callable[[float], float]) -> tuple[float, float] | None:
    """The interval's ends, each turned."""
    return None if found is None or found["ci95"] is None else (turned(found["ci95"][0]), turned(found["ci95"][1]))


def _expm1(x: float) -> float:
    return math.expm1(x) if x < 700 else math.inf


def _perplexity(nll: float, predicted: int) -> float | None:
    if not predicted:
        return None
    return math.exp(nll / predicted) if nll / predicted < 700 else math.inf


def _quantile(ordered: Tensor, share: float) -> float:
    """The smallest value that at least `share` of the positions do not exceed."""
    return float(ordered[max(0, math.ceil(share * len(ordered)) - 1)])
