"""Scores against the libraries' public functions, called as the model's authors called them."""

import math
import sys
from itertools import pairwise

import pytest
import rjieba
import sacrebleu
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

from chatglm_tuning.config.arguments import GENERATION_METRICS
from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.metrics import (
    Answered,
    best_scores,
    distinct_share,
    distinct_shares_without_each,
    require_metrics,
    row_scores,
    score_all,
)
from tests.evaluation.pairs import SPECIAL, pairs


def authors_scores(prediction, reference):
    """compute_metrics of THUDM/ChatGLM-6B, ptuning/main.py, for one row; what it fails on scores 0."""
    scores = dict.fromkeys(("rouge-1", "rouge-2", "rouge-l"), 0.0)
    if prediction.strip():
        hypothesis, words = rjieba.cut(prediction), rjieba.cut(reference)
        found = Rouge().get_scores(" ".join(hypothesis), " ".join(words))[0]
        scores = {name: round(found[name]["f"] * 100, 4) for name in found}
    smoothing = SmoothingFunction().method3
    bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=smoothing)
    return scores | {"bleu-4": round(bleu * 100, 4)}


def test_200_rows_score_as_the_authors_scored():
    rows = pairs()
    assert len(rows) == 200
    for prediction, reference in rows:
        expected = authors_scores(prediction, reference)
        expected["chrf"] = round(sacrebleu.sentence_chrf(prediction, [reference]).score, 4)
        assert row_scores(prediction, reference) == pytest.approx(expected, abs=1e-6), (prediction, reference)


def test_the_mean_is_over_rows_and_not_over_prompts():
    rows = pairs(30)
    answers = [Answered("p", rows[0][0], tuple(reference for _, reference in rows[:9]))]
    answers += [Answered(str(index), row[0], (row[1],)) for index, row in enumerate(rows[9:])]
    flat = [(answered.prediction, reference) for answered in answers for reference in answered.references]
    assert len(flat) == 30
    expected = [authors_scores(*row) for row in flat]
    found = score_all(answers)
    for name in ("rouge-1", "rouge-2", "rouge-l", "bleu-4"):
        assert found[name] == pytest.approx(sum(row[name] for row in expected) / 30, abs=1e-6)
    assert set(found) == set(GENERATION_METRICS)


def test_best_takes_the_nearest_reference():
    prediction = "这条裙子用纯棉制成，很好看。"
    references = ["今天天气不错", "这条裙子用纯棉制成，很好看。", "裙子"]
    found = best_scores(prediction, references)
    alone = [row_scores(prediction, reference) for reference in references]
    for name in ("rouge-1", "rouge-2", "rouge-l", "chrf"):
        assert found[name] == pytest.approx(max(row[name] for row in alone), abs=1e-6)
    smoothing = SmoothingFunction().method3
    bleu = sentence_bleu([list(text) for text in references], list(prediction), smoothing_function=smoothing)
    assert found["bleu-4"] == round(100 * bleu, 4)
    answered = Answered("p", prediction, tuple(references))
    assert score_all([answered], "best")["rouge-l"] > score_all([answered], "each")["rouge-l"]


@pytest.mark.parametrize("prediction", ["", " \n"])
def test_nothing_scores_nothing(prediction):
    assert set(row_scores(prediction, SPECIAL[0][1]).values()) == {0.0}
    assert set(row_scores(SPECIAL[0][1], prediction).values()) == {0.0}
    assert set(score_all([Answered("p", prediction, ("好",))]).values()) <= {0.0, 100.0}


def test_distinct_2_counts_different_pairs_of_characters():
    assert distinct_share(["好好好", "好看"]) == pytest.approx(100 * 2 / 3)
    assert distinct_share(["", "好"]) == 0.0


def test_distinct_2_without_each_is_what_it_is_without_each():
    texts = [prediction for prediction, _ in pairs(40)]
    expected = [distinct_share(texts[:index] + texts[index + 1 :]) for index in range(len(texts))]
    assert distinct_shares_without_each(texts) == pytest.approx(expected, abs=1e-9)
    assert len(set(expected)) > 20
    assert math.isclose(
        distinct_share(texts),
        100 * len({p for t in texts for p in pairwise(t)}) / sum(max(len(t) - 1, 0) for t in texts),
    )


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_chinese", None)
    with pytest.raises(UserError, match=r'pip install "chatglm-tuning\[eval\]"'):
        require_metrics()
