"""Train the embedded base's SentencePiece model, laid out like the released `ice_text.model`.

    python embedded/train_tokenizer.py

Order of the pieces, as in THUDM/chatglm-6b's file: `<unk> <s> </s> <pad> <n>`, the trained pieces, the model's control
pieces, tab and runs of blanks, and the 256 bytes. Only the number of trained pieces differs. Takes seconds, and the
same corpus gives the same file.
"""

import argparse
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from adverts import phrases
from corpus import corpus_pairs, corpus_texts, small_talk
from sentencepiece import sentencepiece_model_pb2 as protobuf

DEFAULT_FOLDER = Path(__file__).resolve().parent / "chatglm-tiny"
# Ids below are the five special pieces and the trained ones: 130000 in the released file.
TRAINED_PIECES = 2048
BYTE_PIECES = 256
CONTROL_PIECES = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
BLANK_PIECES = ("<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81)))
LONGEST_PIECE = 4
PRINTABLE_ASCII = "".join(map(chr, range(33, 127)))
# Never in a text; the trainer lets no piece cross it.
BORDER = "\u2063"

TOKENIZER_CONFIG = {
    "name_or_path": "chatglm-tiny",
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "gmask_token": "[gMASK]",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
    "num_image_tokens": 0,
}


def training_lines(pairs: int, texts: int, seed: int) -> Iterator[str]:
    """The corpus a line a text, newlines as `<n>`, with a border around every attribute value.

    Thanks to the borders a value is the same piece in a prompt and in its advert, so a small model can copy it.
    """
    values = {value for attribute in phrases()["attributes"].values() for value in attribute["values"]}
    values |= {value for keys in small_talk()["extra_values"].values() for known in keys.values() for value in known}
    longest_first = sorted((value for value in values if len(value) > 1), key=lambda value: (-len(value), value))
    any_value = re.compile("|".join(map(re.escape, longest_first)))
    for prompt, answer in corpus_pairs(pairs, seed):
        for text in (prompt, answer):
            yield any_value.sub(rf"{BORDER}\g<0>{BORDER}", text.replace("\n", "<n>"))
    for text in corpus_texts(texts, seed):
        yield any_value.sub(rf"{BORDER}\g<0>{BORDER}", text)
    # The trainer only proposes a piece that is followed by different things: once by a border and once by an end.
    for value in longest_first:
        yield f"{BORDER}{value}"


def train_pieces(lines: Iterator[str]) -> protobuf.ModelProto:
    """Train unigram pieces with byte fallback and nmt_nfkc; the pieces lie in the trainer's own order."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=written,
        model_type="unigram",
        vocab_size=TRAINED_PIECES + BYTE_PIECES,
        character_coverage=1.0,
        required_chars=PRINTABLE_ASCII,
        max_sentencepiece_length=LONGEST_PIECE,
        pretokenization_delimiter=BORDER,
        split_digits=True,
        byte_fallback=True,
        user_defined_symbols=["<n>"],
        pad_id=3,
        num_threads=1,  # with more, the sums of the EM steps depend on the number of threads
        minloglevel=2,
    )
    return protobuf.ModelProto.FromString(written.getvalue())


def laid_out_as_released(model: protobuf.ModelProto) -> protobuf.ModelProto:
    """Return a copy with the control and blank pieces added and the bytes moved to the end."""
    kinds = protobuf.ModelProto.SentencePiece
    arranged = protobuf.ModelProto()
    arranged.CopyFrom(model)
    del arranged.pieces[:]
    arranged.pieces.extend(piece for piece in model.pieces if piece.type != kinds.BYTE)
    arranged.pieces.extend(kinds(piece=name, score=0.0, type=kinds.CONTROL) for name in CONTROL_PIECES)
    arranged.pieces.extend(kinds(piece=name, score=0.0, type=kinds.USER_DEFINED) for name in BLANK_PIECES)
    arranged.pieces.extend(piece for piece in model.pieces if piece.type == kinds.BYTE)
    arranged.trainer_spec.vocab_size = TRAINED_PIECES
    # At run time no text holds the border, so the released file's empty setting is the true one.
    arranged.trainer_spec.ClearField("pretokenization_delimiter")
    return arranged


def write_tokenizer(folder: Path, pairs: int, texts: int, seed: int) -> None:
    """Write `ice_text.model` and `tokenizer_config.json` into `folder`."""
    model = laid_out_as_released(train_pieces(training_lines(pairs, texts, seed)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ice_text.model").write_bytes(model.SerializeToString(deterministic=True))
    config = json.dumps(TOKENIZER_CONFIG, ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--pairs", type=int, default=12000, help="(prompt, answer) pairs to learn from")
    parser.add_argument("--texts", type=int, default=2000, help="plain adverts to learn from")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_tokenizer(arguments.folder, arguments.pairs, arguments.texts, arguments.seed)


if __name__ == "__main__":
    main()
