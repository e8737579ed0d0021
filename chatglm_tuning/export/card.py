"""The model card of an export: README.md in Chinese and English, from what its manifest, scores and certificate say."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from chatglm_tuning.checkpoint import Manifest
from chatglm_tuning.export.scores import Scores
from chatglm_tuning.export.usage import Usage
from chatglm_tuning.wording import counted

CARD_NAME = "README.md"
LOSS_PICTURE = "loss.png"
_METHODS = {"lora": "LoRA", "ptuning": "P-Tuning v2"}
_LICENSE = "https://github.com/THUDM/ChatGLM-6B/blob/main/MODEL_LICENSE"
_FRONT = """---
license: other
license_name: chatglm-6b-model-license
license_link: {license}
language: [zh, en]
base_model: {base}
tags: [chatglm, {method}]
---
"""


@dataclass(frozen=True)
class CardFacts:
    """What a card is written from.

    form: of the weights, or None where only an adapter is written.
    """

    title: str
    method: str
    base_name: str
    base_fingerprint: str
    format: str
    form: str | None
    manifest: Manifest | None
    certificate: Mapping[str, Any]
    scores: Scores
    has_picture: bool
    usage: Usage


def copy_picture(adapter: Path, target: Path) -> bool:
    """Copy the loss picture beside the card; returns whether there is one."""
    if not (adapter / LOSS_PICTURE).is_file():
        return False
    shutil.copyfile(adapter / LOSS_PICTURE, target / LOSS_PICTURE)
    return True


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md into `folder`."""
    (folder / CARD_NAME).write_text("\n".join(_lines(facts)) + "\n", encoding="utf-8")


def _lines(facts: CardFacts) -> Iterator[str]:
    method = _METHODS[facts.method]
    yield _FRONT.format(license=_LICENSE, base=_yaml(facts.base_name), method=facts.method)
    yield f"# {facts.title}\n"
    yield f"用 {method} 微调的 ChatGLM-6B，由 chatglm_tuning 导出（格式：{facts.format}）。\n"
    yield f"ChatGLM-6B tuned with {method}, exported by chatglm_tuning (format: {facts.format}).\n"
    yield "## 使用 / How to use\n\n```bash"
    yield from facts.usage.commands
    yield "```\n"
    if facts.usage.python:
        yield f"```python\n{facts.usage.python}\n```\n"
    yield "## 训练 / Training\n"
    yield from _table(("设置 / setting", "值 / value"), _training(facts))
    if facts.has_picture:
        yield f"![loss]({LOSS_PICTURE})\n"
    yield "## 评测 / Scores\n"
    if facts.scores.rows:
        yield f"{facts.scores.about}\n"
        yield from _table(("指标 / score", "值 / value"), facts.scores.rows)
    else:
        yield "未提供。None were given.\n"
    yield "## 一致性证书 / Certificate\n"
    yield from _certificate(facts.certificate)
    yield "## 许可 / Licence\n"
    yield f"ChatGLM-6B 的权重有其自己的[模型许可证]({_LICENSE})；由它得到的权重也须遵守。\n"
    yield (
        f"The weights of ChatGLM-6B have a licence of their own, the [Model License]({_LICENSE}), which also holds for "
        "weights made from them."
    )


def _training(facts: CardFacts) -> Iterator[tuple[str, str]]:
    yield "方法 / method", _METHODS[facts.method]
    yield "基座 / base", facts.base_name
    yield "基座指纹 / base fingerprint", f"`{facts.base_fingerprint}`"
    if facts.form is not None:
        yield "权重 / weights", facts.form
    manifest = facts.manifest
    if manifest is None:
        return
    trained_on = manifest.base_model
    bits = trained_on.quantization_bit
    yield "训练时的基座 / base while training", f"int{bits}" if bits else "full precision"
    if trained_on.fingerprint != facts.base_fingerprint:
        name = PurePath(trained_on.name_or_path).name
        yield "训练时的基座不是它 / trained on another base", f"{name} `{trained_on.fingerprint}`"
    if manifest.pre_seq_len:
        yield "pre_seq_len", str(manifest.pre_seq_len)
        yield "prefix_projection", str(manifest.prefix_projection).lower()
    for name, value in manifest.settings.items():
        if value not in (None, [], {}):
            yield name, _shown(value)
    for name, version in manifest.library_versions.items():
        yield name, str(version)


def _certificate(certificate: Mapping[str, Any]) -> Iterator[str]:
    if "measured" not in certificate:
        yield (
            f"{certificate['tensors']} 个张量与原适配器逐位相同。The adapter's own "
            f"{counted(certificate['tensors'], 'tensor')}, bit for bit.\n"
        )
        return
    measured, limits = certificate["measured"], certificate["limits"]
    yield f"与“{certificate['compared_with']}”在 {certificate['probes']['prompts']} 个提示上比较 (fp32)。"
    yield f"Compared with {certificate['compared_with']} on {certificate['probes']['prompts']} prompts, in fp32.\n"
    rows = [
        (name.replace("_", " "), f"{value}" + (f" (limit {limits[name]})" if name in limits else ""))
        for name, value in measured.items()
    ]
    yield from _table(("测量 / measured", "值 / value"), rows)


def _table(head: tuple[str, str], rows: Any) -> Iterator[str]:
    yield f"| {head[0]} | {head[1]} |\n|---|---|"
    for name, value in rows:
        yield f"| {_cell(name)} | {_cell(value)} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _shown(value: Any) -> str:
    """Return a setting as a cell: a file with its fingerprint, several values with commas."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, Mapping) and "sha256" in value:
        return f"{value.get('name', '')} (sha256 `{value['sha256']}`)"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    return str(value)


def _yaml(text: str) -> str:
    """Return a text as YAML reads it, whatever is in it: double-quoted, as in JSON."""
    return json.dumps(text, ensure_ascii=False)
