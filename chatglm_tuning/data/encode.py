"""Prompt and answer as token ids and labels, within the two length limits; what was cut is counted."""

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from chatglm_tuning.data.records import Example
from chatglm_tuning.errors import UserError
from chatglm_tuning.prompt import Round, build_prompt

IGNORED_LABEL = -100


class TextEncoder(Protocol):
    """What the data pipeline needs of a tokenizer."""

    @property
    def gmask_token_id(self) -> int:
        """[gMASK], the last token of the prompt."""
        ...

    @property
    def bos_token_id(self) -> int:
        """<sop>, the first token of the answer."""
        ...

    @property
    def eos_token_id(self) -> int:
        """<eop>, which ends an answer."""
        ...

    @property
    def pad_token_id(self) -> int:
        """<pad>."""
        ...

    @property
    def vocab_file(self) -> str | None:
        """The file that the vocabulary was read from, if any; its bytes are part of the cache key."""
        ...

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens: a literal `<eop>` in a text is a word of the user."""
        ...


@dataclass(frozen=True)
class EncodingSettings:
    """The limits of an encoded example.

    max_input_length: tokens of the prompt with [gMASK].
    max_output_length: tokens of the answer with <sop> and <eop>.
    eop_after_cut: end an answer that was cut with <eop> too, as the original did; it teaches to stop mid-sentence.
    Raises UserError where a limit leaves no room for one token of text.
    """

    max_input_length: int
    max_output_length: int
    eop_after_cut: bool = False

    def __post_init__(self) -> None:
        for name, given, least in (
            ("max_input_length", self.max_input_length, 2),
            ("max_output_length", self.max_output_length, 3),
        ):
            if given < least:
                what = f"{given} leaves no room for text; {least} is the least"
                raise UserError(what, code="A112", remedy="Give a larger number", where=f"--{name}")

    @property
    def prompt_room(self) -> int:
        """Tokens of text that fit before [gMASK]."""
        return self.max_input_length - 1

    @property
    def answer_room(self) -> int:
        """Tokens of text that fit between <sop> and <eop>."""
        return self.max_output_length - 2


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Token ids and labels, both `(seq,)`, and what was cut.

    prompt_tokens, answer_tokens: lengths before anything was cut or dropped, without special tokens.
    dropped_rounds: rounds of history that were left out whole.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_tokens: int
    answer_tokens: int
    is_prompt_cut: bool
    is_answer_cut: bool
    dropped_rounds: int = 0


def encode_example(
    prompt_ids: Sequence[int], answer_ids: Sequence[int], tokenizer: TextEncoder, settings: EncodingSettings
) -> EncodedExample:
    """Return prompt, [gMASK], <sop>, answer, <eop>; labels are ignored before <sop>, so [gMASK] predicts <sop>.

    The prompt keeps its first `max_input_length - 1` tokens and the answer its first `max_output_length - 2`. An
    answer that was cut gets no <eop> unless `settings.eop_after_cut`.
    Source: the original's train_lora.py, whose rows are the golden fixture `seed_preprocess`.
    """
    is_answer_cut = len(answer_ids) > settings.answer_room
    context = [*prompt_ids[: settings.prompt_room], tokenizer.gmask_token_id]
    learnt = [tokenizer.bos_token_id, *answer_ids[: settings.answer_room]]
    if not is_answer_cut or settings.eop_after_cut:
        learnt.append(tokenizer.eos_token_id)
    return EncodedExample(
        input_ids=context + learnt,
        labels=[IGNORED_LABEL] * len(context) + learnt,
        prompt_tokens=len(prompt_ids),
        answer_tokens=len(answer_ids),
        is_prompt_cut=len(prompt_ids) > settings.prompt_room,
        is_answer_cut=is_answer_cut,
    )


def fit_history(
    query: str, history: Sequence[Round], max_tokens: int, count_tokens: Callable[[str], int]
) -> tuple[Round, ...]:
    """Return the newest rounds of `history` with which the prompt of `query` has at most `max_tokens` tokens.

    Whole rounds go, oldest first, and the rest is numbered from 0 again: exactly what chat sends with that shorter
    history. Returns no round where the query alone is already too long.
    """

    def fits(dropped: int) -> bool:
        return count_tokens(build_prompt(query, history[dropped:])) <= max_tokens

    # Every dropped round shortens the prompt, so the search may halve instead of encoding once for each round.
    dropped = bisect.bisect_left(range(len(history)), True, key=fits)
    return tuple(history[dropped:])


def encode_examples(
    examples: Sequence[Example], tokenizer: TextEncoder, settings: EncodingSettings
) -> list[EncodedExample]:
    """Encode a batch; prompts that are too long lose their oldest rounds before anything is cut."""
    prompts = tokenizer.encode_texts([example.prompt for example in examples])
    answers = tokenizer.encode_texts([example.answer for example in examples])
    return [
        _fit_and_encode(example, prompt_ids, answer_ids, tokenizer, settings)
        for example, prompt_ids, answer_ids in zip(examples, prompts, answers, strict=True)
    ]


def _fit_and_encode(
    example: Example,
    prompt_ids: list[int],
    answer_ids: list[int],
    tokenizer: TextEncoder,
    settings: EncodingSettings,
) -> EncodedExample:
    if not example.history or len(prompt_ids) <= settings.prompt_room:
        return encode_example(prompt_ids, answer_ids, tokenizer, settings)
    history = fit_history(
        example.query, example.history, settings.prompt_room, lambda text: len(tokenizer.encode_texts([text])[0])
    )
    fitted_ids = tokenizer.encode_texts([build_prompt(example.query, history)])[0]
    encoded = encode_example(fitted_ids, answer_ids, tokenizer, settings)
    dropped_rounds = len(example.history) - len(history)
    return replace(encoded, prompt_tokens=len(prompt_ids), dropped_rounds=dropped_rounds)


@dataclass(frozen=True)
class LengthReport:
    """How long the examples are, in tokens, and what the limits did to them.

    cut_prompts: examples whose prompt was cut in its text (rounds that were dropped whole are not counted here).
    shortened_histories: examples that lost whole rounds.
    cut_answers: examples whose answer was cut.
    enough_input_length, enough_output_length: the smallest limits under which nothing is cut or dropped.
    mean_*, longest_*: of prompt and answer before cutting, without special tokens; of the sequence as it is trained.
    """

    rows: int
    cut_prompts: int
    shortened_histories: int
    cut_answers: int
    enough_input_length: int
    enough_output_length: int
    mean_prompt: float
    mean_answer: float
    mean_sequence: float
    longest_prompt: int
    longest_answer: int
    longest_sequence: int
    total_tokens: int

    def describe(self) -> str:
        """Two sentences for the log."""
        return (
            f"{self.rows} examples, {self.mean_sequence:.1f} tokens on average (prompt {self.mean_prompt:.1f}, answer "
            f"{self.mean_answer:.1f}), the longest {self.longest_sequence}. Cut: {self.cut_prompts} prompts, "
            f"{self.cut_answers} answers; {self.shortened_histories} histories shortened; --max_input_length "
            f"{self.enough_input_length} --max_output_length {self.enough_output_length} would cut none."
        )


def report_lengths(columns: Mapping[str, np.ndarray]) -> LengthReport:
    """Sum up the columns of encoded examples, each `(rows,)` with rows > 0.

    columns: the counts of `EncodedExample` under their names, and `length`, the tokens of the trained sequence.
    """
    prompts, answers, lengths = columns["prompt_tokens"], columns["answer_tokens"], columns["length"]
    return LengthReport(
        rows=len(lengths),
        cut_prompts=int(columns["is_prompt_cut"].sum()),
        shortened_histories=int((columns["dropped_rounds"] > 0).sum()),
        cut_answers=int(columns["is_answer_cut"].sum()),
        enough_input_length=int(prompts.max()) + 1,
        enough_output_length=int(answers.max()) + 2,
        mean_prompt=float(prompts.mean()),
        mean_answer=float(answers.mean()),
        mean_sequence=float(lengths.mean()),
        longest_prompt=int(prompts.max()),
        longest_answer=int(answers.max()),
        longest_sequence=int(lengths.max()),
        total_tokens=int(lengths.sum()),
    )
