"""What records which bytes a weight file had: a list of digests, the hub's cache, and the archive itself."""

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from chatglm_tuning.new_folder import DIGESTS_NAME

_LINE = re.compile(r"\\?([0-9a-f]{64}) [ *](.+)")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MOST_BYTES = 1 << 20


def digests_of(folder: Path) -> Mapping[str, tuple[str, str]]:
    """Return for the files of `folder` where their SHA-256 is recorded, and what it is.

    Sources: SHA256SUMS, as `sha256sum` writes it; a folder that Hugging Face's libraries have downloaded, whose large
    files are links to blobs named by their digest, or have it noted below `.cache/huggingface/download`.
    """
    found = dict(_from_hub(folder))
    sums = folder / DIGESTS_NAME
    if sums.is_file():
        text = _read(sums)
        found |= {
            line[2]: (DIGESTS_NAME, line[1]) for line in map(_LINE.fullmatch, text.splitlines()) if line is not None
        }
    return found


def _from_hub(folder: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    for file in folder.iterdir():
        blob = file.resolve().name
        if file.is_symlink() and _DIGEST.fullmatch(blob):
            yield file.name, ("the hub's cache", blob)
    for note in (folder / ".cache" / "huggingface" / "download").glob("*.metadata"):
        lines = _read(note).splitlines()  # the commit, the digest of a large file, the time
        if len(lines) > 1 and _DIGEST.fullmatch(lines[1].strip()):
            yield note.name.removesuffix(".metadata"), ("the hub's note of the download", lines[1].strip())


def _read(path: Path) -> str:
    with path.open("rb") as stream:
        return stream.read(_MOST_BYTES).decode("utf-8", errors="replace")


def damaged_record(file: Path) -> str | None:
    """Return the name of the first record of a zip archive whose bytes are not those of its CRC-32, None if all are."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except zipfile.BadZipFile as error:
        return str(error)
