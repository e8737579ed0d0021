"""The tokenizer of ChatGLM-6B over its SentencePiece model, and its streaming decoder.

Behaviour follows THUDM/chatglm-6b, tokenization_chatglm.py (revision 8b7d335) under transformers 4.28; every id is
read from the pieces of the SentencePiece model, so a smaller model of the same layout works as well.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import count, takewhile

import sentencepiece
from transformers import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from chatglm_tuning.errors import UserError

VOCAB_FILES_NAMES = {"vocab_file": "ice_text.model"}

_NEWLINE = "<n>"
_TAB = "<|tab|>"
_STAND_IN = re.compile(r"<(?:n|\|tab\||\|blank_\d+\|)>")
# JSON may hold half of a surrogate pair, which is no character: SentencePiece refuses such a string.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"
_USE_RELEASED_FILE = "use the ice_text.model that was released with the model"


def _has_piece(sp_model: sentencepiece.SentencePieceProcessor, piece: str) -> bool:
    return sp_model.id_to_piece(sp_model.piece_to_id(piece)) == piece


class WhitespaceStandIns:
    """The pieces that stand for newline, tab and runs of spaces, which SentencePiece would normalise away.

    Raises UserError when the SentencePiece model lacks the pieces; `where` names its file.
    """

    def __init__(self, sp_model: sentencepiece.SentencePieceProcessor, where: str) -> None:
        blanks = takewhile(lambda k: _has_piece(sp_model, f"<|blank_{k}|>"), count(2))
        self._whitespace = {_NEWLINE: "\n", _TAB: "\t"} | {f"<|blank_{k}|>": " " * k for k in blanks}
        missing = [piece for piece in (_NEWLINE, _TAB, "<|blank_2|>") if not _has_piece(sp_model, piece)]
        if missing:
            raise UserError(
                f"the SentencePiece model has no pieces {', '.join(missing)}, which ChatGLM-6B writes whitespace with",
                code="M111",
                remedy=_USE_RELEASED_FILE,
                where=where,
            )
        self._blank_run = re.compile(f" {{2,{len(self._whitespace) - 1}}}")
        self._prefixes = frozenset(piece[:end] for piece in self._whitespace for end in range(1, len(piece)))

    def insert(self, text: str) -> str:
        """Return `text` with every newline, tab and run of spaces (longest first) written as its stand-in."""
        text = text.replace("\n", _NEWLINE).replace("\t", _TAB)
        return self._blank_run.sub(lambda run: f"<|blank_{len(run[0])}|>", text)

    def restore(self, text: str) -> str:
        """Return `text` with every stand-in turned back into whitespace, also where the user had typed it."""
        return _STAND_IN.sub(lambda found: self._whitespace.get(found[0], found[0]), text)

    def split_open(self, text: str) -> tuple[str, str]:
        """Split `text` before a last stand-in that the text to come may complete; the second part is often empty."""
        before, bracket, after = text.rpartition("<")
        last = bracket + after
        return (before, last) if last in self._prefixes else (text, "")


class ChatGLMTokenizer(SentencePieceBackend):
    """Tokenizer of ChatGLM-6B: `X [gMASK] <sop>` for one sequence, `X [gMASK] <sop> Y <eop>` for a pair.

    Called like any tokenizer it does what the released one did: a literal `<sop>`, `<eop>`, `[MASK]`, `<pad>` or
    `<unk>` becomes the control token and swallows the whitespace beside it. Text from users belongs to
    `encode_text`. Padding is on the left and the attention mask is a plain `(batch, seq)` of 0 and 1: masks and
    position ids of the prefix LM are the model's part.

    The vocabulary is fixed: adding a token that is no piece of the model raises UserError, as does a
    SentencePiece file that is missing, damaged or of another layout.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int

    def __init__(
        self,
        vocab_file: str | None = None,
        *,
        bos_token: str = "<sop>",
        eos_token: str = "<eop>",
        end_token: str = "</s>",
        mask_token: str = "[MASK]",
        gmask_token: str = "[gMASK]",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        num_image_tokens: int = 0,
        **kwargs,
    ) -> None:
        """Read the SentencePiece model `vocab_file`; the tokens are the names of its control pieces.

        num_image_tokens: what the folder says; above 0 it is the older revision, whose ids are shifted. Only kept
            here: whoever assembles a model compares revisions.
        """
        # The base class would make [gMASK] and </s> special, and then split them out of plain text, which the
        # released tokenizer never did: they are kept from it.
        specific = dict(kwargs.pop("model_specific_special_tokens", None) or {})
        self.end_token = str(specific.pop("end_token", end_token))
        self.gmask_token = str(specific.pop("gmask_token", gmask_token))
        self.num_image_tokens = num_image_tokens
        # It names a Python file that a saved folder does not contain.
        kwargs.pop("auto_map", None)
        _check_given(vocab_file, kwargs)
        try:
            super().__init__(
                vocab_file=vocab_file,
                bos_token=bos_token,
                eos_token=eos_token,
                mask_token=mask_token,
                pad_token=pad_token,
                unk_token=unk_token,
                model_specific_special_tokens=specific,
                **kwargs,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"this is no readable SentencePiece model ({error})",
                code="M110",
                remedy="download ice_text.model again (a text file of a few lines is only a Git LFS pointer)",
                where=vocab_file,
            ) from error
        self.init_kwargs.pop("model_specific_special_tokens")
        self.init_kwargs |= {
            "end_token": self.end_token,
            "gmask_token": self.gmask_token,
            "num_image_tokens": num_image_tokens,
        }
        self.stand_ins = WhitespaceStandIns(self.sp_model, str(vocab_file))
        self._check_control_pieces()

    @property
    def gmask_token_id(self) -> int:
        """Id of `[gMASK]`, which ends a prompt that is to be continued."""
        return self.sp_model.piece_to_id(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        """Id of `</s>`; generation ends at `<eop>`, the eos token."""
        return self.sp_model.piece_to_id(self.end_token)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a user's words, without special tokens around them.

        A control token written out in `text` (`[gMASK]`, `<sop>`, `</s>`, …) stays plain text, whatever its name.
        A stand-in for whitespace written out (`<n>`, `<|tab|>`, `<|blank_2|>`, …) is that whitespace, as in the
        released model: it controls nothing.
        """
        return self.sp_model.encode(self._prepare(text))

    def encode_texts(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """Return `encode_text` of each of `texts`, encoded in one call by `num_threads` threads (−1: all cores)."""
        return self.sp_model.encode([self._prepare(text) for text in texts], num_threads=num_threads)

    def readable_ids(self, token_ids: Iterable[int], *, skip_special_tokens: bool) -> list[int]:
        """Return the ids that `decode` reads: no padding, and none that are no piece (the model has more rows)."""
        skipped = set(self.all_special_ids) if skip_special_tokens else {self.pad_token_id}
        return [i for i in map(int, token_ids) if i not in skipped and 0 <= i < self.vocab_size]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return `X [gMASK] <sop>`, or `X [gMASK] <sop> Y <eop>` with a second sequence."""
        prompt = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return prompt if token_ids_1 is None else [*prompt, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Return 1 for every special token of the built sequence and 0 for the rest."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        prompt = [0] * len(token_ids_0) + [1, 1]
        return prompt if token_ids_1 is None else prompt + [0] * len(token_ids_1) + [1]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of `tokens` (pieces)."""
        return self.stand_ins.restore(self.sp_model.decode(list(tokens)))

    def _prepare(self, text: str) -> str:
        return self.stand_ins.insert(_LONE_SURROGATE.sub(_REPLACEMENT, text))

    def _tokenize(self, text: str, **_) -> list[str]:
        return self.sp_model.encode(self._prepare(text), out_type=str)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.id_to_piece(index) if 0 <= index < self.vocab_size else ""

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **_,
    ) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        kept = self.readable_ids(ids, skip_special_tokens=skip_special_tokens)
        text = self.stand_ins.restore(self.sp_model.decode(kept))
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def _add_tokens(self, new_tokens: list[str] | list[AddedToken], special_tokens: bool = False) -> int:
        missing = [str(token) for token in new_tokens if str(token) and not _has_piece(self.sp_model, str(token))]
        if missing:
            raise UserError(
                f"the SentencePiece model has no piece {', '.join(missing)}, and none can be added",
                code="M111",
                remedy=_USE_RELEASED_FILE,
                where=self.vocab_file,
            )
        if not special_tokens:
            return super()._add_tokens(new_tokens)
        # transformers 4.28 stripped the text on both sides of a special token; current ones only when told to.
        stripping = [
            token
            if isinstance(token, AddedToken)
            else AddedToken(token, lstrip=True, rstrip=True, normalized=False, special=True)
            for token in new_tokens
        ]
        return super()._add_tokens(stripping, special_tokens=True)

    def _update_total_vocab_size(self) -> None:
        # The base class counts a dictionary of the whole vocabulary, which takes longer than all the rest of loading.
        self.total_vocab_size = self.vocab_size

    def _check_control_pieces(self) -> None:
        control = [self.bos_token, self.eos_token, self.end_token, self.mask_token, self.gmask_token, self.pad_token]
        wrong = [token for token in control if not self.sp_model.is_control(self.sp_model.piece_to_id(token))]
        if wrong:
            raise UserError(
                f"{', '.join(wrong)} must be control pieces of the SentencePiece model, or text could forge them",
                code="M111",
                remedy=_USE_RELEASED_FILE,
                where=self.vocab_file,
            )


def _check_given(vocab_file: str | None, options: dict) -> None:
    if not vocab_file:
        raise UserError(
            "the tokenizer's folder has no ice_text.model",
            code="M109",
            remedy="copy ice_text.model of the base model into the folder",
        )
    for option in ("do_lower_case", "remove_space"):
        if options.get(option):
            raise UserError(
                f"{option} is true, and only false is supported, as in the released tokenizer",
                code="M111",
                remedy=f"set {option} to false in tokenizer_config.json",
                where=vocab_file,
            )


class IncrementalDecoder:
    """Turns ids into text one at a time, giving out only what no later id can change.

    All that `push` and the last `flush` return, joined, equals `tokenizer.decode(ids, skip_special_tokens=True)`
    (without the clean-up of spaces). Held back are the bytes of an unfinished character and a `<` that may begin a
    stand-in such as `<n>`. Invalid UTF-8 becomes U+FFFD.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer) -> None:
        self._tokenizer = tokenizer
        self._model = tokenizer.sp_model
        self._anchor = self._model.piece_to_id(_NEWLINE)
        self._reset()

    def push(self, token_id: int) -> str:
        """Return the text that became final with `token_id`; often empty."""
        if not self._tokenizer.readable_ids([token_id], skip_special_tokens=True):
            return ""
        token_id = int(token_id)
        if self._model.is_byte(token_id):
            self._bytes.append(int(self._model.id_to_piece(token_id)[3:5], 16))  # the piece is "<0xAB>"
            return self._give_out(self._take_characters())
        text = self._take_characters(is_complete=True)
        return self._give_out(text + self._read_piece(token_id))

    def flush(self) -> str:
        """Return what was held back, and start anew."""
        text = self._tokenizer.stand_ins.restore(self._held + self._take_characters(is_complete=True))
        self._reset()
        return text

    def _reset(self) -> None:
        self._opening: list[int] = []
        self._has_text = False
        self._bytes = bytearray()
        self._held = ""

    def _read_piece(self, token_id: int) -> str:
        if self._has_text:
            # Inside a text a piece decodes by itself, but for the space that only the first one drops.
            return self._model.decode([self._anchor, token_id])[len(_NEWLINE) :]
        # How much leading space is dropped depends on all pieces before the first text.
        self._opening.append(token_id)
        text = self._model.decode(self._opening)
        self._has_text = bool(text)
        return text

    def _take_characters(self, *, is_complete: bool = False) -> str:
        """Take whole characters from the buffered bytes; all of the bytes when no more can follow (`is_complete`)."""
        characters = []
        while self._bytes and (is_complete or len(self._bytes) >= _character_bytes(self._bytes[0])):
            size = _character_bytes(self._bytes[0])
            try:
                characters.append(self._bytes[:size].decode("utf-8"))
            except UnicodeDecodeError:
                characters.append(_REPLACEMENT)
                size = 1
            del self._bytes[:size]
        self._has_text = self._has_text or bool(characters)
        return "".join(characters)

    def _give_out(self, text: str) -> str:
        text, self._held = self._tokenizer.stand_ins.split_open(self._held + text)
        return self._tokenizer.stand_ins.restore(text)


def _character_bytes(lead: int) -> int:
    """Return how many bytes to wait for before judging the UTF-8 character that begins with the byte `lead`."""
    for length, first in ((4, 0xF0), (3, 0xE0), (2, 0xC0)):
        if lead >= first:
            return length
    return 1
