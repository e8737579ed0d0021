"""The embedded tokenizer: laid out like the released one, the same each time, and at home in the corpus."""

import json
from itertools import groupby, islice

import adverts
import pytest
from corpus import corpus_pairs, corpus_texts
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as protobuf
from train_tokenizer import DEFAULT_FOLDER, TRAINED_PIECES, write_tokenizer


def parse(path) -> protobuf.ModelProto:
    return protobuf.ModelProto.FromString(path.read_bytes())


@pytest.fixture(scope="module")
def model() -> protobuf.ModelProto:
    return parse(DEFAULT_FOLDER / "ice_text.model")


@pytest.fixture(scope="module")
def processor() -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(DEFAULT_FOLDER / "ice_text.model"))


def layout(model: protobuf.ModelProto) -> list[tuple[int, list[str]]]:
    """Runs of pieces of one type, with the names of all but the trained ones."""
    normal = protobuf.ModelProto.SentencePiece.NORMAL
    runs = [(kind, [piece.piece for piece in run]) for kind, run in groupby(model.pieces, lambda piece: piece.type)]
    return [(kind, [] if kind == normal else names) for kind, names in runs]


def test_training_again_gives_the_committed_files(tmp_path):
    write_tokenizer(tmp_path, pairs=12000, texts=2000, seed=0)
    for name in ("ice_text.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (DEFAULT_FOLDER / name).read_bytes()


def test_the_layout_is_that_of_the_released_model(model, shared):
    released = parse(shared / "chatglm-6b" / "ice_text.model")
    assert layout(model) == layout(released)
    for field in ("name", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        assert getattr(model.normalizer_spec, field) == getattr(released.normalizer_spec, field), field
    for field in ("model_type", "byte_fallback", "split_digits", "user_defined_symbols", "unk_id", "pad_id"):
        assert getattr(model.trainer_spec, field) == getattr(released.trainer_spec, field), field


def test_the_config_says_what_the_released_one_says(shared):
    ours = json.loads((DEFAULT_FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    released = json.loads((shared / "chatglm-6b" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert {key: released[key] for key in ours if key != "name_or_path"} == {
        key: value for key, value in ours.items() if key != "name_or_path"
    }
    assert set(released) - set(ours) == {"auto_map"}


def test_special_ids_stand_where_the_layout_puts_them(processor):
    names = ["<unk>", "<s>", "</s>", "<pad>", "<n>"]
    assert [processor.piece_to_id(name) for name in names] == [0, 1, 2, 3, 4]
    names = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>", "<|tab|>"]
    assert [processor.piece_to_id(name) for name in names] == list(range(TRAINED_PIECES, TRAINED_PIECES + 9))
    assert processor.piece_to_id("<0xFF>") == processor.get_piece_size() - 1


def test_fewer_than_one_piece_in_a_hundred_is_a_byte_or_unknown(processor):
    # Another seed than the one it was trained on.
    lines = [text for pair in corpus_pairs(1500, seed=11) for text in pair] + list(corpus_texts(300, seed=11))
    pieces = [piece for line in lines for piece in processor.encode(line.replace("\n", "<n>"))]
    strange = sum(processor.is_byte(piece) or processor.is_unknown(piece) for piece in pieces)
    assert strange / len(pieces) < 0.01


def test_an_attribute_value_is_the_same_piece_in_prompt_and_advert(processor):
    rows = adverts.generate_adverts(200, seed=9)
    shared_pieces = total = 0
    for row in rows:
        prompt = processor.encode(row["content"], out_type=str)
        advert = processor.encode(row["summary"], out_type=str)
        for _, value in adverts.attributes_of(row["content"])[1]:
            if len(value) > 1:
                total += 1
                shared_pieces += value in prompt and value in advert
    assert shared_pieces / total > 0.9


def test_text_outside_the_corpus_survives_as_bytes(processor):
    for text in ("囍龘", "Hello, world 42", "안녕하세요"):
        assert processor.decode(processor.encode(text)) == text


def test_no_piece_holds_the_border_or_a_newline(model):
    assert not [piece.piece for piece in islice(model.pieces, TRAINED_PIECES) if "\u2063" in piece.piece]
