"""Random adapters, in the folders that training leaves, for bases of `write_tiny_model`."""

from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape
from chatglm_tuning.checkpoint import Manifest, save_adapter_files, write_manifest
from chatglm_tuning.config.arguments import LORA_TARGETS
from chatglm_tuning.loading import add_prefix, load_base


def write_lora(
    folder: Path,
    base_folder: Path,
    *,
    bits: int | None = None,
    targets=LORA_TARGETS,
    strength: float = 0.05,
    config: LoraConfig | None = None,
    has_manifest: bool = True,
) -> Path:
    """Write a LoRA whose B is not zero, trained (as it says) on the base held in `bits`."""
    base = load_base(str(base_folder), quantization_bit=bits)
    config = config or make_lora_config(rank=4, alpha=8, dropout=0.0, targets=targets)
    torch.manual_seed(3)
    model = add_lora(base.model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=strength)
            if "lora_magnitude_vector" in name:
                parameter.mul_(1.3)
    names = save_adapter_files(model, folder, for_original=False)
    if has_manifest:
        identity = replace(base.identity, name_or_path="the base", quantization_bit=bits)
        settings = {"seed": 3, "data_path": ["rows.json"]}
        write_manifest(folder, Manifest("lora", identity, settings=settings), names)
    return folder


def write_prefix(folder: Path, base_folder: Path, *, prefix_projection: bool = False) -> Path:
    """Write a random prefix of three virtual tokens."""
    base = load_base(str(base_folder))
    torch.manual_seed(4)
    shape = PrefixShape(3, prefix_projection)
    add_prefix(base, shape, None)
    names = save_adapter_files(base.model, folder, for_original=True)
    identity = replace(base.identity, name_or_path="the base")
    write_manifest(folder, Manifest("ptuning", identity, 3, prefix_projection, {"seed": 4}), names)
    return folder
