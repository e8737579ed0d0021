"""The adapters that a page offers: those it was started with, and folders that visitors add."""

import threading
from pathlib import Path

from chatglm_tuning.adapters.served import BASE_ALONE, ServedAdapter
from chatglm_tuning.inference.engine import BatchEngine
from chatglm_tuning.loading import Base, add_served_adapter

BASE_NAME = ":base:"
"""The name of the base alone."""

_Stamp = tuple[tuple[str, int, int], ...]


class AdapterShelf:
    """Adapters by name, the same for all visitors. They stay until the program ends."""

    def __init__(self, base: Base, engine: BatchEngine) -> None:
        self._base = base
        self._engine = engine
        self._by_name: dict[str, ServedAdapter] = {BASE_NAME: BASE_ALONE}
        self._loaded: dict[tuple[Path, _Stamp], str] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the base's first."""
        return tuple(self._by_name)

    def __getitem__(self, name: str) -> ServedAdapter:
        return self._by_name[name]

    def add(self, folder: Path, name: str | None = None) -> str:
        """Load the adapter of `folder` beside the others and return its name.

        name: without it the folder's; a number follows where it is taken. A folder that is loaded already, and whose
        files have not changed since, is not loaded again.
        Raises UserError where there is no adapter in it, it is damaged, or it does not fit the base.
        """
        with self._lock:
            key = (folder.resolve(), _stamp(folder))
            if key in self._loaded:
                return self._loaded[key]
            with self._engine.paused() as adapters:
                adapter = add_served_adapter(self._base, adapters, folder)
            name = self._free_name(name or folder.resolve().name)
            self._by_name = {**self._by_name, name: adapter}
            self._loaded[key] = name
            return name

    def _free_name(self, wanted: str) -> str:
        name, number = wanted, 2
        while name in self._by_name:
            name, number = f"{wanted} ({number})", number + 1
        return name


def _stamp(folder: Path) -> _Stamp:
    """Return what changes when a file of the folder does."""
    if not folder.is_dir():
        return ()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)
