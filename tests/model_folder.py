"""Small model folders in the released layout, with the embedded base's tokenizer, so that a bare clone has them."""

import json
import shutil
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
EMBEDDED = REPOSITORY / "embedded" / "chatglm-tiny"
TOKENIZER_FILES = ("ice_text.model", "tokenizer_config.json")


def write_tiny_model(folder: Path, tokenizer: Path = EMBEDDED, *, seed: int = 0, **config_changes) -> Path:
    """Write a random model (hidden 32, 2 layers) as one `.bin` beside the tokenizer of the folder `tokenizer`."""
    from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder)
    pieces = ChatGLMTokenizer.from_pretrained(folder)
    content = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "position_encoding_2d": True,
        "torch_dtype": "float16",
        "hidden_size": 32,
        "inner_hidden_size": 64,
        "num_attention_heads": 2,
        "num_layers": 2,
        "max_sequence_length": 256,
        "vocab_size": 130528 if pieces.vocab_size > 100_000 else pieces.vocab_size + 8,
        "bos_token_id": pieces.bos_token_id,
        "eos_token_id": pieces.eos_token_id,
        "gmask_token_id": pieces.gmask_token_id,
        "mask_token_id": pieces.mask_token_id,
        "pad_token_id": pieces.pad_token_id,
        **config_changes,
    }
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    torch.manual_seed(seed)
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**{k: v for k, v in content.items() if k != "torch_dtype"}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)  # the initial 0.02 would leave attention flat and gradients tiny
    state = {key: value.half() for key, value in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def write_rows(path: Path, count: int, *, start: int = 0) -> Path:
    """Write the first rows of the sample data, from `start`, into `path`."""
    lines = (REPOSITORY / "data" / "AdvertiseGen" / "sample_train.json").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[start : start + count]) + "\n", encoding="utf-8")
    return path


def quantize_linear(linear, bits: int):
    """The quantised linear of a plain one, which must have a bias."""
    from chatglm_tuning.quantization.linear import QuantizedLinear
    from chatglm_tuning.quantization.packing import quantize_rows

    quantized = QuantizedLinear(linear.in_features, linear.out_features, bits, dtype=linear.bias.dtype)
    quantized.weight.data, quantized.weight_scale.data = quantize_rows(linear.weight.data, bits)
    quantized.bias = linear.bias
    return quantized


def dequantize_linear(quantized) -> torch.Tensor:
    """The full weight of a quantised linear, fp32."""
    from chatglm_tuning.quantization.packing import dequantize_rows

    return dequantize_rows(quantized.weight.data, quantized.weight_scale.data, quantized.bits, torch.float32)
