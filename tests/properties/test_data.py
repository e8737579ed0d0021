"""Any text and any JSON as training data: rows, or one UserError that names the places."""

import gzip
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatglm_tuning.data.collate import PrefixLMCollator
from chatglm_tuning.data.dataset import build_dataset
from chatglm_tuning.data.encode import IGNORED_LABEL, EncodingSettings, encode_examples
from chatglm_tuning.data.records import Example, examples_of_row, read_records
from chatglm_tuning.errors import UserError
from chatglm_tuning.model.tokenization import ChatGLMTokenizer
from tests.model_folder import EMBEDDED
from tests.properties.texts import examples, json_values, texts

# A name is known, a value is nearly right: such rows reach further than any JSON.
_VALUES = st.one_of(texts, json_values, st.just("a"))
_KEYS = ("instruction", "input", "output", "prompt", "response", "content", "summary", "system")
_FLAT = st.dictionaries(st.sampled_from(_KEYS), _VALUES, min_size=1, max_size=5)
_PAIRS = st.lists(st.one_of(st.lists(texts, min_size=2, max_size=2), json_values), max_size=3)
_ROLES = st.one_of(st.sampled_from(["user", "assistant", "system", "human", "gpt", "Bot"]), json_values)
_TURN_KEYS = st.sampled_from(["role", "content", "from", "value"])
_TURNS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": _ROLES, "content": _VALUES}),
        st.fixed_dictionaries({"from": _ROLES, "value": _VALUES}),
        st.dictionaries(_TURN_KEYS, _VALUES),
        json_values,
    ),
    max_size=5,
)
_GOOD = st.fixed_dictionaries({"content": st.just("问"), "summary": texts.map(lambda text: f"a{text}")})
rows = st.one_of(
    _FLAT,
    _GOOD,
    st.builds(lambda row, pairs: {**row, "history": pairs}, _FLAT, st.one_of(_PAIRS, json_values)),
    st.builds(lambda key, turns: {key: turns}, st.sampled_from(["messages", "conversations"]), _TURNS),
    json_values,
)
_TOKENIZER = ChatGLMTokenizer.from_pretrained(EMBEDDED)


def written(values: list, form: str) -> bytes:
    """The bytes of a data file; surrogates come out as they are where `form` is raw."""
    dumped = [
        json.dumps(value, ensure_ascii="raw" not in form, indent=1 if "pretty" in form else None) for value in values
    ]
    text = f"[{','.join(dumped)}]" if "array" in form else "\n".join(dumped)
    data = text.encode("utf-8", "surrogatepass" if "pass" in form else "backslashreplace")
    return gzip.compress(data) if "gz" in form else data


FORMS = st.sampled_from(["lines", "lines raw", "lines raw pass", "lines gz", "array", "array pretty", "array raw gz"])


def check_refusal(error: UserError, file) -> None:
    """Every line of a report but the last names a place in the file."""
    assert error.remedy
    if error.where is not None:
        assert error.where == str(file)
        return
    *places, total = error.what.splitlines()
    assert re.search(r"\d+ bad rows? in all", total)
    assert places
    assert all(re.match(rf"{re.escape(str(file))}:\d+: .", place) for place in places), error.what


def check_encoded(example: Example, settings: EncodingSettings, row) -> None:
    start = row.input_ids.index(_TOKENIZER.bos_token_id)
    assert row.input_ids[start - 1] == _TOKENIZER.gmask_token_id
    assert row.labels == [IGNORED_LABEL] * start + row.input_ids[start:]
    assert start <= settings.max_input_length
    assert len(row.input_ids) - start <= settings.max_output_length
    answer = _TOKENIZER.encode_text(example.answer)
    ending = [] if row.is_answer_cut else [_TOKENIZER.eos_token_id]
    assert row.input_ids[start + 1 :] == answer[: settings.answer_room] + ending
    inside = row.input_ids[: start - 1] + row.input_ids[start + 1 : len(row.input_ids) - len(ending)]
    assert not any(_TOKENIZER.sp_model.is_control(i) for i in inside)


@given(values=st.lists(rows, max_size=5), form=FORMS, skips=st.booleans(), limits=st.tuples(*[st.integers(4, 40)] * 2))
@examples(500)
def test_any_json_is_rows_or_one_refusal(tmp_path_factory, values, form, skips, limits):
    file = tmp_path_factory.getbasetemp() / "rows"
    file.write_bytes(written(values, form))
    try:
        read = read_records([file], skip_bad_rows=skips)
    except UserError as error:
        check_refusal(error, file)
        return
    assert len(read.examples) + read.skipped >= len(values) > 0
    settings = EncodingSettings(*limits)
    encoded = encode_examples(read.examples, _TOKENIZER, settings)
    for example, row in zip(read.examples, encoded, strict=True):
        check_encoded(example, settings, row)
    batch = PrefixLMCollator(_TOKENIZER.pad_token_id)([{"input_ids": r.input_ids, "labels": r.labels} for r in encoded])
    for index, row in enumerate(encoded):
        assert int(batch["attention_mask"][index].sum()) == len(row.input_ids)
        assert (
            batch["labels"][index][batch["labels"][index] != IGNORED_LABEL].tolist()
            == row.labels[row.labels.index(_TOKENIZER.bos_token_id) :]
        )


@given(
    data=st.binary(max_size=200), start=st.sampled_from([b"", b"[", b'{"content": "', b"\x1f\x8b\x08\0\0\0\0\0\0\3"])
)
@examples(300)
def test_any_bytes_are_rows_or_one_refusal(tmp_path_factory, data, start):
    file = tmp_path_factory.getbasetemp() / "bytes"
    file.write_bytes(start + data)
    try:
        read_records([file])
    except UserError as error:
        check_refusal(error, file)


@given(row=rows)
@examples(500)
def test_any_row_is_examples_or_one_reason(row):
    try:
        _, found = examples_of_row(row, "file:1")
    except ValueError as error:
        reason = str(error)
        assert reason
        assert len(reason) < 400
        reason.encode("utf-8")
        return
    for example in found:
        for text in (example.query, example.answer, *(text for pair in example.history for text in pair)):
            text.encode("utf-8")
            assert "\0" not in text


@given(answers=st.lists(texts, min_size=1, max_size=4))
@examples(15)
def test_the_whole_of_the_preparation_takes_what_the_reader_takes(tmp_path_factory, answers):
    """With its cache, its look at the texts, and Arrow in between."""
    base = tmp_path_factory.getbasetemp()
    file = base / "whole"
    file.write_bytes(written([{"content": f"q{answer}", "summary": answer} for answer in answers], "lines"))
    settings = EncodingSettings(16, 16)
    try:
        read = read_records([file])
    except UserError:
        with pytest.raises(UserError):
            build_dataset([file], _TOKENIZER, settings, cache_dir=base / "cache")
        return
    built = build_dataset([file], _TOKENIZER, settings, cache_dir=base / "cache")
    expected = encode_examples(read.examples, _TOKENIZER, settings)
    assert [row["labels"] for row in built.dataset] == [row.labels for row in expected]
