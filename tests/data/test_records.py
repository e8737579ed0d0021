"""Reading data files: the five shapes, multi-turn rows, and every kind of bad row with its place."""

import gzip
import json
import logging
import os

import pytest

from chatglm_tuning.data.records import Example, read_records
from chatglm_tuning.data.rows import SHOWN_PROBLEMS
from chatglm_tuning.errors import UserError
from chatglm_tuning.prompt import build_prompt

GOOD = {"instruction": "q", "output": "a"}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def examples_of(path):
    return [(example.query, example.answer, example.history) for example in read_records([path]).examples]


SHAPES = {
    "instruction": ({"instruction": "q", "input": "i", "output": "a"}, [("q\ni", "a", ())]),
    "instruction, blank input": ({"instruction": "q", "input": "  ", "output": "a"}, [("q", "a", ())]),
    "instruction, null input": ({"instruction": "q", "input": None, "output": "a"}, [("q", "a", ())]),
    "instruction, input only": ({"instruction": "", "input": "i", "output": "a"}, [("\ni", "a", ())]),
    "prompt": ({"prompt": "q", "response": "a"}, [("q", "a", ())]),
    "prompt, history": (
        {"prompt": "q2", "response": "a2", "history": [["q1", "a1"]]},
        [("q2", "a2", (("q1", "a1"),))],
    ),
    "prompt, system": (
        {"prompt": "q2", "response": "a2", "history": [["q1", "a1"]], "system": "s"},
        [("q2", "a2", (("s\nq1", "a1"),))],
    ),
    "content": ({"content": "q", "summary": "a"}, [("q", "a", ())]),
    "content, system": ({"content": "q", "summary": "a", "system": "s"}, [("s\nq", "a", ())]),
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q1"},
                {"role": "assistant", "content": "a1"},
                {"role": "user", "content": "q2"},
                {"role": "assistant", "content": "a2"},
                {"role": "user", "content": "left out"},
            ]
        },
        [("s\nq1", "a1", ()), ("q2", "a2", (("s\nq1", "a1"),))],
    ),
    "conversations": (
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "q1"},
                {"from": "gpt", "value": "a1"},
                {"from": "User", "value": "q2"},
                {"from": "assistant", "value": "a2"},
            ],
        },
        [("s\nq1", "a1", ()), ("q2", "a2", (("s\nq1", "a1"),))],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_read(tmp_path, name):
    row, expected = SHAPES[name]
    assert examples_of(write_lines(tmp_path / "data.jsonl", [row])) == expected


