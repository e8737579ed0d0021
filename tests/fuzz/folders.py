"""Small right folders, of which a case replaces one file, and the weight files that are made of a mutated part."""

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape
from chatglm_tuning.checkpoint import MANIFEST_NAME, Manifest, save_adapter_files, write_manifest
from chatglm_tuning.loading import add_prefix, load_base
from tests.model_folder import write_tiny_model

SIZES = {"num_layers": 1, "hidden_size": 8, "inner_hidden_size": 16}


@dataclass(frozen=True)
class Part:
    """A file that a case replaces: its name, its right bytes, and how the bytes of a case become the file's."""

    name: str
    seed: bytes
    build: Callable[[bytes], bytes] = lambda content: content


def write_base(folder: Path, bits: int | None = None) -> Path:
    """Write a model of one layer, with its weights in one `.bin`, quantised to `bits`."""
    write_tiny_model(folder, **SIZES)
    if bits:
        model = load_base(str(folder), quantization_bit=bits, dtype=torch.float16).model
        torch.save({key: value.detach() for key, value in model.state_dict().items()}, folder / "pytorch_model.bin")
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_bit": bits}), encoding="utf-8")
    return folder


def write_adapter(folder: Path, base_folder: Path, method: str) -> Path:
    """Write a new LoRA or prefix for the base of `base_folder`, with its manifest."""
    base = load_base(str(base_folder))
    model: Any = base.model
    if method == "lora":
        model = add_lora(model, make_lora_config(rank=2, alpha=4, dropout=0.0, targets=["query_key_value"]))
    else:
        add_prefix(base, PrefixShape(3), None)
    names = save_adapter_files(model, folder, for_original=True)
    write_manifest(folder, Manifest(method, base.identity, settings={"seed": 1}), names)
    trust_again(folder)
    return folder


def trust_again(folder: Path) -> None:
    """Give the manifest of `folder` the digests of its files, as whoever changed them would, where it is one."""
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    content.pop("sha256", None)  # its own, which earlier versions did not write
    for name, facts in content["files"].items():
        data = (folder / name).read_bytes()
        facts |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(content), encoding="utf-8")


def saved(state: Mapping[str, Any], *, is_zip: bool = True) -> bytes:
    """What torch saves for `state`."""
    stream = io.BytesIO()
    torch.save(dict(state), stream, _use_new_zipfile_serialization=is_zip)
    return stream.getvalue()


def pickle_part(name: str, archive: bytes) -> Part:
    """The pickle in the middle of what torch saves; the bytes of the tensors stay as they are."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        content = {entry: opened.read(entry) for entry in opened.namelist()}
    pickled = next(entry for entry in content if entry.endswith("/data.pkl"))

    def build(data: bytes) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as made:
            for entry, stored in content.items():
                made.writestr(entry, data if entry == pickled else stored)
        return stream.getvalue()

    return Part(name, content[pickled], build)


def header_part(name: str, state: Mapping[str, torch.Tensor]) -> Part:
    """The header of safetensors, length included; the bytes of the tensors stay as they are."""
    whole = save({key: value.contiguous().clone() for key, value in state.items()})
    end = 8 + int.from_bytes(whole[:8], "little")
    return Part(name, whole[:end], lambda header: header + whole[end:])


def without_length(part: Part) -> Part:
    """The same, but that the length is made right: mutations then reach what reads the JSON behind it."""
    return replace(part, seed=part.seed[8:], build=lambda text: part.build(len(text).to_bytes(8, "little") + text))


def copy_of(folder: Path, target: Path) -> Path:
    """Copy a folder, over an earlier copy."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(folder, target))
