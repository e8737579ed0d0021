"""What holds of the tokenizer for every text."""

import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatglm_tuning.model.tokenization import ChatGLMTokenizer, IncrementalDecoder
from tests.conftest import shared_folder
from tests.model_folder import EMBEDDED
from tests.properties.texts import CONTROLS, examples, texts


@cache
def load(folder: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.fixture(params=["embedded", "released"], scope="module")
def tokenizer(request) -> ChatGLMTokenizer:
    return load(EMBEDDED if request.param == "embedded" else shared_folder() / "chatglm-6b")


def normalised(tokenizer: ChatGLMTokenizer, text: str) -> str:
    """The text as the model reads it.

    Half a surrogate pair is U+FFFD; newlines, tabs and runs of spaces are stand-ins; then SentencePiece's own rule
    (nmt_nfkc: NFKC, no control and no zero-width characters, one space for any other whitespace, none at the ends,
    where only the stand-ins count as characters); and stand-ins are whitespace again, also those the user typed.
    """
    whole = "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    read = tokenizer.sp_model.normalize(tokenizer.stand_ins.insert(whole))
    return tokenizer.stand_ins.restore(read.replace("▁", " ").removeprefix(" "))


@given(text=texts)
@examples(300)
def test_a_text_comes_back_as_it_is_read(tokenizer, text):
    """The law of encode and decode: nothing is lost or changed but by `normalised`."""
    assert tokenizer.decode(tokenizer.encode_text(text)) == normalised(tokenizer, text)


@given(text=st.text("abcXYZ09äÅ白色衣裙ＡＢ０９ﬁ①㎏，。！？：,.", min_size=1, max_size=30))
@examples(200)
def test_letters_and_signs_come_back_in_their_compatible_form(tokenizer, text):
    """The same law without SentencePiece's help, where it says only: NFKC."""
    assert tokenizer.decode(tokenizer.encode_text(text)) == unicodedata.normalize("NFKC", text)


@given(text=st.text("ab白色\n\t ", max_size=40))
@examples(200)
def test_whitespace_inside_a_text_is_kept(tokenizer, text):
    inside = f"a{text}b"
    assert tokenizer.decode(tokenizer.encode_text(inside)) == inside


@given(text=texts)
@examples(300)
def test_no_text_becomes_a_control_token(tokenizer, text):
    model = tokenizer.sp_model
    ids = tokenizer.encode_text(text)
    assert not any(model.is_control(i) or model.is_unknown(i) or model.is_unused(i) for i in ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert not set(ids) & {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.gmask_token_id}


@given(text=texts)
@examples(200)
def test_called_like_any_tokenizer_it_never_raises(tokenizer, text):
    """Then a written special token is one: that is what the released tokenizer did, and nothing of ours calls it so."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    controls = {i for i in ids if tokenizer.sp_model.is_control(i)}
    assert controls <= {tokenizer.convert_tokens_to_ids(literal) for literal in CONTROLS if literal in text}
    assert isinstance(tokenizer.decode(ids), str)


@given(batch=st.lists(texts, max_size=5))
@examples(60)
def test_many_texts_are_encoded_as_one_by_one(tokenizer, batch):
    assert tokenizer.encode_texts(batch) == [tokenizer.encode_text(text) for text in batch]


@given(data=st.data())
@examples(300)
def test_decoding_a_token_at_a_time_gives_the_same_text(tokenizer, data):
    """For any ids, those that are no pieces among them."""
    near = st.sampled_from(range(tokenizer.vocab_size - 260, tokenizer.vocab_size + 5))
    anything = st.one_of(st.integers(-2, tokenizer.vocab_size + 10), near)
    written = texts.map(tokenizer.encode_text)
    # A stand-in that comes in pieces: `<n>` of the model is one.
    pieces = ["▁", "<", "n", ">", "<n>", "|", "tab", "<|", "|>", "_", "2", "blank", "<|tab|>"]
    parts = st.lists(st.sampled_from([*map(tokenizer.sp_model.piece_to_id, pieces)]), max_size=8)
    typed = st.sampled_from(["<n>", "<|tab|>", "<|blank_2|>", "<<n>"]).map(
        lambda text: [tokenizer.sp_model.piece_to_id(character) for character in text]
    )
    ids = [
        i
        for part in data.draw(st.lists(st.one_of(written, parts, typed, st.lists(anything, max_size=6)), max_size=5))
        for i in part
    ]
    decoder = IncrementalDecoder(tokenizer)
    streamed = "".join(decoder.push(i) for i in ids) + decoder.flush()
    assert streamed == tokenizer.decode(ids, skip_special_tokens=True)
    streamed.encode("utf-8")  # no half of a pair ever comes out
