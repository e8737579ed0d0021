"""A copy of the embedded base, random adapters that change its answers, and prompts with several references."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.model_folder import EMBEDDED, REPOSITORY


@dataclass(frozen=True)
class Place:
    """Folders of one test module."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def rows(self) -> Path:
        return self.root / "rows.jsonl"

    @property
    def lora(self) -> Path:
        return self.root / "lora"

    @property
    def prefix(self) -> Path:
        return self.root / "prefix"

    def flags(self, output: Path, *more: Any) -> list[str]:
        """What a run needs, in which all is right; answers are short."""
        given = ["--model_name_or_path", self.model, "--dtype", "float32", "--data_path", self.rows]
        given += ["--max_input_length", 64, "--max_output_length", 12, "--batch_size", 4, "--output_dir", output, *more]
        return list(map(str, given))


def make_place(root: Path, rows: int = 22) -> Place:
    """Write the place; every tenth prompt has three answers, and one has history."""
    from chatglm_tuning.adapters.lora import add_lora, make_lora_config
    from chatglm_tuning.adapters.ptuning import PrefixShape
    from chatglm_tuning.checkpoint import Manifest, save_adapter_files, write_manifest
    from chatglm_tuning.loading import add_prefix, load_base

    place = Place(root)
    shutil.copytree(EMBEDDED, place.model)  # a random model repeats <sop>, which is no text
    source = (REPOSITORY / "data" / "AdvertiseGen" / "sample_dev.json").read_text(encoding="utf-8").splitlines()
    lines = []
    for index, row in enumerate(json.loads(line) for line in source[:rows]):
        lines.append({"prompt": row["content"], "response": row["summary"], "history": []})
        if index % 10 == 0:
            lines += [{**lines[-1], "response": text} for text in ("好看的衣服。", "很好。")]
    lines.append({"prompt": "你好", "response": "你好！", "history": [["谁？", "我。"]]})
    place.rows.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    torch.manual_seed(5)
    for folder, method in ((place.lora, "lora"), (place.prefix, "ptuning")):
        base = load_base(str(place.model))
        model: Any = base.model
        if method == "lora":
            model = add_lora(model, make_lora_config(rank=2, alpha=8, dropout=0.0, targets=["query_key_value"]))
        else:
            add_prefix(base, PrefixShape(8), None)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "prefix_encoder" in name:
                    parameter.normal_(std=1.0 if method == "lora" else 4.0)
        write_manifest(folder, Manifest(method, base.identity), save_adapter_files(model, folder, for_original=True))
    return place
