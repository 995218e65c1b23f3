"""The DeepSeek-VL2 port equals the original: fixtures made by the original code, and properties on tiny checkpoints.

`pytest -s -k original` prints the equivalence table: variant x what x greatest difference.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from shared_files import shared
from tiny_ports import VL2_LANGUAGE, write_json, write_tiny
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from mopeq.errors import BadInput
from mopeq.families import deepseek_vl2
from mopeq.families.deepseek_vl2.configuration_deepseek_vl2 import DeepseekVLV2TextConfig
from mopeq.families.deepseek_vl2.modeling_deepseek_vl2 import DeepseekVLV2Router
from mopeq.families.deepseek_vl2.processing_deepseek_vl2 import DeepseekVLV2Processor, select_best_resolution
from mopeq.seam import experts_modules, plain_forward, watch

deepseek_vl2.register()
TOLERANCE = 1e-4
SIZES = ("tiny", "small", "base")
TINY = tuple(VL2_LANGUAGE)
EXACT = ("input_ids", "attention_mask", "images_seq_mask", "images_spatial_crop")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def load(folder: Path, **kwargs):
    kwargs.setdefault("dtype", torch.float32)
    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder, **kwargs)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def user(*parts) -> dict:
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


def greedy(model, inputs, tokens=6, **kwargs) -> list[list[int]]:
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **kwargs)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def watched(model, inputs) -> tuple[object, dict[str, torch.Tensor], dict[str, tuple]]:
    """The model's output with hidden states, the features of tower and projector, and what each router chose."""
    seen: dict[str, torch.Tensor] = {}
    chosen: dict[str, tuple] = {}

    def keep(into, name):
        return lambda module, args, out: into.__setitem__(name, out)

    hooks = [
        model.vision.register_forward_hook(keep(seen, "vision_features")),
        model.projector.register_forward_hook(keep(seen, "projector_features")),
    ]
    hooks += [
        module.register_forward_hook(keep(chosen, name))
        for name, module in model.named_modules()
        if isinstance(module, DeepseekVLV2Router)
    ]
    out = model(**inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return out, seen, chosen


# --------------------------------------------------------------------------------- against the original's


@pytest.mark.parametrize("size", SIZES)
def test_equals_the_original(size):
    folder = shared(f"fixtures/deepseek_vl2_{size}")
    expected, meta = load_file(folder / "expected.safetensors"), json.loads((folder / "meta.json").read_text("utf-8"))
    # eager attention, as the original's: it agrees in the rows of padding too
    processor, model = load(folder, attn_implementation="eager")
    cases = {case["name"]: case for case in meta["cases"]}
    worst: Counter[str] = Counter()
    routers = 0
    for name, case in cases.items():
        of = [cases[one] for one in case.get("batch_of", [name])]
        pictures = [[Image.open(folder / image) for image in one["images"]] for one in of]
        inputs = processor(conversations=[one["conversation"] for one in of], images=pictures)
        for key in EXACT:
            assert torch.equal(inputs[key], expected[f"{name}.{key}"]), (name, key)
        if "images_sha256" in case:
            assert hashlib.sha256(inputs["images"].numpy().tobytes()).hexdigest() == case["images_sha256"]
        out, seen, chosen = watched(model, inputs)
        found = {"logits": out.logits, "hidden.0": out.hidden_states[0]} | seen
        found[f"hidden.{len(out.hidden_states) - 1}"] = out.hidden_states[-1]
        for key, value in found.items():
            what = "hidden" if key.startswith("hidden") else key
            worst[what] = max(worst[what], float((value - expected[f"{name}.{key}"]).abs().max()))
        for gate, (_, weight_TK, index_TK) in chosen.items():
            index_TK, order = index_TK.sort(-1)
            assert torch.equal(index_TK.int(), expected[f"{name}.{gate}.topk_idx_sorted"]), (name, gate)
            difference = weight_TK.gather(1, order) - expected[f"{name}.{gate}.topk_weight_sorted"]
            worst["router weights"] = max(worst["router weights"], float(difference.abs().max()))
            routers += 1
        assert greedy(model, inputs) == [one["greedy_ids"] for one in of], name
        assert greedy(model, inputs, use_cache=False) == [one["greedy_ids"] for one in of], name
        if name == "two_turn":
            labels = inputs["input_ids"].masked_fill(inputs["images_seq_mask"], -100)
            loss = model(**inputs, labels=labels).loss
            assert float(loss) == pytest.approx(meta["loss_two_turn_all_text_labels"], abs=1e-5)
    print(f"\ndeepseek-vl2-{size}:", ", ".join(f"{what} {value:.1e}" for what, value in worst.items()))
    assert routers >= len(cases)
    assert set(worst) == {"logits", "hidden", "vision_features", "projector_features", "router weights"}
    assert max(worst.values()) <= TOLERANCE


def test_processor_equals_the_original_at_full_size():
    folder = shared("fixtures/deepseek_vl2_processor_384")
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    expected = load_file(folder / "expected.safetensors")
    for size, best in meta["select_best_resolution"]:
        assert list(select_best_resolution(size, meta["candidate_resolutions"])) == best, size
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜▁pad▁｜>",
    )
    processor = DeepseekVLV2Processor(tokenizer, meta["candidate_resolutions"], 14, 2)
    for number, case in enumerate(meta["cases"]):
        conversation = [{"role": "<|User|>", "content": "<image>\nWhat is shown in the image?"}]
        inputs = processor(conversations=conversation, images=[Image.open(folder / case["image"])])
        assert hashlib.sha256(inputs["images"].numpy().tobytes()).hexdigest() == case["images_sha256_f32"]
        assert inputs["images_spatial_crop"][0].tolist() == case["spatial_crop_wh"]
        assert inputs["images_seq_mask"].sum(1).tolist() == case["num_image_tokens"]
        ids = expected[f"{number}.input_ids"]
        assert torch.equal(inputs["input_ids"].view(-1), ids.view(-1))


