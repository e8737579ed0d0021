"""Data files to a tokenised dataset: read, checked, encoded in parallel, and cached on content and settings.

A cached dataset is a folder named after its key: the SHA-256 of everything that decides the result, the bytes of the
data files among it. It is written beside its place and renamed, so a run that was killed leaves nothing that is used.
"""

import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from filelock import FileLock

from chatglm_tuning import prompt as prompt_module
from chatglm_tuning.data import audit as audit_module
from chatglm_tuning.data import encode as encode_module
from chatglm_tuning.data import faults as faults_module
from chatglm_tuning.data import records as records_module
from chatglm_tuning.data import rows as rows_module
from chatglm_tuning.data.audit import ExampleAudit, ExampleReport, Finding
from chatglm_tuning.data.encode import EncodingSettings, LengthReport, TextEncoder, encode_examples, report_lengths
from chatglm_tuning.data.records import Example, iterate_examples
from chatglm_tuning.data.rows import BadRows, check_files
from chatglm_tuning.errors import UserError
from chatglm_tuning.wording import counted

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "CHATGLM_TUNING_CACHE"

_BATCH_ROWS = 1000
# Below this, starting processes takes longer than the work that they would share.
_ROWS_PER_PROCESS = 2000
_ABANDONED_SECONDS = 24 * 3600
_BUILDING = "building-"
_LEAST_FREE_BYTES = 1 << 20
_REPORT_NAME = "report.json"
_DIGESTS_NAME = "digests.npy"
_PROBES = ["你好，world", " a  b\tc\n", "[gMASK]<sop><eop>[MASK]<n><|blank_2|>", "０①ﬁ\u3000é😀"]
_SOURCES = (prompt_module, rows_module, records_module, encode_module, audit_module, faults_module)

_TEXT_SCHEMA = pa.schema({"query": pa.string(), "answer": pa.string(), "history": pa.list_(pa.list_(pa.string()))})
_COUNTS = ("prompt_tokens", "answer_tokens", "is_prompt_cut", "is_answer_cut", "dropped_rounds")
_FEATURES = Features(
    {"input_ids": List(Value("int32")), "labels": List(Value("int32")), "length": Value("int32")}
    | {name: Value("int32") for name in _COUNTS}
)


@dataclass(frozen=True)
class BuiltDataset:
    """A tokenised dataset and what became of its rows.

    dataset: columns input_ids and labels, both int32 `(seq,)`, and length, the tokens of the row; in row order.
    examples: what their texts hold that hurts training. skipped_rows: bad rows that were left out.
    """

    dataset: Dataset
    lengths: LengthReport
    examples: ExampleReport
    skipped_rows: int
    is_from_cache: bool


def build_dataset(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: TextEncoder,
    settings: EncodingSettings,
    *,
    skip_bad_rows: bool = False,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> BuiltDataset:
    """Return the tokenised examples of `paths`, from the cache where nothing that decides the result has changed.

    num_proc: processes that tokenise; by default one for each usable core. Few rows are always done in this process.
    cache_dir: by default $CHATGLM_TUNING_CACHE, else ~/.cache/chatglm_tuning.
    Raises UserError for what `read_records` refuses, and for a cache folder that cannot be written. Processes that
    build the same dataset at once (torchrun) wait for the first one and take its result.
    """
    key = _cache_key(check_files(paths), tokenizer, settings, skip_bad_rows=skip_bad_rows)
    folder = _cache_folder(cache_dir)
    target = folder / key
    with _told_unwritable(folder), FileLock(folder / f"{key}.lock"):
        built = _load(target, paths)
        if built is None:
            _remove_abandoned(folder)
            with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=folder, ignore_cleanup_errors=True) as work:
                found = _write_texts(paths, Path(work) / "texts.arrow", skip_bad_rows=skip_bad_rows)
                encoded = _encode_texts(Path(work), tokenizer, settings, num_proc)
                _store(encoded, found, Path(work) / "result", target)
            stored = _load(target, paths)
            assert stored is not None
            built = dataclasses.replace(stored, is_from_cache=False)
    logger.info("%s%s", "from the cache: " if built.is_from_cache else "", built.lengths.describe())
    if built.skipped_rows:
        logger.warning("skipped: %s", counted(built.skipped_rows, "bad row"))
    return built


