"""Training steps on a mid-sized random model, beside a baseline that does what the released code and common recipes do.

    python benchmarks/small.py

The baseline pads to the longest row, computes the logits of every position in fp32, recomputes every layer, and
dequantises into an interleaved matrix in each pass, with the gradient of the frozen weight that nobody uses. Ours is
what training does: nothing recomputed, and (lean) every layer. All run in turn in one process on the same batch, so
the ratios hold whatever the machine does meanwhile. Memory is what a step holds in tensors beyond the model. Under
three minutes on two cores.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measures import (
    add_document_flag,
    live_peak_bytes,
    markdown_table,
    product_rate,
    publish,
    synchronize,
    useful_flop,
)
from torch import Tensor, nn
from torch.nn import functional

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.allocator import keep_freed_memory
from chatglm_tuning.data.collate import PrefixLMCollator
from chatglm_tuning.data.encode import EncodingSettings, encode_examples
from chatglm_tuning.data.records import read_records
from chatglm_tuning.kernels import set_compiling
from chatglm_tuning.loading import compute_dtype, default_device, load_base
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_tuning.quantization.linear import QuantizedLinear
from chatglm_tuning.quantization.packing import dequantize_rows

REPOSITORY = Path(__file__).resolve().parent.parent
TOKENIZER = REPOSITORY / "embedded" / "chatglm-tiny"
DATA = REPOSITORY / "data" / "AdvertiseGen" / "sample_train.json"
HIDDEN, LAYERS, HEADS, VOCABULARY, PREFIX = 1024, 5, 8, 20480, 32
ROWS = 8
WORKS = (("lora", None), ("lora", 8), ("lora", 4), ("ptuning", 4))


def write_model(folder: Path) -> None:
    """Write a random model with the tiny base's tokenizer into `folder`; most of its vocabulary has no pieces."""
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    ids = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")
    config = ChatGLMConfig(
        hidden_size=HIDDEN,
        inner_hidden_size=4 * HIDDEN,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        **{name: getattr(tokenizer, name) for name in ids},
    )
    ChatGLMForConditionalGeneration(config).to(torch.float16).save_pretrained(folder)


def make_batch(tokenizer: ChatGLMTokenizer, device: torch.device) -> dict[str, Tensor]:
    """The first rows of the sample data, as the collator gives them."""
    encoded = encode_examples(read_records([DATA]).examples[:ROWS], tokenizer, EncodingSettings(256, 256))
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in encoded]
    batch = PrefixLMCollator(tokenizer.pad_token_id)(rows)
    return {name: value.to(device) for name, value in batch.items()}


class _InterleavedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(states, weight, scale)
        ctx.bits = bits
        return states @ dequantize_rows(weight, scale, bits, states.dtype).T

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, None, None, None]:
        states, weight, scale = ctx.saved_tensors
        gradient = output_gradients[0]
        gradient.flatten(0, -2).T @ states.flatten(0, -2)  # the gradient of the frozen weight
        return gradient @ dequantize_rows(weight, scale, ctx.bits, gradient.dtype), None, None, None


class InterleavedLinear(QuantizedLinear):
    """The baseline's quantised linear: dequantised whole in every pass, and a weight gradient that nobody uses."""

    def forward(self, states: Tensor) -> Tensor:
        return _InterleavedProduct.apply(states, self.weight, self.weight_scale, self.bits) + self.bias


def make_baseline(model: ChatGLMForConditionalGeneration) -> None:
    """Turn a base, adapter and all, into the baseline's: padded, and with its quantised linears."""
    model.transformer.is_padding_free = False
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.__class__ = InterleavedLinear


def baseline_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss over the logits of every position, in fp32."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits.float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def our_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss as training computes it."""
    return model(**batch, return_logits=False).loss


