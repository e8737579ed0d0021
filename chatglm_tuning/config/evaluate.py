"""The settings of `chatglm-tuning eval`, from the command line to frozen arguments."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from chatglm_tuning.config.arguments import ModelArguments, Setting, settings_of
from chatglm_tuning.config.flags import FlagGroup, build_parser, read_flags
from chatglm_tuning.config.predict import (
    ADAPTER_GROUP,
    ANSWER_GROUPS,
    DATA_PATH,
    ELSEWHERE,
    OUTPUT_DIR,
    OVERWRITE,
    AdapterArguments,
    AnswerArguments,
    adapter_arguments,
    answer_arguments,
    check_given,
    model_arguments,
)
from chatglm_tuning.config.sources import Registry, resolve_flags
from chatglm_tuning.config.values import Value
from chatglm_tuning.errors import UserError

BASE = "base"
"""The operand of --compare that is the model without an adapter."""
PREDICTIONS_NAME = "predictions.jsonl"
"""The file that `predict` writes."""
SCORES_NAME = "scores.json"
PROMPT_SCORES_NAME = "prompt_scores.jsonl"
PICTURE_NAME = "comparison.png"
RESULT_NAMES = (SCORES_NAME, PROMPT_SCORES_NAME, PICTURE_NAME)
"""The files that `eval` writes."""

_PREDICTIONS = Setting("predictions", Value("paths"), "files of predictions to score, as predict writes them", None)
_COMPARE = Setting(
    "compare", Value("names"), f"two or more of: an adapter's folder, a file of predictions, the word {BASE}", None
)
_BASELINE = Setting("baseline", Value("text"), "the one that the others are compared with; without it, the last", None)
_REFERENCES = Setting(
    "references",
    Value("text", choices=("each", "best")),
    "each: a row for every reference of a prompt, as the model's authors scored; best: one row a prompt, against all",
    "each",
)


@dataclass(frozen=True)
class Operand:
    """One side of a comparison: a file of predictions, an adapter's folder, or neither for the base alone.

    name: what tables call it; no two are called the same.
    folder: the folder's name in the output_dir where it is answered; no two have the same.
    """

    name: str
    folder: str
    predictions: Path | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class EvalArguments:
    """One run of `eval`, which is of one of three kinds.

    predictions: score these files. compare: answer and compare these, against the one named `baseline`.
    Neither: let the model, with `adapter` where there is one, answer and score it.
    answers: None where nothing has to be answered. output_dir: None where nothing is to be written.
    """

    references: Literal["each", "best"] = _REFERENCES.default
    predictions: tuple[Path, ...] = ()
    compare: tuple[Operand, ...] = ()
    baseline: str | None = None
    model: ModelArguments = field(default_factory=ModelArguments)
    adapter: AdapterArguments | None = None
    answers: AnswerArguments | None = None
    output_dir: Path | None = None
    overwrite: bool = OVERWRITE.default


def parse_eval_arguments(argv: Sequence[str]) -> EvalArguments:
    """Return what `argv` (without the program's name) asks for; prints and raises as training does.

    Looks whether the paths of --compare are files or folders, and reads none.
    """
    groups = [
        FlagGroup("what is scored (without both: the answers of the model)", (_PREDICTIONS, _COMPARE, _BASELINE)),
        FlagGroup("how", (_REFERENCES,)),
        FlagGroup("model", tuple(settings_of(ModelArguments))),
        ADAPTER_GROUP,
        *ANSWER_GROUPS,
        FlagGroup("output", (OUTPUT_DIR, OVERWRITE)),
    ]
    parser = build_parser("chatglm-tuning eval", "Score answers against references, and compare adapters.", groups)
    registry = Registry.of([setting for group in groups for setting in group.settings], {})
    values = resolve_flags(read_flags(parser, argv, ELSEWHERE), registry)
    if "predictions" in values and "compare" in values:
        raise UserError(
            "--predictions and --compare are both given",
            code="A105",
            remedy="Give the files of predictions to --compare, too",
        )
    if "baseline" in values and "compare" not in values:
        raise UserError("--baseline says nothing without --compare", code="A106", remedy="Leave it out")
    if "predictions" in values:
        return _scoring(values)
    return _comparing(values) if "compare" in values else _answering(values)


def _scoring(values: Mapping[str, Any]) -> EvalArguments:
    _refuse_twice("--predictions", [(str(path), path.resolve()) for path in values["predictions"]])
    own = {"predictions", "references", "output_dir", "overwrite"}
    if others := [name for name in values if name not in own]:
        raise UserError(
            f"--{others[0]} changes nothing where --predictions are scored as they are",
            code="A106",
            remedy="Leave it out, or leave --predictions out to let the model answer",
        )
    return EvalArguments(**values)


def _answering(values: Mapping[str, Any]) -> EvalArguments:
    if DATA_PATH.name not in values:
        raise UserError(
            "there is nothing to score: --data_path is missing, and so are --predictions and --compare",
            code="A104",
            remedy="Give --predictions to score files that are there, --data_path to let the model answer first, or "
            "--compare with adapters to compare",
        )
    check_given(values, DATA_PATH, OUTPUT_DIR)
    return EvalArguments(
        references=values.get("references", _REFERENCES.default),
        model=model_arguments(values),
        adapter=adapter_arguments(values),
        answers=answer_arguments(values),
        output_dir=values["output_dir"],
        overwrite=values.get("overwrite", OVERWRITE.default),
    )


def _comparing(values: Mapping[str, Any]) -> EvalArguments:
    written = values["compare"]
    if len(written) < 2:
        raise UserError(
            f"--compare has one operand ({written[0]}), and it takes two or more",
            code="E101",
            remedy=f"Give another adapter or file of predictions, or the word {BASE}",
        )
    for name in ("lora_checkpoint", "ptuning_checkpoint"):
        if name in values:
            raise UserError(
                f"--{name} changes nothing beside --compare", code="A106", remedy="Give the folder to --compare"
            )
    operands = _operands(written)
    check_given(values, OUTPUT_DIR)
    needs_answers = any(operand.predictions is None for operand in operands)
    if needs_answers:
        check_given(values, DATA_PATH)
    return EvalArguments(
        references=values.get("references", _REFERENCES.default),
        compare=operands,
        baseline=_baseline(values.get("baseline"), written, operands),
        model=model_arguments(values),
        answers=answer_arguments(values) if needs_answers else None,
        output_dir=values["output_dir"],
        overwrite=values.get("overwrite", OVERWRITE.default),
    )


def _operands(written: Sequence[str]) -> tuple[Operand, ...]:
    paths = {word: None if word == BASE else Path(word).expanduser() for word in written}
    _refuse_twice("--compare", [(word, BASE if (path := paths[word]) is None else path.resolve()) for word in written])
    for word, path in paths.items():
        if path is not None and not path.is_file() and not path.is_dir():
            raise UserError(
                "there is no such file or folder",
                code="E102",
                where=f"--compare {word}",
                remedy=f"Give an adapter's folder, a file of predictions, or the word {BASE}",
            )
    names = _told_apart({word: BASE if path is None else _name(path) for word, path in paths.items()})
    folders = _folders(names, paths)
    return tuple(
        Operand(
            names[word],
            folders[word],
            predictions=path if path is not None and path.is_file() else None,
            adapter=path if path is not None and path.is_dir() else None,
        )
        for word, path in paths.items()
    )


def _refuse_twice(flag: str, given: Sequence[tuple[str, Any]]) -> None:
    """Raise UserError where two words of `given`, which come with what they stand for, stand for the same."""
    first: dict[Any, str] = {}
    for word, meaning in given:
        if meaning in first:
            also = "" if first[meaning] == word else f", also as {word}"
            raise UserError(f"{flag} has {first[meaning]} twice{also}", code="E101", remedy="Give each once")
        first[meaning] = word


def _told_apart(names: Mapping[str, str]) -> Mapping[str, str]:
    """Return a name for every word; words whose short names are the same are called as they were written."""
    counts = Counter(names.values())
    found = {word: name if counts[name] == 1 else word for word, name in names.items()}
    return found if len(set(found.values())) == len(found) else {word: word for word in names}


def _folders(names: Mapping[str, str], paths: Mapping[str, Path | None]) -> dict[str, str]:
    """Return a folder's name for every word; some disks take two that differ only in case for one."""
    folders = {word: re.sub(r"[/\\]+", "-", name.strip("/.")) or "_" for word, name in names.items()}
    counts = Counter([*(folder.casefold() for folder in folders.values()), *RESULT_NAMES])
    for word, path in paths.items():
        if path is not None and counts[folders[word].casefold()] > 1:
            digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
            folders[word] = f"{folders[word]}-{digest[:8]}"
    return folders


def _name(path: Path) -> str:
    """Name a file or folder by itself, predict's file by its folder."""
    path = path.resolve()
    if path.is_dir():
        return path.name
    return path.parent.name if path.name == PREDICTIONS_NAME else path.stem


def _baseline(given: str | None, written: Sequence[str], operands: Sequence[Operand]) -> str:
    if given is None:
        return operands[-1].name
    for word, operand in zip(written, operands, strict=True):
        if given in (word, operand.name):
            return operand.name
    raise UserError(
        f"--baseline {given} is none of those that are compared",
        code="E102",
        remedy=f"Give one of {', '.join(written)}",
    )
