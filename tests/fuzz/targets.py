"""What is fuzzed: each target takes any bytes, and raises nothing that a reader does not tell as a UserError.

The first byte of a case chooses which file of a right folder the rest of it replaces.
"""

import copy
import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from chatglm_tuning.adapters.served import AdapterSet
from chatglm_tuning.checkpoint import (
    CERTIFICATE_NAME,
    LORA_CONFIG_FILE,
    LORA_FILE,
    MANIFEST_NAME,
    OLD_LORA_FILE,
    ORIGINAL_PREFIX_FILE,
    PREFIX_FILE,
    read_manifest,
    whole_checkpoints,
)
from chatglm_tuning.data.audit import ExampleAudit
from chatglm_tuning.data.records import iterate_examples
from chatglm_tuning.data.rows import BadRows
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import add_served_adapter, load_base
from chatglm_tuning.shards import find_weight_files, iterate_tensors
from chatglm_tuning.training.state_files import check_state_files
from tests.fuzz.folders import (
    Part,
    copy_of,
    header_part,
    pickle_part,
    saved,
    trust_again,
    without_length,
    write_adapter,
    write_base,
)

ROWS = [
    {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]], "system": "s"},
    {"prompt": "问", "response": "答\U0001f600", "history": None},
    {"content": "类型#裤<n>[gMASK]", "summary": "<p>a</p>&nbsp;"},
    {"messages": [{"role": "system", "content": "s"}, *[{"role": r, "content": "x"} for r in ("user", "assistant")]]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
]


@dataclass(frozen=True)
class Target:
    """run: takes the bytes of a case. seeds: cases in which all is right."""

    run: Callable[[bytes], None]
    seeds: Sequence[bytes]


def make_data(work: Path) -> Target:
    """The data reader: lines, arrays and their gzip, with the look at every text."""
    file = work / "rows.json"

    def run(case: bytes) -> None:
        content = case[1:]
        file.write_bytes(gzip.compress(content, 1) if case[:1] == b"\1" else content)
        bad_rows = BadRows()
        for needs_answers in (True, False):
            audit = ExampleAudit()
            for example in audit.watch(iterate_examples([file], bad_rows, needs_answers=needs_answers)):
                example.prompt.encode("utf-8")
                assert example.source.startswith(f"{file}:")
            audit.report()
        assert all(place.startswith(f"{file}:") for place in bad_rows.shown)

    lines = "\n".join(json.dumps(row) for row in ROWS).encode()
    texts = [lines, json.dumps(ROWS, indent=1).encode(), json.dumps(ROWS, ensure_ascii=False).encode("utf-16")]
    texts += [b"\xef\xbb\xbf" + lines, json.dumps(ROWS, indent=1).encode().replace(b"q", b"\xc4\xe3"), b"[" * 2000]
    texts += [b'{"messages": ' * 500, b"[1e999, -0, 1" + b"0" * 5000 + b"]", b'{"content": "\\ud800\\u0000\0"}']
    seeds = [bytes([kind]) + text for kind in (0, 1) for text in texts]
    return Target(run, [*seeds, b"\0" + gzip.compress(lines), b"\0" + gzip.compress(lines) * 2])


def make_folder_target(work: Path, right: Path, parts: Sequence[Part], read: Callable[[Path], None]) -> Target:
    """A folder of which one file is replaced; `read` must refuse it with a UserError, or take it."""
    folder = copy_of(right, work / "case")
    has_manifest = (right / MANIFEST_NAME).is_file()

    def run(case: bytes) -> None:
        part = parts[case[0] % len(parts)] if case else parts[0]
        file = folder / part.name
        before = file.read_bytes() if file.is_file() else None
        file.write_bytes(part.build(case[1:]))
        others = [
            (other, other.read_bytes())
            for other in folder.iterdir()
            if other.suffix in (".safetensors", ".bin") and other != file and part.name.endswith((".bin", ".json"))
        ]
        try:
            if part.name.endswith(".bin"):  # where both are there, safetensors are read
                for other, _ in others:
                    other.unlink()
                (folder / MANIFEST_NAME).unlink(missing_ok=True)
            elif has_manifest and part.name != MANIFEST_NAME:
                trust_again(folder)
            read(folder)
        except UserError:
            pass
        finally:
            file.unlink() if before is None else file.write_bytes(before)
            for other, content in others:
                other.write_bytes(content)
            if has_manifest:
                (folder / MANIFEST_NAME).write_bytes((right / MANIFEST_NAME).read_bytes())

    seeds = [bytes([number]) + part.seed for number, part in enumerate(parts)]
    return Target(run, seeds)


