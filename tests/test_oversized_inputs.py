"""Files made to fill the memory: gigabytes in a row, bombs of gzip and zip, tensors that lie about their size."""

import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import chatglm_tuning.data.rows as rows_module
from chatglm_tuning.data.records import read_records
from chatglm_tuning.errors import UserError
from chatglm_tuning.shards import find_weight_files, iterate_tensors, load_bin

PEAK = """
import sys
from pathlib import Path
from chatglm_tuning.data.records import iterate_examples
from chatglm_tuning.data.rows import BadRows
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) >> 10
before, bad, count = peak(), BadRows(), 0
for example in iterate_examples([Path(sys.argv[1])], bad):
    count += 1
print(count, bad.count, peak() - before)
print(*bad.shown, sep="\\n")
"""
MIB = 1 << 20


def read_in_a_process(file: Path) -> tuple[int, int, int, str]:
    """Read a data file; returns examples, bad rows, MiB of memory that this took, and what is told."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's account of resident memory")
    done = subprocess.run([sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True)
    numbers, told = done.stdout.split("\n", 1)
    count, bad, megabytes = map(int, numbers.split())
    return count, bad, megabytes, told


@pytest.mark.parametrize(
    "start", ['{"content": "a", "summary": "', "", " \n [ {"], ids=["a row", "nothing", "an array"]
)
def test_a_gigabyte_without_a_newline_takes_little_memory(start, tmp_path):
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"content": "q", "summary": "a"}\n' if "[" not in start else b"")
        stream.write(start.encode())
        stream.truncate(1 << 30)  # a hole of zeros takes no room on the disk
        stream.seek(0, os.SEEK_END)
        stream.write(b'"}\n{"content": "q", "summary": "a"}\n')
    count, bad, megabytes, told = read_in_a_process(file)
    assert (count, bad) == ((0, 1) if "[" in start else (2, 1))
    assert megabytes < 200, told
    assert f"{file}:2: the row is longer than 16 MiB, which is the most; make" in told


def test_a_row_of_the_most_bytes_is_read_and_one_more_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MOST_ROW_BYTES", 1000)
    frame = len('{"content": "q", "summary": ""}') + 1  # and its newline
    rows = ['{"content": "q", "summary": "%s"}' % ("a" * (1000 - frame + more)) for more in (0, 1)]
    lines, array = tmp_path / "lines", tmp_path / "array"
    lines.write_text("\n".join([*rows, rows[0]]) + "\n")
    with pytest.raises(UserError, match=r"lines:2: the row is longer than[^\n]*\n1 bad row in all") as caught:
        read_records([lines], skip_bad_rows=False)
    assert "\n" in caught.value.what
    assert len(read_records([lines], skip_bad_rows=True).examples) == 2
    array.write_text(f"[{rows[0]},\n{rows[0]},\n{rows[1]}{' ' * 3}]")
    assert len(read_records([array]).examples) == 3  # a row of an array has no newline of its own
    array.write_text(f'[{rows[0]},\n{rows[1][:-2]}aa"}}]')
    with pytest.raises(UserError, match="array:2: the row is longer than"):
        read_records([array])


def test_a_bomb_of_gzip_is_refused_while_it_is_unpacked(tmp_path):
    """600 MiB in less than 6: rows, and blank lines."""
    for name, unit in {
        "rows": b'{"content": "q", "summary": "' + b"a" * MIB + b'"}\n',
        "blank": b" " * MIB + b"\n",
    }.items():
        file = tmp_path / name
        with gzip.open(file, "wb", compresslevel=1) as stream:
            for _ in range(600):
                stream.write(unit)
        assert file.stat().st_size < 6 * MIB
        _, _, megabytes, told = read_in_a_process(file)
        assert megabytes < 200
        assert "the gzip data unpacks to more than" in told


def test_a_file_that_compresses_well_is_read(tmp_path):
    file = tmp_path / "rows.json.gz"
    data = b'{"content": "q", "summary": "the same answer"}\n' * 20_000
    file.write_bytes(gzip.compress(data))
    assert file.stat().st_size * 200 < len(data), "it does not compress well, so this shows nothing"
    assert len(read_records([file]).examples) == 20_000


def test_a_conversation_whose_prompts_would_fill_the_memory_is_a_bad_row(tmp_path):
    file = tmp_path / "rows.json"
    turns = [{"role": role, "content": "x" * 30} for _ in range(6000) for role in ("user", "assistant")]
    file.write_text(json.dumps({"messages": turns}))
    with pytest.raises(UserError, match=r'rows\.json:1: "messages" turn \d+: the conversation is too long'):
        read_records([file])
    file.write_text(json.dumps({"messages": turns[:1000]}))
    assert len(read_records([file]).examples) == 500


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text", [DEEP, '{"content": ' * 50_000, f'[{{"content": {DEEP}', '{"messages": [{"role": ' + DEEP]
)
def test_deep_nesting_in_data_is_a_bad_row(text, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"rows\.json:1: not JSON: nested too deeply"):
        read_records([file])


@pytest.mark.parametrize("depth", [200, 900, 960, 990])
def test_nesting_that_json_just_takes_is_told_in_few_words(depth, tmp_path):
    file = tmp_path / "rows.json"
    nested = "[" * depth + "]" * depth
    rows = [
        f'{{"messages": [{{"role": {nested}, "content": "a"}}]}}',
        f'{{"content": {nested}, "summary": "a"}}',
        nested,
    ]
    file.write_text("\n".join([*rows, f'{{"prompt": "q", "response": {nested}}}']))
    with pytest.raises(UserError) as caught:
        read_records([file], needs_answers=False)
    assert max(map(len, str(caught.value).splitlines())) < 400


def zip_of(content: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return stream.getvalue()


def test_a_bomb_of_zip_is_refused_before_it_is_unpacked(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(zip_of({"archive/data.pkl": b"\0" * (64 * MIB), "archive/version": b"3\n"}))
    assert file.stat().st_size < MIB
    with pytest.raises(UserError, match="the archive is compressed"):
        find_weight_files(tmp_path)


def test_a_zip_whose_entries_lie_in_the_same_bytes_is_refused(tmp_path):
    """Each of these is whole, and together they are larger than the file."""
    whole = zip_of({"a": b"x" * 1000}, zipfile.ZIP_STORED)
    start = whole.rindex(b"PK\x01\x02")
    end = whole.rindex(b"PK\x05\x06")
    entry, ending = whole[start:end], bytearray(whole[end:])
    ending[8:12] = (100).to_bytes(2, "little") * 2
    ending[12:16] = (100 * len(entry)).to_bytes(4, "little")
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(whole[:start] + entry * 100 + bytes(ending))
    assert len(zipfile.ZipFile(file).infolist()) == 100
    with pytest.raises(UserError, match="says that it holds more than its own size"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    "state",
    [
        {"a": torch.zeros(1).expand(1 << 40)},
        {str(number): view for view in [torch.zeros(1 << 16)] for number in range(50)},
        {"a": torch.empty(1 << 40, device="meta")},
        {"a": torch.eye(3).to_sparse()},
        {3: torch.ones(2)},
    ],
    ids=["no strides", "many of one storage", "meta", "sparse", "a number as name"],
)
def test_tensors_that_are_larger_than_their_file_or_none_are_refused(state, is_zip, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match="no flat mapping of names to tensors"):
        load_bin(file)


def test_tied_tensors_are_no_lie(tmp_path):
    weight = torch.ones(1000, 10)
    torch.save({"a": weight, "b": weight, "c": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    assert len(list(iterate_tensors(find_weight_files(tmp_path)))) == 3
