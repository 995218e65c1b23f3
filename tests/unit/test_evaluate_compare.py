"""compare against a slow reference in float64, and its rules about what counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mopeq.errors import BadInput, MopeqError
from mopeq.evaluate.compare import compare


def table_model(seed: int, vocabulary: int, noise: float = 1.0):
    """Logits that depend on the token alone: a callable, as compare takes them."""
    weights_VV = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)) * noise
    return lambda batch: weights_VV[batch["input_ids"]]


def ids(seed: int, rows: int, length: int, vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference(rows: list[tuple[Tensor, Tensor, Tensor, list[int], list[int]]]) -> dict[str, float]:
    """(ids [T], original [T, V], packed [T, V], positions counted, positions whose next token is predicted)."""
    kls, losses, losses_against, same = [], [], [], []
    for ids_T, p_TV, q_TV, counted, predicts in rows:
        p, q = p_TV.double().softmax(-1), q_TV.double().softmax(-1)
        for t in counted:
            kls.append(float(sum(p[t, v] * (p[t, v].log() - q[t, v].log()) for v in range(p.shape[1]) if p[t, v] > 0)))
            same.append(int(p[t].argmax() == q[t].argmax()))
        losses += [-float(q[t, ids_T[t + 1]].log()) for t in predicts]
        losses_against += [-float(p[t, ids_T[t + 1]].log()) for t in predicts]
    kls.sort()
    return {
        "kl": sum(kls) / len(kls),
        "kl_median": kls[math.ceil(0.5 * len(kls)) - 1],
        "kl_p99": kls[math.ceil(0.99 * len(kls)) - 1],
        "kl_max": kls[-1],
        "ppl": math.exp(sum(losses) / len(losses)),
        "ppl_against": math.exp(sum(losses_against) / len(losses_against)),
        "top1_agreement": sum(same) / len(same),
        "tokens": len(kls),
        "predicted": len(losses),
    }


def close(part, wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        assert getattr(part, name) == pytest.approx(value, rel=2e-5, abs=1e-7), name


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_text_equals_the_slow_way(seed: int, chunk: int | None) -> None:
    original, packed = table_model(seed, 11), table_model(seed + 100, 11, 0.5)
    batches = [{"input_ids": ids(seed, 3, 9, 11)}, {"input_ids": ids(seed + 50, 1, 2, 11)}]
    rows = [
        (row, original(batch)[n], packed(batch)[n], list(range(len(row))), list(range(len(row) - 1)))
        for batch in batches
        for n, row in enumerate(batch["input_ids"])
    ]
    found = compare(batches, original, packed, chunk)
    close(found.all, reference(rows))
    assert found.by_modality.keys() == {"text"} and found.by_modality["text"] == found.all
    assert found.all.rows == 4 and found.kl == found.all.kl


def test_chunks_change_nothing() -> None:
    original, packed, batch = table_model(0, 50), table_model(1, 50), {"input_ids": ids(0, 2, 33, 50)}
    whole = compare([batch], original, packed).all
    for chunk in (1, 2, 7, 32, 33, 1000):
        part = compare([batch], original, packed, chunk).all
        assert (part.kl_median, part.kl_max) == (whole.kl_median, whole.kl_max)
        assert part.top1_agreement == whole.top1_agreement
        assert part.kl == pytest.approx(whole.kl, rel=1e-12) and part.ppl == pytest.approx(whole.ppl, rel=1e-12)


def test_padding_never_counts() -> None:
    original, packed = table_model(0, 9), table_model(1, 9)
    row = ids(3, 1, 6, 9)[0]
    plain = compare([{"input_ids": row[None]}], original, packed).all
    pad = torch.tensor([8, 8, 8])
    for padded, mask in (
        (torch.cat([pad, row]), [0, 0, 0, 1, 1, 1, 1, 1, 1]),
        (torch.cat([row, pad]), [1, 1, 1, 1, 1, 1, 0, 0, 0]),
    ):
        batch = {"input_ids": padded[None], "attention_mask": torch.tensor([mask])}
        assert compare([batch], original, packed).all == plain


def test_answers_count_where_there_are_pictures() -> None:
    original, packed, row = table_model(0, 12), table_model(1, 12), ids(5, 1, 8, 12)[0]
    batch = {
        "input_ids": row[None],
        "image_mask": torch.tensor([[0, 1, 1, 0, 0, 0, 0, 0]]).bool(),
        "answer_mask": torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1]]).bool(),
    }
    found = compare([batch], original, packed)
    predicting = [5, 6]  # the positions before the answer's tokens
    wanted = reference([(row, original(batch)[0], packed(batch)[0], predicting, predicting)])
    close(found.by_modality["image"], wanted)
    assert found.by_modality.keys() == {"image"} and found.all.kl_ci95 is None


def test_pictures_without_an_answer_count_their_text() -> None:
    original, packed, row = table_model(0, 12), table_model(1, 12), ids(6, 1, 6, 12)[0]
    batch = {"input_ids": row[None], "image_mask": torch.tensor([[0, 1, 1, 0, 0, 0]]).bool()}
    wanted = reference([(row, original(batch)[0], packed(batch)[0], [0, 3, 4, 5], [3, 4])])
    close(compare([batch], original, packed).all, wanted)


def test_answers_without_pictures_are_text_and_all_of_it_counts() -> None:
    original, packed = table_model(0, 12), table_model(1, 12)
    batch = {"input_ids": ids(6, 1, 6, 12)}
    answered = batch | {"answer_mask": torch.tensor([[0, 0, 0, 0, 1, 1]]).bool()}
    assert compare([answered], original, packed) == compare([batch], original, packed)


def test_the_parts_make_the_whole() -> None:
    original, packed = table_model(0, 12), table_model(1, 12)
    text, image = {"input_ids": ids(1, 2, 7, 12)}, {"input_ids": ids(2, 1, 5, 12)}
    image["image_mask"] = torch.tensor([[1, 0, 0, 0, 0]]).bool()
    found = compare([text, image], original, packed)
    parts = found.by_modality
    assert found.all.tokens == parts["text"].tokens + parts["image"].tokens == 14 + 4
    total = sum(part.kl * part.tokens for part in parts.values())
    assert found.all.kl == pytest.approx(total / found.all.tokens, rel=1e-12)
    low, high = found.all.kl_ci95
    assert low < found.all.kl < high
    assert found.to_json()["by_modality"]["text"]["kl"] == parts["text"].kl


def test_the_same_model_loses_nothing() -> None:
    model = table_model(0, 30)
    found = compare([{"input_ids": ids(0, 2, 20, 30)}], model, model).all
    assert (found.kl, found.kl_max, found.top1_agreement) == (0.0, 0.0, 1.0) and found.ppl == found.ppl_against


def test_alone_there_is_only_perplexity() -> None:
    batch = {"input_ids": ids(0, 2, 20, 30)}
    alone = compare([batch], None, table_model(1, 30)).all
    both = compare([batch], table_model(0, 30), table_model(1, 30)).all
    assert alone.ppl == both.ppl and alone.tokens == both.tokens
    assert alone.kl is alone.kl_median is alone.kl_ci95 is alone.ppl_against is alone.top1_agreement is None


def test_half_precision_logits_are_measured_in_float32() -> None:
    original, packed, batch = table_model(0, 40), table_model(1, 40), {"input_ids": ids(0, 1, 10, 40)}
    half = compare([batch], lambda b: original(b).bfloat16(), lambda b: packed(b).bfloat16()).all
    exact = compare([batch], lambda b: original(b).bfloat16().float(), lambda b: packed(b).bfloat16().float()).all
    assert half == exact


def test_tokens_that_cannot_be() -> None:
    """A vocabulary padded with -inf costs nothing; a token the packed model rules out costs everything."""
    never = torch.tensor([0.0] * 9 + [-math.inf])
    original, packed, batch = table_model(0, 10), table_model(1, 10), {"input_ids": ids(0, 1, 6, 9)}
    found = compare([batch], lambda b: original(b) + never, lambda b: packed(b) + never).all
    assert math.isfinite(found.kl) and found.kl > 0
    assert compare([batch], original, lambda b: packed(b) + never).all.kl == math.inf


def test_not_a_number_is_refused_and_named() -> None:
    good, batch = table_model(0, 10), {"input_ids": ids(0, 1, 6, 10)}

    def bad(b):
        return good(b).index_fill(1, torch.tensor([2]), math.nan)

    with pytest.raises(MopeqError, match="packed"):
        compare([batch], good, bad)
    with pytest.raises(MopeqError, match="original"):
        compare([batch], bad, good)


def test_nothing_to_measure_is_said() -> None:
    with pytest.raises(BadInput, match="no position"):
        compare([], table_model(0, 5), table_model(1, 5))


def test_masks_of_ours_do_not_reach_the_models() -> None:
    seen = []

    def model(batch):
        seen.append(sorted(batch))
        return table_model(0, 9)(batch)

    mask = torch.ones(1, 4, dtype=torch.bool)
    batch = {"input_ids": ids(0, 1, 4, 9), "answer_mask": mask, "image_mask": ~mask, "pixel_values": mask}
    compare([batch], None, model)
    assert seen == [["input_ids", "pixel_values"]]


def test_the_interval_covers_the_truth_about_19_times_in_20() -> None:
    """Rows with one mean of their own: an interval over positions would be far too narrow."""
    truth_of = [0.5, 1.5]
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.0, 0.0])

    def packed_for(kl: float) -> Tensor:  # logits of two tokens whose KL from a fair coin is kl
        low, high = 0.0, 50.0
        for _ in range(80):
            middle = (low + high) / 2
            value = float((0.5 * (math.log(0.5) - torch.log_softmax(torch.tensor([middle, 0.0]).double(), 0))).sum())
            low, high = (middle, high) if value < kl else (low, middle)
        return torch.tensor([low, 0.0])

    two = [packed_for(kl) for kl in truth_of]
    inside = 0
    for _ in range(200):
        which = torch.randint(2, (40,), generator=generator)
        batch = {"input_ids": torch.zeros(40, 12, dtype=torch.long)}
        logits = torch.stack([two[n] for n in which.tolist()])[:, None].expand(40, 12, 2)
        low, high = compare([batch], lambda b: p.expand(40, 12, 2), lambda b, q=logits: q).all.kl_ci95
        inside += low <= 1.0 <= high
    assert 0.90 <= inside / 200 <= 0.99


def test_each_row_is_kept_and_the_rows_make_the_whole() -> None:
    original, noise = table_model(0, 12), table_model(1, 12, 0.5)

    def packed(batch):
        return original(batch) + noise(batch)

    text, image = {"input_ids": ids(1, 3, 7, 12)}, {"input_ids": ids(2, 1, 5, 12)}
    image["image_mask"] = torch.tensor([[1, 0, 0, 0, 0]]).bool()
    found = compare([text, image], original, packed)
    assert [row.modality for row in found.rows] == ["text"] * 3 + ["image"]
    assert sum(row.kl for row in found.rows) / sum(row.tokens for row in found.rows) == pytest.approx(found.all.kl)
    assert math.exp(sum(r.nll for r in found.rows) / sum(r.predicted for r in found.rows)) == pytest.approx(
        found.all.ppl
    )
    assert len({row.id for row in found.rows}) == 4
    other = compare([text, image], original, table_model(2, 12))  # another packed model: the same rows
    assert [row.id for row in other.rows] == [row.id for row in found.rows]
    assert found.all.ppl_change == pytest.approx(found.all.ppl / found.all.ppl_against - 1)
    assert found.all.ppl_change_ci95[0] <= found.all.ppl_change <= found.all.ppl_change_ci95[1]
    assert found.all.top1_ci95[0] <= found.all.top1_agreement <= found.all.top1_ci95[1]
    alone = compare([text], None, packed)
    assert alone.all.ppl_change is None and alone.all.top1_ci95 is None and alone.rows[0].kl == 0.0


def test_models_of_two_vocabularies_are_not_compared() -> None:
    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    with pytest.raises(BadInput, match="320 logits a token, the packed model 384"):
        compare([batch], lambda _: torch.zeros(1, 3, 320), lambda _: torch.zeros(1, 3, 384))
