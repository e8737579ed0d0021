"""The tokenizer against the released one (golden values), and on a small SentencePiece model of the same layout."""

import copy
import hashlib
import json
import pickle
import random
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch

from chatglm_tuning.errors import UserError
from chatglm_tuning.model.tokenization import ChatGLMTokenizer, IncrementalDecoder

MODEL_VOCABULARY = 130528  # rows of the released model's embedding; the tokenizer has fewer pieces
CONTROLS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
LITERALS = [*CONTROLS, "<pad>", "<unk>", "<s>", "</s>"]
STAND_INS = ["<n>", "<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]


@pytest.fixture(scope="session")
def released_folder(shared: Path) -> Path:
    return shared / "chatglm-6b"


@pytest.fixture(scope="session")
def tokenizer(released_folder: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer.from_pretrained(released_folder)


@pytest.fixture(scope="session")
def fixtures(golden) -> dict:
    return golden.json("tokenizer")


@pytest.fixture(scope="session")
def strings(fixtures) -> list[dict]:
    return fixtures["strings"]


def train_sentencepiece(folder: Path, *, controls: list[str], stand_ins: list[str], vocabulary: int = 600) -> Path:
    """Write `ice_text.model`, trained on a few sentences, into `folder`."""
    lines = [f"第{i}件白色的针织外套，搭配简约的牛仔裤和连衣裙。 A soft knitted jacket number {i}." for i in range(200)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "ice_text"),
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        pad_id=3,
        control_symbols=controls,
        user_defined_symbols=stand_ins,
        minloglevel=2,
        num_threads=1,
    )
    return folder / "ice_text.model"


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> ChatGLMTokenizer:
    folder = tmp_path_factory.mktemp("small")
    train_sentencepiece(folder, controls=CONTROLS, stand_ins=STAND_INS[:20])
    return ChatGLMTokenizer.from_pretrained(folder)


# --- Golden values of the released tokenizer ---


def test_attributes_are_the_released_ones(tokenizer, fixtures):
    expected = dict(fixtures["attributes"])
    found = {name: getattr(tokenizer, name) for name in expected}
    assert found == expected
    assert tokenizer.num_image_tokens == 0
    assert len(tokenizer) == tokenizer.vocab_size


def test_tokens_and_ids_are_the_released_ones(tokenizer, fixtures):
    for token, token_id in fixtures["special_token_to_id"].items():
        assert tokenizer.convert_tokens_to_ids(token) == token_id, token
    for token_id, token in fixtures["id_to_token"].items():
        assert tokenizer.convert_ids_to_tokens(int(token_id)) == token, token_id


def test_all_pieces_are_the_released_ones(tokenizer, fixtures):
    pieces = tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))
    digest = hashlib.sha256("\n".join(pieces).encode()).hexdigest()
    assert digest == fixtures["sp_pieces_newline_joined_sha256"]
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[piece] for piece in pieces] == list(range(tokenizer.vocab_size))


def test_every_string_encodes_as_released(tokenizer, strings):
    for row in strings:
        text = row["text"]
        assert tokenizer.encode(text, add_special_tokens=False) == row["ids_no_special"], text
        assert tokenizer.encode(text) == row["ids_special"], text
        assert row["tokens"] in (None, tokenizer.tokenize(text)), text  # left out of long rows
        assert tokenizer.encode_text(text) == row["sp_ids"], text


def test_every_string_decodes_as_released(tokenizer, strings):
    for row in strings:
        text, ids = row["text"], row["ids_no_special"]
        assert tokenizer.decode(ids) == row["decode"], text
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["decode_skip_special"], text
        assert tokenizer.decode(row["ids_special"]) == row["decode_with_special"], text
        assert tokenizer.decode(row["sp_ids"]) == row["sp_decode"], text
        assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) == row["decode"], text


