"""The stand-alone converter, run as a user runs it: from its own folder, without site packages."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from chatglm_tuning.data.records import read_records

SCRIPT = Path(__file__).resolve().parents[2] / "data" / "AdvertiseGen" / "convert_to_instruct.py"
ROWS = [{"content": "类型#上衣", "summary": "好看\u2028的上衣"}, {"content": "类型#裤", "summary": "裤子"}]
CONVERTED = [{"instruction": row["content"], "output": row["summary"]} for row in ROWS]


def run(folder, source="train.json", target="train.jsonl"):
    # -I and -S: neither the package nor anything that is installed can be imported.
    command = [sys.executable, "-I", "-S", str(SCRIPT), "--input_file", source, "--output_file", target]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False)


@pytest.mark.parametrize("form", ["lines", "array", "pretty", "bom", "lines gzip", "array gzip"])
def test_every_form_is_converted(tmp_path, form):
    if form.startswith("lines") or form == "bom":
        text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    else:
        text = "\n" + json.dumps(ROWS, ensure_ascii=False, indent=1 if form == "pretty" else None)
    data = text.encode("utf-8-sig" if form == "bom" else "utf-8")
    (tmp_path / "train.json").write_bytes(gzip.compress(data) if "gzip" in form else data)
    result = run(tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "2 rows written to train.jsonl\n", "")
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == CONVERTED
    assert "类型#上衣" in lines[0]
    assert [example.answer for example in read_records([tmp_path / "train.jsonl"]).examples] == [
        "好看\u2028的上衣",
        "裤子",
    ]


def test_the_output_is_gzipped_on_request(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(ROWS), encoding="utf-8")
    assert run(tmp_path, target="train.jsonl.gz").returncode == 0
    lines = gzip.decompress((tmp_path / "train.jsonl.gz").read_bytes()).decode("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == CONVERTED


GOOD = b'{"content": "q", "summary": "a"}\n'
BAD_INPUTS = {
    "not JSON": (GOOD + b"{'content': 1}\n", "train.json:2: not JSON (Expecting property name"),
    "no object": (GOOD + b"5\n", "train.json:2: the row is not an object."),
    "missing": (GOOD + b'{"content": "q"}\n', 'train.json:2: "summary" is missing.'),
    "number": (GOOD + b'{"content": 1, "summary": "a"}\n', 'train.json:2: "content" is not a string.'),
    "empty": (GOOD + b'{"content": "q", "summary": ""}\n', 'train.json:2: "summary" is empty.'),
    "surrogate": (GOOD + b'{"content": "q", "summary": "\\ud800"}\n', 'train.json:2: "summary" holds half'),
    "not UTF-8": (GOOD + b'{"content": "\xff", "summary": "a"}\n', "train.json:2: the text is not UTF-8."),
    "not UTF-8 in an array": (b"[\n" + GOOD + b',{"content": "\xff"}]', "train.json:3: the text is not UTF-8."),
    "bad row of an array": (b"[\n" + GOOD + b"\n, 5]", "train.json:4: the row is not an object."),
    "broken array": (b"[\n" + GOOD + b'\n {"content"', "train.json:4: not JSON (the array does not end"),
    "broken row of an array": (b"[\n" + GOOD + b',\n {"content"', "train.json:4: not JSON (Expecting ':'"),
    "text after the array": (b"[\n" + GOOD + b"]\n[]", "train.json:3: not JSON (the array does not end"),
    "cut gzip": (gzip.compress(GOOD * 9)[:-9], "the gzip data is damaged"),
    "no rows": (b"\n\n", "train.json: there are no rows."),
    "empty array": (b"[]", "train.json: there are no rows."),
    "missing file": (None, "train.json: the file cannot be read (No such file or directory)."),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_message_and_nothing_is_written(tmp_path, name):
    data, expected = BAD_INPUTS[name]
    if data is not None:
        (tmp_path / "train.json").write_bytes(data)
    (tmp_path / "train.jsonl").write_text("as before")
    result = run(tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith(".\n")
    assert (tmp_path / "train.jsonl").read_text() == "as before"
    assert {file.name for file in tmp_path.iterdir()} <= {"train.json", "train.jsonl"}


def test_an_output_folder_that_is_not_there_is_one_message(tmp_path):
    (tmp_path / "train.json").write_bytes(GOOD)
    result = run(tmp_path, target="nowhere/train.jsonl")
    assert result.returncode == 2
    assert result.stderr.startswith("nowhere/train.jsonl: cannot be written (No such file or directory).")
