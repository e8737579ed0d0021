"""The checks that every command makes of a model's folder, and of its tensors' names and shapes. In its own process.

It imports torch: `model_check.py` calls it where torch is known to work.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from chatglm_tuning.base_folder import load_tokenizer, read_config
from chatglm_tuning.checkpoint import check_certificate
from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration
from chatglm_tuning.shards import (
    WEIGHT_NAMES,
    WeightFiles,
    find_weight_files,
    is_zip,
    iterate_directories,
    resolve_model_folder,
)
from chatglm_tuning.small_json import read_small_json
from chatglm_tuning.tensor_check import HEAD_KEY, TensorCheck, is_ignored


def main(given: str) -> None:
    """Print one JSON object: {} or the error's code and sentences. What libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
        os.dup2(2, 1)
        try:
            check_folder(resolve_model_folder(given))
        except UserError as error:
            place = f"{error.where}: " if error.where else ""
            found = {"code": error.code, "what": f"{place}{error.what}", "remedy": error.remedy}
        else:
            found = {}
        stream.write(json.dumps(found))


def check_folder(folder: Path) -> None:
    """Raise UserError for whatever keeps commands from taking the model in `folder`, but the values of its weights."""
    config = read_config(folder)
    load_tokenizer(folder, config)
    files = find_weight_files(folder)
    check_certificate(folder)
    if all(file.suffix == ".safetensors" or is_zip(file) for file in files.files):
        _check_tensors(config, files)


def _check_tensors(config: ChatGLMConfig, files: WeightFiles) -> None:
    """Compare names and shapes with those that config.json asks for, and places with those of the index."""
    with torch.device("meta"):
        check = TensorCheck(ChatGLMForConditionalGeneration(config), files.folder)
    tensors = list(iterate_directories(files))
    _check_index(files, {(file.name, stored.key) for file, stored in tensors})
    for _file, stored in tensors:
        check.is_wanted(stored)
    check.finish()


def _check_index(files: WeightFiles, found: set[tuple[str, str]]) -> None:
    index = next(files.folder / name for name in WEIGHT_NAMES if (files.folder / name).is_file())
    if index.suffix != ".json":
        return
    named: Mapping[str, str] = read_small_json(index)["weight_map"]
    needed = {key: name for key, name in named.items() if not is_ignored(key) and key != HEAD_KEY}
    absent = sorted(key for key, name in needed.items() if (name, key) not in found)
    if absent:
        raise UserError(
            f"the index says that {named[absent[0]]} holds {absent[0]}, and it does not ({len(absent)} such tensors)",
            code="M117",
            where=str(index),
            remedy="Take index and weights from one download",
        )


if __name__ == "__main__":
    main(sys.argv[1])
