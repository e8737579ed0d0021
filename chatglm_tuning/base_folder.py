"""The folder of a base: its configuration and its tokenizer, each read and checked before any weight."""

from pathlib import Path

from chatglm_tuning.checkpoint import refuse_adapter
from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMConfig, ChatGLMTokenizer
from chatglm_tuning.model.configuration import OLD_REVISION_VOCABULARY, check_settings, refuse_other_architectures
from chatglm_tuning.small_json import read_small_json

MERGED_KEY = "merged_adapters"
"""The key of config.json that says which adapters are in a base's weights."""

_READ_SETTINGS = {*ChatGLMConfig.__annotations__, *ChatGLMConfig.attribute_map, MERGED_KEY}
_DOWNLOAD_AGAIN = "Copy or download this file again"


def read_config(folder: Path) -> ChatGLMConfig:
    """Read `config.json`.

    Raises UserError for another architecture, for the revision with 150528 words, for quantised embeddings, for a
    file that is no configuration, and for the folder of an adapter.
    """
    refuse_adapter(folder)
    path = folder / "config.json"
    try:
        content = read_small_json(path)
    except FileNotFoundError as error:
        raise UserError(
            "the folder has no config.json",
            code="M103",
            where=str(folder),
            remedy="Give the folder of a downloaded ChatGLM-6B",
        ) from error
    except ValueError as error:
        raise UserError(f"this is not JSON ({error})", code="M104", where=str(path), remedy=_DOWNLOAD_AGAIN) from error
    if not isinstance(content, dict):
        raise UserError("this is not a JSON object", code="M104", where=str(path), remedy=_DOWNLOAD_AGAIN)
    refuse_other_architectures(content, str(folder))
    if content.get("vocab_size") == OLD_REVISION_VOCABULARY:
        raise UserError(
            f"this is the earlier revision of ChatGLM-6B (vocabulary {OLD_REVISION_VOCABULARY}, with image tokens)",
            code="M106",
            where=str(folder),
            remedy="Use the final revision (vocabulary 130528) with its own tokenizer",
        )
    if content.get("quantization_embeddings"):
        raise UserError(
            "this folder has quantised embeddings (chatglm-6b-int4-qe), which are not supported",
            code="M107",
            where=str(folder),
            remedy="Use chatglm-6b-int4, or chatglm-6b with --quantization_bit 4",
        )
    # transformers takes more from a configuration than ours has, kernels to download among it.
    content = {key: value for key, value in content.items() if key in _READ_SETTINGS}
    # A base has no prefix: the original wrote these two beside a trained one, which is loaded as an adapter.
    content |= {"pre_seq_len": None, "prefix_projection": False}
    try:
        config = ChatGLMConfig.from_dict(content)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"a setting in it cannot be used ({_last_line(error)})",
            code="M104",
            where=str(path),
            remedy=_DOWNLOAD_AGAIN,
        ) from error
    check_settings(config, str(path))
    config.name_or_path = str(folder)  # the file may say under which name it was published
    return config


def _last_line(error: Exception) -> str:
    """Return what an error of a library says in the end, where it tells the value that it refused."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip().rstrip(".") if lines else type(error).__name__


def load_tokenizer(folder: Path, config: ChatGLMConfig) -> ChatGLMTokenizer:
    """Load the tokenizer of `folder`; raises UserError where it is not the one of `config`'s revision."""
    if not (folder / "ice_text.model").is_file():
        raise UserError(
            "the folder has no ice_text.model (the tokenizer)",
            code="M109",
            where=str(folder),
            remedy="Copy it from the model's download",
        )
    try:
        tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"the tokenizer cannot be read ({_last_line(error)})",
            code="M110",
            where=str(folder),
            remedy="Download ice_text.model and tokenizer_config.json again",
        ) from error
    if difference := _revision_difference(tokenizer, config):
        raise UserError(
            f"tokenizer and model are of different revisions: {difference}",
            code="M112",
            where=str(folder),
            remedy="Take ice_text.model, tokenizer_config.json and config.json from one download",
        )
    return tokenizer


def _revision_difference(tokenizer: ChatGLMTokenizer, config: ChatGLMConfig) -> str | None:
    """Say in what a tokenizer and a model's config differ, None where they fit."""
    if tokenizer.num_image_tokens:
        return (
            f"tokenizer_config.json has {tokenizer.num_image_tokens} image tokens (vocabulary "
            f"{OLD_REVISION_VOCABULARY}), the model has none (vocabulary {config.vocab_size})"
        )
    if tokenizer.vocab_size > config.vocab_size:
        return f"the tokenizer has {tokenizer.vocab_size} pieces, config.json says vocab_size {config.vocab_size}"
    for name in ("bos_token_id", "eos_token_id", "gmask_token_id", "mask_token_id", "pad_token_id"):
        of_tokenizer, of_config = getattr(tokenizer, name), getattr(config, name)
        if of_tokenizer != of_config:
            return f"{name} is {of_tokenizer} in the tokenizer and {of_config} in config.json"
    return None


def merged_adapters(config: ChatGLMConfig) -> dict[str, str]:
    """Return the adapters that `export` merged into the weights of a base: digest of the tensors → name, in order."""
    found = getattr(config, MERGED_KEY, None)
    entries = found if isinstance(found, list) else []
    return {str(entry.get("tensors_sha256")): str(entry.get("name")) for entry in entries if isinstance(entry, dict)}


def bits_to_hold(config: ChatGLMConfig, quantization_bit: int | None, folder: Path) -> int | None:
    """Return 8, 4 or None: what the folder is stored in, else what was asked for.

    Raises UserError where both are there and differ.
    """
    stored_bit = config.quantization_bit or None
    if stored_bit and quantization_bit and stored_bit != quantization_bit:
        raise UserError(
            f"the folder holds int{stored_bit} weights, and --quantization_bit says {quantization_bit}",
            code="M121",
            where=str(folder),
            remedy=f"Leave --quantization_bit out, or say {stored_bit}, or give the full-precision model",
        )
    return stored_bit or quantization_bit
