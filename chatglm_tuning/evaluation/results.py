"""What `eval` leaves in a folder: scores.json, the scores of every prompt, and a picture of a comparison."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatglm_tuning.config.evaluate import PICTURE_NAME, PROMPT_SCORES_NAME, SCORES_NAME
from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.compare import CONFIDENCE, RESAMPLES, SEED, Comparison, System
from chatglm_tuning.evaluation.files import json_line, json_text, write_all, writing_to
from chatglm_tuning.evaluation.metrics import Answered, References
from chatglm_tuning.evaluation.picture import draw_comparison, label_systems
from chatglm_tuning.wording import counted

ANSWERED_BY = "answered_by"
"""The key under which scores and predictions say which adapter and base they are of."""

CONVENTIONS: dict[References, str] = {
    "each": "every pair of a prompt and a reference is a row by itself, as the model's authors scored",
    "best": "one row a prompt: ROUGE and chrF of its nearest reference, BLEU-4 against all of them together",
}


@dataclass(frozen=True)
class Evaluation:
    """What was found: scores of systems that answered the same prompts, or one of these for each of several files.

    data_files: names of the files with the prompts; () where only predictions were given.
    """

    comparisons: tuple[Comparison, ...]
    systems: tuple[System, ...]
    references: References
    data_files: tuple[str, ...] = ()

    @property
    def has_picture(self) -> bool:
        """Whether there is something to draw: several systems with the same prompts."""
        return len(self.comparisons) == 1 and len(self.systems) > 1

    @property
    def picture_labels(self) -> dict[str, str]:
        """What the picture calls each system; nothing where there is none."""
        return label_systems([system.name for system in self.systems]) if self.has_picture else {}


@dataclass(frozen=True)
class MadeOf:
    """What decides an evaluation's results. systems: by name, a digest of its predictions or of what makes them."""

    references: str
    baseline: str | None
    systems: Mapping[str, str]


def digest_identity(identity: Mapping[str, Any]) -> str:
    """Return a digest of what decides predictions that are not there yet."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def refuse_other_results(folder: Path, made_of: MadeOf) -> None:
    """Raise UserError where `folder` holds the scores of another evaluation than this one."""
    path = folder / SCORES_NAME
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["made_of"]
        before = MadeOf(found["references"], found["baseline"], dict(found["systems"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        differences = ["its scores.json does not say of what"]
    else:
        differences = [
            f"{name} was {getattr(before, name)} and is now {getattr(made_of, name)}"
            for name in ("references", "baseline")
            if getattr(before, name) != getattr(made_of, name)
        ]
        if list(before.systems) != list(made_of.systems):
            differences.append(f"of {', '.join(before.systems)}")
        elif before.systems != made_of.systems:
            changed = [name for name, digest in made_of.systems.items() if before.systems[name] != digest]
            differences.append(f"{', '.join(changed)} had other answers")
    if differences:
        raise UserError(
            f"it holds the scores of another evaluation ({'; '.join(differences)})",
            code="O105",
            where=str(folder),
            remedy="Give another --output_dir, or --overwrite to give them up",
        )


def write_results(found: Evaluation, folder: Path, made_of: MadeOf) -> None:
    """Write all files of an evaluation, or after an error none; a picture of an earlier one goes."""
    lines = [
        json_line({"system": system.name, "prompt": answered.prompt, "scores": scores})
        for system, answered, scores in _prompt_scores(found)
    ]
    contents: dict[Path, str | bytes] = {folder / PROMPT_SCORES_NAME: "".join(lines)}
    if found.has_picture:
        contents[folder / PICTURE_NAME] = draw_comparison(found.comparisons[0], _subject(found))
    contents[folder / SCORES_NAME] = json_text({**describe(found), "made_of": asdict(made_of)})
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not found.has_picture:
            (folder / PICTURE_NAME).unlink(missing_ok=True)
        write_all(contents)


def _subject(found: Evaluation) -> str:
    system = found.systems[0]
    rows = f"{counted(count_rows(system, found.references), 'row')} of {counted(len(system.answers), 'prompt')}"
    return f"{', '.join(found.data_files)}: {rows}" if found.data_files else rows


def _prompt_scores(found: Evaluation) -> list[tuple[System, Answered, dict[str, float]]]:
    scores = {
        name: by_metric for comparison in found.comparisons for name, by_metric in comparison.prompt_scores.items()
    }
    return [
        (system, answered, {metric: round(float(values[index]), 4) for metric, values in scores[system.name].items()})
        for system in found.systems
        for index, answered in enumerate(system.answers)
    ]


def describe(found: Evaluation) -> dict[str, Any]:
    """Return the content of scores.json, but what it was made of."""
    first = found.comparisons[0]
    labels = found.picture_labels
    return {
        "data_files": list(found.data_files),
        "references": found.references,
        "convention": CONVENTIONS[found.references],
        "chrf": "the mean of sacrebleu's chrF2 of every row",
        "loss": "the mean over the label tokens of all references; less is better",
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": SEED,
        "systems": {
            system.name: {
                "prompts": len(system.answers),
                "rows": count_rows(system, found.references),
                "cut_answers": system.cut,
                "cut_prompts": system.cut_prompts,
                ANSWERED_BY: None if system.answered_by is None else asdict(system.answered_by),
                "metrics": {
                    metric: asdict(interval)
                    for comparison in found.comparisons
                    for metric, interval in comparison.systems.get(system.name, {}).items()
                },
            }
            for system in found.systems
        },
        **({"in_picture": labels} if labels else {}),
        "baseline": first.baseline,
        "differences": {
            name: {metric: asdict(gap) | {"is_real": gap.is_real} for metric, gap in gaps.items()}
            for name, gaps in first.differences.items()
        },
    }


def count_rows(system: System, references: References) -> int:
    """Return how many rows its scores are the mean of."""
    if references == "best":
        return len(system.answers)
    return sum(len(answered.references) for answered in system.answers)
