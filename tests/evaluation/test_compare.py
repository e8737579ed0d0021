"""Intervals and verdicts: against plain numpy, by their coverage, and where there is nothing to tell apart."""

import numpy as np
import pytest

from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation import compare as compare_module
from chatglm_tuning.evaluation.compare import LOSS_METRIC, System, align, compare
from chatglm_tuning.evaluation.loss import PromptLosses
from chatglm_tuning.evaluation.metrics import Answered, distinct_share, row_scores
from chatglm_tuning.evaluation.picture import draw_comparison
from tests.evaluation.pairs import pairs


def system(name, rows, losses=None):
    answers = tuple(
        Answered(f"p{index}", prediction, (reference,)) for index, (prediction, reference) in enumerate(rows)
    )
    return System(name, answers, losses=losses)


@pytest.fixture
def fewer_resamples(monkeypatch):
    """For what is repeated many times."""
    monkeypatch.setattr(compare_module, "RESAMPLES", 1000)


@pytest.fixture(scope="module")
def rows():
    return pairs(60)[12:]


@pytest.fixture(scope="module")
def two(rows):
    """A good system and a poor one, the latter with losses that depend on it."""
    poor = [(prediction[: len(prediction) // 3], reference) for prediction, reference in rows]
    count = len(rows)
    draw = np.random.default_rng(1)
    tokens = draw.integers(5, 50, count)
    losses = [PromptLosses(tokens * draw.uniform(low, low + 1, count), tokens) for low in (0.5, 1.5)]
    return system("good", rows, losses[0]), system("poor", poor, losses[1])


def test_the_interval_is_the_paired_bootstrap(two):
    found = compare(two, "each", "poor")
    good, poor = ([row_scores(a.prediction, a.references[0])["rouge-1"] for a in s.answers] for s in two)
    gaps = np.subtract(good, poor)
    draw = np.random.default_rng(5)
    means = gaps[draw.integers(0, len(gaps), (20_000, len(gaps)))].mean(-1)
    gap = found.differences["good"]["rouge-1"]
    assert gap.value == pytest.approx(gaps.mean(), abs=1e-9)
    spread = np.std(means)
    assert (gap.low, gap.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.1 * spread)
    assert gap.is_real
    # Unpaired, the interval would be wider: prompts that are hard are hard for both.
    unpaired = np.sqrt(np.var(good) / len(good) + np.var(poor) / len(poor))
    assert abs(spread - unpaired) > 0.1 * spread


def test_the_loss_is_weighed_by_tokens(two):
    found = compare(two, "each", "poor")
    losses = two[0].losses
    assert found.systems["good"][LOSS_METRIC].value == pytest.approx(losses.sums.sum() / losses.tokens.sum())
    gap = found.differences["good"][LOSS_METRIC]
    assert gap.is_real
    assert gap.high < 0


def test_the_same_answers_are_not_told_apart(rows):
    found = compare([system("one", rows), system("other", rows)], "each", "other")
    for gap in found.differences["one"].values():
        assert (gap.value, gap.low, gap.high) == (0.0, 0.0, 0.0)
        assert not gap.is_real


def test_a_difference_by_chance_is_rarely_called_real(rows, fewer_resamples):
    """Two systems that are equally good: each answers a random half of the prompts well."""
    rows = [(prediction[:8], reference[:8]) for prediction, reference in rows]
    draw = np.random.default_rng(3)
    real = 0
    for _ in range(40):
        chosen = draw.random(len(rows)) < 0.5
        one = [(row[0] if good else "好", row[1]) for row, good in zip(rows, chosen, strict=True)]
        other = [("好" if good else row[0], row[1]) for row, good in zip(rows, chosen, strict=True)]
        real += (
            compare([system("one", one), system("other", other)], "each", "other").differences["one"]["chrf"].is_real
        )
    assert real <= 6  # 2 are expected


def test_the_interval_of_distinct_2_holds_what_other_prompts_give(fewer_resamples):
    texts = [prediction[:30] for prediction, _ in pairs(200)[12:]]
    draw = np.random.default_rng(2)
    size, inside = 60, 0
    values = [distinct_share([texts[i] for i in draw.choice(len(texts), size, replace=False)]) for _ in range(200)]
    expected = float(np.mean(values))
    for _ in range(40):
        sample = [(texts[i], "好") for i in draw.choice(len(texts), size, replace=False)]
        interval = compare([system("s", sample)], "each").systems["s"]["distinct-2"]
        assert interval.low < interval.value < interval.high
        inside += interval.low <= expected <= interval.high
    assert inside >= 34


def test_one_prompt_has_no_interval(rows):
    found = compare([system("one", rows[:1]), system("other", rows[:1])], "each", "other")
    assert found.systems["one"]["chrf"].low is None
    assert not found.differences["one"]["chrf"].is_real


def test_the_same_prompts_in_another_order_are_brought_together(two):
    good, poor = two
    order = list(range(len(poor.answers)))[::-1]
    turned = System(
        "poor",
        tuple(poor.answers[index] for index in order),
        losses=PromptLosses(poor.losses.sums[order], poor.losses.tokens[order]),
    )
    assert turned.answers != poor.answers
    aligned = align([good, turned])[1]
    assert aligned.answers == poor.answers
    assert (aligned.losses.sums == poor.losses.sums).all()


def test_other_prompts_are_refused_with_their_number(two):
    good, poor = two
    with pytest.raises(UserError, match="good has 48 prompts with their references, poor has 40, and 40 are the same"):
        align([good, System("poor", poor.answers[:40])])


def texts_of(monkeypatch, comparison):
    """Everything that is written into the picture of `comparison`, and the picture."""
    from matplotlib import pyplot
    from matplotlib.text import Text

    found = []
    close = pyplot.close
    monkeypatch.setattr(
        pyplot, "close", lambda figure: (found.extend(t.get_text() for t in figure.findobj(Text)), close(figure))
    )
    return found, draw_comparison(comparison, "开发.json: 48 rows of 48 prompts")


def test_the_picture_has_a_panel_for_each_metric_and_marks_what_is_real(two, monkeypatch, recwarn):
    found = compare(two, "each", "poor")
    texts, picture = texts_of(monkeypatch, found)
    assert picture.startswith(b"\x89PNG")
    assert any(
        text.endswith(
            " 48 rows of 48 prompts, with intervals of 95 %\n"
            "* the difference from poor is real: its interval leaves out 0"
        )
        for text in texts
    )
    real = [metric for metric, gap in found.differences["good"].items() if gap.is_real]
    assert real
    assert sum(text.endswith("*") for text in texts) == len(real)
    assert {"good", "poor", "ROUGE-L"} <= set(texts)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


@pytest.mark.filterwarnings("ignore:Glyph")  # this machine may lack the font that is pretended
@pytest.mark.parametrize("has_font", [False, True])
def test_a_name_that_has_no_room_has_a_key(two, monkeypatch, has_font):
    from chatglm_tuning.evaluation import picture

    names = ["前缀", "chatglm_tuning/output/$lora_1$", "base"]
    monkeypatch.setattr(picture, "_is_drawable", lambda text, _: has_font or text.isascii())
    found = compare([System(name, two[0].answers) for name in names], "each", "base")
    texts, _ = texts_of(monkeypatch, found)
    first = "前缀" if has_font else "no font here has the characters of its name, which is in scores.json"
    key = [f"system 1: {first}", f"system 2: {names[1]}", "system 3: base"]
    assert "\n".join(key) in texts
    assert {"system 1", "system 2", "system 3"} <= set(texts)
    assert picture.label_systems(names) == dict(zip(names, ["system 1", "system 2", "system 3"], strict=True))


def test_distinct_2_and_its_differences_end_where_they_can(rows):
    short = [("好看" if index else "衣服很好", reference) for index, (_, reference) in enumerate(rows[:3])]
    unlike = [(text, reference) for text, (_, reference) in zip(["一二三", "四五六", "七八八八八"], rows, strict=False)]
    found = compare([system("one", unlike), system("other", short)], "each", "other")
    for name in ("one", "other"):
        interval = found.systems[name]["distinct-2"]
        assert 0 <= interval.low <= interval.value <= interval.high <= 100
    assert found.systems["one"]["distinct-2"].high == 100
    assert found.differences["one"]["distinct-2"].high <= 100
