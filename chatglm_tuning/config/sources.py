"""The two sources of settings, a JSON file and typed flags: each brought to current names and types, then merged."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from chatglm_tuning.config.arguments import Setting
from chatglm_tuning.config.arguments_file import ArgumentsFile
from chatglm_tuning.config.launch import is_first_rank
from chatglm_tuning.config.legacy import LEGACY_KEYS, Label, Replacement, translate, written_key
from chatglm_tuning.config.values import Value, nearest
from chatglm_tuning.errors import UserError

logger = logging.getLogger(__name__)

EIGHT_BIT_KEYS = ("int8", "load_in_8bit")
"""The original's two ways to say `quantization_bit` 8."""

# A typed setting also silences these of the file, which would decide over it otherwise.
_SILENCES = {
    "num_train_epochs": "max_steps",
    "fp16": "bf16",
    "bf16": "fp16",
    "activation_checkpointing": "gradient_checkpointing",
    "gradient_checkpointing": "activation_checkpointing",
}
_SAYS_AS_MUCH_WHEN_FALSE = "gradient_checkpointing"


@dataclass(frozen=True)
class Registry:
    """What a command knows. values: what every setting may hold. off_keys: from a key to the setting it turns off."""

    values: Mapping[str, Value]
    off_keys: Mapping[str, str]

    @classmethod
    def of(cls, own: Iterable[Setting], others: Mapping[str, Value]) -> "Registry":
        """A command's own settings go before `others` of the same name."""
        own = tuple(own)
        values = {**others, **{setting.name: setting.value for setting in own}}
        return cls(values, {setting.off_flag: setting.name for setting in own if setting.off_flag})

    def keys(self) -> list[str]:
        """Every key that a file may hold."""
        return [*self.values, *self.off_keys, *EIGHT_BIT_KEYS, *LEGACY_KEYS]


def resolve_flags(typed: Mapping[str, Any], registry: Registry) -> dict[str, Any]:
    """Return typed flags converted; raises UserError for a value of the wrong kind or range, or two that conflict."""
    return _resolve(typed, lambda key: (f"--{key}", None), registry)


def resolve_file(file: ArgumentsFile, registry: Registry, program: str, elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """Return the file's settings converted; raises UserError with file:line, for an unknown key too.

    elsewhere: keys that another command has, and what to do about them.
    """
    known = registry.keys()
    for key in file.values:
        if key not in known:
            name, where = file.label(key)
            near = nearest(key, known)
            remedy = elsewhere.get(key) or (f'If "{near}" was meant, write that' if near else "Remove it")
            raise UserError(f"{name} is no setting of {program}", code="A118", remedy=remedy, where=where)
    return _resolve(file.values, file.label, registry)


def merge(from_file: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return both together; a typed flag beats the file, also where the file's way to say it has another name."""
    kept = dict(from_file)
    for winner, loser in _SILENCES.items():
        is_said = typed.get(winner) or (winner in typed and winner == _SAYS_AS_MUCH_WHEN_FALSE)
        if is_said and loser in kept and loser not in typed:
            dropped = kept.pop(loser)
            _report(
                [Replacement(f"{loser} {dropped} of the file has no effect: --{winner} was typed", is_dropped=True)]
            )
    return kept | dict(typed)


def _resolve(written: Mapping[str, Any], label: Label, registry: Registry) -> dict[str, Any]:
    current, replacements = translate(written, label)
    _report(replacements)
    _expand_off_keys(current, label, registry)
    _expand_eight_bit(current, label, registry)
    resolved = {}
    for key, raw in current.items():
        name, where = label(written_key(key, written))
        resolved[key] = registry.values[key].convert(raw, name=name, where=where)
    return resolved


def _expand_off_keys(values: dict[str, Any], label: Label, registry: Registry) -> None:
    for off_key in [key for key in values if key in registry.off_keys]:
        setting = registry.off_keys[off_key]
        name, where = label(off_key)
        if setting in values:
            raise UserError(
                f"{name} and {label(setting)[0]} are both given", code="A105", remedy="Keep one of the two", where=where
            )
        values[setting] = not registry.values[setting].convert(values.pop(off_key), name=name, where=where)


def _expand_eight_bit(values: dict[str, Any], label: Label, registry: Registry) -> None:
    for key in [key for key in EIGHT_BIT_KEYS if key in values]:
        name, where = label(key)
        if not Value("boolean").convert(values.pop(key), name=name, where=where):
            continue
        bits = values.setdefault("quantization_bit", 8)
        other = label("quantization_bit")[0]
        if registry.values["quantization_bit"].convert(bits, name=other, where=where) != 8:
            raise UserError(
                f"{name} asks for 8 bits and {other} for {bits}", code="A105", remedy="Keep one of the two", where=where
            )


def _report(replacements: Iterable[Replacement]) -> None:
    """Log each once, not once a process: as a warning only where something lost its effect."""
    if is_first_rank():
        for replacement in replacements:
            logger.log(logging.WARNING if replacement.is_dropped else logging.INFO, "%s", replacement.text)
