"""Adapters that a page or a server offers by name, from the flags that name them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatglm_tuning.config.values import expand_home
from chatglm_tuning.errors import UserError

AdapterMethod = Literal["lora", "ptuning"]

_FLAGS: tuple[tuple[str, AdapterMethod], ...] = (("lora_checkpoint", "lora"), ("ptuning_checkpoint", "ptuning"))


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter's folder and the name it is chosen by. method: which it must be, None for either."""

    name: str
    folder: Path
    method: AdapterMethod | None = None


def named_adapters(values: Mapping[str, Any], reserved: Collection[str] = ()) -> tuple[NamedAdapter, ...]:
    """Return the adapters of `--lora_checkpoint` and `--ptuning_checkpoint`, named as their folders, and `--adapter`.

    reserved: names that mean something else. Reads no files.
    Raises UserError for one that is no NAME=FOLDER, and for a name that is reserved, unprintable or given twice.
    """
    named = [NamedAdapter(folder_name(values[flag]), values[flag], method) for flag, method in _FLAGS if flag in values]
    named += [_read(str(given)) for given in values.get("adapter", ())]
    known: set[str] = set()
    for adapter in named:
        _check_name(adapter, reserved)
        if adapter.name in known:
            raise UserError(
                f"two adapters are named {adapter.name}",
                code="A119",
                where=str(adapter.folder),
                remedy="Give each a name of its own with --adapter NAME=FOLDER",
            )
        known.add(adapter.name)
    return tuple(named)


def folder_name(folder: Path) -> str:
    """Return what an adapter is called that was given without a name."""
    return folder.name or folder.resolve().name or str(folder)


def _read(given: str) -> NamedAdapter:
    name, separator, folder = given.partition("=")
    if not (separator and name.strip() and folder.strip()):
        raise UserError(
            f"--adapter must be NAME=FOLDER, not {given!r}",
            code="A119",
            remedy="Write it as in --adapter mine=output/my-lora",
        )
    return NamedAdapter(name.strip(), expand_home(folder.strip()))


def _check_name(adapter: NamedAdapter, reserved: Collection[str]) -> None:
    if adapter.name in reserved:
        raise UserError(
            f"no adapter may be named {adapter.name}: that means the base alone",
            code="A119",
            where=str(adapter.folder),
            remedy="Give it another name with --adapter NAME=FOLDER",
        )
    if not adapter.name.isprintable():
        raise UserError(
            f"{adapter.name!r} cannot be the name of an adapter",
            code="A119",
            where=str(adapter.folder),
            remedy="Use printable characters",
        )
