"""Train the embedded base from scratch and write it in the released layout.

    python embedded/train_base.py

Learns from `corpus.py` alone, in one pass over ever new rows, so nothing is seen twice. The same seed gives
the same rows and first weights; README.md says how long it takes and what comes out.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from corpus import corpus_pairs, corpus_texts
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from chatglm_tuning.data.collate import LengthBucketSampler, PrefixLMCollator
from chatglm_tuning.data.encode import IGNORED_LABEL, EncodedExample, EncodingSettings, encode_example
from chatglm_tuning.loading import compute_dtype
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer

DEFAULT_FOLDER = Path(__file__).resolve().parent / "chatglm-tiny"
SHARDS = 2
LONGEST_PROMPT, LONGEST_ANSWER = 256, 256
# Held-out rows come from a seed of their own, so no row of the training pass is among them.
HELD_OUT_SEED_STEP, HELD_OUT_ROWS = 1, 400
REPORT_EVERY = 25


@dataclass(frozen=True)
class Shape:
    """The model's sizes; what is not here is as released. vocab_size: more than the tokenizer's, as released."""

    hidden_size: int = 256
    inner_hidden_size: int = 1024
    num_layers: int = 4
    num_attention_heads: int = 4
    vocab_size: int = 2432
    max_sequence_length: int = 2048


@dataclass(frozen=True)
class Schedule:
    """The training run. batch_rows: rows a step; text_share: the share of them that are plain texts without a prompt.

    The rate rises over the first `warmup_share` of the steps and then falls to 0 along a cosine.
    """

    steps: int
    batch_rows: int
    learning_rate: float
    text_share: float = 0.06
    warmup_share: float = 0.04
    weight_decay: float = 0.1
    largest_gradient: float = 1.0

    def rate_factor(self, step: int) -> float:
        """The share of `learning_rate` that step `step`, counted from 0, takes."""
        warmup = max(int(self.steps * self.warmup_share), 1)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(self.steps - warmup, 1)))


def make_config(tokenizer: ChatGLMTokenizer, shape: Shape) -> ChatGLMConfig:
    """A config of `shape` with the tokenizer's own special ids; `residual_scale` stays the released one."""
    ids = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")
    return ChatGLMConfig(**asdict(shape), **{name: getattr(tokenizer, name) for name in ids})


def out_linears(model: ChatGLMForConditionalGeneration) -> list[nn.Linear]:
    """The two linears of every layer whose output is added to the residual."""
    return [linear for layer in model.transformer.layers for linear in (layer.attention.dense, layer.mlp.dense_4h_to_h)]


@torch.no_grad()
def initialise(model: ChatGLMForConditionalGeneration) -> None:
    """Draw the weights so that every layer counts from the start.

    A residual is the normalised input times `residual_scale` (sqrt(56), however few the layers are), so a layer with
    the usual small weights would add next to nothing to it. With its output `residual_scale` times larger the block is
    the post-LN block of Vaswani et al., arXiv:1706.03762.
    """
    nn.init.normal_(model.transformer.word_embeddings.weight, std=1 / math.sqrt(model.config.hidden_size))
    for layer in model.transformer.layers:
        for linear in (layer.attention.query_key_value, layer.mlp.dense_h_to_4h):
            nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
    for linear in out_linears(model):
        nn.init.normal_(linear.weight, std=model.config.residual_scale / math.sqrt(linear.in_features))


def encode_corpus(pairs: int, texts: int, seed: int, tokenizer: ChatGLMTokenizer) -> list[EncodedExample]:
    """Encode corpus rows; a text is the answer to an empty prompt."""
    rows = itertools.chain(corpus_pairs(pairs, seed), (("", text) for text in corpus_texts(texts, seed)))
    settings = EncodingSettings(LONGEST_PROMPT, LONGEST_ANSWER)
    encoded = []
    while chunk := list(itertools.islice(rows, 4096)):
        prompts = tokenizer.encode_texts([prompt for prompt, _ in chunk])
        answers = tokenizer.encode_texts([answer for _, answer in chunk])
        encoded += [
            encode_example(prompt, answer, tokenizer, settings) for prompt, answer in zip(prompts, answers, strict=True)
        ]
    return encoded


