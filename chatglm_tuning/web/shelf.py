"""The adapters that a page offers: those it was started with, and folders that visitors add."""

import threading
from pathlib import Path

from chatglm_tuning.adapters.served import BASE_ALONE, ServedAdapter
from chatglm_tuning.config.adapters import NamedAdapter, folder_name
from chatglm_tuning.config.values import expand_home
from chatglm_tuning.config.web import BASE_NAME
from chatglm_tuning.errors import UserError
from chatglm_tuning.inference.engine import BatchEngine
from chatglm_tuning.loading import (
    Base,
    Unlike,
    add_served_adapter,
    check_adapter,
    check_lora,
    check_prefix,
    compare_base,
)
from chatglm_tuning.model import ChatGLMConfig

_SHOWN_PATH = 80
_GIVE_AN_ADAPTER = "Give the folder of a trained adapter"

_Stamp = tuple[tuple[str, int, int], ...]


class AdapterShelf:
    """Adapters by name, the same for all visitors. They stay until the program ends."""

    def __init__(self, base: Base, engine: BatchEngine) -> None:
        self._base = base
        self._engine = engine
        self._by_name: dict[str, ServedAdapter] = {BASE_NAME: BASE_ALONE}
        self._loaded: dict[tuple[Path, _Stamp], str] = {}
        self._unlike: dict[str, Unlike] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the base's first."""
        return tuple(self._by_name)

    @property
    def bits(self) -> int | None:
        """8 or 4 where the base is held so, None in full precision."""
        return self._base.identity.quantization_bit

    def __getitem__(self, name: str) -> ServedAdapter:
        return self._by_name[name]

    def unlike(self, name: str) -> Unlike:
        """Return in what the base is not the one that the adapter was trained on."""
        return self._unlike[name]

    def add(self, folder: Path, name: str | None = None) -> str:
        """Load the adapter of `folder` beside the others and return its name.

        name: without it the folder's; a number follows where it is taken. A folder that is loaded already, and whose
        files have not changed since, is not loaded again: it keeps its name, and has `name` as well.
        Raises UserError where there is no adapter in it, it is damaged, or it does not fit the base.
        """
        check_folder(folder)
        with self._lock:
            key = (folder.resolve(), _stamp(folder))
            loaded_as = self._loaded.get(key)
            if loaded_as is not None:
                adapter = self._by_name[loaded_as]
                if name is None or self._by_name.get(name) is adapter:
                    return name or loaded_as
            else:
                with self._engine.paused() as adapters:
                    adapter = add_served_adapter(self._base, adapters, folder)
            name = self._free_name(name or folder_name(folder.resolve()))
            self._unlike[name] = compare_base(self._base, folder)
            self._by_name = {**self._by_name, name: adapter}
            self._loaded.setdefault(key, name)
            return name

    def _free_name(self, wanted: str) -> str:
        name, number = wanted, 2
        while name in self._by_name:
            name, number = f"{wanted} ({number})", number + 1
        return name


def read_folder(typed: str) -> Path:
    """Return the folder that a visitor typed; raises UserError where there is none."""
    folder = expand_home(typed.strip())
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Raise UserError for what is no folder; a path that no system has is not repeated in full."""
    shown = "".join(sign if sign.isprintable() else "\ufffd" for sign in str(folder))
    if len(shown) > _SHOWN_PATH:
        shown = f"{shown[: _SHOWN_PATH // 2]}…{shown[-_SHOWN_PATH // 4 :]}"
    try:
        is_there, is_folder = folder.exists(), folder.is_dir()
        if is_folder:
            next(folder.iterdir(), None)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no path has such a character"
        raise UserError(f"this cannot be read ({reason})", code="C101", where=shown, remedy=_GIVE_AN_ADAPTER) from error
    if not is_folder:
        what = "this is a file, not a folder" if is_there else "there is no such folder"
        remedy = "Give the folder that it is in" if is_there else _GIVE_AN_ADAPTER
        raise UserError(what, code="C101", where=shown, remedy=remedy)


def check_named_adapter(adapter: NamedAdapter, config: ChatGLMConfig) -> None:
    """Raise UserError where the folder does not hold the adapter that it was given as, or one for another base."""
    check_folder(adapter.folder)
    if adapter.method == "lora":
        check_lora(adapter.folder, config)
    elif adapter.method == "ptuning":
        check_prefix(adapter.folder, config, None)
    else:
        check_adapter(adapter.folder, config)


def _stamp(folder: Path) -> _Stamp:
    """Return what changes when a file of the folder does."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
