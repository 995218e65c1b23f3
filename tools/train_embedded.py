"""Train mopeq's embedded model, or a larger one of its kind, from nothing but this repository: one GPU, minutes.

    python tools/train_embedded.py --out OUT [--size middle] [--seconds 510] [--seed 0]

Worker processes draw pictures and questions without end; they are copied into two pools on the card (short and long
rows). One step (draw rows, forward, backward, clip, AdamW) is one CUDA graph, so the host only says "again". Then the
weights are rounded to bf16, saved, loaded back by transformers, compared with this script's own forward, and measured
on the held-out items by greedy decoding. Results and log go to OUT/training.json.

Left out: several cards, resuming. Two runs with one seed differ in the last digits and in which pictures came when.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import queue
import sys
import time
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

import embedded_files as files  # noqa: E402
from embedded_net import HEAD, IMAGE_TOKENS, Net, Rows  # noqa: E402

from mopeq.embedded import world  # noqa: E402
from mopeq.embedded.words import PALETTE_C3  # noqa: E402

# Tasks of the two kinds of rows, with how often each is drawn. Diagrams come open-ended in short rows, as multiple
# choice in long ones, together with some easy questions as multiple choice.
SHARES = {
    "short": {
        "counting": 11,
        "colour": 15,
        "position": 8,
        "yesno": 17,
        "emblem": 5,
        "words": 12,
        "document": 17,
        "chart": 16,
        "diagram": 9,
    },
    "long": {"diagram": 9, "caption": 2, "colour": 2, "counting": 1},
}
TAIL = {"short": 32, "long": 54}  # tokens after the picture: the question to the end of the answer
BLOCK = 2048  # pictures that a worker hands over at once
QUESTION_WEIGHT = 0.05  # of a question's own tokens in the loss, against 1 for an answer's
TEXT_LENGTH = 512
DATA = HERE.parent / "src" / "mopeq"


# ---------------------------------------------------------------- rows of tokens


class Encoder:
    def __init__(self, tokenizer: Tokenizer):
        self.encode = lru_cache(200_000)(lambda text: tuple(tokenizer.encode(text).ids))
        self.head = [files.START, *self.encode("user\n"), files.SEE, *[files.IMAGE] * IMAGE_TOKENS, files.SEEN]
        self.turn = (files.STOP, *self.encode("\n"), files.START, *self.encode("assistant\n"))
        assert len(self.head) == HEAD

    def tail(self, asked: str, answer: str) -> tuple[list[int], int]:
        """Tokens after the picture, and where the answer starts among them."""
        before = [*self.encode(asked), *self.turn]
        return [*before, *self.encode(answer), files.STOP], len(before)


def fill_block(kind: str, encoder: Encoder, seed: int, start: int, out: dict[str, np.ndarray]) -> None:
    """Pictures `start` … of the training stream into `pixels` [B, 96, 96], `tails` [B, 2, S] and `spans` [B, 2, 2]."""
    shares, length = SHARES[kind], TAIL[kind]
    names, bounds = list(shares), np.cumsum(list(shares.values()))
    out["tails"][:] = files.END
    for place in range(len(out["pixels"])):
        dice = world.Dice(seed, start + place)
        task = names[int(np.searchsorted(bounds, dice.below(int(bounds[-1])), side="right"))]
        picture = world.DRAW[task](dice)
        out["pixels"][place] = picture.pixels_HW
        for turn in range(2):
            question = picture.questions[turn % len(picture.questions)]
            question = world.open_ended(question) if kind == "short" else world.with_choices(question, dice)
            tokens, answer = encoder.tail(world.reworded(question, dice), question.answer)
            if len(tokens) > length:
                tokens, answer = encoder.tail(world.prompt(question), question.answer)
            out["tails"][place, turn, : len(tokens)] = tokens
            out["spans"][place, turn] = answer, len(tokens)


def block_arrays(kind: str, memory: Any) -> dict[str, np.ndarray]:
    """The arrays of one block, as views of shared memory."""
    sizes = {
        "pixels": (np.uint8, (BLOCK, world.SIDE, world.SIDE)),
        "tails": (np.int16, (BLOCK, 2, TAIL[kind])),
        "spans": (np.int16, (BLOCK, 2, 2)),
    }
    arrays, start = {}, 0
    for name, (dtype, shape) in sizes.items():
        count = math.prod(shape)
        arrays[name] = np.frombuffer(memory, dtype, count, start).reshape(shape)
        start += count * np.dtype(dtype).itemsize
    return arrays


def work(number: int, workers: int, seed: int, text: str, memory: dict, ready: Any, free: Any) -> None:
    """Fill this worker's block of each kind whenever it is free; five short blocks to a long one."""
    torch.set_num_threads(1)
    encoder = Encoder(Tokenizer.from_str(text))
    turn = 0
    while (kind := free.get()) is not None:
        # Stream numbers above a million are the training's own; each block has its own range of indices.
        fill_block(kind, encoder, 1_000_000 + seed, (turn * workers + number) * BLOCK, block_arrays(kind, memory[kind]))
        ready.put((number, kind))
        turn += 1