@pytest.mark.parametrize("form", ["lines", "lines.gz", "array", "array.gz", "pretty array", "bom", "crlf"])
def test_every_form_of_file_gives_the_same_examples_whatever_its_name(tmp_path, form):
    rows = [{"content": f"问{i}", "summary": f"答\u2028{i}"} for i in range(3)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    if "array" in form:
        text = "\n \n" + json.dumps(rows, ensure_ascii=False, indent=2 if "pretty" in form else None)
    data = text.replace("\n", "\r\n" if form == "crlf" else "\n").encode("utf-8-sig" if form == "bom" else "utf-8")
    path = tmp_path / "data.txt"
    path.write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    assert examples_of(path) == [(f"问{i}", f"答\u2028{i}", ()) for i in range(3)]


def test_the_log_names_the_shapes(tmp_path, caplog):
    path = write_lines(tmp_path / "mixed.jsonl", [GOOD, {"content": "q", "summary": "a"}, GOOD])
    with caplog.at_level(logging.INFO, logger="chatglm_tuning"):
        read_records([path])
    assert caplog.messages == [
        f"{path}: rows of the shape instruction/input/output: 2",
        f"{path}: rows of the shape content/summary: 1",
    ]


def test_the_source_is_file_and_line(tmp_path):
    lines = write_lines(tmp_path / "lines.jsonl", [GOOD, GOOD])
    array = tmp_path / "array.json"
    array.write_text('[\n{"content": "q",\n "summary": "a"},\n\n{"content": "q", "summary": "a"}\n]')
    sources = [example.source for example in read_records([lines, array]).examples]
    assert sources == [f"{lines}:1", f"{lines}:2", f"{array}:2", f"{array}:5"]


def test_the_prompt_of_a_turn_is_what_chat_sends():
    history = (("q1", "a1"), ("q2", "a2"))
    assert Example("q3", "a3", history).prompt == build_prompt("q3", history)


BAD_ROWS = {
    "not JSON": ('{"instruction": "q"', "not JSON: Expecting ',' delimiter (column 20)"),
    "two on a line": ('{"a": 1} {"b": 2}', "not JSON: Extra data (column 10)"),
    "raw NUL": ('{"instruction": "q\0", "output": "a"}', "not JSON: Invalid control character"),
    "nested": ("[" * 100_000, None),
    "long number": (f'{{"a": {"1" * 5000}}}', "not JSON: Exceeds the limit"),
    "a list": ("[1, 2]", "the row is a list, not an object"),
    "a number": ("7", "the row is a number, not an object"),
    "null": ("null", "the row is null, not an object"),
    "unknown shape": ('{"text": "q", "label": 1}', "no known shape: its fields are 'text', 'label'; known are"),
    "no fields": ("{}", "no known shape: its fields are none"),
    "missing answer": ('{"instruction": "q"}', '"output" is missing'),
    "missing prompt": ('{"response": "a"}', '"prompt" is missing'),
    "number": ('{"instruction": "q", "output": 5}', '"output" is a number, not a string'),
    "null answer": ('{"content": "q", "summary": null}', '"summary" is null, not a string'),
    "number as input": ('{"instruction": "q", "input": 5, "output": "a"}', '"input" is a number, not a string'),
    "empty answer": ('{"instruction": "q", "output": " \\n"}', 'the answer is empty ("output")'),
    "empty prompt": ('{"content": "", "summary": "a"}', 'the prompt is empty ("content")'),
    "NUL": ('{"instruction": "q\\u0000", "output": "a"}', '"instruction" holds a NUL character'),
    "lone surrogate": ('{"instruction": "q", "output": "\\ud83d"}', '"output" is not valid UTF-8 text (\\ud83d)'),
    "history no list": ('{"prompt": "q", "response": "a", "history": "x"}', '"history" is a string, not a list'),
    "history no pair": ('{"prompt": "q", "response": "a", "history": [["x"]]}', '"history" round 1 is not a pair'),
    "history number": ('{"prompt": "q", "response": "a", "history": [["x", 1]]}', '"history" round 1 is a number'),
    "turns no list": ('{"messages": {}}', '"messages" is an object, not a list of turns'),
    "no turns": ('{"conversations": []}', '"conversations" holds no answer of the assistant'),
    "turn no object": ('{"messages": ["x"]}', '"messages" turn 1 is a string, not an object'),
    "turn without role": ('{"messages": [{"content": "x"}]}', '"messages" turn 1: "role" is missing'),
    "turn without text": ('{"messages": [{"role": "user"}]}', '"messages" turn 1: "content" is missing'),
    "ShareGPT turn without text": ('{"conversations": [{"from": "human"}]}', 'turn 1: "value" is missing'),
    "a role that is a list": (
        '{"messages": [{"role": [{"a": 1}], "content": "x"}]}',
        '"messages" turn 1: "role" is a list, not a string',
    ),
    "unknown role": ('{"messages": [{"role": "tool", "content": "x"}]}', "unknown role 'tool'; known are system"),
}
TURN = {"u": {"role": "user", "content": "q"}, "a": {"role": "assistant", "content": "a"}}
TURN |= {"s": {"role": "system", "content": "s"}, "e": {"role": "assistant", "content": " "}}
BAD_TURNS = {
    "uu": "turn 2 is the user's, the assistant's was expected",
    "a": "turn 1 is the assistant's, the user's was expected",
    "uaa": "turn 3 is the assistant's, the user's was expected",
    "uas": "turn 3: a system text may only come first",
    "usa": "turn 2: a system text may only come first",
    "ue": "turn 2: the answer is empty",
    "u": "holds no answer of the assistant",
}


def lines_with_bad_row(bad: bytes) -> bytes:
    good = json.dumps(GOOD).encode()
    return good + b"\n\n" + bad + b"\n" + good + b"\n"


def assert_reported_and_skippable(path, line, expected):
    with pytest.raises(UserError) as raised:
        read_records([path], skip_bad_rows=False)
    assert str(raised.value).startswith(f"{path}:{line}: ")
    if expected:
        assert expected in str(raised.value)
    assert "1 bad row in all. Mend them, or pass --skip_bad_rows" in str(raised.value)
    records = read_records([path], skip_bad_rows=True)
    assert records.skipped == 1
    assert [example.source for example in records.examples] == [f"{path}:1", f"{path}:{line + 1}"]


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_reported_with_its_line_and_can_be_skipped(tmp_path, name):
    bad, expected = BAD_ROWS[name]
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines_with_bad_row(bad.encode()))
    assert_reported_and_skippable(path, 3, expected)


@pytest.mark.parametrize("turns", BAD_TURNS)
def test_odd_turns_are_reported(tmp_path, turns):
    path = write_lines(tmp_path / "data.jsonl", [GOOD, {"messages": [TURN[turn] for turn in turns]}, GOOD])
    assert_reported_and_skippable(path, 2, BAD_TURNS[turns])


