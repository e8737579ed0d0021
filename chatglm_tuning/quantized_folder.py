"""A base in int8 or int4, written once as a folder in the layout of the released ones.

The linears' weights become int8 `weight` and fp16 `weight_scale`; all else stays in the precision that it is stored
in. No more than one file's tensors are in memory.
"""

import json
import shutil
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from chatglm_tuning.checkpoint import fsync
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import load_tokenizer, read_config
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration
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

_TOKENIZER_FILES = ("ice_text.model", "tokenizer_config.json")
_BYTES_OF_A_FILE = 512 << 20
_INDEX_NAME = "model.safetensors.index.json"
_OF_A_PREFIX = ("pre_seq_len", "prefix_projection")


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
            where=str(folder),
            remedy="Use it as it is, or give the full-precision model",
        )
    load_tokenizer(folder, config)
    files = find_weight_files(folder)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise UserError(
            "the output is there already", where=str(output_dir), remedy="Give a new folder with --output_dir"
        )
    _check_space(files, config, bits, output_dir)
    unfinished = output_dir.parent / f".{output_dir.name}.part"
    _check_unfinished(unfinished, output_dir)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            size_bytes = _write(folder, files, config, bits, unfinished, show_progress=show_progress)
            if output_dir.exists():
                output_dir.rmdir()
            unfinished.rename(output_dir)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        fsync(output_dir.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"the folder cannot be written ({reason})",
            where=str(output_dir),
            remedy="Give a folder with --output_dir that can be written, on a disk with room for it",
        ) from error
    return size_bytes


def _check_unfinished(unfinished: Path, output_dir: Path) -> None:
    """Refuse a folder of the name that is used until the output is whole, unless a killed run left it."""
    known = {"config.json", _INDEX_NAME, *_TOKENIZER_FILES}
    names = [path.name for path in unfinished.iterdir()] if unfinished.is_dir() else []
    strangers = [name for name in names if name not in known and Path(name).suffix not in (".part", ".safetensors")]
    if strangers:
        raise UserError(
            f"{unfinished.name}, which would be written to at first, holds other files ({strangers[0]})",
            where=str(output_dir.parent),
            remedy="Move it away, or give another --output_dir",
        )


def _check_space(files: WeightFiles, config: ChatGLMConfig, bits: int, output_dir: Path) -> None:
    plain, quantized = _models(config, bits)
    linears = sum(
        module.in_features * module.out_features
        for module in quantized.modules()
        if isinstance(module, QuantizedLinear)
    )
    values = sum(parameter.numel() for parameter in plain.parameters())
    needed = linears * bits // 8 + (values - linears) * files.size_bytes // values
    free = shutil.disk_usage(next(path for path in output_dir.absolute().parents if path.is_dir())).free
    if needed > free:
        raise UserError(
            f"about {needed / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free",
            where=str(output_dir),
            remedy="Make room, or give a folder on another disk",
        )


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
    writer = _FilesWriter(target)
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
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    content = {key: value for key, value in content.items() if key not in _OF_A_PREFIX}
    content |= {"quantization_bit": bits, "quantization_embeddings": False, "tie_word_embeddings": is_tied}
    (target / "config.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in sorted(target.iterdir()):
        fsync(path)
    fsync(target)
    return size_bytes


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Compare two stored tensors of one shape block by block."""
    if one.tensor.dtype != other.tensor.dtype:
        return False
    pairs = zip(one.blocks(), other.blocks(), strict=True)
    return all(torch.equal(block, other_block) for (_, block), (_, other_block) in pairs)


class _FilesWriter:
    """Writes tensors into safetensors files of about one size, and their index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, Tensor] = {}
        self._names: list[list[str]] = []
        self._total_bytes = 0

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a tensor, which must stay as it is until the file is written."""
        pending_bytes = sum(waiting.nbytes for waiting in self._pending.values())
        if self._pending and pending_bytes + tensor.nbytes > _BYTES_OF_A_FILE:
            self._write_pending()
        self._pending[key] = tensor
        self._total_bytes += tensor.nbytes

    def _write_pending(self) -> None:
        path = self._part(len(self._names))
        save_file(self._pending, path, metadata={"format": "pt"})
        self._names.append(list(self._pending))
        self._pending = {}

    def _part(self, number: int) -> Path:
        return self._folder / f"{number:05d}.part"

    def finish(self) -> int:
        """Write what is left, name the files by their number, and write the index; return the bytes of all tensors."""
        self._write_pending()
        weight_map = {}
        for number, keys in enumerate(self._names):
            name = f"model-{number + 1:05d}-of-{len(self._names):05d}.safetensors"
            self._part(number).rename(self._folder / name)
            weight_map |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        path = self._folder / _INDEX_NAME
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for name in set(weight_map.values()):
            # safetensors keeps a file from everyone but its owner; the umask decided over the index.
            (self._folder / name).chmod(stat.S_IMODE(path.stat().st_mode))
        return self._total_bytes
