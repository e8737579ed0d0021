"""A base in int8 or int4, written once as a folder in the layout of the released ones.

The linears' weights become int8 `weight` and fp16 `weight_scale`; all else stays in the precision that it is stored
in. No more than one file's tensors are in memory. The digests of all files stand beside them.
"""

from pathlib import Path

import torch

from chatglm_tuning.base_folder import load_tokenizer, read_config
from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm_tuning.new_folder import (
    WeightsWriter,
    appearing_whole,
    check_new_folder,
    check_room,
    copy_tokenizer,
    write_config,
    write_digests,
)
from chatglm_tuning.quantization.linear import QuantizedLinear
from chatglm_tuning.quantization.packing import quantize_rows
from chatglm_tuning.shards import (
    StoredTensor,
    WeightFiles,
    find_weight_files,
    iterate_tensors,
    reading_progress,
    resolve_model_folder,
)
from chatglm_tuning.tensor_check import EMBEDDING_KEY, HEAD_KEY, TensorCheck


def write_quantized_folder(model_name_or_path: str, output_dir: Path, bits: int, *, show_progress: bool = False) -> int:
    """Quantise a full-precision base to `bits` (8 or 4) and write it with its tokenizer as the new folder `output_dir`.

    `load_base` gives the same tensors for it as for the base with that `quantization_bit`. The folder appears under
    its name when it is whole, and not before.
    Returns the bytes of its weights.
    Raises UserError for a base that cannot be loaded or is quantised already, for an output that exists, and where it
    cannot be written.
    """
    folder = resolve_model_folder(model_name_or_path)
    config = read_config(folder)
    if config.quantization_bit:
        raise UserError(
            f"the folder holds int{config.quantization_bit} weights already",
            code="M121",
            where=str(folder),
            remedy="Use it as it is, or give the full-precision model",
        )
    load_tokenizer(folder, config)
    files = find_weight_files(folder)
    check_new_folder(output_dir)
    _check_space(files, config, bits, output_dir)
    with appearing_whole(output_dir) as unfinished:
        return _write(folder, files, config, bits, unfinished, show_progress=show_progress)


def _check_space(files: WeightFiles, config: ChatGLMConfig, bits: int, output_dir: Path) -> None:
    plain, quantized = _models(config, bits)
    linears = sum(
        module.in_features * module.out_features
        for module in quantized.modules()
        if isinstance(module, QuantizedLinear)
    )
    values = sum(parameter.numel() for parameter in plain.parameters())
    needed = linears * bits // 8 + (values - linears) * files.size_bytes // values
    check_room(needed, output_dir)


def _models(
    config: ChatGLMConfig, bits: int
) -> tuple[ChatGLMForConditionalGeneration, ChatGLMForConditionalGeneration]:
    """Return the model as it is stored and as it will be, both without storage."""
    with torch.device("meta"):
        plain = ChatGLMForConditionalGeneration(config)
        config.quantization_bit = bits
        quantized = ChatGLMForConditionalGeneration(config)
        config.quantization_bit = None
    return plain, quantized


def _write(
    folder: Path, files: WeightFiles, config: ChatGLMConfig, bits: int, target: Path, *, show_progress: bool
) -> int:
    plain, quantized = _models(config, bits)
    check = TensorCheck(plain, folder)
    writer = WeightsWriter(target)
    ends: dict[str, StoredTensor] = {}
    with reading_progress("quantising", files, show=show_progress) as advance:
        for stored in iterate_tensors(files):
            key, tensor = stored
            name, _, leaf = key.rpartition(".")
            if check.is_wanted(stored):
                if key in (EMBEDDING_KEY, HEAD_KEY):
                    ends[key] = stored
                elif leaf == "weight" and isinstance(quantized.get_submodule(name), QuantizedLinear):
                    weight, scale = quantize_rows(tensor, bits)
                    check.check_scale(key, scale)
                    writer.add(key, weight)
                    writer.add(f"{key}_scale", scale)
                else:
                    writer.add(key, tensor)
            advance(tensor.nbytes)
        check.finish()
        writer.add(EMBEDDING_KEY, ends[EMBEDDING_KEY].tensor)
        is_tied = HEAD_KEY not in ends or _are_equal(ends[HEAD_KEY], ends[EMBEDDING_KEY])
        if not is_tied:
            writer.add(HEAD_KEY, ends[HEAD_KEY].tensor)
        size_bytes = writer.finish()
    copy_tokenizer(folder, target)
    changes = {"quantization_bit": bits, "quantization_embeddings": False, "tie_word_embeddings": is_tied}
    write_config(folder, target, changes)
    write_digests(target)
    return size_bytes


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Compare two stored tensors of one shape block by block."""
    if one.tensor.dtype != other.tensor.dtype:
        return False
    pairs = zip(one.blocks(), other.blocks(), strict=True)
    return all(torch.equal(block, other_block) for (_, block), (_, other_block) in pairs)
