"""Self-describing adapter folders: what was trained, on which base, by which versions, and whether it is whole.

A folder counts as ours once its manifest stands in it, and the manifest is written last: it holds the size and the
SHA-256 of every file, so a half-written folder is never taken for a whole one.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from chatglm_tuning.adapters.lora import lora_state_dict
from chatglm_tuning.adapters.ptuning import (
    PREFIX_KEY,
    PrefixShape,
    prefix_state_dict,
    prefix_tensors,
    shape_of_prefix,
)
from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMForConditionalGeneration
from chatglm_tuning.shards import WEIGHT_NAMES, find_weight_files, is_zip, iterate_tensors, load_bin
from chatglm_tuning.small_json import read_small_json

logger = logging.getLogger(__name__)

MANIFEST_NAME = "chatglm_tuning.json"
CERTIFICATE_NAME = "certificate.json"
PREFIX_FILE = "prefix_encoder.safetensors"
ORIGINAL_PREFIX_FILE = "pytorch_model.bin"
LORA_CONFIG_FILE = "adapter_config.json"
LORA_FILE = "adapter_model.safetensors"
OLD_LORA_FILE = "adapter_model.bin"
_TOKENIZER_FILES = ("ice_text.model", "tokenizer_config.json")
_CHECKPOINT_PREFIX = "checkpoint-"
_RESULT_PART = ".result.part"
_QUICKLY_READ_BYTES = 8 << 20
_LIBRARIES = ("chatglm-tuning", "torch", "transformers", "peft", "accelerate", "safetensors")

Method = Literal["lora", "ptuning", "full"]

# Of an adapter; a full model's depend on its size, and a checkpoint's of an engine on the engine.
_FILES_OF: Mapping[str, tuple[str, ...]] = {"lora": (LORA_CONFIG_FILE, LORA_FILE), "ptuning": (PREFIX_FILE,)}


@dataclass(frozen=True)
class BaseModel:
    """Which base an adapter was trained on.

    fingerprint: SHA-256 over its LayerNorms and biases, the same for every precision and file format of one model;
        of a base that adapters were merged into, over these adapters too.
    """

    name_or_path: str
    fingerprint: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    quantization_bit: int | None


@dataclass(frozen=True)
class Manifest:
    """What an adapter folder says of itself.

    files: name → {"bytes", "sha256"} of every file that belongs to it. proof: that the adapter was read again and
        answers as the live one did (proof.py), None where that was not tried.
    """

    method: Method
    base_model: BaseModel
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    library_versions: Mapping[str, str] = field(default_factory=dict)
    proof: Mapping[str, Any] | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    format_version: int = 1


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that make a result."""
    return {name: importlib.metadata.version(name) for name in _LIBRARIES}