@pytest.mark.parametrize("size", SIZES)
def test_official_sizes_have_the_official_tensors(size):
    official = json.loads(shared(f"fixtures/official/deepseek_vl2_{size}.json").read_text("utf-8"))
    config = AutoConfig.for_model(**official["config"])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    found: Counter[tuple] = Counter()
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        pattern = re.sub(r"\.\d+\.", ".{L}.", re.sub(r"experts\.\d+\.", "experts.{E}.", name))
        found[pattern, tuple(tensor.shape)] += 1
    wanted = {
        (t["pattern"], tuple(t["shape"])): t["count"] for t in official["tensors"] if "attn_pool" not in t["pattern"]
    }
    assert found == wanted


# ----------------------------------------------------------------------------------------- on tiny models


@pytest.mark.parametrize("which", TINY)
def test_saving_gives_the_official_names_and_values_back(which, tmp_path):
    folder = write_tiny(tmp_path / "in", which, seed=1, shards=3)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "out")
    source = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert set(saved) == {name for name in source if "attn_pool" not in name}
    assert all(torch.equal(saved[name].float(), source[name].float()) for name in saved)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "deepseek_vl_v2"
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("lost", ["experts.3.up_proj", "experts.3.", "mlp.gate.weight", "vision.norm", "image_newline"])
def test_a_missing_tensor_is_fatal(lost, tmp_path):
    folder = write_tiny(tmp_path, "vl2-base", seed=2)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if lost not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((BadInput, RuntimeError)):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_float32_and_tied_checkpoints_load(tmp_path):
    folder = write_tiny(tmp_path, "vl2-tiny", seed=3, dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    config["language_config"]["tie_word_embeddings"] = True
    config["torch_dtype"] = config["language_config"]["torch_dtype"] = "float32"
    write_json(folder / "config.json", config)
    weights = load_file(folder / "model.safetensors")
    del weights["language.lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert torch.equal(model.get_output_embeddings().weight, weights["language.model.embed_tokens.weight"])


@pytest.mark.parametrize("which", TINY)
def test_processor_files_may_be_missing(which, tmp_path):
    folder = write_tiny(tmp_path, which, seed=4)
    conversation = [user("Look", picture(100, 50), " and answer")]

    def ids():
        return AutoProcessor.from_pretrained(folder).apply_chat_template(conversation, tokenize=True)

    whole = ids()
    (folder / "processor_config.json").unlink()
    assert torch.equal(whole, ids())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        AutoProcessor.from_pretrained(folder)


def test_a_saved_processor_is_the_same(tmp_path):
    folder = write_tiny(tmp_path / "in", "vl2-small", seed=5)
    processor = AutoProcessor.from_pretrained(folder)
    processor.save_pretrained(tmp_path / "out")
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    assert again.to_dict() == processor.to_dict()
    conversation = [user(picture(100, 50), "What is it?")]
    first, second = (p.apply_chat_template(conversation, tokenize=True, return_dict=True) for p in (processor, again))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("which", TINY)
def test_batches_and_caches_change_nothing(which, tmp_path):
    processor, model = load(write_tiny(tmp_path, which, seed=6))
    conversations = [
        [user(picture(100, 50), "What is the red circle?")],
        [user("There is no picture")],
        [
            user("one ", picture(40, 90), " two ", picture(42, 42), " three ", picture(90, 90)),
            answer("yes"),
            user("Why?"),
        ],
    ]
    singles = [processor.apply_chat_template([c], tokenize=True, return_dict=True) for c in conversations]
    batch = processor.apply_chat_template(conversations, tokenize=True, return_dict=True)
    logits = model(**batch).logits
    for row, single in enumerate(singles):
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], single["input_ids"][0])
        torch.testing.assert_close(logits[row, -length:], model(**single).logits[0], atol=TOLERANCE, rtol=0)
    assert model.generation_config.eos_token_id == 1  # only the nested config says it
    written = [greedy(model, single, tokens=5)[0] for single in singles]
    assert greedy(model, batch, tokens=5) == written
    assert greedy(model, batch, tokens=5, use_cache=False) == written


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_three_ways_of_asking_are_one(tmp_path):
    processor = AutoProcessor.from_pretrained(write_tiny(tmp_path, "vl2-tiny", seed=7))
    shown = picture(100, 50)
    parts = [user(shown, "What is it?")]
    original = [{"role": "<|User|>", "content": "<image>\nWhat is it?"}, {"role": "<|Assistant|>", "content": ""}]
    text = "<|User|>: <image>\nWhat is it?\n\n<|Assistant|>:"
    assert processor.apply_chat_template(parts) == text
    calls = [
        processor.apply_chat_template(parts, tokenize=True, return_dict=True, add_generation_prompt=True),
        processor(conversations=original, images=[shown]),
        processor(text=text, images=shown),
        processor(text=[text], images=[[shown]]),
    ]
    for inputs in calls[1:]:
        assert all(torch.equal(inputs[key], calls[0][key]) for key in (*EXACT, "images"))
    eos = processor.tokenizer.eos_token_id
    whole = [*parts, answer("a circle")]
    assert processor.apply_chat_template(whole, tokenize=True)[0, -1] == eos
    assert processor.apply_chat_template(whole, tokenize=True, continue_final_message=True)[0, -1] != eos
    turns = [*whole, user("Why?")]
    said = "a circle<｜end▁of▁sentence｜><|User|>: Why?\n\n<|Assistant|>:"
    assert processor.apply_chat_template(turns) == text + said
    ids = processor.apply_chat_template(turns, tokenize=True)[0]
    assert processor.tokenizer.decode(ids[calls[0]["input_ids"].shape[1] :]) == said
    for wrong in ({"text": text}, {"text": text, "images": [shown, shown]}, {"conversations": original}):
        with pytest.raises(BadInput):
            processor(**wrong)


