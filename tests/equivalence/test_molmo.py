"""The MolmoE port equals the original: fixtures made by the original code, and properties on tiny checkpoints.

`pytest -s -k original` prints the equivalence table: what x greatest difference.
"""

from __future__ import annotations

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
from tiny_ports import write_json, write_tiny
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from mopeq.errors import BadInput
from mopeq.families import molmo
from mopeq.families.molmo.configuration_molmo import MolmoConfig
from mopeq.families.molmo.image_processing_molmo import MolmoImageProcessor, select_tiling
from mopeq.families.molmo.modeling_molmo import MolmoEmbedding
from mopeq.families.molmo.processing_molmo import MolmoProcessor
from mopeq.seam import experts_modules, plain_forward, watch

molmo.register()
TOLERANCE, PIXEL_TOLERANCE = 1e-4, 2e-5  # torch's resize differs in the last digits between its versions
IDS = dict(start=1, end=2, token=3, column=4)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def load(folder: Path, **kwargs):
    kwargs.setdefault("dtype", torch.float32)
    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder, **kwargs)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def greedy(model, inputs, tokens=6, **kwargs) -> list[list[int]]:
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **kwargs)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


def watched(model, inputs) -> tuple[object, dict[str, torch.Tensor], dict[str, tuple]]:
    """The model's output with hidden states, the pictures' features, and what each router chose."""
    seen: dict[str, torch.Tensor] = {}
    chosen: dict[str, tuple] = {}

    def keep(into, name):
        return lambda module, args, out: into.__setitem__(name, out)

    hooks = [model.model.vision_backbone.register_forward_hook(keep(seen, "image_features"))]
    hooks += [
        module.register_forward_hook(keep(chosen, name.removesuffix(".gate")))
        for name, module in model.named_modules()
        if isinstance(module, OlmoeTopKRouter)
    ]
    out = model(**inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return out, seen, chosen


# --------------------------------------------------------------------------------- against the original's


def test_equals_the_original():
    folder = shared("fixtures/molmoe_1b")
    expected, meta = load_file(folder / "expected.safetensors"), json.loads((folder / "meta.json").read_text("utf-8"))
    processor, model = load(folder)
    worst: Counter[str] = Counter()
    asked: dict[str, tuple] = {}

    def compare(name, inputs):
        out, seen, chosen = watched(model, inputs)
        ids = expected[f"{name}.input_ids"]
        real = ids >= 0  # rows of padding are nobody's
        found = {"logits": out.logits, "hidden.0": out.hidden_states[0], "hidden.last": out.hidden_states[-1]}
        for key, value in found.items():
            difference = (value - expected[f"{name}.{key}"])[real]
            what = key.partition(".")[0]
            worst[what] = max(worst[what], float(difference.abs().max()))
        for key, value in seen.items():
            worst[key] = max(worst[key], float((value - expected[f"{name}.{key}"]).abs().max()))
        assert len(chosen) == model.config.n_layers
        for mlp, (logits_TE, weight_TK, index_TK) in chosen.items():
            rows = real.flatten()
            index_TK, order = index_TK.sort(-1)
            assert torch.equal(index_TK[rows].int(), expected[f"{name}.{mlp}.topk_idx_sorted"][rows]), (name, mlp)
            for what, value, key in (
                ("router weights", weight_TK.gather(1, order), "topk_weight_sorted"),
                ("router logits", logits_TE, "router_logits"),
            ):
                difference = (value - expected[f"{name}.{mlp}.{key}"])[rows]
                worst[what] = max(worst[what], float(difference.abs().max()))

    for case in meta["cases"]:
        name = case["name"]
        if "text" in case:
            pictures = [Image.open(folder / image) for image in case["images"]]
            asked[name] = (case, pictures)
            inputs = processor(text=case["text"], images=pictures or None)
            one = processor.process(text=case["text"], images=pictures or None)
            assert set(inputs) == {*one, "attention_mask"}
            for key, value in one.items():
                assert torch.equal(value, inputs[key][0])
                wanted = expected[f"{name}.{key}"][0]
                assert value.dtype == wanted.dtype
                torch.testing.assert_close(value, wanted, atol=PIXEL_TOLERANCE if key == "images" else 0, rtol=0)
            compare(name, inputs)
            assert greedy(model, inputs) == [case["greedy_ids"]], name
            assert greedy(model, inputs, use_cache=False) == [case["greedy_ids"]], name
            if name == "text":
                assert float(model(**inputs, labels=inputs["input_ids"]).loss) == pytest.approx(
                    meta["loss_text"], abs=1e-5
                )
        elif "batch_of" in case:  # the original's batch: everything padded on the right with -1, and no attention mask
            inputs = {key: expected[f"{name}.{key}"] for key in ("input_ids", "image_masks", "image_input_idx")}
            parts = [expected[f"{one}.images"][0] for one in case["batch_of"]]
            crops = max(len(part) for part in parts)
            inputs["images"] = torch.stack(
                [torch.cat([part, part.new_full((crops - len(part), *part.shape[1:]), -1)]) for part in parts]
            )
            compare(name, inputs)
            pairs = [asked[one] for one in (*case["batch_of"], "text")]
            batch = processor(text=[one["text"] for one, _ in pairs], images=[pictures for _, pictures in pairs])
            assert greedy(model, batch) == [one["greedy_ids"] for one, _ in pairs]
        else:
            compare(name, {"input_ids": expected[f"{name}.input_ids"]})
    print("\nmolmoe-1b:", ", ".join(f"{what} {value:.1e}" for what, value in worst.items()))
    assert set(worst) == {"logits", "hidden", "image_features", "router weights", "router logits"}
    assert max(worst.values()) <= TOLERANCE


def test_processor_equals_the_original_at_full_size():
    folder = shared("fixtures/molmoe_1b_processor_336")
    meta = json.loads((folder / "meta.json").read_text("utf-8"))
    expected = load_file(folder / "expected.safetensors")
    for (height, width), tiling in meta["select_tiling_hw_window224_max12"]:
        assert list(select_tiling(height, width, 224, 12)) == tiling, (height, width)
    processor = AutoProcessor.from_pretrained(folder)
    for number, case in enumerate(meta["cases"]):
        made = processor.process(text="What is shown in the image?", images=Image.open(folder / case["image"]))
        assert list(made["images"].shape) == case["images_shape"]
        for key in ("input_ids", "image_input_idx", "image_masks"):
            assert torch.equal(made[key], expected[f"{number}.{key}"]), key
        some = made["images"][:, ::24, ::12]
        torch.testing.assert_close(some, expected[f"{number}.images_sub"], atol=PIXEL_TOLERANCE, rtol=0)
        mean = made["images"].mean(-1)
        torch.testing.assert_close(mean, expected[f"{number}.images_patch_mean"], atol=PIXEL_TOLERANCE, rtol=0)


def test_the_official_tokenizer_is_read_as_published():
    folder = shared("fixtures/official/molmoe_1b_tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = json.loads((folder / "expected_ids.json").read_text("utf-8"))
    assert [tokenizer.encode(text, add_special_tokens=False) for text in expected["texts"]] == expected["ids"]
    processor = MolmoProcessor(tokenizer)  # the folder holds no more than the tokenizer
    ids = processor.process(text="What is shown in the image?")["input_ids"].tolist()
    assert ids == [50279, *expected["ids"][0]]  # the first text is that prompt; there is no bos, so eos leads
    assert processor.image_ids == [50280, 50281, 50282, 50283]


def test_the_official_size_has_the_official_tensors():
    official = json.loads(shared("fixtures/official/molmoe_1b.json").read_text("utf-8"))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**official["config"]))
    found: Counter[tuple] = Counter()
    saved = revert_weight_conversion(model, model.state_dict())
    for name, tensor in saved.items():
        pattern = re.sub(r"\.\d+\.", ".{L}.", re.sub(r"experts\.\d+\.", "experts.{E}.", name))
        found[pattern, tuple(tensor.shape)] += 1
    assert found == {(t["pattern"], tuple(t["shape"])): t["count"] for t in official["tensors"]}
    assert sum(tensor.numel() for tensor in saved.values()) == official["total_params"]