class Pools:
    """Pictures and rows on the card, refreshed by the workers; `take` draws from them inside the graph."""

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer, device: str):
        context = multiprocessing.get_context("fork")
        self.ready = context.Queue()
        self.free, self.memory, self.processes = [], [], []
        per_picture = {kind: world.SIDE**2 + 2 * (TAIL[kind] + 2) * 2 for kind in SHARES}
        for number in range(args.workers):
            memory = {kind: context.RawArray("b", BLOCK * per_picture[kind]) for kind in SHARES}
            free = context.SimpleQueue()
            inputs = (number, args.workers, args.seed, tokenizer.to_str(), memory, self.ready, free)
            process = context.Process(target=work, args=inputs, daemon=True)
            process.start()
            self.free.append(free), self.memory.append(memory), self.processes.append(process)
        self.size = {"short": args.pool, "long": args.pool // 4}
        self.arrays: dict[str, dict[str, Tensor]] = {}
        self.next = dict.fromkeys(SHARES, 0)
        self.seen = dict.fromkeys(SHARES, 0)
        self.device = device

    def start(self) -> None:
        """Reserve the pools and fill them once. (After the fork: the workers must not know of the card.)"""
        for kind, size in self.size.items():
            assert size % BLOCK == 0
            shapes = {
                "pixels": (torch.uint8, (size, world.SIDE, world.SIDE)),
                "tails": (torch.int16, (size, 2, TAIL[kind])),
                "spans": (torch.int16, (size, 2, 2)),
            }
            self.arrays[kind] = {n: torch.zeros(s, dtype=d, device=self.device) for n, (d, s) in shapes.items()}
        for number, free in enumerate(self.free):
            free.put("long" if number % 5 == 4 or len(self.free) == 1 else "short")
        while any(self.seen[kind] < self.size[kind] for kind in SHARES):
            self.refresh(wait=True)

    def refresh(self, wait: bool = False, most: int = 1) -> None:
        """Copy up to `most` finished blocks over the oldest rows."""
        for _ in range(most):
            try:
                number, kind = self.ready.get(timeout=60) if wait else self.ready.get_nowait()
            except queue.Empty:
                assert not wait, "the workers have stopped"
                return
            start = self.next[kind]
            for name, block in block_arrays(kind, self.memory[number][kind]).items():
                self.arrays[kind][name][start : start + BLOCK].copy_(torch.from_numpy(block))
            self.next[kind] = (start + BLOCK) % self.size[kind]
            self.seen[kind] += BLOCK
            behind = self.seen["long"] * 4 < self.seen["short"]
            self.free[number].put("long" if behind else "short")

    def take(self, kind: str, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Random pictures [rows / 2, 96, 96] with both their questions: tokens [rows, S] and answer spans [rows, 2]."""
        pool = self.arrays[kind]
        index = (torch.rand(rows // 2, device=self.device) * self.size[kind]).long()
        return (
            pool["pixels"][index],
            pool["tails"][index].flatten(0, 1).long(),
            pool["spans"][index].flatten(0, 1).long(),
        )

    def stop(self) -> None:
        for free in self.free:
            free.put(None)
        for process in self.processes:
            process.terminate()


# ---------------------------------------------------------------- the step


def loss_weights(tails_BS: Tensor, spans_B2: Tensor) -> Tensor:
    """Weight of the loss at each tail position for predicting the next: an answer's tokens share √(their number)."""
    place = torch.arange(1, tails_BS.shape[1] + 1, device=tails_BS.device)
    start, stop = spans_B2[:, :1], spans_B2[:, 1:]
    answer = (place >= start) & (place < stop)
    return answer / (stop - start).sqrt() + (place < start) * QUESTION_WEIGHT / 4


def twice(seen_BPH: Tensor) -> Tensor:
    """Each picture once for each of its two questions. (repeat_interleave may wait for the host; expand does not.)"""
    return seen_BPH[:, None].expand(-1, 2, -1, -1).flatten(0, 1)


class Trainer:
    def __init__(self, model: torch.nn.Module, pools: Pools, text: Tensor, encoder: Encoder, args: argparse.Namespace):
        self.pools, self.text, self.args = pools, text, args
        device = pools.device
        self.net = Net(model, torch.bfloat16, device)
        self.colours = torch.from_numpy(PALETTE_C3).float().to(device) / 127.5 - 1
        self.head = torch.tensor([encoder.head], device=device)
        self.rate = torch.tensor(0.0, device=device)
        self.stats = torch.zeros(6, device=device)
        self.picks = torch.zeros(
            model.config.text_config.num_hidden_layers, model.config.text_config.num_experts, device=device
        )
        pictured = [Rows(args.short, HEAD + TAIL["short"], True), Rows(args.long, HEAD + TAIL["long"], True)]
        self.rows = {False: pictured, True: [*pictured, Rows(1, TEXT_LENGTH, False)]}
        self.tables = {key: self.net.rotary(rows) for key, rows in self.rows.items()}
        self.parameters = list(model.parameters())
        decay = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n]
        plain = [p for n, p in model.named_parameters() if not (p.ndim > 1 and "embed" not in n)]
        groups = [{"params": decay, "weight_decay": args.decay}, {"params": plain, "weight_decay": 0.0}]
        cuda = device == "cuda"
        self.optimizer = torch.optim.AdamW(
            groups, lr=self.rate if cuda else 0.0, betas=(0.9, 0.95), fused=cuda, capturable=cuda
        )

    def step(self, texted: bool) -> None:
        net, kinds = self.net, (("short", self.args.short), ("long", self.args.long))
        drawn = [self.pools.take(kind, rows) for kind, rows in kinds]
        seen, deep = net.see(self.colours[torch.cat([pixels for pixels, _, _ in drawn]).long()])
        seen, deep = twice(seen), twice(deep)
        flat, extra, valid = [], [], []
        for (_, tails, spans), part in zip(
            drawn, (slice(0, self.args.short), slice(self.args.short, None)), strict=True
        ):
            x, more = net.place(self.head, tails, seen[part], deep[part])
            flat.append(x.flatten(0, 1)), extra.append(more.flatten(0, 1))
            real = torch.arange(x.shape[1], device=x.device) < HEAD + spans[:, 1:]
            valid.append(real.flatten())
        if texted:
            offset = (torch.rand(1, device=self.text.device) * (len(self.text) - TEXT_LENGTH - 1)).long()
            read = self.text[offset + torch.arange(TEXT_LENGTH + 1, device=self.text.device)].long()
            flat.append(net.embed(read[:-1])), extra.append(torch.zeros_like(flat[-1]))
            valid.append(torch.ones_like(read[:-1], dtype=torch.bool))
        cos, sin = self.tables[texted]
        states, balance, picks = net.think(
            torch.cat(flat), torch.cat(extra), self.rows[texted], cos, sin, torch.cat(valid).float()
        )
        total, weight_sum, right, asked, start = 0.0, 0.0, 0.0, 0.0, 0
        for (_, tails, spans), part in zip(drawn, self.rows[texted], strict=False):
            stop = start + part.count * part.length
            tail_states = states[start:stop].view(part.count, part.length, -1)[:, HEAD:-1]
            logits = net.logits(tail_states).float()
            weight = loss_weights(tails, spans)[:, :-1]
            wrong = F.cross_entropy(logits.flatten(0, 1), tails[:, 1:].flatten(), reduction="none").view_as(weight)
            total, weight_sum = total + (wrong * weight).sum(), weight_sum + weight.sum()
            place = torch.arange(1, tails.shape[1], device=tails.device)
            answer = (place >= spans[:, :1]) & (place < spans[:, 1:])
            hit = (logits.argmax(-1) == tails[:, 1:]) | ~answer
            right, asked = right + hit.all(1).sum(), asked + part.count
            start = stop
        answers = total / weight_sum
        loss = answers + self.args.balance * balance
        if texted:
            reading = F.cross_entropy(net.logits(states[start:]).float(), read[1:])
            loss = loss + self.args.text_weight * reading
        loss.backward()
        size = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            reading = reading.detach() if texted else torch.zeros_like(answers)
            ones = torch.ones_like(answers)
            told = [answers, reading, balance / len(picks), right / asked, size, ones]
            self.stats += torch.stack([t.detach().float() for t in told])
            self.picks += picks

    def capture(self) -> None:
        """Record one graph with a row of text and one without; where that fails, steps stay eager, and it is said."""
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        if self.pools.device != "cuda":
            return
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for turn in range(6):
                    self.optimizer.zero_grad(set_to_none=True)
                    self.step(turn % 2 == 0)
            torch.cuda.current_stream().wait_stream(side)
            pool = None
            for texted in (True, False):
                self.optimizer.zero_grad(set_to_none=True)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self.step(texted)
                pool = graph.pool()
                self.graphs[texted] = graph
        except Exception:
            traceback.print_exc()
            print("!! no graph: every step will be eager", flush=True)
            self.graphs = {}
            torch.cuda.synchronize()

    def run(self, texted: bool) -> None:
        if self.graphs:
            self.graphs[texted].replay()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self.step(texted)

    def set_rate(self, rate: float) -> None:
        self.rate.fill_(rate)
        if self.pools.device != "cuda":
            for group in self.optimizer.param_groups:
                group["lr"] = rate


def schedule(step: int, done: float, args: argparse.Namespace) -> float:
    """Warm-up over `args.warmup` steps, then level until `args.hold` of the time, then falling straight to 2 %."""
    fall = 1.0 if done < args.hold else max(0.02, (1 - done) / (1 - args.hold))
    return args.rate * min(1.0, (step + 1) / args.warmup) * fall


def train(trainer: Trainer, args: argparse.Namespace, save_half: Any) -> list[dict]:
    log: list[dict] = []
    begin, step, last_told, half = time.monotonic(), 0, 0.0, False
    while (spent := time.monotonic() - begin) < args.seconds and step < args.steps:
        done = spent / args.seconds if args.steps >= 10**9 else step / args.steps
        chunk = 10 if step < args.warmup else 50
        trainer.set_rate(schedule(step, done, args))
        for turn in range(step, min(step + chunk, args.steps)):
            trainer.run(turn % args.text_every == 0)
        step = min(step + chunk, args.steps)
        trainer.pools.refresh(most=2)
        if trainer.pools.device == "cuda":
            torch.cuda.synchronize()
        if not half and done > 0.5:
            half = True
            save_half()
        if spent - last_told >= args.tell or step >= args.steps:
            last_told = spent
            answers, reading, balance, right, size, steps = trainer.stats.tolist()
            texts = max(1.0, steps / args.text_every)
            entry = {
                "step": step,
                "seconds": round(time.monotonic() - begin, 1),
                "answers": round(answers / steps, 4),
                "text": round(reading / texts, 4),
                "balance": round(balance / steps, 4),
                "right": round(right / steps, 4),
                "gradient": round(size / steps, 3),
                "rate": trainer.rate.item(),
                "least_used": round((trainer.picks.min(1).values / trainer.picks.mean(1)).min().item(), 3),
                "pictures": dict(trainer.pools.seen),
            }
            log.append(entry)
            print(json.dumps(entry), flush=True)
            trainer.stats.zero_()
            trainer.picks.zero_()
            assert math.isfinite(entry["answers"]), "the loss is not finite"
    return log


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def answer(net: Net, encoder: Encoder, items: list[world.Item], most: int = 14, batch: int = 400) -> list[list[int]]:
    """Tokens of greedy answers, each token by a whole forward over the row so far."""
    colours = torch.from_numpy(PALETTE_C3).float().to(net.device) / 127.5 - 1
    head = torch.tensor([encoder.head], device=net.device)
    answers: list[list[int]] = []
    for first in range(0, len(items), batch):
        part = items[first : first + batch]
        starts = [[*encoder.encode(world.prompt(item.question)), *encoder.turn] for item in part]
        length = max(len(s) for s in starts) + most
        tails = torch.full((len(part), length), files.END)
        for place, tokens in enumerate(starts):
            tails[place, : len(tokens)] = torch.tensor(tokens)
        tails, at = tails.to(net.device), torch.tensor([len(s) for s in starts], device=net.device)
        seen, deep = net.see(colours[torch.from_numpy(np.stack([i.pixels_HW for i in part])).long().to(net.device)])
        rows = [Rows(len(part), HEAD + length, True)]
        cos, sin = net.rotary(rows)
        valid = torch.ones(len(part) * (HEAD + length), device=net.device)
        line = torch.arange(len(part), device=net.device)
        ended = torch.zeros(len(part), dtype=torch.bool, device=net.device)
        for turn in range(most):
            x, more = net.place(head, tails, seen, deep)
            states, _, _ = net.think(x.flatten(0, 1), more.flatten(0, 1), rows, cos, sin, valid)
            states = states.view(len(part), HEAD + length, -1)[line, HEAD + at + turn - 1]
            tails[line, at + turn] = net.logits(states).argmax(-1)
            ended |= tails[line, at + turn] == files.STOP
            if ended.all():
                break
        for place, tokens in enumerate(starts):
            said = tails[place, len(tokens) : len(tokens) + most].tolist()
            answers.append(said[: said.index(files.STOP)] if files.STOP in said else said)
    return answers


def accuracies(net: Net, encoder: Encoder, tokenizer: Tokenizer, items: list[world.Item]) -> dict[str, float]:
    said = [tokenizer.decode(ids) for ids in answer(net, encoder, items)]
    hits: dict[str, list[bool]] = {}
    for item, text in zip(items, said, strict=True):
        hits.setdefault(item.question.task, []).append(text == item.question.answer)
    return {task: round(100 * sum(h) / len(h), 1) for task, h in hits.items()}


@torch.no_grad()
def reading_loss(net: Net, text: Tensor) -> float:
    """Mean nats per token over windows of 512 tokens, the last one dropped."""
    count = (len(text) - 1) // TEXT_LENGTH
    read = text[: count * TEXT_LENGTH].view(count, TEXT_LENGTH).long()
    after = text[1 : count * TEXT_LENGTH + 1].long()
    rows = [Rows(count, TEXT_LENGTH, False)]
    cos, sin = net.rotary(rows)
    states, _, _ = net.think(net.embed(read.flatten()), None, rows, cos, sin, torch.ones(len(after), device=net.device))
    return F.cross_entropy(net.logits(states).float(), after).item()


def compare(
    model: torch.nn.Module, net: Net, encoder: Encoder, tokenizer: Tokenizer, folder: Path, items: list
) -> dict:
    """transformers' forward and `generate` against ours: relative differences of the logits, and equal answers.

    A router's near tie may fall the other way in the two orders of summation, so the largest difference can be large
    where the median is not.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    mine = [tokenizer.decode(ids) for ids in answer(net, encoder, items)]
    colours = torch.from_numpy(PALETTE_C3).float().to(net.device) / 127.5 - 1
    differences, same = [], 0
    for item, text in zip(items, mine, strict=True):
        seen = processor(images=[item.image()], return_tensors="pt")
        start = [*encoder.head, *encoder.encode(world.prompt(item.question)), *encoder.turn]
        ids = torch.tensor([start], device=net.device)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == files.IMAGE).int(),
            "pixel_values": seen["pixel_values"].to(net.device),
            "image_grid_thw": seen["image_grid_thw"].to(net.device),
        }
        with torch.no_grad():
            theirs = model(**inputs).logits[0]
            told = model.generate(**inputs, max_new_tokens=14, do_sample=False)[0, len(start) :].tolist()
            rows = [Rows(1, len(start), True)]
            pixels = colours[torch.from_numpy(item.pixels_HW[None]).long().to(net.device)]
            x, more = net.place(ids[:, :HEAD], ids[:, HEAD:], *net.see(pixels))
            valid = torch.ones(len(start), device=net.device)
            ours = net.logits(net.think(x[0], more[0], rows, *net.rotary(rows), valid)[0])
        differences.append(((ours - theirs).norm() / theirs.norm()).item())
        told = told[: told.index(files.STOP)] if files.STOP in told else told
        same += tokenizer.decode(told) == text
    median, largest = float(np.median(differences)), max(differences)
    return {"median_difference": median, "largest_difference": largest, "same_answers": f"{same}/{len(items)}"}


def check_processor(folder: Path, encoder: Encoder, item: world.Item) -> str:
    """What AutoProcessor makes of a chat with a picture, against the rows trained on; a sentence."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (ImportError, ValueError, RuntimeError) as error:  # no torchvision: its video part cannot be built
        return f"not built here: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    asked = world.prompt(item.question)
    content = [{"type": "image", "image": item.image()}, {"type": "text", "text": asked}]
    chat = [{"role": "user", "content": content}]
    made = processor.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    wanted = [*encoder.head, *encoder.encode(asked), *encoder.turn]
    same = made["input_ids"][0].tolist() == wanted
    return f"{type(processor).__name__}: tokens {'equal' if same else 'DIFFER'}, grid {made['image_grid_thw'].tolist()}"


# ---------------------------------------------------------------- the whole


def initialise(model: torch.nn.Module, layers: int) -> None:
    """Matrices by their fan-in, outputs into the residual stream smaller with depth; embeddings and routers at 0.02."""
    for name, p in model.named_parameters():
        if p.ndim < 2:
            continue
        if "embed_tokens" in name or "pos_embed" in name or name.endswith("gate.weight"):
            torch.nn.init.normal_(p, std=0.02)
            continue
        fan_in = p[0].numel() if "patch_embed" in name or p.ndim == 2 else p.shape[-1]
        deep = (
            1 / math.sqrt(2 * layers)
            if name.endswith(("o_proj.weight", "down_proj", "attn.proj.weight", "linear_fc2.weight"))
            else 1
        )
        torch.nn.init.normal_(p, std=0.7 / math.sqrt(fan_in) * deep)


def read_texts(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (DATA / name).read_text().splitlines()]


def join(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer.encode(text).ids, files.END]
    return torch.tensor(ids, dtype=torch.int16)


def save(model: torch.nn.Module, tokenizer: Tokenizer, folder: Path) -> None:
    """bf16 weights in the layout of the released checkpoints: experts fused and [expert, in, out], ties stored once."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    width = 2 * model.config.text_config.moe_intermediate_size
    assert all(p.shape[1] == width for n, p in model.named_parameters() if n.endswith("gate_up_proj"))
    for name, p in model.named_parameters():
        value = p.detach().to("cpu", torch.bfloat16)
        tensors[name] = value.transpose(1, 2).contiguous() if ".experts." in name else value.contiguous()
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    (folder / "model.safetensors.part").rename(folder / "model.safetensors")
    config = json.loads(model.config.to_json_string())
    config["architectures"] = ["Qwen3VLMoeForConditionalGeneration"]
    files.write_files(folder, tokenizer, config)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=files.SIZES, default="embedded")
    parser.add_argument("--seconds", type=float, default=510, help="of training proper")
    parser.add_argument("--steps", type=int, default=10**9, help="stop after so many steps instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 6))
    parser.add_argument("--pool", type=int, default=BLOCK * 80, help="pictures held on the card")
    parser.add_argument("--short", type=int, default=208, help="short rows a step")
    parser.add_argument("--long", type=int, default=48, help="long rows a step")
    parser.add_argument("--text-every", type=int, default=6, help="steps to a row of text")
    parser.add_argument("--text-weight", type=float, default=0.3)
    parser.add_argument("--balance", type=float, default=0.01)
    parser.add_argument("--rate", type=float, help="default: the size's own")
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=300)
    parser.add_argument("--hold", type=float, default=0.4)
    parser.add_argument("--tell", type=float, default=10, help="seconds between lines of the log")
    parser.add_argument("--items", type=int, default=world.ITEMS_PER_TASK, help="held-out items of each task")
    args = parser.parse_args()
    args.rate = args.rate or files.SIZES[args.size].rate
    return args


def main() -> None:
    args = parse()
    begin = time.monotonic()
    texts = read_texts("data/builtin/text.jsonl")
    tokenizer = files.train_tokenizer(texts + files.question_texts())
    encoder = Encoder(tokenizer)
    pools = Pools(args, tokenizer, args.device)  # forks before anything touches the card
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(args.seed)
    config = files.model_config(files.SIZES[args.size])
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    initialise(model, config.text_config.num_hidden_layers)
    model.to(args.device)
    pools.start()
    card = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{card}: pools {pools.seen} after {time.monotonic() - begin:.1f} s", flush=True)
    trainer = Trainer(model, pools, join(texts, tokenizer).to(args.device), encoder, args)
    trainer.capture()
    print(f"step ready after {time.monotonic() - begin:.1f} s", flush=True)
    started = time.monotonic()
    log = train(trainer, args, lambda: save(model, tokenizer, args.out / "half"))
    trained = time.monotonic() - started
    pools.stop()
    save(model, tokenizer, args.out / "model")
    print(f"saved after {time.monotonic() - begin:.1f} s", flush=True)

    kept = AutoModelForImageTextToText.from_pretrained(args.out / "model", dtype=torch.float32).to(args.device).eval()
    net = Net(kept, torch.float32, args.device)
    items = list(world.items(world.EVALUATION_SEED, args.items))
    scores = accuracies(net, encoder, tokenizer, items)
    heldout = join(read_texts("embedded/heldout.jsonl"), tokenizer).to(args.device)
    learnt = join(texts, tokenizer).to(args.device)[: 40 * TEXT_LENGTH + 1]
    result = {
        "card": card,
        "torch": torch.__version__,
        "seed": args.seed,
        "steps": log[-1]["step"],
        "seconds": round(trained, 1),
        "graph": bool(trainer.graphs),
        "parameters": sum(p.numel() for p in model.parameters()),
        "expert_parameters": sum(p.numel() for n, p in model.named_parameters() if ".experts." in n),
        "accuracy": scores,
        "accuracy_easy": round(sum(scores[t] for t in world.EASY) / len(world.EASY), 2),
        "accuracy_hard": round(sum(scores[t] for t in world.HARD) / len(world.HARD), 2),
        "items": len(items),
        "text_perplexity_heldout": round(math.exp(reading_loss(net, heldout)), 3),
        "text_perplexity_trained": round(math.exp(reading_loss(net, learnt)), 3),
        "evaluation": world.evaluation_tsv(args.out / "evaluation.tsv", per_task=args.items),
        "arguments": {k: v for k, v in vars(args).items() if k != "out"},
    }
    (args.out / "evaluation.tsv").unlink()  # 16 MB that anyone can rebuild
    (args.out / "training.json").write_text(json.dumps({**result, "log": log}, indent=1) + "\n")
    print(json.dumps(result), flush=True)
    sample = items[:: max(1, len(items) // 40)]
    result["processor"] = check_processor(args.out / "model", encoder, items[0])
    result["against_transformers"] = compare(kept, net, encoder, tokenizer, args.out / "model", sample)
    print(
        result["processor"],
        json.dumps(result["against_transformers"]),
        f"all done after {time.monotonic() - begin:.1f} s",
        flush=True,
    )
    (args.out / "training.json").write_text(json.dumps({**result, "log": log}, indent=1) + "\n")


if __name__ == "__main__":
    main()