def test_pairs_are_the_released_ones(tokenizer, fixtures):
    for pair in fixtures["pairs"]:
        a_ids = tokenizer.encode(pair["a"], add_special_tokens=False)
        b_ids = tokenizer.encode(pair["b"], add_special_tokens=False)
        assert (a_ids, b_ids) == (pair["a_ids"], pair["b_ids"])
        assert tokenizer.build_inputs_with_special_tokens(a_ids, b_ids) == pair["build"]
        assert tokenizer.build_inputs_with_special_tokens(a_ids) == pair["build_single"]
        assert tokenizer(pair["a"], pair["b"])["input_ids"] == pair["encode_pair"]


def preprocess_as_the_original(tokenizer, example: dict, max_input_length: int, max_output_length: int) -> dict:
    """Build one training row as the original's scripts did, with calls of the tokenizer alone."""
    instruction = example["instruction"]
    if (example.get("input") or "").strip():
        instruction = instruction + "\n" + example["input"]
    question = tokenizer.encode(instruction, add_special_tokens=False)[: max_input_length - 1]
    answer = tokenizer.encode(example["output"], add_special_tokens=False)[: max_output_length - 2]
    input_ids = tokenizer.build_inputs_with_special_tokens(question, answer)
    prompt = input_ids.index(tokenizer.bos_token_id)
    return {"input_ids": input_ids, "labels": [-100] * prompt + input_ids[prompt:]}


def test_training_rows_are_the_original_ones(tokenizer, fixtures):
    for row in fixtures["seed_preprocess"]:
        built = preprocess_as_the_original(tokenizer, row["example"], row["max_input_length"], row["max_output_length"])
        assert built == {"input_ids": row["input_ids"], "labels": row["labels"]}, row["example"]


def test_a_batch_is_padded_on_the_left(tokenizer, fixtures):
    batch = fixtures["left_padded_batch"]
    encoded = tokenizer(batch["texts"], padding=True, return_tensors="pt")
    expected = torch.tensor(batch["input_ids"])
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert torch.equal(encoded["input_ids"], expected)
    assert torch.equal(encoded["attention_mask"], (expected != tokenizer.pad_token_id).long())


def test_mask_prompts_are_the_released_ones(tokenizer, fixtures):
    prompts = fixtures["mask_prompt"]
    assert tokenizer(prompts["texts"])["input_ids"] == prompts["input_ids"]


def test_single_ids_decode_as_released(tokenizer, fixtures):
    for token_id, piece, text in fixtures["single_id_decode"]:
        assert tokenizer.convert_ids_to_tokens(token_id) == piece
        assert tokenizer.decode(token_id) == text, piece
        assert tokenizer.decode([token_id]) == text, piece


# --- A user's words ---


@pytest.mark.parametrize("kind", ["tokenizer", "small"])
def test_literals_in_text_never_become_control_tokens(kind, request):
    tokenizer = request.getfixturevalue(kind)
    model = tokenizer.sp_model
    for literal in LITERALS:
        for text in (literal, f"请解释{literal}的含义", f"{literal}{literal}", f" {literal}\n", f"a {literal} b"):
            ids = tokenizer.encode_text(text)
            assert not any(model.is_control(i) or model.is_unknown(i) for i in ids), text
            assert literal in tokenizer.decode(ids), text
            assert [ids] == tokenizer.encode_texts([text])
    assert tokenizer.encode("<sop>", add_special_tokens=False) == [tokenizer.bos_token_id]


def test_a_stand_in_in_text_is_its_whitespace(tokenizer):
    newline, tab, blanks = (tokenizer.convert_tokens_to_ids(piece) for piece in ("<n>", "<|tab|>", "<|blank_3|>"))
    assert tokenizer.encode_text("a<n>b") == tokenizer.encode_text("a\nb")
    assert newline in tokenizer.encode_text("a\nb")
    assert tokenizer.encode_text("a<|tab|>b") == tokenizer.encode_text("a\tb")
    assert tab in tokenizer.encode_text("a\tb")
    assert tokenizer.encode_text("a<|blank_3|>b") == tokenizer.encode_text("a   b")
    assert blanks in tokenizer.encode_text("a   b")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_many_texts_encode_like_one_by_one(tokenizer, strings, num_threads):
    texts = [row["text"] for row in strings]
    assert tokenizer.encode_texts(texts, num_threads=num_threads) == [row["sp_ids"] for row in strings]
    assert tokenizer.encode_texts([], num_threads=num_threads) == []


