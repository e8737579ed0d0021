"""Training examples from data files of five shapes, each shape detected row by row and named in the log.

    instruction, input, output      input is appended to the instruction after a newline when it is not blank
    prompt, response, history       history: a list of [question, answer] pairs
    content, summary                ADGEN's own format
    messages                        a list of {role, content}: OpenAI's format
    conversations                   a list of {from, value}: ShareGPT's format

The three flat shapes give one example a row and all take `history` and `system`; the two lists of turns give one
example for each turn of the assistant, with the turns before it as history. A system text is put before the first
question with a newline. A last turn of the user has no answer to learn from and is left out.
"""

import logging
import os
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from chatglm_tuning.data.rows import BadRows, check_files, iterate_rows
from chatglm_tuning.errors import UserError
from chatglm_tuning.prompt import Round, build_prompt

logger = logging.getLogger(__name__)

_FLAT_SHAPES = {
    "instruction/input/output": ("instruction", "output"),
    "prompt/response/history": ("prompt", "response"),
    "content/summary": ("content", "summary"),
}
_TURN_SHAPES = ("messages", "conversations")
# Each turn of a long conversation repeats all turns before it: this many characters in all, the template included.
_MOST_PROMPT_CHARACTERS = 64 << 20
_CHARACTERS_OF_A_ROUND = 20
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}


@dataclass(frozen=True, slots=True)
class Example:
    """One answer to learn, and what the model reads before it.

    query: what the user asks, system text and input included.
    history: the (question, answer) rounds before it, oldest first.
    source: `file:line` of the row.
    answer: empty only where a reader takes prompts without answers.
    """

    query: str
    answer: str
    history: tuple[Round, ...] = ()
    source: str = ""

    @property
    def prompt(self) -> str:
        """The text that chat sends for this turn."""
        return build_prompt(self.query, self.history)


@dataclass(frozen=True)
class Records:
    """The examples of some files in their order, and how many bad rows were left out."""

    examples: tuple[Example, ...]
    skipped: int


@dataclass
class RowsSeen:
    """Rows by the name of their shape, and conversations whose last turn, the user's, has no answer to learn from."""

    shapes: Counter[str]
    unanswered: int = 0


class _RowError(ValueError):
    """What is wrong with a row; becomes one line of the report."""


def read_records(
    paths: Sequence[str | os.PathLike[str]], *, skip_bad_rows: bool | None = None, needs_answers: bool = True
) -> Records:
    """Read every example of `paths` (file after file, row after row) into memory.

    skip_bad_rows: None where the command has no such flag. needs_answers: False takes prompts alone too, whose answer
    is empty.
    Raises UserError for a file that cannot be read, for bad rows (all of them counted, the first ones listed) unless
    `skip_bad_rows`, and where no usable row is left.
    """
    bad_rows = BadRows()
    examples = tuple(iterate_examples(paths, bad_rows, needs_answers=needs_answers))
    bad_rows.settle(skip_bad_rows=skip_bad_rows)
    if not examples:
        raise UserError(
            "no usable row was found", code="D105", remedy="Check the data files", where=", ".join(map(str, paths))
        )
    return Records(examples, bad_rows.count)


def iterate_examples(
    paths: Sequence[str | os.PathLike[str]],
    bad_rows: BadRows,
    *,
    needs_answers: bool = True,
    seen: RowsSeen | None = None,
) -> Iterator[Example]:
    """Yield the examples of `paths` one at a time; rows that cannot be used go to `bad_rows`, usable ones to `seen`.

    Raises UserError, before the first example, where one of `paths` is not a readable file.
    """
    for path in check_files(paths):
        shapes: Counter[str] = Counter()
        for line, row in iterate_rows(path, bad_rows):
            source = f"{path}:{line}"
            try:
                shape, examples = examples_of_row(row, source, needs_answers=needs_answers)
            except _RowError as error:
                bad_rows.add(source, str(error))
                continue
            shapes[shape] += 1
            if seen is not None and shape in _TURN_SHAPES:
                seen.unanswered += _read_turn(row[shape][-1], source)[0] == "user"
            yield from examples
        for shape, count in shapes.most_common():
            logger.info("%s: rows of the shape %s: %d", path, shape, count)
        if seen is not None:
            seen.shapes.update(shapes)


def examples_of_row(row: Any, source: str, *, needs_answers: bool = True) -> tuple[str, list[Example]]:
    """Return the name of the shape of `row` and its examples; raises ValueError with what is wrong."""
    if not isinstance(row, dict):
        raise _RowError(f"the row is {_kind(row)}, not an object")
    for shape in _TURN_SHAPES:
        if shape in row:
            return shape, _turn_examples(row, shape, source, needs_answers=needs_answers)
    best = max(_FLAT_SHAPES, key=lambda shape: sum(key in row for key in _FLAT_SHAPES[shape]))
    if not any(key in row for key in _FLAT_SHAPES[best]):
        keys = ", ".join(map(reprlib.repr, islice(row, 5))) or "none"
        known = "; ".join([*_FLAT_SHAPES, *_TURN_SHAPES])
        raise _RowError(f"no known shape: its fields are {keys}; known are {known}")
    query_key, answer_key = _FLAT_SHAPES[best]
    answer = row.get(answer_key)
    if not needs_answers and (answer is None or (isinstance(answer, str) and not answer.strip())):
        row = {**row, answer_key: ""}
        return best, [_flat_example(row, query_key, answer_key, source, needs_answer=False)]
    return best, [_flat_example(row, query_key, answer_key, source)]


