"""Scores of one answer against its references, as ChatGLM-6B's authors computed them for ADGEN, and two more.

ROUGE-1, ROUGE-2, ROUGE-L and BLEU-4 follow `compute_metrics` of THUDM/ChatGLM-6B, ptuning/main.py: words cut by jieba
for ROUGE (rouge-chinese, F1), characters for BLEU (NLTK, smoothing method 3), each a percentage of four decimals.
rjieba cuts as jieba does. chrF is sacrebleu's of one sentence, with its defaults (6 characters, beta 2).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from chatglm_tuning.optional import require

EXTRA = "eval"
"""The optional dependencies that scores need."""

ROUGE_METRICS = ("rouge-1", "rouge-2", "rouge-l")
ROW_METRICS = (*ROUGE_METRICS, "bleu-4", "chrf")
"""What every answer has by itself; their mean is the score of many."""
DISTINCT_METRIC = "distinct-2"

References = Literal["each", "best"]

_DECIMALS = 4


@dataclass(frozen=True)
class Answered:
    """A prompt's prediction and every answer that its data has for it."""

    prompt: str
    prediction: str
    references: tuple[str, ...]


def require_metrics() -> None:
    """Raise UserError where one of the libraries that score is missing."""
    for module in ("rouge_chinese", "rjieba", "nltk", "sacrebleu"):
        require(module, EXTRA)


def row_scores(prediction: str, reference: str) -> dict[str, float]:
    """Return the scores of one (prediction, reference) row, 0 to 100.

    A text without a word (nothing but whitespace) scores 0 against any, and so does any against it.
    """
    scores = {
        **_rouge(prediction, reference),
        "bleu-4": _bleu(prediction, [reference]),
        "chrf": _chrf(prediction, [reference]),
    }
    return {name: round(score, _DECIMALS) for name, score in scores.items()}


def best_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """Return the scores of one prediction against all its references at once, 0 to 100.

    ROUGE and chrF of the reference that it comes nearest to, for each of them by itself; BLEU-4 as BLEU defines it for
    several references.
    """
    rouge = [_rouge(prediction, reference) for reference in references]
    scores = {
        **{name: max(row[name] for row in rouge) for name in ROUGE_METRICS},
        "bleu-4": _bleu(prediction, references),
        "chrf": _chrf(prediction, references),
    }
    return {name: round(score, _DECIMALS) for name, score in scores.items()}


def distinct_share(predictions: Sequence[str]) -> float:
    """Return distinct-2, 0 to 100: the different pairs of neighbouring characters, of all pairs in all predictions.

    Source: Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", section 5.
    """
    pairs = Counter(pair for text in predictions for pair in pairwise(text))
    return 100 * len(pairs) / pairs.total() if pairs else 0.0


def distinct_shares_without_each(predictions: Sequence[str]) -> np.ndarray:
    """Return distinct-2 without the first prediction, without the second, and so on: `(predictions,)`."""
    counted = [Counter(pairwise(text)) for text in predictions]
    everywhere: Counter[tuple[str, str]] = Counter()
    for pairs in counted:
        everywhere.update(pairs)
    shares = []
    for pairs in counted:
        only_here = sum(everywhere[pair] == count for pair, count in pairs.items())
        rest = everywhere.total() - pairs.total()
        shares.append(100 * (len(everywhere) - only_here) / rest if rest else 0.0)
    return np.asarray(shares)


def score_prompt(answered: Answered, references: References) -> tuple[dict[str, float], int]:
    """Return the summed scores of a prompt's rows, and how many rows they are.

    references: `each` makes a row of every reference, as the authors had it; `best` makes one of all together.
    """
    if references == "best":
        return best_scores(answered.prediction, answered.references), 1
    rows = [row_scores(answered.prediction, reference) for reference in answered.references]
    return {name: sum(row[name] for row in rows) for name in ROW_METRICS}, len(rows)


def score_all(answers: Sequence[Answered], references: References = "each") -> dict[str, float]:
    """Return every metric of at least one answer: the mean over its rows, and distinct-2 of all predictions."""
    scored = [score_prompt(answered, references) for answered in answers]
    rows = sum(count for _, count in scored)
    means = {name: sum(scores[name] for scores, _ in scored) / rows for name in ROW_METRICS}
    return means | {DISTINCT_METRIC: distinct_share([answered.prediction for answered in answers])}


def _rouge(prediction: str, reference: str) -> Mapping[str, float]:
    if not prediction.strip() or not reference.strip():  # rouge-chinese raises ValueError
        return dict.fromkeys(ROUGE_METRICS, 0.0)
    (scores,) = _rouge_scorer().get_scores(" ".join(_words(prediction)), " ".join(_words(reference)))
    return {name: 100 * scores[name]["f"] for name in ROUGE_METRICS}


def _words(text: str) -> list[str]:
    return require("rjieba", EXTRA).cut(text)


def _bleu(prediction: str, references: Sequence[str]) -> float:
    bleu = require("nltk.translate.bleu_score", EXTRA)
    characters = [list(reference) for reference in references]
    smoothing = bleu.SmoothingFunction().method3
    return 100 * bleu.sentence_bleu(characters, list(prediction), smoothing_function=smoothing)


def _chrf(prediction: str, references: Sequence[str]) -> float:
    return require("sacrebleu", EXTRA).sentence_chrf(prediction, references).score


@cache
def _rouge_scorer() -> Any:
    return require("rouge_chinese", EXTRA).Rouge()