def save_adapter_files(
    model: nn.Module, folder: Path, *, for_original: bool, state: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Write what was trained of `model` (LoRA or prefix) into `folder`, each file atomically, and return their names.

    for_original: also write the prefix as the original's `pytorch_model.bin`. state: its tensors under the names they
        are saved under, where an engine has gathered them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        state, name = state or lora_state_dict(model), LORA_FILE
        config = model.peft_config["default"].to_dict()
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        config["inference_mode"] = True
        text = json.dumps(config, indent=2, sort_keys=True, default=_enum_value) + "\n"
        with _replacing(folder / LORA_CONFIG_FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")
        names = [LORA_CONFIG_FILE, LORA_FILE]
    else:
        state, name = state or prefix_state_dict(cast("ChatGLMForConditionalGeneration", model)), PREFIX_FILE
        names = [PREFIX_FILE]
        if for_original:
            with _replacing(folder / ORIGINAL_PREFIX_FILE) as temporary:
                torch.save(dict(state), temporary)
            names.append(ORIGINAL_PREFIX_FILE)
    with _replacing(folder / name) as temporary:
        save_file(dict(state), temporary, metadata={"format": "pt"})
    return names


def save_full_files(model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None) -> list[str]:
    """Write a whole model, a PreTrainedModel, into `folder` as safetensors for `from_pretrained` and `load_base`.

    The tokenizer's files are copied from the base's folder. Nothing in `folder` changes before all is written.
    state: the model's state dict where an engine has gathered it, else None.
    Returns the names of all files of the model.
    """
    whole = cast("PreTrainedModel", model)
    unfinished = folder / ".model.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        whole.save_pretrained(unfinished, state_dict=None if state is None else dict(state))
        for name in _TOKENIZER_FILES:
            source = Path(whole.config.name_or_path or folder) / name
            if source.is_file():
                shutil.copyfile(source, unfinished / name)
        names = sorted(path.name for path in unfinished.iterdir())
        for name in names:
            _let_umask_decide(unfinished / name)
            os.replace(unfinished / name, folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return names


def _enum_value(value: Any) -> Any:
    return getattr(value, "value", str(value))


def write_manifest(folder: Path, manifest: Manifest, names: list[str]) -> None:
    """Make `folder` whole: fsync the files `names`, then write `manifest` with their digests, atomically."""
    files = {}
    for name in sorted(names):
        path = folder / name
        fsync(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    content = {**asdict(manifest), "files": files, "library_versions": library_versions()}
    content["sha256"] = _digest_content(content)
    with _replacing(folder / MANIFEST_NAME) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path, *, verify_files: bool = True) -> Manifest | None:
    """Return the manifest of `folder`, None where it has none.

    Raises UserError where it cannot be read or was changed, or with `verify_files` where a file differs from what it
    says. The manifests of earlier versions have no digest of their own.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        content = read_small_json(path)
        version = content["format_version"]
        digest = content.pop("sha256", None)
        if version != Manifest.format_version:
            raise UserError(
                f"the manifest is of format {version}, and this version reads format {Manifest.format_version}",
                code="C105",
                where=str(path),
                remedy="Use the version of chatglm-tuning that wrote it",
            )
        if digest not in (None, _digest_content(content)):
            raise _damaged(path, "its manifest differs from what was saved")
        manifest = Manifest(**{**content, "base_model": BaseModel(**content["base_model"])})
        facts = {name: (fact["bytes"], fact["sha256"]) for name, fact in manifest.files.items()}
        # These names are read, and those of a result that is given up are removed.
        if strangers := [name for name in facts if not _is_inside(folder, name)]:
            raise _damaged(path, f"its manifest names a file outside its folder: {strangers[0]!r}")
        if manifest.method not in get_args(Method) or not isinstance(manifest.settings, dict):
            raise ValueError("no method, or no settings")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, "its manifest cannot be read") from error
    what = "model" if manifest.method == "full" else "adapter"
    if absent := [name for name in _FILES_OF.get(manifest.method, ()) if name not in facts]:
        raise _damaged(path, f"its manifest does not name {absent[0]}", what)
    for name, (size, digest) in facts.items() if verify_files else ():
        file = folder / name
        if not file.is_file():
            raise _damaged(file, "the file is missing", what)
        if file.stat().st_size != size or file_digest(file) != digest:
            raise _damaged(file, "the file differs from what was saved", what)
    return manifest


def _digest_content(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a manifest says, however it is laid out."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()


def is_name_inside(name: str) -> bool:
    """Return whether `name`, joined to a folder, is a file in that folder or in one below it."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts)


def _is_inside(folder: Path, name: str) -> bool:
    """Return whether `name`, joined to `folder`, is a file in it or in a folder of its own (as DeepSpeed writes)."""
    # The file itself may be a link, as in the hub's cache.
    is_below = (folder / name).parent.resolve().is_relative_to(folder.resolve())
    return is_below and all(map(is_name_inside, name.split("/")))


def _damaged(path: Path, reason: str, what: str = "adapter") -> UserError:
    return UserError(
        f"the {what} is damaged ({reason})",
        code="C104",
        where=str(path),
        remedy="Copy the folder again, or use an earlier checkpoint",
    )


def adapter_method(folder: Path) -> Method | None:
    """Return which adapter `folder` holds, by its manifest or else by its files; None where it holds none."""
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest.method
    if (folder / LORA_CONFIG_FILE).is_file():
        return "lora"
    if (folder / PREFIX_FILE).is_file() or (folder / ORIGINAL_PREFIX_FILE).is_file():
        return "ptuning"
    return None


def refuse_adapter(folder: Path) -> None:
    """Raise UserError for a folder that is given as a base and holds an adapter alone."""
    weights = next((name for name in WEIGHT_NAMES if (folder / name).is_file()), None)
    if weights is not None and not (weights == ORIGINAL_PREFIX_FILE and _is_prefix_alone(folder / weights)):
        return
    if (folder / LORA_CONFIG_FILE).is_file():
        what, flag = "a LoRA", "--lora_checkpoint"
    elif weights is not None or (folder / PREFIX_FILE).is_file():
        what, flag = "a prefix of P-Tuning v2", "--ptuning_checkpoint"
    else:
        return
    manifest = read_manifest(folder, verify_files=False)
    base = "its base" if manifest is None else f"its base ({manifest.base_model.name_or_path})"
    raise UserError(
        f"the folder holds {what}, which is no model by itself",
        code="M122",
        where=str(folder),
        remedy=f"Give it as the adapter ({flag}), and {base} with --model_name_or_path",
    )


def _is_prefix_alone(file: Path) -> bool:
    # The format before zip archives would be read whole; prefixes are not that old.
    return is_zip(file) and all(key.startswith(PREFIX_KEY) for key in load_bin(file))


def check_certificate(folder: Path) -> None:
    """Compare a model folder that `export` wrote with its certificate, as far as that takes no time.

    The sizes of all files are compared, and the digests of small ones; a folder without a certificate passes.
    Raises UserError where weights have another size; warns of other files that were changed.
    """
    path = folder / CERTIFICATE_NAME
    if not path.is_file():
        return
    try:
        files = read_small_json(path)["output"]["files"]
        facts = {
            folder / name: (int(fact["bytes"]), fact["sha256"]) for name, fact in files.items() if is_name_inside(name)
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        logger.warning("%s is no certificate of an export: nothing vouches for this folder", path)
        return
    changed = [file for file, (size, digest) in facts.items() if _has_changed(file, size, digest)]
    torn = [file for file in changed if file.suffix in (".safetensors", ".bin")]
    if torn:
        raise UserError(
            f"the weights are not those that were exported ({torn[0].name} is missing or has another size than "
            f"{CERTIFICATE_NAME} says)",
            code="M123",
            where=str(folder),
            remedy=f"Copy the folder again; if they were changed on purpose, remove {CERTIFICATE_NAME}",
        )
    if changed:
        names = ", ".join(file.name for file in changed)
        logger.warning("%s was changed after the export: the certificate in %s is not of this folder", names, folder)


def _has_changed(file: Path, size: int, digest: str) -> bool:
    if not file.is_file() or file.stat().st_size != size:
        return True
    is_weight = file.suffix in (".safetensors", ".bin")
    return not is_weight and size <= _QUICKLY_READ_BYTES and file_digest(file) != digest


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over an adapter's names, shapes and values, the same in every file format."""
    whole = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().float().contiguous()
        whole.update(f"{key} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return whole.hexdigest()


def read_prefix(folder: Path) -> tuple[PrefixShape, dict[str, Tensor]]:
    """Read the prefix of `folder`: ours, or the original's `.bin` with or without full-model keys, sharded or not.

    Returns its shape, read from the tensors, and the tensors named as in the encoder, fp32.
    Raises UserError where there is none or it is damaged.
    """
    _check_folder(folder)
    read_manifest(folder)
    if (folder / PREFIX_FILE).is_file():
        state = _load_safetensors(folder / PREFIX_FILE)
    elif (folder / LORA_CONFIG_FILE).is_file():
        raise UserError(
            "the folder holds a LoRA adapter, not a prefix of P-Tuning v2",
            code="C103",
            where=str(folder),
            remedy="Give it with --lora_checkpoint",
        )
    elif any((folder / name).is_file() for name in WEIGHT_NAMES):
        pairs = iterate_tensors(find_weight_files(folder))
        state = {key: tensor.clone() for key, tensor in pairs if key.startswith(PREFIX_KEY)}
    else:
        raise UserError(
            f"the folder holds no prefix ({PREFIX_FILE} or {ORIGINAL_PREFIX_FILE})",
            code="C102",
            where=str(folder),
            remedy="Give the folder of a P-Tuning v2 run",
        )
    tensors = {key: value.float() for key, value in prefix_tensors(state).items()}
    return shape_of_prefix(tensors, str(folder)), tensors


def read_lora(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the LoRA adapter in `folder`, named as peft saves them, on the CPU.

    Raises UserError where the folder does not hold a whole LoRA adapter.
    """
    check_lora_folder(folder)
    if (folder / LORA_FILE).is_file():
        return _load_safetensors(folder / LORA_FILE)
    return load_bin(folder / OLD_LORA_FILE)


def check_lora_folder(folder: Path) -> None:
    """Raise UserError where `folder` does not hold a whole LoRA adapter."""
    _check_folder(folder)
    read_manifest(folder)
    if (folder / LORA_CONFIG_FILE).is_file():
        if (folder / LORA_FILE).is_file():
            _load_safetensors(folder / LORA_FILE)
            return
        if (folder / OLD_LORA_FILE).is_file():
            load_bin(folder / OLD_LORA_FILE)
            return
    elif adapter_method(folder) == "ptuning":
        raise UserError(
            "the folder holds a prefix of P-Tuning v2, not a LoRA adapter",
            code="C103",
            where=str(folder),
            remedy="Give it with --ptuning_checkpoint",
        )
    raise UserError(
        f"the folder holds no LoRA adapter ({LORA_CONFIG_FILE} and {LORA_FILE} or {OLD_LORA_FILE})",
        code="C102",
        where=str(folder),
        remedy="Give the folder of a LoRA run",
    )


def _load_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, "the file is truncated or no safetensors") from error


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            "there is no such folder", code="C101", where=str(folder), remedy="Give the folder of a trained adapter"
        )


def step_of_checkpoint(folder: Path) -> int | None:
    """Return N for a folder named `checkpoint-N`, None for any other."""
    named = re.fullmatch(rf"{_CHECKPOINT_PREFIX}([0-9]{{1,18}})", folder.name)
    return None if named is None else int(named[1])


def whole_checkpoints(output_dir: Path) -> Iterator[Path]:
    """Yield the whole `checkpoint-N` folders of `output_dir`, newest first; torn ones are passed over."""
    numbered = [(step_of_checkpoint(path), path) for path in output_dir.glob(f"{_CHECKPOINT_PREFIX}*")]
    for _step, path in sorted(((step, path) for step, path in numbered if step is not None), reverse=True):
        try:
            if read_checkpoint(path) is not None:
                yield path
        except UserError:
            continue


def read_checkpoint(folder: Path) -> Manifest | None:
    """Return the manifest of a checkpoint, None where it has none.

    Raises UserError where it is damaged, and where its name says another step than it was written at.
    """
    manifest = read_manifest(folder)
    step = step_of_checkpoint(folder)
    written = None if manifest is None else manifest.settings.get("steps")
    if None not in (step, written) and step != written:
        raise UserError(
            f"the folder was renamed: it was written at step {written}",
            code="C112",
            where=str(folder),
            remedy=f"give it back its name, {_CHECKPOINT_PREFIX}{written}",
        )
    return manifest


@contextmanager
def new_result(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write a result to, manifest and all; on leaving, its files are in `folder`.

    Until they all are, `folder` has no manifest, so that a mixture of an old and a new result counts as none.
    An error inside leaves `folder` as it was.
    """
    part = folder / _RESULT_PART
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        names = sorted(path.name for path in part.iterdir() if path.name != MANIFEST_NAME)
        for name in [*names, MANIFEST_NAME]:
            os.replace(part / name, folder / name)
        fsync(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to; on leaving, that file is on the disk and in the place of `path`.

    An error inside leaves `path` as it was.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        yield temporary
        _let_umask_decide(temporary)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _let_umask_decide(path: Path) -> None:
    """Give `path` the permissions of any new file: safetensors would keep it from everyone but its owner."""
    probe = path.with_name(f".{path.name}.mode")
    probe.touch()
    try:
        path.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink()


def fsync(path: Path) -> None:
    """See to it that a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes only what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
