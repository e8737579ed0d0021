"""Building a dataset: its rows, the cache and what invalidates it, several processes, killed runs."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from chatglm_tuning.data import dataset as dataset_module
from chatglm_tuning.data.dataset import CACHE_VARIABLE, build_dataset
from chatglm_tuning.data.encode import EncodingSettings, encode_examples
from chatglm_tuning.data.records import read_records
from chatglm_tuning.errors import UserError
from tests.data.fakes import CharacterEncoder

FAKE = CharacterEncoder()
LIMITS = EncodingSettings(12, 12)
ROWS = [
    {"content": "问", "summary": "答"},
    {"prompt": "q" * 20, "response": "a", "history": [["q", "a"]]},
    {"messages": [{"role": role, "content": "x" * 15} for role in ("user", "assistant", "user", "assistant")]},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "data.jsonl", ROWS)


@pytest.fixture
def build(tmp_path):
    def build_cached(*paths, tokenizer=FAKE, settings=LIMITS, **options):
        return build_dataset(paths, tokenizer, settings, cache_dir=tmp_path / "cache", **options)

    return build_cached


def assert_holds(built, paths):
    expected = encode_examples(read_records(paths, skip_bad_rows=True).examples, FAKE, LIMITS)
    assert built.dataset.column_names == ["input_ids", "labels", "length"]
    assert list(built.dataset["input_ids"]) == [row.input_ids for row in expected]
    assert list(built.dataset["labels"]) == [row.labels for row in expected]
    assert list(built.dataset["length"]) == [len(row.input_ids) for row in expected]


def test_the_dataset_holds_the_encoded_examples_in_order(build, file, tmp_path):
    other = write(tmp_path / "other.jsonl", [{"content": "乙", "summary": "丙"}])
    built = build(file, other)
    assert_holds(built, [file, other])
    assert (built.skipped_rows, built.is_from_cache, built.lengths.rows) == (0, False, 5)
    assert (built.lengths.cut_prompts, built.lengths.cut_answers, built.lengths.shortened_histories) == (3, 2, 2)


def test_the_second_time_nothing_is_parsed_or_encoded(build, file, monkeypatch, caplog):
    first = build(file)

    def fail(*arguments, **options):
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(dataset_module, "iterate_examples", fail)
    monkeypatch.setattr(dataset_module, "encode_examples", fail)
    with caplog.at_level(logging.INFO, logger="chatglm_tuning"):
        second = build(file)
    assert second.is_from_cache
    assert (second.lengths, second.skipped_rows) == (first.lengths, first.skipped_rows)
    assert_holds(second, [file])
    assert caplog.messages[-1].startswith("from the cache: 4 examples")


def test_a_copy_under_another_name_is_found_in_the_cache(build, file, tmp_path):
    build(file)
    copy = tmp_path / "copy.json"
    copy.write_bytes(file.read_bytes())
    assert build(copy).is_from_cache


@pytest.mark.parametrize(
    "change",
    [
        "content",
        "order",
        "input length",
        "output length",
        "eop",
        "skip",
        "vocabulary",
        "control id",
        "encoding",
        "code",
    ],
)
def test_whatever_decides_the_result_leads_to_a_new_dataset(build, file, tmp_path, change, monkeypatch):
    other = write(tmp_path / "other.jsonl", [{"content": "乙", "summary": "丙"}])
    paths, options = [file, other], {}
    build(*paths)
    assert build(*paths).is_from_cache

    class Spelled(CharacterEncoder):
        __qualname__ = CharacterEncoder.__qualname__

        def encode_texts(self, texts):
            return [[ord(character) + 1 for character in text] for text in texts]

    if change == "content":
        write(other, [{"content": "乙", "summary": "丁"}])
    elif change == "order":
        paths.reverse()
    elif change == "skip":
        options["skip_bad_rows"] = True
    elif change == "code":
        monkeypatch.setattr(dataset_module, "_SOURCES", dataset_module._SOURCES[1:])
    elif change in ("input length", "output length", "eop"):
        names = {"input length": "max_input_length", "output length": "max_output_length", "eop": "eop_after_cut"}
        options["settings"] = replace(LIMITS, **{names[change]: 13})
    else:
        vocabulary = replace(FAKE, vocab_file=str(write(tmp_path / "vocabulary", [])))
        options["tokenizer"] = {"vocabulary": vocabulary, "control id": replace(FAKE, eos_token_id=9)}.get(
            change, Spelled()
        )
    assert not build(*paths, **options).is_from_cache


@pytest.mark.parametrize("num_proc", [1, 2])
def test_several_processes_give_the_same_rows(build, tmp_path, num_proc, monkeypatch):
    monkeypatch.setattr(dataset_module, "_ROWS_PER_PROCESS", 10)
    file = write(tmp_path / "many.jsonl", [{"content": f"问{i}", "summary": f"答{i}"} for i in range(41)])
    if num_proc == 1:
        monkeypatch.setattr("datasets.arrow_dataset.mp.Pool", lambda *_: pytest.fail("a process was started"))
    assert_holds(build(file, num_proc=num_proc), [file])


@pytest.mark.parametrize(
    ("rows", "num_proc", "expected"), [(1999, 8, None), (4000, 1, None), (4000, 8, 2), (10**6, 3, 3), (10**6, 2, 2)]
)
def test_few_rows_start_no_processes(rows, num_proc, expected):
    assert dataset_module._process_count(rows, num_proc) == expected


def test_bad_rows_are_refused_or_skipped_and_the_count_is_cached(build, tmp_path):
    file = write(tmp_path / "data.jsonl", [*ROWS, {"content": "q"}, 5])
    with pytest.raises(UserError, match="2 bad rows in all"):
        build(file)
    assert build(file, skip_bad_rows=True).skipped_rows == 2
    again = build(file, skip_bad_rows=True)
    assert (again.skipped_rows, again.is_from_cache) == (2, True)
    assert_holds(again, [file])
    with pytest.raises(UserError, match="2 bad rows in all"):
        build(file)
    assert not list((tmp_path / "cache").glob("building-*"))


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "state.json", "report.json"])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_damaged_cache_is_built_anew(build, file, tmp_path, name, damage, caplog):
    build(file)
    [found] = (tmp_path / "cache").glob(f"*/{name}")
    if damage == "removed":
        found.unlink()
    else:
        found.write_bytes(found.read_bytes()[: found.stat().st_size // 3])
    built = build(file)
    assert not built.is_from_cache
    assert_holds(built, [file])
    assert any("the cached dataset is damaged" in message for message in caplog.messages)
    assert build(file).is_from_cache


def test_a_cache_that_lost_rows_is_built_anew(build, file, tmp_path):
    build(file).dataset.select([0]).save_to_disk(str(tmp_path / "shorter"))
    [found] = (tmp_path / "cache").glob("*/data-00000-of-00001.arrow")
    found.unlink()
    found.write_bytes((tmp_path / "shorter" / found.name).read_bytes())
    built = build(file)
    assert not built.is_from_cache
    assert_holds(built, [file])


KILLED = """
import os, signal, sys
from chatglm_tuning.data import dataset
from chatglm_tuning.data.encode import EncodingSettings
from tests.data.fakes import CharacterEncoder
name = sys.argv[3]
if name == "replace":
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
else:
    setattr(dataset, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
dataset.build_dataset([sys.argv[1]], CharacterEncoder(), EncodingSettings(12, 12), cache_dir=sys.argv[2])
"""


@pytest.mark.parametrize("moment", ["encode_examples", "report_lengths", "replace"])
def test_a_killed_run_leaves_nothing_that_is_used(build, file, tmp_path, moment):
    command = [sys.executable, "-c", KILLED, str(file), str(tmp_path / "cache"), moment]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    [left_over] = (tmp_path / "cache").glob("building-*")
    built = build(file)
    assert not built.is_from_cache
    assert_holds(built, [file])
    assert left_over.exists()
    long_ago = time.time() - 2 * dataset_module._ABANDONED_SECONDS
    os.utime(left_over, (long_ago, long_ago))
    build(file, settings=EncodingSettings(20, 20))
    assert not left_over.exists()


def test_the_cache_lies_where_the_variable_says_or_in_the_home_folder(file, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "named"))
    build_dataset([file], FAKE, LIMITS)
    assert list((tmp_path / "named").glob("*/report.json"))
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    build_dataset([file], FAKE, LIMITS)
    assert list((tmp_path / "home" / ".cache" / "chatglm_tuning").glob("*/report.json"))


def test_a_cache_folder_that_cannot_be_made_is_the_users_to_mend(file):
    with pytest.raises(UserError, match=f"the cache folder cannot be written .*set {CACHE_VARIABLE} to"):
        build_dataset([file], FAKE, LIMITS, cache_dir=file / "below")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("24 requested and 0 written")]
)
def test_a_cache_whose_disk_is_full_is_named(build, file, tmp_path, monkeypatch, error):
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(dataset_module.shutil, "disk_usage", lambda _path: full)
    monkeypatch.setattr(dataset_module.np, "save", Mock(side_effect=error))
    with pytest.raises(UserError, match=r"the cache folder cannot be written \(No space left on device\)") as told:
        build(file)
    assert (told.value.code, told.value.where) == ("O108", str(tmp_path / "cache"))


def test_data_that_cannot_be_read_is_not_the_fault_of_the_cache(build, file, monkeypatch):
    monkeypatch.setattr(dataset_module, "iterate_examples", Mock(side_effect=OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        build(file)


def test_missing_files_are_refused(build, tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        build(tmp_path / "missing.jsonl")


def test_what_the_texts_hold_is_kept_under_the_names_that_the_files_have_now(build, tmp_path):
    rows = [{"content": "问", "summary": "坏�了。"}, {"content": "问", "summary": "坏�了。"}]
    first, second = write(tmp_path / "first.jsonl", rows), write(tmp_path / "second.jsonl", rows)
    built, cached = build(first), build(second)
    assert (built.is_from_cache, cached.is_from_cache) == (False, True)
    for found, file in ((built.examples, first), (cached.examples, second)):
        assert found.findings["the same prompt and answer again"].places == [f"{file}:2"]
        assert found.findings["characters that replace undecodable bytes"].places == [f"{file}:1", f"{file}:2"]
    assert (cached.examples.pairs == built.examples.pairs).all()
    assert (cached.examples.prompts == built.examples.prompts).all()
    assert cached.examples.languages == built.examples.languages