def batches_of(
    rows: list[EncodedExample], batch_rows: int, seed: int, pad_token_id: int
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of rows of like length, in a random order that depends on the seed."""
    collate = PrefixLMCollator(pad_token_id)
    sampler = LengthBucketSampler([len(row.input_ids) for row in rows], batch_rows, seed=seed)
    for indices in BatchSampler(sampler, batch_rows, drop_last=False):
        yield collate([{"input_ids": rows[i].input_ids, "labels": rows[i].labels} for i in indices])


def loss_of(model: ChatGLMForConditionalGeneration, batch: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The mean loss over the label tokens of `batch`, with products in `dtype`."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(**batch, return_logits=False, use_cache=False).loss


@torch.no_grad()
def held_out_loss(
    model: ChatGLMForConditionalGeneration, rows: list[EncodedExample], batch_rows: int, dtype: torch.dtype
) -> float:
    """The mean loss over all label tokens of `rows`."""
    model.eval()
    total = count = 0.0
    for batch in batches_of(rows, batch_rows, 0, model.config.pad_token_id):
        labels = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
        total += loss_of(model, batch, dtype).item() * labels
        count += labels
    model.train()
    return total / count


def train(
    model: ChatGLMForConditionalGeneration,
    rows: list[EncodedExample],
    schedule: Schedule,
    *,
    seed: int,
    dtype: torch.dtype,
    report: Callable[[str], None],
) -> None:
    """Train every weight of `model` in fp32, with products in `dtype`; `report` gets a line now and then."""
    scale = model.config.residual_scale
    out = {id(linear.weight) for linear in out_linears(model)}
    weights = list(model.parameters())
    decay, rate = schedule.weight_decay, schedule.learning_rate
    groups = [
        {"params": [w for w in weights if w.dim() > 1 and id(w) not in out], "lr": rate, "weight_decay": decay},
        # AdamW's steps do not grow with a weight, so weights that are drawn larger get larger steps.
        {"params": [w for w in weights if id(w) in out], "lr": rate * scale, "weight_decay": decay / scale},
        {"params": [w for w in weights if w.dim() == 1], "lr": rate, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.rate_factor)
    model.train()
    start, recent = time.monotonic(), []
    for step, batch in enumerate(batches_of(rows, schedule.batch_rows, seed, model.config.pad_token_id), start=1):
        loss = loss_of(model, batch, dtype)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), schedule.largest_gradient)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        recent.append(loss.item())
        if step % REPORT_EVERY == 0 or step == schedule.steps:
            elapsed = time.monotonic() - start
            left = elapsed / step * (schedule.steps - step)
            mean = sum(recent) / len(recent)
            report(f"step {step}/{schedule.steps}  loss {mean:.4f}  {elapsed:.0f} s, {left:.0f} s left")
            recent = []


def write_released_layout(model: ChatGLMForConditionalGeneration, folder: Path) -> None:
    """Write `config.json` and fp16 weights in shards with an index, the head beside the embeddings, as released."""
    weights = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    total = sum(tensor.nbytes for tensor in weights.values())
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in weights.items():
        if filled >= total / SHARDS * len(shards):
            shards.append({})
        # A clone, since lm_head shares the embeddings' storage and torch.save would write a shard's other tensors too.
        shards[-1][name] = tensor.clone()
        filled += tensor.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("pytorch_model-*"):
        stale.unlink()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    _write_json(folder / "pytorch_model.bin.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / "config.json", released_config(model.config))


def released_config(config: ChatGLMConfig) -> dict:
    """The keys that the released `config.json` has, without its remote code."""
    keys = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id", "hidden_size")
    keys += ("inner_hidden_size", "layernorm_epsilon", "max_sequence_length")
    later = ("num_attention_heads", "num_layers", "position_encoding_2d")
    return {
        "_name_or_path": "chatglm-tiny",
        "architectures": ["ChatGLMModel"],
        **{key: getattr(config, key) for key in keys},
        "model_type": "chatglm",
        **{key: getattr(config, key) for key in later},
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="holds ice_text.model; gets the weights")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-rows", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    report = Console(highlight=False, soft_wrap=True).print
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    dtype = compute_dtype("auto", torch.device("cpu"))
    schedule = Schedule(arguments.steps, arguments.batch_rows, arguments.learning_rate)
    tokenizer = ChatGLMTokenizer.from_pretrained(arguments.folder)
    model = ChatGLMForConditionalGeneration(make_config(tokenizer, Shape()))
    initialise(model)
    report(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, products in {dtype}")
    count = schedule.steps * schedule.batch_rows
    texts = round(count * schedule.text_share)
    rows = encode_corpus(count - texts, texts, arguments.seed, tokenizer)
    held_out = encode_corpus(HELD_OUT_ROWS, 0, arguments.seed + HELD_OUT_SEED_STEP, tokenizer)
    train(model, rows, schedule, seed=arguments.seed, dtype=dtype, report=report)
    report(f"held-out loss per token {held_out_loss(model, held_out, schedule.batch_rows, dtype):.4f}")
    write_released_layout(model, arguments.folder)


if __name__ == "__main__":
    main()