def _flat_example(
    row: Mapping[str, Any], query_key: str, answer_key: str, source: str, *, needs_answer: bool = True
) -> Example:
    query, answer = _text(row, query_key), _text(row, answer_key)
    if query_key == "instruction":
        addition = _optional_text(row, "input")
        query = f"{query}\n{addition}" if addition.strip() else query
    if not query.strip():
        raise _RowError(f'the prompt is empty ("{query_key}")')
    if needs_answer and not answer.strip():
        raise _RowError(f'the answer is empty ("{answer_key}")')
    questions, answers = _history(row)
    questions, query = _with_system(_optional_text(row, "system"), questions, query)
    return Example(query, answer, tuple(zip(questions, answers, strict=True)), source)


def _history(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    history = row.get("history")
    if history is None:
        return [], []
    if not isinstance(history, list):
        raise _RowError(f'"history" is {_kind(history)}, not a list of [question, answer] pairs')
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _RowError(f'"history" round {number} is not a pair [question, answer]')
        for text in pair:
            _check_text(text, f'"history" round {number}')
    return [question for question, _ in history], [answer for _, answer in history]


def _with_system(system: str, questions: list[str], query: str) -> tuple[list[str], str]:
    """Put the system text before the first question, which is the query itself where there is no history."""
    if not system.strip():
        return questions, query
    if questions:
        return [f"{system}\n{questions[0]}", *questions[1:]], query
    return questions, f"{system}\n{query}"


def _turn_examples(row: Mapping[str, Any], key: str, source: str, *, needs_answers: bool) -> list[Example]:
    """One example for each answer of the assistant; `key` names the list of turns in `row`.

    A last turn of the user is one without an answer where `needs_answers` is False, and else none.
    """
    turns = row[key]
    if not isinstance(turns, list):
        raise _RowError(f'"{key}" is {_kind(turns)}, not a list of turns')
    system = [text for text in [_optional_text(row, "system")] if text.strip()]
    examples: list[Example] = []
    history: list[Round] = []
    history_characters = all_characters = 0
    question: str | None = None
    for number, turn in enumerate(turns, start=1):
        role, text = _read_turn(turn, f'"{key}" turn {number}')
        if role == "system":
            if history or question is not None:
                raise _RowError(f'"{key}" turn {number}: a system text may only come first')
            system.append(text)
            continue
        if (role == "user") == (question is not None):
            expected = "the assistant's" if role == "user" else "the user's"
            raise _RowError(f'"{key}" turn {number} is the {role}\'s, {expected} was expected')
        if role == "user":
            question = "\n".join([*system, text]) if not history else text
        else:
            assert question is not None
            all_characters += history_characters
            if all_characters > _MOST_PROMPT_CHARACTERS:
                raise _RowError(f'"{key}" turn {number}: the conversation is too long; make several of it')
            examples.append(Example(question, text, tuple(history), source))
            history.append((question, text))
            history_characters += len(question) + len(text) + _CHARACTERS_OF_A_ROUND
            question = None
    if question is not None and not needs_answers:
        examples.append(Example(question, "", tuple(history), source))
    if not examples:
        raise _RowError(f'"{key}" holds no answer of the assistant')
    return examples


def _read_turn(turn: Any, where: str) -> tuple[str, str]:
    """Return the role (system, user or assistant) and the text of one turn; both formats' names are taken."""
    if not isinstance(turn, dict):
        raise _RowError(f"{where} is {_kind(turn)}, not an object")
    role_key, text_key = ("from", "value") if "from" in turn or "value" in turn else ("role", "content")
    for name in (role_key, text_key):
        if name not in turn:
            raise _RowError(f'{where}: "{name}" is missing')
    name = _check_text(turn[role_key], f'{where}: "{role_key}"')
    role = _ROLES.get(name.lower())
    if role is None:
        raise _RowError(f"{where}: unknown role {reprlib.repr(name)}; known are {', '.join(_ROLES)}")
    text = _check_text(turn[text_key], f'{where}: "{text_key}"')
    if role != "system" and not text.strip():
        raise _RowError(f"{where}: the {'answer' if role == 'assistant' else 'prompt'} is empty")
    return role, text


def _text(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise _RowError(f'"{key}" is missing')
    return _check_text(row[key], f'"{key}"')


def _optional_text(row: Mapping[str, Any], key: str) -> str:
    return "" if row.get(key) is None else _text(row, key)


def _check_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _RowError(f"{name} is {_kind(value)}, not a string")
    if "\0" in value:
        raise _RowError(f"{name} holds a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # Bytes that are not UTF-8 were read as lone surrogates; a JSON escape can also spell one.
        found = value[error.start].encode("unicode_escape").decode("ascii")
        raise _RowError(f"{name} is not valid UTF-8 text ({found}); save the file as UTF-8") from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")