def test_more_than_two_pictures_are_not_tiled(tmp_path):
    processor = AutoProcessor.from_pretrained(write_tiny(tmp_path, "vl2-tiny", seed=8))
    wide = picture(120, 40)
    for count, crop in ((2, [3, 1]), (3, [1, 1])):
        inputs = processor.apply_chat_template([user(*[wide] * count, "?")], tokenize=True, return_dict=True)
        assert inputs["images_spatial_crop"].tolist() == [[crop] * count]
        assert inputs["images"].shape[1] == count * (1 + crop[0])


def test_tiles_are_laid_out_row_by_row(tmp_path):
    _, model = load(write_tiny(tmp_path, "vl2-tiny", seed=9))
    wide, high, h = 3, 2, 2
    tokens = torch.randn(1 + wide * high, h * h, 64)
    expected = []
    for y in range(h):
        expected += [tokens[0, y * h + x] for x in range(h)] + [model.image_newline]
    expected.append(model.view_seperator)
    for y in range(high * h):
        for x in range(wide * h):
            tile = 1 + (y // h) * wide + x // h
            expected.append(tokens[tile, (y % h) * h + x % h])
        expected.append(model.image_newline)
    assert torch.equal(model.lay_out(tokens, wide, high), torch.stack(expected))
    model.config.global_view_pos = "tail"
    first = h * (h + 1)
    moved = torch.cat([torch.stack(expected[first + 1 :]), torch.stack(expected[first : first + 1])])
    assert torch.equal(model.lay_out(tokens, wide, high), torch.cat([moved, torch.stack(expected[:first])]))


def plain_router(config, weight, bias, x) -> tuple[list[int], list[float]]:
    """One token's experts (sorted) and weights, written as loops from the original's rules."""
    logits = [sum(w * v for w, v in zip(row, x, strict=True)) for row in weight.double().tolist()]
    if config.scoring_func == "softmax":
        total = sum(np.exp(logits))
        scores = [np.exp(z) / total for z in logits]
    else:
        scores = [1 / (1 + np.exp(-z)) for z in logits]
    choice = [s + b for s, b in zip(scores, bias.double().tolist(), strict=True)]
    groups = config.n_group or 1
    size = len(scores) // groups
    if config.topk_method in ("noaux_tc", "group_limited_greedy"):
        rank = []
        for g in range(groups):
            best = sorted(choice[g * size : (g + 1) * size], reverse=True)
            rank.append(sum(best[:2]) if config.topk_method == "noaux_tc" else best[0])
        kept = sorted(range(groups), key=lambda g: -rank[g])[: config.topk_group or 1]
        choice = [c if e // size in kept else 0.0 for e, c in enumerate(choice)]
    chosen = sorted(sorted(range(len(scores)), key=lambda e: -choice[e])[: config.num_experts_per_tok])
    weights = [scores[e] for e in chosen]
    if config.norm_topk_prob and len(chosen) > 1:
        weights = [w / (sum(weights) + 1e-20) for w in weights]
    return chosen, [w * config.routed_scaling_factor for w in weights]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(
    ("method", "groups", "kept"),
    [("greedy", None, None), ("group_limited_greedy", 4, 2), ("noaux_tc", 1, 1), ("noaux_tc", 4, 2)],
)
def test_router_equals_the_rules_written_out(scoring, norm, top_k, method, groups, kept):
    config = DeepseekVLV2TextConfig(
        hidden_size=16,
        num_attention_heads=4,
        n_routed_experts=12,
        num_experts_per_tok=top_k,
        scoring_func=scoring,
        topk_method=method,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=norm,
        routed_scaling_factor=2.5,
    )
    generator = torch.Generator().manual_seed(top_k)
    router = DeepseekVLV2Router(config)
    router.weight.copy_(torch.randn(12, 16, generator=generator))
    if method == "noaux_tc":
        router.e_score_correction_bias.copy_(torch.randn(12, generator=generator) * 0.1)
    x_TH = torch.randn(20, 16, generator=generator)
    logits, weight_TK, index_TK = router(x_TH[None])
    assert logits.shape == (20, 12)
    index_TK, order = index_TK.sort(-1)
    for x, index, weight in zip(x_TH.tolist(), index_TK.tolist(), weight_TK.gather(1, order).tolist(), strict=True):
        chosen, weights = plain_router(config, router.weight, router.e_score_correction_bias, x)
        assert index == chosen
        assert weight == pytest.approx(weights, abs=1e-5)


def test_masked_experts_win_where_all_others_are_below_zero():
    """The original masks to 0, not to minus infinity."""
    config = DeepseekVLV2TextConfig(
        hidden_size=16,
        num_attention_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=4,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        n_group=2,
        topk_group=1,
    )
    router = DeepseekVLV2Router(config)
    router.e_score_correction_bias.copy_(torch.tensor([-2.0] * 4 + [-3.0] * 4))  # the first group is kept
    _, weight_TK, index_TK = router(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
    assert index_TK.sort(-1)[0].tolist() == [[4, 5, 6, 7]] * 5
    assert torch.equal(weight_TK, torch.full((5, 4), 0.5))  # sigmoid(0), without the bias


@pytest.mark.parametrize("which", TINY)
def test_experts_are_transformers_own(which, tmp_path):
    """mopeq's one cut finds them, its plain forward equals theirs, and a caller may choose their implementation."""
    processor, model = load(write_tiny(tmp_path, which, seed=10))
    inputs = processor.apply_chat_template([user(picture(100, 50), "?")], tokenize=True, return_dict=True)
    found = experts_modules(model)
    assert [name for name, _ in found] == [f"language.model.layers.{n}.mlp.experts" for n in (1, 2)]
    logits = model(**inputs).logits
    with watch(model, plain_forward):
        torch.testing.assert_close(model(**inputs).logits, logits, atol=TOLERANCE, rtol=0)
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert {module.config._experts_implementation for _, module in found} == {implementation}
        torch.testing.assert_close(model(**inputs).logits, logits, atol=TOLERANCE, rtol=0)
    model.set_attn_implementation("eager")
    assert model.vision.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**inputs).logits, logits, atol=TOLERANCE, rtol=0)
    out = model(**inputs, output_router_logits=True)
    assert [tuple(logits.shape) for logits in out.router_logits] == [(inputs["input_ids"].shape[1], 8)] * 2


def test_gradients_reach_pictures_and_experts(tmp_path):
    processor, model = load(write_tiny(tmp_path, "vl2-small", seed=11), attn_implementation="eager")
    inputs = processor.apply_chat_template([user(picture(100, 50), "?")], tokenize=True, return_dict=True)
    with torch.enable_grad():
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for parameter in (model.vision.pos_embed, model.image_newline, model.projector.layers[0].weight):
        assert parameter.grad.abs().sum() > 0
    assert all(module.down_proj.grad.abs().sum() > 0 for _, module in experts_modules(model))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"architectures": ["DeepseekOCRForCausalLM"]}, "DeepseekOCRForCausalLM"),
        ({"vision_config": {"model_name": "deeplip_b_l", "width": {"sam_vit_b": {}}}}, "deeplip_b_l"),
        ({"tile_tag": "1D"}, "tile_tag"),
    ],
)
def test_kin_are_not_claimed(edit, says, tmp_path):
    """DeepSeek-OCR says deepseek_vl_v2 too. Its tokenizer still loads; model and processor are refused by name."""
    folder = write_tiny(tmp_path, "vl2-tiny", seed=12)
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | edit)
    with pytest.raises(BadInput, match=says):
        AutoModelForImageTextToText.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).encode("the") != []
    if "tile_tag" not in edit:
        with pytest.raises(BadInput, match=says):
            AutoProcessor.from_pretrained(folder)


def test_defaults_are_the_original_classes():
    """What published configs leave out: base names no latent sizes, layers or heads; tiny alone says use_mla."""
    text = DeepseekVLV2TextConfig()
    assert (text.kv_lora_rank, text.qk_nope_head_dim, text.qk_rope_head_dim, text.v_head_dim) == (512, 128, 64, 128)
    assert (text.num_hidden_layers, text.num_attention_heads, text.use_mla) == (30, 32, True)
    assert (text.norm_topk_prob, text.scoring_func, text.routed_scaling_factor) == (False, "softmax", 1.0)
    config = AutoConfig.for_model("deepseek_vl_v2")
    assert (config.vision_config.heads, config.vision_config.image_size) == (16, 384)
    assert config.projector_config["downsample_ratio"] == 2
    assert config.get_text_config() is config.language_config