def make_adapter(work: Path, method: str) -> Target:
    """A LoRA or a prefix: configuration, manifest, safetensors and both kinds of pickle, put onto its base."""
    base_folder = write_base(work / "base")
    right = write_adapter(work / "right", base_folder, method)
    base = load_base(str(base_folder))
    name, old_name = (LORA_FILE, OLD_LORA_FILE) if method == "lora" else (PREFIX_FILE, ORIGINAL_PREFIX_FILE)
    state = {key: tensor.clone() for key, tensor in _tensors(right / name).items()}
    header = header_part(name, state)
    parts = [header, without_length(header), pickle_part(old_name, saved(state)), Part(old_name, saved(state))]
    parts += [Part(old_name, saved(state, is_zip=False)), Part(name, (right / name).read_bytes())]
    parts += [Part(MANIFEST_NAME, (right / MANIFEST_NAME).read_bytes())]
    if method == "lora":
        parts += [Part(LORA_CONFIG_FILE, (right / LORA_CONFIG_FILE).read_bytes())] * 2

    def read(folder: Path) -> None:
        if method == "lora":
            add_served_adapter(base, AdapterSet(copy.deepcopy(base.model)), folder)
        else:
            add_served_adapter(base, AdapterSet(base.model), folder)

    return make_folder_target(work, right, parts, read)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def make_base(work: Path, bits: int | None = None) -> Target:
    """A base, full or quantised: its configurations, the pickle and the header of its weights, a certificate."""
    right = write_base(work / "right", bits)
    archive = (right / "pytorch_model.bin").read_bytes()
    state = torch.load(right / "pytorch_model.bin", weights_only=True)
    header = header_part("model.safetensors", state)
    certificate = {"output": {"files": {"config.json": {"bytes": 1, "sha256": "0"}}}}
    parts = [Part("config.json", (right / "config.json").read_bytes())] * 2
    parts += [header, without_length(header), pickle_part("pytorch_model.bin", archive)]
    if bits is None:
        parts += [Part("tokenizer_config.json", (right / "tokenizer_config.json").read_bytes())]
        parts += [Part(CERTIFICATE_NAME, json.dumps(certificate).encode())]

    def read(folder: Path) -> None:
        model = load_base(str(folder)).model
        tokens = torch.tensor([[5, 6, model.config.gmask_token_id, model.config.bos_token_id]])
        with torch.inference_mode():
            model(input_ids=tokens)

    return make_folder_target(work, right, parts, read)


def make_index(work: Path) -> Target:
    """Index files, before shards that are there."""
    right = work / "right"
    right.mkdir()
    (right / "a.bin").write_bytes(saved({"a": torch.ones(2)}))
    (right / "a.safetensors").write_bytes(saved({}))
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": {"a": "a.bin", "b": "a.bin"}}).encode()
    parts = [Part("pytorch_model.bin.index.json", index), Part("model.safetensors.index.json", index)]

    def read(folder: Path) -> None:
        for file in find_weight_files(folder).files:
            assert file.parent == folder
        list(iterate_tensors(find_weight_files(folder)))

    return make_folder_target(work, right, parts, read)


def make_checkpoint(work: Path) -> Target:
    """A checkpoint to resume: manifest, Trainer's state, and the pickles of optimizer, schedule and random numbers."""
    base = write_base(work / "base")
    run = work / "right"
    right = write_adapter(run, base, "lora")
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    states = {
        "optimizer.pt": optimizer.state_dict(),
        "scheduler.pt": {"last_epoch": 1, "_last_lr": [0.1]},
        "rng_state.pth": {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.get_rng_state(),
        },
    }
    for name, state in states.items():
        (right / name).write_bytes(saved(state))
    trainer_state = {"global_step": 1, "epoch": 0.5, "max_steps": 2, "log_history": [{"loss": 1.0, "step": 1}]}
    (right / "trainer_state.json").write_text(json.dumps(trainer_state))
    parts = [pickle_part(name, saved(state)) for name, state in states.items()]
    parts += [Part(name, (right / name).read_bytes()) for name in ("trainer_state.json", MANIFEST_NAME)]
    short = {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"params": [0]}]}
    parts += [Part("optimizer.pt", saved(short)), Part("optimizer.pt", saved(short, is_zip=False))]

    def read(folder: Path) -> None:
        list(whole_checkpoints(folder.parent))
        manifest = read_manifest(folder)
        assert manifest is None or manifest.settings.get("seed") is None or manifest.method
        check_state_files(folder)

    return make_folder_target(work, right, parts, read)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "data": make_data,
    "index": make_index,
    "base": make_base,
    "int8": lambda work: make_base(work, 8),
    "int4": lambda work: make_base(work, 4),
    "lora": lambda work: make_adapter(work, "lora"),
    "prefix": lambda work: make_adapter(work, "ptuning"),
    "checkpoint": make_checkpoint,
}