def add_adapter(base: ChatGLMForConditionalGeneration, method: str) -> nn.Module:
    """Return the model to train: LoRA on query_key_value, or a new prefix. No dropout: all compute the same."""
    if method == "lora":
        config = make_lora_config(rank=8, alpha=32, dropout=0.0, targets=["query_key_value"])
        return add_lora(base, config).train()
    base.config.prefix_dropout = 0.0
    torch.manual_seed(0)
    add_prefix_encoder(base, PrefixShape(PREFIX), None, "")
    base.get_submodule("transformer.prefix_encoder").requires_grad_(True)
    return base.train()


@dataclass(frozen=True)
class Contender:
    """One way to do the same step."""

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]

    def step(self, batch: dict[str, Tensor]) -> float:
        """Do the forward and the backward pass; returns the loss."""
        loss = self.loss(self.model, batch)
        loss.backward()
        self.model.zero_grad()
        return loss.item()


def load_contenders(folder: Path, method: str, bits: int | None, device: torch.device) -> list[Contender]:
    """Load the same model three times: the baseline, ours and ours lean."""
    dtype = compute_dtype("auto", device)
    contenders = []
    for name in ("baseline", "ours", "ours, lean"):
        base = load_base(str(folder), quantization_bit=bits, dtype=dtype, device_of=lambda _key: device).model
        if name != "ours":
            base.activation_checkpointing_enable({"use_reentrant": False})
        model = add_adapter(base, method)
        if name == "baseline":
            make_baseline(base)
        contenders.append(Contender(name, model, baseline_loss if name == "baseline" else our_loss))
    return contenders


def time_in_turn(contenders: list[Contender], batch: dict[str, Tensor], repeats: int) -> dict[str, float]:
    """Return the median seconds of a step of each, all of them in turn in every round."""
    device = batch["input_ids"].device
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.step(batch)
    for _ in range(repeats):
        for contender in contenders:
            synchronize(device)
            start = time.perf_counter()
            contender.step(batch)
            synchronize(device)
            seconds[contender.name].append(time.perf_counter() - start)
    return {name: statistics.median(measured) for name, measured in seconds.items()}


def use_kernels_of_training(is_on: bool) -> None:
    """Switch what a training run switches on: compiled kernels and memory that is reused.

    Memory of blocks that are reused is not seen by whoever counts tensors, so it is measured without.
    """
    set_compiling(is_on)
    keep_freed_memory(is_on)


def measure(folder: Path, method: str, bits: int | None, repeats: int) -> list[list[str]]:
    """Return the lines of the table for one work; every contender's loss must be the same."""
    device = default_device()
    contenders = load_contenders(folder, method, bits, device)
    batch = make_batch(ChatGLMTokenizer.from_pretrained(folder), device)
    losses = [contender.step(batch) for contender in contenders]
    assert max(losses) - min(losses) < 0.02 * min(losses), losses
    memory = {c.name: live_peak_bytes(lambda step=c.step: step(batch), device) for c in contenders}
    use_kernels_of_training(True)
    seconds = time_in_turn(contenders, batch, repeats)
    use_kernels_of_training(False)
    config: Any = contenders[0].model.config
    tokens, labels = int(batch["attention_mask"].sum()), int((batch["labels"][:, 1:] != -100).sum())
    rate = product_rate(device, compute_dtype("auto", device))
    return [
        [
            f"{'LoRA' if method == 'lora' else 'P-Tuning v2'}, {f'int{bits}' if bits else 'full'} base",
            name,
            f"{seconds[name]:.3f}",
            f"{seconds['baseline'] / seconds[name]:.2f}",
            f"{memory[name] / 2**20:.0f}",
            f"{memory['baseline'] / memory[name]:.2f}",
            f"{useful_flop(config, tokens, labels) / seconds[name] / rate:.2f}",
        ]
        for name in seconds
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    add_document_flag(parser)
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder)
        lines = [line for method, bits in WORKS for line in measure(folder, method, bits, arguments.repeats)]
    header = ["work", "way", "s a step", "times as fast", "MiB a step", "times as little", "of the product rate"]
    publish("small", markdown_table(header, lines), arguments.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
