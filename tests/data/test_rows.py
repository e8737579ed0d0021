"""Rows of an array are read a piece at a time: the same rows, lines and columns wherever the pieces end."""

import json
import random

import pytest

import chatglm_tuning.data.rows as rows_module
from chatglm_tuning.data.rows import BadRows, iterate_rows

VALUES = [
    {"content": "问\u2028é😀" * 3, "summary": "a\n"},
    12345,
    -1.5e-7,
    1e300,
    None,
    True,
    'ab\\"',
    [1, [2]],
    {},
    "😀",
]


@pytest.fixture(params=[1, 2, 3, 7, 64])
def small_pieces(request, monkeypatch):
    monkeypatch.setattr(rows_module, "_CHUNK_BYTES", request.param)


def read(path, data: bytes):
    path.write_bytes(data)
    bad_rows = BadRows()
    return list(iterate_rows(path, bad_rows)), [place.removeprefix(f"{path}:") for place in bad_rows.shown]


@pytest.mark.usefixtures("small_pieces")
def test_an_array_in_pieces_is_the_same_array(tmp_path):
    rng = random.Random(0)
    for _ in range(60):
        values = rng.choices(VALUES, k=rng.randrange(1, 12))
        text = json.dumps(values, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
        found, bad = read(tmp_path / "rows", f"\n{text}\n ".replace("[", "[\n", 1).encode())
        assert bad == []
        assert [value for _, value in found] == values


@pytest.mark.usefixtures("small_pieces")
def test_lines_are_those_of_the_file(tmp_path):
    found, bad = read(tmp_path / "rows", b'\n[\n  {"a":\n 1},\n\n 2, "x\xc3\xa9",\n 3 ]')
    assert found == [(3, {"a": 1}), (6, 2), (6, "xé"), (7, 3)]
    assert bad == []


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("data", "rows", "place"),
    [
        (b'[{"a": 1},\n {"b" 2}]', 1, "2: not JSON: Expecting ':' delimiter (column 7)"),
        (b'[ {"a": 1}, {"b" 2}]', 1, "1: not JSON: Expecting ':' delimiter (column 18)"),
        (b'[\n\n"abc', 0, "3: not JSON: Unterminated string starting at (column 1)"),
        (b"[1,\n2,\n tru]", 2, "3: not JSON: Expecting value (column 2)"),
        (b"[1,\n2\n3]", 2, "3: not JSON: no comma or ] after this row"),
        (b"[1]\n\n x", 1, "3: not JSON: more text after the array"),
        (b"[1e5, 1e+5, 12e, 3]", 3, "1: not JSON: no comma or ] after this row"),
        (b'["\xe4\xbd", "\xe4"', 2, "1: not JSON: no comma or ] after this row"),
    ],
)
def test_a_broken_place_is_named_with_line_and_column(data, rows, place, tmp_path):
    found, bad = read(tmp_path / "rows", data)
    assert len(found) == rows
    assert len(bad) == 1
    assert bad[0].startswith(place)
