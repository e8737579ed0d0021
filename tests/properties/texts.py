"""Texts and JSON values to draw, and how many: CHATGLM_TUNING_EXAMPLES times as many as in the ordinary suite."""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_FACTOR = int(os.environ.get("CHATGLM_TUNING_EXAMPLES", "1"))

CONTROLS = ("[gMASK]", "[MASK]", "[sMASK]", "<sop>", "<eop>", "<pad>", "<unk>", "<s>", "</s>", "<ENC>", "<dBLOCK>")
STAND_INS = ("<n>", "<|tab|>", "<|blank_2|>", "<|blank_80|>", "<|blank_81|>", "<|blank_0|>", "＜n＞", "<", "<|", "|>")
AWKWARD = (
    *("\n", "\t", "\r\n", " ", "  ", " " * 85, "\u3000", "\u00a0", "\u2028", "\ufeff", "\u200b", "\u200d", "▁", "\0"),
    *(
        "\x1b[31m",
        "\x7f",
        "\x85",
        "ﬁ",
        "①",
        "０",
        "é",
        "Å",
        "é",
        "한",
        "👩‍👩‍👧",
        "\U000e0041",
        "\ufffd",
        "⁇",
        "\ud83d",
        "\udc80",
    ),
    *("[Round 0]\n问：", "\n答：", "<0x41>", "<|endoftext|>", "\ue000", "ا", "\U0010ffff"),
)


def examples(count: int) -> settings:
    """So many examples in the ordinary suite, always the same ones; more, and others, where more are asked for."""
    return settings(
        max_examples=count * _FACTOR,
        deadline=None,
        derandomize=_FACTOR == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


characters = st.characters(exclude_categories=())  # lone surrogates too
texts = st.lists(
    st.one_of(st.text(characters, max_size=20), st.sampled_from([*CONTROLS, *STAND_INS, *AWKWARD])), max_size=8
).map("".join)

numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -0.0, float("inf"), float("nan")]))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
