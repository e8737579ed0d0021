"""An adapter as another program reads it: the original's prefix, peft 0.3's LoRA, and this program's own folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from chatglm_tuning.adapters.lora import load_lora, read_lora_config
from chatglm_tuning.adapters.ptuning import PREFIX_KEY
from chatglm_tuning.checkpoint import (
    LORA_CONFIG_FILE,
    MANIFEST_NAME,
    OLD_LORA_FILE,
    ORIGINAL_PREFIX_FILE,
    PREFIX_FILE,
    BaseModel,
    Manifest,
    read_lora,
    read_manifest,
    read_prefix,
    save_adapter_files,
    write_manifest,
)
from chatglm_tuning.errors import UserError
from chatglm_tuning.export.weights import make_hollow_model
from chatglm_tuning.loading import refuse_values_not_finite
from chatglm_tuning.new_folder import TOKENIZER_FILES, copy_tokenizer, write_config
from chatglm_tuning.shards import WEIGHT_NAMES, find_weight_files

# All that peft 0.3 knows of a LoRA; another key would make it raise.
_KEYS_OF_PEFT_0_3 = (
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "target_modules",
    "task_type",
)
_SCALED_BY_ROOT = "use_rslora"


def check_convertible(checkpoint: Path) -> None:
    """Raise UserError for a LoRA that peft 0.3 cannot express."""
    config: Any = read_lora_config(checkpoint)
    unknown = {
        "it is a DoRA": config.use_dora,
        "its modules have ranks of their own (rank_pattern)": bool(config.rank_pattern),
        "its modules have scales of their own (alpha_pattern)": bool(config.alpha_pattern),
        "its B matrices have biases (lora_bias)": config.lora_bias,
        "it is on some layers only (layers_to_transform)": config.layers_to_transform is not None,
        "it leaves out modules (exclude_modules)": bool(config.exclude_modules),
    }
    for reason, is_so in unknown.items():
        if is_so:
            raise UserError(
                f"peft 0.3 has no such LoRA: {reason}",
                code="E109",
                where=str(checkpoint),
                remedy="Merge it into the base with --format folder",
            )


def write_peft_0_3(checkpoint: Path, target: Path) -> None:
    """Write a LoRA as adapter_config.json and adapter_model.bin with what peft 0.3 knows, and nothing else.

    rsLoRA, which it does not know, is written as the lora_alpha that gives the same scale.
    """
    config: Any = read_lora_config(checkpoint)
    content = {key: value for key, value in config.to_dict().items() if key in _KEYS_OF_PEFT_0_3}
    if getattr(config, _SCALED_BY_ROOT):
        content["lora_alpha"] = config.lora_alpha * config.r**0.5
    targets = content["target_modules"]
    content |= {
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "inference_mode": True,
        "init_lora_weights": True,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
    }
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (target / LORA_CONFIG_FILE).write_text(text, encoding="utf-8")
    torch.save(read_lora(checkpoint), target / OLD_LORA_FILE)


def write_original_prefix(checkpoint: Path, folder: Path, target: Path) -> None:
    """Write a prefix as the original's pytorch_model.bin, and the base's config.json with the prefix's shape in it."""
    shape, tensors = read_prefix(checkpoint)
    torch.save(_full_names(tensors), target / ORIGINAL_PREFIX_FILE)
    changes = {"pre_seq_len": shape.pre_seq_len, "prefix_projection": shape.prefix_projection}
    write_config(folder, target, changes)
    copy_tokenizer(folder, target)


def write_adapter(checkpoint: Path, identity: BaseModel, folder: Path, target: Path) -> None:
    """Write an adapter of any origin as this program's own folder, with a manifest.

    One that has a manifest keeps what it says; else it names the base in `folder`, which is `identity`.
    """
    target.mkdir(exist_ok=True)
    manifest = read_manifest(checkpoint) or _new_manifest(checkpoint, identity)
    if manifest.method == "lora":
        adapted = load_lora(make_hollow_model(folder), checkpoint, read_lora(checkpoint), is_trainable=False)
        # peft would name the folder that the base lay in here.
        adapted.peft_config["default"].base_model_name_or_path = manifest.base_model.name_or_path
        names = save_adapter_files(adapted, target, for_original=False)
    else:
        tensors = _full_names(read_prefix(checkpoint)[1])
        save_file(tensors, target / PREFIX_FILE, metadata={"format": "pt"})
        torch.save(tensors, target / ORIGINAL_PREFIX_FILE)
        (target / PREFIX_FILE).chmod((target / ORIGINAL_PREFIX_FILE).stat().st_mode & 0o777)
        names = [PREFIX_FILE, ORIGINAL_PREFIX_FILE]
    write_manifest(target, manifest, names)


def _new_manifest(checkpoint: Path, identity: BaseModel) -> Manifest:
    if (checkpoint / LORA_CONFIG_FILE).is_file():
        return Manifest(method="lora", base_model=identity)
    shape, _ = read_prefix(checkpoint)
    return Manifest("ptuning", identity, shape.pre_seq_len, shape.prefix_projection)


def _full_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{PREFIX_KEY}{key}": tensor.contiguous() for key, tensor in tensors.items()}


def base_files(folder: Path) -> list[Path]:
    """Return the files that a base consists of."""
    weights = find_weight_files(folder).files
    index = next(path for name in WEIGHT_NAMES if (path := folder / name).is_file())
    beside = [folder / name for name in ("config.json", *TOKENIZER_FILES)]
    return list(dict.fromkeys([*(path for path in beside if path.is_file()), index, *weights]))


def copy_base(folder: Path, target: Path, advance: Callable[[int], None]) -> None:
    """Copy a base, byte for byte; `advance` is told of every file."""
    target.mkdir()
    for path in base_files(folder):
        shutil.copyfile(path, target / path.name)
        advance(1)


def adapter_files(folder: Path) -> list[Path]:
    """Return the files that an adapter consists of: those of its manifest, or else the known names."""
    manifest = read_manifest(folder, verify_files=False)
    known = (LORA_CONFIG_FILE, "adapter_model.safetensors", OLD_LORA_FILE, PREFIX_FILE, *WEIGHT_NAMES)
    names = known if manifest is None else (MANIFEST_NAME, *manifest.files)
    return [folder / name for name in sorted(names) if (folder / name).is_file()]


def read_adapter(method: str, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter; raises UserError where a number of them is not finite."""
    tensors = read_lora(folder) if method == "lora" else read_prefix(folder)[1]
    refuse_values_not_finite(tensors, folder)
    return tensors


def compare_adapters(method: str, one: Path, other: Path) -> tuple[int, list[str]]:
    """Return how many tensors the adapter in `one` has, and what differs in `other`: names, values or scale."""
    if method == "ptuning":
        (shape, tensors), (other_shape, others) = read_prefix(one), read_prefix(other)
        different = [] if shape == other_shape else ["its shape"]
    else:
        tensors, others = read_lora(one), read_lora(other)
        scales = [_scale(folder) for folder in (one, other)]
        different = [] if abs(scales[0] - scales[1]) <= 1e-6 * abs(scales[0]) else ["its scale"]
    for key in sorted(tensors.keys() | others.keys()):
        if key not in tensors or key not in others or not torch.equal(tensors[key], others[key]):
            different.append(key)
    return len(tensors), different


def _scale(folder: Path) -> float:
    config: Any = read_lora_config(folder)
    return config.lora_alpha / (config.r**0.5 if getattr(config, _SCALED_BY_ROOT) else config.r)
