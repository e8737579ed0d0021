"""The configuration of ChatGLM-6B, read from the released `config.json` as it is."""

import math
from typing import Any

from transformers import PreTrainedConfig

from chatglm_tuning.errors import UserError

# What only ChatGLM2-6B, ChatGLM3-6B and glm-4-9b have in a config that also says "model_type": "chatglm".
_LATER_ARCHITECTURE_KEYS = ("multi_query_attention", "ffn_hidden_size", "padded_vocab_size", "rmsnorm", "kv_channels")

# Beyond these, a few bytes of config.json would make a model without storage that fills the memory.
_MOST_OF = {
    "vocab_size": 1 << 20,
    "hidden_size": 1 << 20,
    "num_layers": 1000,
    "num_attention_heads": 1 << 20,
    "inner_hidden_size": 1 << 22,
    "max_sequence_length": 1 << 22,
}

# Beyond these, what is computed is not finite, or means nothing.
_RANGE_OF = {"layernorm_epsilon": (1e-15, 0.1), "residual_scale": (1e-4, 1e4), "prefix_dropout": (0, 1)}

# The revision of ChatGLM-6B whose ids are shifted by 20000 image tokens.
OLD_REVISION_VOCABULARY = 150528


def refuse_other_architectures(config: dict[str, Any], where: str) -> None:
    """Raise UserError where `config` (the parsed `config.json` of the folder `where`) is not a ChatGLM-6B's."""
    found = [key for key in _LATER_ARCHITECTURE_KEYS if key in config]
    if found:
        name = _later_model_name(config)
        raise UserError(
            f"this folder holds {name} (config.json has {found[0]!r}), whose architecture is not ChatGLM-6B's",
            code="M105",
            where=where,
            remedy="give the folder of the first ChatGLM-6B (THUDM/chatglm-6b)",
        )
    model_type = config.get("model_type")
    if model_type != "chatglm":
        found_type = "no model_type" if model_type is None else f"model_type {model_type!r}"
        raise UserError(
            f"config.json says {found_type}; only 'chatglm' (ChatGLM-6B) can be tuned here",
            code="M105",
            where=where,
            remedy="give the folder of ChatGLM-6B (THUDM/chatglm-6b)",
        )


def _later_model_name(config: dict[str, Any]) -> str:
    if config.get("padded_vocab_size", 0) > 100_000 or config.get("num_layers") == 40:
        return "glm-4-9b"
    return "ChatGLM2-6B or ChatGLM3-6B"


class ChatGLMConfig(PreTrainedConfig):
    """Sizes, special ids and switches of a ChatGLM-6B.

    Defaults are the released model's (THUDM/chatglm-6b, config.json, vocabulary 130528).
    residual_scale: factor of the normalised residual; the released block never learns its model's depth, so it is
        sqrt(2 * 28) whatever `num_layers` is.
    pre_seq_len: virtual tokens of P-Tuning v2, or None; prefix_projection: whether an MLP makes them.
    quantization_bit: 4 or 8 where the four linears of every layer are stored quantised, else 0 or None.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    residual_scale: float = math.sqrt(2 * 28)
    position_encoding_2d: bool = True
    use_cache: bool = True
    bos_token_id: int = 130004
    eos_token_id: int = 130005
    pad_token_id: int = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    prefix_dropout: float = 0.1
    quantization_bit: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_other_architectures({"model_type": self.model_type, **kwargs}, kwargs.get("_name_or_path") or "config")
        if not self.position_encoding_2d:
            raise UserError(
                "config.json says position_encoding_2d false; only the released two-row positions are supported",
                code="M108",
                where="config.json",
                remedy="give the folder of the released ChatGLM-6B",
            )
        if self.quantization_bit not in (None, 0, 4, 8):
            raise UserError(
                f"config.json says quantization_bit {self.quantization_bit}; 4 and 8 are supported",
                code="M108",
                where="config.json",
                remedy="give a full-precision, int8 or int4 ChatGLM-6B",
            )
        # transformers would look for the released model's own code under these names.
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Columns of one attention head."""
        return self.hidden_size // self.num_attention_heads


def check_settings(config: ChatGLMConfig, where: str) -> None:
    """Raise UserError where a number in `config`, read from the file `where`, is none or beyond those of any model."""
    wrong = _wrong_size(config) or _wrong_number(config)
    if wrong:
        raise UserError(wrong, code="M104", where=where, remedy="Copy or download this file again")


def _wrong_size(config: ChatGLMConfig) -> str | None:
    for name, most in _MOST_OF.items():
        size = getattr(config, name)
        if not isinstance(size, int) or not 1 <= size <= most:
            return f"{name} must be a whole number from 1 to {most}, not {size!r}"
    if config.hidden_size % config.num_attention_heads:
        return f"hidden_size {config.hidden_size} cannot be divided by num_attention_heads {config.num_attention_heads}"
    return None


def _wrong_number(config: ChatGLMConfig) -> str | None:
    for name, (least, most) in _RANGE_OF.items():
        number = getattr(config, name)
        if type(number) not in (int, float) or not least <= number <= most:  # NaN is not, either
            return f"{name} must be a number from {least:g} to {most:g}, not {number!r}"
    return None