def _cache_key(
    files: Sequence[Path], tokenizer: TextEncoder, settings: EncodingSettings, *, skip_bad_rows: bool
) -> str:
    """The SHA-256 of the files' bytes, the settings, the tokenizer and the code that reads and encodes."""
    control_ids = [tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    parts = {
        "files": [_file_digest(file) for file in files],
        "code": [_file_digest(Path(name)) for name in (__file__, *(module.__file__ or "" for module in _SOURCES))],
        "settings": dataclasses.asdict(settings) | {"skip_bad_rows": skip_bad_rows},
        "vocabulary": _file_digest(Path(tokenizer.vocab_file)) if tokenizer.vocab_file else None,
        # The vocabulary alone does not show how a tokenizer treats spaces and control words.
        "tokenizer": [type(tokenizer).__qualname__, control_ids, tokenizer.encode_texts(_PROBES)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    folder = Path(cache_dir or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "chatglm_tuning")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, str(error.strerror)) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(folder, "permission denied")
    return folder


def _unwritable(folder: Path, reason: str) -> UserError:
    remedy = f"Give --data_cache_dir, or set {CACHE_VARIABLE} to, a folder that can be written"
    return UserError(f"the cache folder cannot be written ({reason})", code="O108", remedy=remedy, where=str(folder))


@contextmanager
def _told_unwritable(folder: Path) -> Iterator[None]:
    """Raise UserError where the disk of the cache takes no more; the data files, which are only read, never say so."""
    try:
        yield
    except OSError as error:
        number = error.errno
        if number is None and shutil.disk_usage(folder).free < _LEAST_FREE_BYTES:  # as numpy and arrow tell it
            number = errno.ENOSPC
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise _unwritable(folder, os.strerror(number)) from error


@dataclass(frozen=True)
class _Texts:
    """What reading the texts of some files found. paths: those files."""

    paths: list[str]
    examples: ExampleReport
    skipped_rows: int


def _load(target: Path, paths: Sequence[str | os.PathLike[str]]) -> BuiltDataset | None:
    """The dataset cached in `target`; None where there is none, or none that can be read.

    paths: the files as they are called now, by which places in them are named.
    """
    if not target.exists():
        return None
    try:
        report = json.loads((target / _REPORT_NAME).read_text(encoding="utf-8"))
        dataset = Dataset.load_from_disk(str(target))
        lengths = LengthReport(**report["lengths"])
        if len(dataset) != lengths.rows:
            raise ValueError(f"{len(dataset)} rows instead of {lengths.rows}")
        prompts, pairs = np.load(target / _DIGESTS_NAME)
        renamed = dict(zip(report["paths"], map(str, paths), strict=True))
        findings = {
            what: Finding(found["count"], [_renamed(place, renamed) for place in found["places"]])
            for what, found in report["findings"].items()
        }
        examples = ExampleReport(len(pairs), report["languages"], findings, prompts, pairs)
        return BuiltDataset(dataset, lengths, examples, report["skipped_rows"], is_from_cache=True)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        logger.warning("%s: the cached dataset is damaged (%s); it is built anew", target, error)
        return None


def _renamed(place: str, names: Mapping[str, str]) -> str:
    """`file:line` with the name that the file has now."""
    path, _, line = place.rpartition(":")
    return f"{names[path]}:{line}"


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed runs left behind long ago."""
    for left_over in folder.glob(f"{_BUILDING}*"):
        if time.time() - left_over.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(left_over, ignore_errors=True)


def _write_texts(paths: Sequence[str | os.PathLike[str]], file: Path, *, skip_bad_rows: bool) -> _Texts:
    """Write the examples of `paths` to the Arrow stream `file`, a batch at a time; return what was found on the way."""
    bad_rows, audit = BadRows(), ExampleAudit()
    examples = audit.watch(iterate_examples(paths, bad_rows))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, _TEXT_SCHEMA) as writer:
        while batch := list(itertools.islice(examples, _BATCH_ROWS)):
            writer.write_batch(_text_batch(batch))
    bad_rows.settle(skip_bad_rows=skip_bad_rows)
    found = audit.report()
    if not found.examples:
        raise UserError(
            "no usable row was found", code="D105", remedy="Check the data files", where=", ".join(map(str, paths))
        )
    return _Texts(list(map(str, paths)), found, bad_rows.count)


def _text_batch(examples: Iterable[Example]) -> pa.RecordBatch:
    rows = [{"query": e.query, "answer": e.answer, "history": list(map(list, e.history))} for e in examples]
    return pa.RecordBatch.from_pylist(rows, schema=_TEXT_SCHEMA)


def _encode_texts(work: Path, tokenizer: TextEncoder, settings: EncodingSettings, num_proc: int | None) -> Dataset:
    texts = Dataset.from_file(str(work / "texts.arrow"))
    return texts.map(
        _encode_batch,
        batched=True,
        batch_size=_BATCH_ROWS,
        fn_kwargs={"tokenizer": tokenizer, "settings": settings},
        remove_columns=texts.column_names,
        features=_FEATURES,
        num_proc=_process_count(len(texts), num_proc),
        cache_file_name=str(work / "encoded.arrow"),
        load_from_cache_file=False,
        new_fingerprint="encoded",
        desc="Tokenising",
    )


def _process_count(rows: int, num_proc: int | None) -> int | None:
    """How many processes to start for `rows`; None does the work in this one."""
    allowed = num_proc or _usable_cores()
    useful = min(allowed, rows // _ROWS_PER_PROCESS)
    return useful if useful > 1 else None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _encode_batch(batch: Mapping[str, list], tokenizer: TextEncoder, settings: EncodingSettings) -> dict[str, list]:
    rows = zip(batch["query"], batch["answer"], batch["history"], strict=True)
    examples = [Example(query, answer, tuple(map(tuple, history))) for query, answer, history in rows]
    encoded = encode_examples(examples, tokenizer, settings)
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in encoded] for name in _COUNTS}
    columns["input_ids"] = [row.input_ids for row in encoded]
    columns["labels"] = [row.labels for row in encoded]
    columns["length"] = [len(row.input_ids) for row in encoded]
    return columns


def _store(encoded: Dataset, texts: _Texts, result: Path, target: Path) -> None:
    """Write the dataset and its reports to `result`, then put it in place as `target` in one step."""
    counts = {name: np.asarray(encoded.with_format("numpy")[name][:]) for name in (*_COUNTS, "length")}
    report = {
        "lengths": dataclasses.asdict(report_lengths(counts)),
        "skipped_rows": texts.skipped_rows,
        "paths": texts.paths,
        "languages": texts.examples.languages,
        "findings": {what: dataclasses.asdict(finding) for what, finding in texts.examples.findings.items()},
    }
    encoded.remove_columns(list(_COUNTS)).save_to_disk(str(result))
    np.save(result / _DIGESTS_NAME, np.stack([texts.examples.prompts, texts.examples.pairs]))
    (result / _REPORT_NAME).write_text(json.dumps(report), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(result, target)
