"""Weights written in every layout of files that a model folder comes in."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.model_folder import TOKENIZER_FILES

LAYOUTS = ("bin", "legacy_bin", "sharded_bin", "safetensors", "sharded_safetensors")


def read_released_state(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder of `write_tiny_model`, with the unused rotary tensors of the released files."""
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    layers = {key.split(".")[2] for key in state if ".layers." in key}
    rotary = {f"transformer.layers.{n}.attention.rotary_emb.inv_freq": torch.ones(8).half() for n in layers}
    return state | rotary


def copy_without_weights(source: Path, target: Path, **config_changes) -> Path:
    """Copy the tokenizer and the config of `source`, changed, into the new folder `target`."""
    target.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, target)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | config_changes), encoding="utf-8")
    return target


def write_weights(state: Mapping[str, Tensor], folder: Path, layout: str) -> Path:
    """Write `state` into `folder`; sharded layouts have three files, filled in the order of the keys in `state`."""
    if not layout.startswith("sharded"):
        _write(dict(state), folder, layout, "")
        return folder
    kind = layout.removeprefix("sharded_")
    keys = list(state)
    weight_map = {}
    for number in range(3):
        part = {key: state[key] for key in keys[number * len(keys) // 3 : (number + 1) * len(keys) // 3]}
        weight_map |= dict.fromkeys(part, _write(part, folder, kind, f"-0000{number + 1}-of-00003"))
    name = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": weight_map}
    (folder / name).write_text(json.dumps(index), encoding="utf-8")
    return folder


def _write(state: dict[str, Tensor], folder: Path, kind: str, suffix: str) -> str:
    if kind == "safetensors":
        name = f"model{suffix}.safetensors"
        save_file({key: tensor.clone() for key, tensor in state.items()}, folder / name)
    else:
        name = f"pytorch_model{suffix}.bin"
        torch.save(state, folder / name, _use_new_zipfile_serialization=kind != "legacy_bin")
    return name