def test_threads_reach_sentencepiece(small, monkeypatch):
    calls = []
    model = SimpleNamespace(encode=lambda texts, **options: calls.append((texts, options)))
    monkeypatch.setattr(small, "sp_model", model)
    small.encode_texts(["a\tb"], num_threads=3)
    assert calls == [(["a<|tab|>b"], {"num_threads": 3})]


def test_half_of_a_surrogate_pair_is_no_error(small):
    assert small.encode_text("白\ud83d色") == small.encode_text("白\ufffd色")
    assert small.encode_texts(["\udc00"]) == [small.encode_text("\ufffd")]
    assert small.encode("白\ud83d色") == small.encode("白\ufffd色")


def test_special_tokens_swallow_the_whitespace_beside_them(small):
    ids = small.encode("白  [MASK]\n色", add_special_tokens=False)
    assert ids == [*small.encode_text("白"), small.mask_token_id, *small.encode_text("色")]


# --- Decoding whatever a model may produce ---


def test_every_id_of_the_model_decodes(tokenizer):
    texts = tokenizer.batch_decode([[i] for i in range(MODEL_VOCABULARY)])
    assert all(isinstance(text, str) for text in texts)
    assert set(texts[tokenizer.vocab_size :]) == {""}
    assert tokenizer.convert_ids_to_tokens([MODEL_VOCABULARY - 1, 10**9]) == ["", ""]


def test_ids_that_are_no_pieces_leave_no_trace(small):
    ids = small.encode_text("白色的外套")
    noisy = [-100, *ids[:2], small.vocab_size, *ids[2:], 10**9]
    assert small.decode(noisy) == small.decode(ids) == "白色的外套"


def test_padding_leaves_no_trace(small):
    opening, *character = small.encode_text("👋")
    ids = [small.pad_token_id, opening, *character[:2], small.pad_token_id, *character[2:]]
    assert small.decode(ids) == "👋"
    assert small.sp_model.decode(ids) == "\ufffd" * 4


def test_decoding_takes_ids_in_every_form(small):
    ids = small.encode("白色")
    assert small.decode(torch.tensor(ids)) == small.decode(np.array(ids)) == "白色"
    assert small.decode(torch.tensor(small.convert_tokens_to_ids("<n>"))) == "\n"
    assert small.batch_decode(torch.tensor([ids, ids])) == small.batch_decode([ids, ids]) == ["白色", "白色"]
    assert small.decode([]) == ""


def test_unknown_is_shown_unless_special_tokens_are_skipped(small):
    ids = [small.unk_token_id, *small.encode("白色")]
    assert small.decode(ids).startswith(" ⁇ ")
    assert small.decode(ids, skip_special_tokens=True) == "白色"


def test_spaces_are_cleaned_up_only_on_request(small):
    ids = small.encode_text("a soft , jacket")
    assert small.decode(ids) == "a soft , jacket"
    assert small.decode(ids, clean_up_tokenization_spaces=True) == "a soft, jacket"


def test_special_tokens_mask_marks_what_was_added(small):
    ids = small("白色", "外套", return_special_tokens_mask=True)
    special = [i for i, flag in zip(ids["input_ids"], ids["special_tokens_mask"], strict=True) if flag]
    assert special == [small.gmask_token_id, small.bos_token_id, small.eos_token_id]
    single = small("白色", return_special_tokens_mask=True)
    assert single["special_tokens_mask"][-2:] == [1, 1]
    assert sum(single["special_tokens_mask"]) == 2
    marked = small.get_special_tokens_mask([*small.encode_text("白"), small.eos_token_id], None, True)
    assert marked[-1] == 1
    assert sum(marked) == 1


# --- A smaller model, folders, and copies ---