# ----------------------------------------------------------------------------------------- on tiny models


def test_saving_gives_the_official_names_and_values_back(tmp_path):
    folder = write_tiny(tmp_path / "in", "molmoe", seed=1, shards=3)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "out")
    source = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert set(saved) == set(source)
    assert all(torch.equal(saved[name], source[name]) for name in saved)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["block_type"], config.get("auto_map")) == ("molmo", "moe", None)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    for (name, tensor), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize(
    "lost", ["experts.3.up_proj", "experts.3.", "mlp.gate.weight", "att_proj", "pad_embed", "wte.new_embedding"]
)
def test_a_missing_tensor_is_fatal(lost, tmp_path):
    folder = write_tiny(tmp_path, "molmoe", seed=2)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if lost not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((BadInput, RuntimeError)):
        AutoModelForImageTextToText.from_pretrained(folder)


def test_float32_and_tied_checkpoints_load(tmp_path):
    folder = write_tiny(tmp_path, "molmoe", seed=3, dtype=torch.float32)
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | {"weight_tying": True})
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.float32  # nothing in config.json says so; the file does
    assert torch.equal(model.lm_head.weight, weights["model.transformer.wte.embedding"])


def test_processor_files_may_be_missing(tmp_path):
    folder = write_tiny(tmp_path, "molmoe", seed=4)

    def made():
        return AutoProcessor.from_pretrained(folder)(text="What?", images=picture(150, 90))

    whole = made()
    (folder / "preprocessor_config.json").unlink()
    without = made()
    assert all(torch.equal(whole[key], without[key]) for key in whole)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        AutoProcessor.from_pretrained(folder)