def test_bytes_that_are_not_utf8_are_reported_with_their_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines_with_bad_row('{"content": "上衣", "summary": "a"}'.encode("gbk")))
    assert_reported_and_skippable(path, 3, '"content" is not valid UTF-8 text (\\udcc9); save the file as UTF-8')


def test_a_bad_row_of_an_array_is_reported_with_its_line(tmp_path):
    path = tmp_path / "data.json"
    path.write_text('[{"content": "q", "summary": "a"},\n  5, \n{"content": "q", "summary": "a"}]')
    assert_reported_and_skippable(path, 2, "the row is a number, not an object")


def test_all_bad_rows_of_all_files_are_counted_and_the_first_ones_shown(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", [GOOD, *[{"instruction": "q"}] * 15])
    second = write_lines(tmp_path / "b.jsonl", [GOOD, *[{"content": "q"}] * 15])
    with pytest.raises(UserError) as raised:
        read_records([first, second])
    lines = str(raised.value).splitlines()
    assert lines[0] == f'{first}:2: "output" is missing'
    assert lines[SHOWN_PROBLEMS - 1] == f'{second}:6: "summary" is missing'
    assert lines[SHOWN_PROBLEMS].startswith(f"30 bad rows in all, the first {SHOWN_PROBLEMS} shown above. Mend them")
    assert read_records([first, second], skip_bad_rows=True).skipped == 30


def test_nothing_but_bad_rows_is_an_error_even_when_they_are_skipped(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"instruction": "q"}])
    with pytest.raises(UserError, match="no usable row was found"):
        read_records([path], skip_bad_rows=True)


LINES = (json.dumps(GOOD) + "\n").encode() * 2000
BROKEN_FILES = {
    "empty": (b"", ":1: the file is empty"),
    "blank": (b"\n \n", ":1: the file is empty"),
    "empty gzip": (gzip.compress(b""), ":1: the file is empty"),
    "empty array": (b"\n[ ]", ":2: the array holds no rows"),
    "utf-16": ('{"content": "q", "summary": "a"}'.encode("utf-16"), ":1: the file is UTF-16; save it as UTF-8"),
    "cut gzip": (gzip.compress(os.urandom(9000).hex().encode())[:500], "the gzip data is damaged or cut off here"),
    "damaged gzip": (gzip.compress(LINES)[:-6] + b"\0" * 6, ":2001: the gzip data is damaged or cut off here"),
    "broken array": (b'[{"content": "q",\n"summary": "a"},\n{"content"\n"q"}]', ":4: not JSON: Expecting ':'"),
    "array, no comma": (b'[{"content": "q", "summary": "a"}\n\n{"content": 1}]', ":3: not JSON: no comma or ]"),
    "array, no end": (b'[{"content": "q", "summary": "a"}\n', ":2: not JSON: no comma or ] after this row"),
    "array, comma at the end": (b'[{"content": "q", "summary": "a"},\n]', ":2: not JSON: Expecting value"),
    "text after the array": (b'[{"content": "q", "summary": "a"}]\n[]', ":2: not JSON: more text after the array"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_file_that_breaks_off_is_an_error_that_skipping_does_not_hide(tmp_path, name):
    data, expected = BROKEN_FILES[name]
    path = tmp_path / "data.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as raised:
        read_records([path], skip_bad_rows=True)
    assert expected in str(raised.value)
    assert "--skip_bad_rows cannot help" in str(raised.value)


def test_a_missing_file_and_a_folder_are_refused_before_any_row_is_read(tmp_path):
    bad = write_lines(tmp_path / "bad.jsonl", [{}])
    with pytest.raises(UserError, match=r"missing\.json: there is no such file"):
        read_records([bad, tmp_path / "missing.json"])
    with pytest.raises(UserError, match="this is a folder, not a file"):
        read_records([bad, tmp_path])


def test_a_prompt_without_its_answer_is_taken_where_none_is_needed(tmp_path):
    rows = [
        {"content": "a"},
        {"instruction": "b", "input": "c", "output": ""},
        {"prompt": "d", "response": None, "history": [["e", "f"]]},
        {"messages": [{"role": "user", "content": "g"}]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = read_records([path], needs_answers=False).examples
    assert [(example.query, example.answer) for example in found] == [("a", ""), ("b\nc", ""), ("d", ""), ("g", "")]
    with pytest.raises(UserError, match="4 bad rows in all"):
        read_records([path])


@pytest.mark.parametrize("text", ['{"content": 1}', '[{"content": "q", "summary": "a"}'])
def test_only_commands_that_have_the_flag_recommend_to_skip(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"1 bad row in all\. Mend the") as raised:
        read_records([path])
    assert "skip_bad_rows" not in str(raised.value)
    with pytest.raises(UserError, match="--skip_bad_rows"):
        read_records([path], skip_bad_rows=False)