def test_a_smaller_model_has_ids_of_its_own(small):
    assert small.vocab_size < 1000
    special = (small.bos_token_id, small.eos_token_id, small.mask_token_id, small.gmask_token_id, small.end_token_id)
    pieces = ("<sop>", "<eop>", "[MASK]", "[gMASK]", "</s>")
    assert special == tuple(small.sp_model.piece_to_id(piece) for piece in pieces)
    assert small.encode("白色")[-2:] == [small.gmask_token_id, small.bos_token_id]
    # Its longest blank is 19 spaces: longer runs are several pieces, and nothing is lost.
    for length in (2, 19, 20, 38, 81):
        text = "a" + " " * length + "b\n\tc"
        assert small.decode(small.encode_text(text)) == text


def test_save_and_load_change_nothing(tokenizer, released_folder, strings, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert (tmp_path / "ice_text.model").read_bytes() == (released_folder / "ice_text.model").read_bytes()
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("end_token", "gmask_token", "num_image_tokens", "all_special_tokens", "special_tokens_map"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    for row in strings:
        assert loaded.encode(row["text"]) == row["ids_special"]
    loaded.save_pretrained(tmp_path / "again")
    saved = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert saved[0] == saved[1]


def test_other_names_of_tokens_survive_saving(tmp_path):
    model = train_sentencepiece(tmp_path, controls=[*CONTROLS, "[G]", "<end>"], stand_ins=STAND_INS[:5])
    tokenizer = ChatGLMTokenizer(str(model), gmask_token="[G]", end_token="<end>", num_image_tokens=20000)
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = ChatGLMTokenizer.from_pretrained(tmp_path / "saved")
    assert (loaded.gmask_token, loaded.end_token, loaded.num_image_tokens) == ("[G]", "<end>", 20000)
    assert loaded.encode("") == [loaded.sp_model.piece_to_id("[G]"), loaded.bos_token_id]
    assert loaded.end_token_id == loaded.sp_model.piece_to_id("<end>")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_copies_work_like_the_original(small, duplicate):
    text = "白色的 [MASK]  外套\n"
    clone = duplicate(small)
    assert clone.encode(text) == small.encode(text)
    assert clone.decode(clone.encode_text(text)) == small.decode(small.encode_text(text))


def test_loading_builds_no_dictionary_of_the_vocabulary(released_folder, monkeypatch):
    def refuse(self):
        raise AssertionError("get_vocab was called")

    monkeypatch.setattr(ChatGLMTokenizer, "get_vocab", refuse)
    tokenizer = ChatGLMTokenizer.from_pretrained(released_folder)
    assert len(tokenizer) == tokenizer.vocab_size


# --- What a user may get wrong ---


def test_a_folder_without_the_model_is_refused(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    with pytest.raises(UserError, match=r"no ice_text\.model"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", "truncated"])
def test_a_damaged_model_is_refused(content, small, tmp_path):
    if content == "truncated":
        content = Path(small.vocab_file).read_bytes()[:2000]
    (tmp_path / "ice_text.model").write_bytes(content)
    with pytest.raises(UserError, match="no readable SentencePiece model") as caught:
        ChatGLMTokenizer.from_pretrained(tmp_path)
    assert caught.value.where == str(tmp_path / "ice_text.model")


@pytest.mark.parametrize(
    ("controls", "stand_ins", "message"),
    [
        ([c for c in CONTROLS if c != "<sop>"], STAND_INS[:5], "no piece <sop>"),
        ([c for c in CONTROLS if c != "[gMASK]"], STAND_INS[:5], r"\[gMASK\] must be control pieces"),
        ([c for c in CONTROLS if c != "<eop>"], ["<eop>", *STAND_INS[:5]], "<eop> must be control pieces"),
        (CONTROLS, STAND_INS[1:5], "no pieces <n>,"),
        (CONTROLS, STAND_INS[:2], r"no pieces <\|blank_2\|>,"),
    ],
)
def test_a_model_of_another_layout_is_refused(controls, stand_ins, message, tmp_path):
    model = train_sentencepiece(tmp_path, controls=controls, stand_ins=stand_ins)
    with pytest.raises(UserError, match=message) as caught:
        ChatGLMTokenizer.from_pretrained(tmp_path)
    assert caught.value.where == str(model)


@pytest.mark.parametrize("option", ["do_lower_case", "remove_space"])
def test_options_that_the_released_folder_turns_off_are_refused(option, small, tmp_path):
    shutil.copy(small.vocab_file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({option: True}))
    with pytest.raises(UserError, match=f"{option} is true"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_the_vocabulary_is_fixed(small):
    tokenizer = copy.deepcopy(small)
    with pytest.raises(UserError, match="no piece <new>"):
        tokenizer.add_tokens(["<new>"])
    assert tokenizer.add_tokens(["<ENC>"], special_tokens=True) == 0
    assert len(tokenizer) == small.vocab_size


# --- Streaming ---


def stream(tokenizer: ChatGLMTokenizer, ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


def test_streaming_every_string_gives_its_text(tokenizer, strings):
    for row in strings:
        for ids in (row["ids_special"], row["sp_ids"]):
            pieces = stream(tokenizer, ids)
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True), row["text"]
            assert "\ufffd" not in "".join(pieces), row["text"]


@cache
def awkward_ids(tokenizer: ChatGLMTokenizer) -> list[int]:
    """Ids whose text depends on their neighbours: bytes, spaces, parts of stand-ins, control and missing ids."""
    parts = ["▁", "<", "n", ">", "<n>", "|", "tab", "<|", "<|tab|>", "<|blank_3|>", "blank", "_", "2", "|>", *LITERALS]
    pieces = [tokenizer.convert_tokens_to_ids(part) for part in parts]
    return [*pieces, *range(tokenizer.vocab_size - 256, tokenizer.vocab_size), -1, tokenizer.vocab_size + 7]


@pytest.mark.parametrize("seed", range(4))
def test_streaming_random_ids_gives_the_decoded_text(tokenizer, seed):
    rng = random.Random(seed)
    bytes_of_characters = [tokenizer.encode_text(c)[1:] for c in "👋𠮷龘\ue000"]
    for _ in range(700):
        ids, length = [], rng.randrange(1, 24)
        while len(ids) < length:
            kind = rng.randrange(4)
            if kind == 0:
                ids.append(rng.randrange(MODEL_VOCABULARY))
            elif kind == 1:
                character = rng.choice(bytes_of_characters)
                ids += character[: rng.randrange(1, len(character) + 1)]
            elif kind == 2:
                ids += [rng.choice(awkward_ids(tokenizer)[:14]) for _ in range(rng.randrange(1, 5))]
            else:
                ids.append(rng.choice(awkward_ids(tokenizer)))
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True), ids


def test_streaming_typed_stand_ins_in_pieces(tokenizer):
    lengths = {}
    for pieces in (["<", "n", ">"], ["<", "|", "tab", "|", ">"], ["<", "n", "x"], ["<", "<", "n", ">"], ["<"]):
        ids = [tokenizer.convert_tokens_to_ids(piece) for piece in ["▁a", *pieces]]
        streamed = stream(tokenizer, ids)
        assert "".join(streamed) == tokenizer.decode(ids)
        lengths["".join(pieces)] = streamed
    assert "".join(lengths["<n>"]) == "a\n"
    assert lengths["<"] == ["a", "", "<"]


def test_streaming_gives_out_whole_characters_at_once(tokenizer):
    ids = tokenizer.encode_text("你好👋！")
    assert stream(tokenizer, ids) == ["", "你好", "", "", "", "👋", "!", ""]
    cut = ids[: ids.index(tokenizer.sp_model.piece_to_id("!")) - 1]
    assert stream(tokenizer, cut)[-1] == "\ufffd" * 3


def test_streaming_does_not_hold_back_plain_text(tokenizer):
    ids = tokenizer.encode_text("the quick brown fox\njumps over")
    texts = [tokenizer.decode(ids[:length]) for length in range(len(ids) + 1)]
    new = [after.removeprefix(before) for before, after in pairwise(texts)]
    assert stream(tokenizer, ids) == [*new, ""]


def test_a_flushed_decoder_starts_anew(small):
    decoder = IncrementalDecoder(small)
    ids = small.encode_text("a 白 b")
    for _ in range(2):
        text = "".join([decoder.push(torch.tensor(i)) for i in ids]) + decoder.flush()
        assert text == "a 白 b"