def test_a_saved_processor_is_the_same(tmp_path):
    processor = AutoProcessor.from_pretrained(write_tiny(tmp_path / "in", "molmoe", seed=5))
    processor.save_pretrained(tmp_path / "out")
    again = AutoProcessor.from_pretrained(tmp_path / "out")
    assert again.to_dict() == processor.to_dict()
    first, second = (p(text="What?", images=picture(150, 90)) for p in (processor, again))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_batches_and_caches_change_nothing(tmp_path):
    processor, model = load(write_tiny(tmp_path, "molmoe", seed=6))
    texts = ["What is the red circle?", "There is no picture", "Two of them"]
    pictures = [[picture(150, 90)], [], [picture(60, 60), picture(90, 200)]]
    singles = [processor(text=text, images=shown or None) for text, shown in zip(texts, pictures, strict=True)]
    batch = processor(text=texts, images=pictures)
    logits = model(**batch).logits
    for row, single in enumerate(singles):
        length = single["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][row, -length:], single["input_ids"][0])
        torch.testing.assert_close(logits[row, -length:], model(**single).logits[0], atol=TOLERANCE, rtol=0)
    written = [greedy(model, single, tokens=5)[0] for single in singles]
    assert greedy(model, batch, tokens=5) == written
    assert greedy(model, batch, tokens=5, use_cache=False) == written


def test_three_ways_of_asking_are_one(tmp_path):
    processor = AutoProcessor.from_pretrained(write_tiny(tmp_path, "molmoe", seed=7))
    shown = picture(150, 90)
    message = {"role": "user", "content": [{"type": "image", "image": shown}, {"type": "text", "text": "What is it?"}]}
    text = processor.apply_chat_template([message])
    assert text == " User: What is it? Assistant:"
    calls = [
        processor.apply_chat_template([message], tokenize=True, return_dict=True, add_generation_prompt=True),
        processor(text="What is it?", images=shown),
        processor(text=text, images=[shown]),
    ]
    for inputs in calls[1:]:
        assert all(torch.equal(inputs[key], calls[0][key]) for key in calls[0])
    eos = processor.tokenizer.eos_token_id
    turns = [message, {"role": "assistant", "content": "a circle"}, {"role": "user", "content": "Why?"}]
    ids = processor.apply_chat_template(turns, tokenize=True)[0]
    alone = processor(text="What is it?", images=shown)["input_ids"][0]
    assert torch.equal(ids[: len(alone)], alone)
    assert processor.tokenizer.decode(ids[len(alone) :]) == " a circle<|endoftext|> User: Why? Assistant:"
    assert processor.apply_chat_template(turns[:2], tokenize=True)[0, -1] == eos
    more = processor(text="What is it?", images=shown, max_crops=1)
    assert (more["images"].shape[1], calls[0]["images"].shape[1]) == (2, 3)


def test_each_token_stands_where_its_patches_lie():
    """Every place is used once, rows read left to right; a token's crop shows the pixels it stands for."""
    make = MolmoImageProcessor(
        side=112, patch=14, tokens=4, max_crops=6, margins=(2, 2), mean=(0, 0, 0), std=(1, 1, 1), do_normalize=False
    )
    # the picture is as large as its canvas, so nothing is scaled: red counts patches across, green counts them down
    high, wide = 2 * 56 + 56, 3 * 56 + 56
    y, x = np.mgrid[:high, :wide] // 14
    made = make(np.stack([x, y, 0 * x], -1).astype(np.uint8), **IDS)
    assert made.crops.shape == (7, 64, 588)
    positions = made.index[made.index >= 0]
    tokens = [place for place, one in enumerate(made.ids) if one == IDS["token"]]
    assert sorted(positions.tolist()) == tokens
    first = tokens[16]  # the first 16 are the whole view's
    columns = wide // 28
    for crop in range(1, 7):
        grid = made.crops[crop].reshape(8, 8, 14, 14, 3)
        for slot, place in enumerate(made.index[crop].tolist()):
            if place < 0:
                continue
            row, column = divmod(place - first, columns + 1)
            corner = grid[2 * (slot // 4), 2 * (slot % 4), 0, 0] * 255
            assert corner[:2].round().tolist() == [2 * column, 2 * row]
    assert made.ids.count(IDS["column"]) == 4 + high // 28
    assert (made.masks[:-1] == 1).all()
    assert (made.masks[-1] == -1).all()  # last, though the whole view comes first: the original's order


def test_ids_beyond_the_vocabulary_read_the_second_table():
    both = MolmoEmbedding(10, 3, 4)
    ids = torch.tensor([[0, 9, 10, 12]])
    table = torch.cat([both.embedding, both.new_embedding])
    assert torch.equal(both(ids), table[ids])


def test_features_are_added_and_padding_marked(tmp_path):
    _, model = load(write_tiny(tmp_path, "molmoe", seed=8))
    images, masks = torch.randn(1, 2, 64, 588), torch.ones(1, 2, 64)
    index = torch.full((1, 2, 16), -100)
    index[0, 1, 5] = 2
    ids = torch.arange(4)[None]
    features = model.get_image_features(images, masks)
    plain = model.get_input_embeddings()(ids)
    shown = model.model.embed(ids, images, masks, index)
    assert torch.equal(shown[0, 2], plain[0, 2] + features[0, 1, 5])
    assert torch.equal(shown[0, [0, 1, 3]], plain[0, [0, 1, 3]])
    backbone = model.model.vision_backbone
    base = backbone.features(images, masks)
    for value, mark in ((0.0, backbone.pad_embed[0]), (0.5, backbone.pad_embed[1]), (-1.0, backbone.pad_embed[1])):
        masks[0, 0, 7] = value
        moved = backbone.features(images, masks) - base
        torch.testing.assert_close(moved[0, 0, 7], mark, atol=1e-5, rtol=0)
        assert moved.abs().sum(-1).count_nonzero() == 1
    masks[:] = 1
    images[0, 1, 3, 3] = -1  # one pixel makes the crop padding
    assert backbone.features(images, masks)[0, 1].abs().max() == 0
    with pytest.raises(ValueError, match="image_masks"):
        model.get_image_features(images)


def test_experts_are_transformers_own(tmp_path):
    """mopeq's one cut finds them under their names on disk, and a caller may choose their implementation."""
    processor, model = load(write_tiny(tmp_path, "molmoe", seed=9))
    inputs = processor(text="What?", images=picture(150, 90))
    found = experts_modules(model)
    assert [name for name, _ in found] == [f"model.transformer.blocks.{n}.mlp.experts" for n in (0, 1)]
    logits = model(**inputs).logits
    with watch(model, plain_forward):
        torch.testing.assert_close(model(**inputs).logits, logits, atol=TOLERANCE, rtol=0)
    for implementation in ("eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert {module.config._experts_implementation for _, module in found} == {implementation}
        torch.testing.assert_close(model(**inputs).logits, logits, atol=TOLERANCE, rtol=0)
    model.set_attn_implementation("eager")
    assert model.model.vision_backbone.image_vit.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**inputs).logits, logits, atol=TOLERANCE, rtol=0)
    out = model(**inputs, output_router_logits=True)
    assert [tuple(logits.shape) for logits in out.router_logits] == [(inputs["input_ids"].shape[1], 8)] * 2


def test_gradients_reach_pictures_and_experts(tmp_path):
    processor, model = load(write_tiny(tmp_path, "molmoe", seed=10), attn_implementation="eager")
    inputs = processor(text="What?", images=picture(150, 90))
    with torch.enable_grad():
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    backbone = model.model.vision_backbone
    for parameter in (
        backbone.pad_embed,
        backbone.image_vit.patch_embedding.weight,
        backbone.image_projector.w2.weight,
    ):
        assert parameter.grad.abs().sum() > 0
    assert all(module.down_proj.grad.abs().sum() > 0 for _, module in experts_modules(model))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"block_type": "sequential", "auto_map": {"AutoConfig": "config_molmo.MolmoConfig"}}, "dense Molmo"),
        ({"clip_qkv": 8.0}, "clip_qkv"),
        ({"n_kv_heads": 2}, "n_kv_heads"),
        ({"rope_impl": "cockatoo"}, "rope_impl"),
    ],
)
def test_other_models_are_refused(edit, says, tmp_path):
    folder = write_tiny(tmp_path, "molmoe", seed=11)
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | edit)
    with pytest.raises(BadInput, match=says):
        AutoModelForImageTextToText.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).encode("the") != []


def test_the_remote_codes_file_name_tells_a_mixture_of_experts():
    """Published configs may lack block_type; then the code they name says what they are."""
    needed = {"rope": True, "rope_impl": "llama", "attention_layer_norm": True, "include_bias": False}
    config = MolmoConfig(auto_map={"AutoConfig": "config_molmoe.MolmoConfig"}, **needed)
    assert (config.num_experts, config.inner_size, config.pooled_grid) == (8, 4 * 768 // 2, (12, 12))
    with pytest.raises(BadInput, match="dense"):
        MolmoConfig(**needed)
