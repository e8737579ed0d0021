"""The model card of an export: README.md in Chinese and English, from what its manifest, scores and certificate say."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm_tuning.checkpoint import Manifest
from chatglm_tuning.errors import UserError

CARD_NAME = "README.md"
SCORES_NAME = "scores.json"
LOSS_PICTURE = "loss.png"
_METHODS = {"lora": "LoRA", "ptuning": "P-Tuning v2"}
_LICENSE = "https://github.com/THUDM/ChatGLM-6B/blob/main/MODEL_LICENSE"
_MOST_SCORES = 40
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

    form: of the weights, or None where only an adapter is written. commands: shell lines that chat with the export.
    """

    title: str
    method: str
    base_name: str
    format: str
    form: str | None
    manifest: Manifest | None
    certificate: Mapping[str, Any]
    scores: list[tuple[str, str]]
    has_picture: bool
    commands: tuple[str, ...]


def read_scores(given: Path | None, adapter: Path) -> list[tuple[str, str]]:
    """Return names and values of the scores that `eval` wrote into the given file, else into the adapter's folder.

    Raises UserError where the file is missing or holds no such scores.
    """
    path = given or adapter / SCORES_NAME
    if given is None and not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"the scores cannot be read ({error.strerror})", where=str(path), remedy="Give the scores.json of eval"
        ) from error
    except ValueError as error:
        raise UserError("the scores are no JSON", where=str(path), remedy="Give the scores.json of eval") from error
    if not isinstance(content, dict):
        raise UserError("the scores are no JSON object", where=str(path), remedy="Give the scores.json of eval")
    try:
        return list(_scores(content))[:_MOST_SCORES]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            "the scores are not as eval writes them", where=str(path), remedy="Give the scores.json of eval"
        ) from error


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
    yield _FRONT.format(license=_LICENSE, base=facts.base_name, method=facts.method)
    yield f"# {facts.title}\n"
    yield f"用 {method} 微调的 ChatGLM-6B，由 chatglm_tuning 导出（格式：{facts.format}）。\n"
    yield f"ChatGLM-6B tuned with {method}, exported by chatglm_tuning (format: {facts.format}).\n"
    yield "## 使用 / How to use\n\n```bash"
    yield from facts.commands
    yield "```\n"
    yield "## 训练 / Training\n"
    yield from _table(("设置 / setting", "值 / value"), _training(facts))
    if facts.has_picture:
        yield f"![loss]({LOSS_PICTURE})\n"
    yield "## 评测 / Scores\n"
    if facts.scores:
        yield from _table(("指标 / score", "值 / value"), facts.scores)
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
    if facts.form is not None:
        yield "权重 / weights", facts.form
    manifest = facts.manifest
    if manifest is None:
        return
    bits = manifest.base_model.quantization_bit
    yield "训练时的基座 / base while training", f"int{bits}" if bits else "full precision"
    yield "基座指纹 / base fingerprint", f"`{manifest.base_model.fingerprint}`"
    if manifest.pre_seq_len:
        yield "pre_seq_len", str(manifest.pre_seq_len)
        yield "prefix_projection", str(manifest.prefix_projection).lower()
    for name, value in manifest.settings.items():
        yield name, _shown(value)
    for name, version in manifest.library_versions.items():
        yield name, str(version)


def _certificate(certificate: Mapping[str, Any]) -> Iterator[str]:
    if "measured" not in certificate:
        yield (
            f"{certificate['tensors']} 个张量与原适配器逐位相同。All {certificate['tensors']} tensors are those of the "
            "adapter, bit for bit.\n"
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
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _scores(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the scores that `eval` writes for every system, with their intervals; of another file, every number."""
    systems = content.get("systems")
    if not isinstance(systems, Mapping):
        yield from _numbers(content)
        return
    for system, facts in systems.items():
        for metric, found in facts.get("metrics", {}).items():
            has_interval = found.get("low") is not None and found.get("high") is not None
            interval = f" [{found['low']:.4g}, {found['high']:.4g}]" if has_interval else ""
            yield f"{system}: {metric}", f"{found['value']:.4g}{interval}"
        yield f"{system}: prompts", str(facts.get("prompts", ""))


def _numbers(content: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield every number of nested JSON objects with the path of its keys."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _numbers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield name, f"{content:.6g}"
