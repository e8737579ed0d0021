"""Time a LoRA step on a mid-sized random model in each precision, beside the machine's own matrix-product rate.

    python benchmarks/small.py

Prints, for a full, an int8 and an int4 base: tokens a second, and the share of the rate that plain products of the
same shapes reach in the same dtype, measured just before. Counted are the products that a step cannot do without: those
of the forward pass and of the input gradients, over the layers and, at labelled positions, the head; neither the second
forward pass of activation checkpointing nor dequantising. Under two minutes on two cores.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.loading import compute_dtype, default_device, load_base
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer

TOKENIZER = Path(__file__).resolve().parent.parent / "embedded" / "chatglm-tiny"
HIDDEN, LAYERS, HEADS = 1024, 4, 8
ROWS, PROMPT, ANSWER = 4, 48, 80
REPEATS = 7


def write_model(folder: Path) -> ChatGLMConfig:
    """Write a random model with the tiny base's tokenizer into `folder`."""
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    ids = ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")
    config = ChatGLMConfig(
        hidden_size=HIDDEN,
        inner_hidden_size=4 * HIDDEN,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        vocab_size=-(-tokenizer.vocab_size // 128) * 128,
        **{name: getattr(tokenizer, name) for name in ids},
    )
    ChatGLMForConditionalGeneration(config).save_pretrained(folder)
    return config


def make_batch(config: ChatGLMConfig) -> dict[str, Tensor]:
    """Rows of one length: a prompt, [gMASK], <sop> and an answer of random ids; labels from <sop> on."""
    ids = torch.randint(5, 1000, (ROWS, PROMPT + ANSWER))
    ids[:, PROMPT - 1], ids[:, PROMPT] = config.gmask_token_id, config.bos_token_id
    labels = ids.masked_fill(torch.arange(PROMPT + ANSWER) < PROMPT, -100)
    return {"input_ids": ids, "labels": labels}


def median_seconds(work: Callable[[], object]) -> float:
    """The median of a few runs of `work`, after one to warm up."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP a second of the products of one layer, forward and for the input gradient."""
    tokens = ROWS * (PROMPT + ANSWER)
    shapes = [(3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN)]
    weights = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    inputs = [torch.randn(tokens, weight.shape[1], dtype=dtype, device=device) for weight in weights]

    def products() -> None:
        for weight, values in zip(weights, inputs, strict=True):
            (values @ weight.T) @ weight

    flop = sum(2 * 2 * tokens * rows * columns for rows, columns in shapes)
    return flop / median_seconds(products)


def step_of(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """One forward and backward pass, as a training step does it."""

    def step() -> None:
        model(**batch, return_logits=False).loss.backward()
        model.zero_grad()

    return step


def main() -> None:
    torch.manual_seed(0)
    device = default_device()
    dtype = compute_dtype("auto", device)
    tokens, labels = ROWS * (PROMPT + ANSWER), ROWS * ANSWER
    with tempfile.TemporaryDirectory() as folder:
        config = write_model(Path(folder))
        batch = {name: value.to(device) for name, value in make_batch(config).items()}
        needed = 2 * 2 * HIDDEN * (LAYERS * 12 * HIDDEN * tokens + labels * config.vocab_size)
        for bits in (None, 8, 4):
            base = load_base(folder, quantization_bit=bits, dtype=dtype, device_of=lambda _key: device)
            lora = make_lora_config(rank=8, alpha=32, dropout=0.0, targets=["query_key_value"])
            model = add_lora(base.model, lora).train()
            base.model.activation_checkpointing_enable()
            rate = product_rate(dtype, device)
            seconds = median_seconds(step_of(model, batch))
            print(
                f"{f'int{bits}' if bits else 'full'} base in {dtype} on {device}: {tokens / seconds:.0f} tokens/s, "
                f"{needed / seconds / rate:.2f} of the product rate ({rate / 1e9:.0f} GFLOP/s)"
            )


if __name__ == "__main__":
    main()
