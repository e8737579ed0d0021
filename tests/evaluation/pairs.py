"""200 pairs of a prediction and a reference: ours, from the sample data, and the shapes that break scorers."""

import json
import random
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SPECIAL = [
    ("", "这条裙子很好看。"),
    (" \n\t", "这条裙子很好看。"),
    ("。", "这条裙子很好看。"),
    ("。！？，；", "。，！"),
    ("好", "好"),
    ("好", "这条裙子很好看。"),
    ("A soft cotton dress, made for summer.", "A light cotton dress for the summer days."),
    ("dress", "dress"),
    ("这条 dress 用了 100% cotton，很 soft", "这条裙子用了100%纯棉，很柔软"),
    ("......", "……"),
    ("裙子裙子裙子裙子裙子裙子", "裙子很美"),
    ("第一句。第二句！第三句？", "第二句！第一句。"),
]


def pairs(count: int = 200) -> list[tuple[str, str]]:
    """The special ones, then summaries of the sample data against themselves, changed, shortened or mixed up."""
    lines = (REPOSITORY / "data" / "AdvertiseGen" / "sample_dev.json").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["summary"] for line in lines]
    draw = random.Random(11)
    found = list(SPECIAL)
    while len(found) < count:
        one, other = draw.sample(texts, 2)
        cut = draw.randrange(1, len(one))
        kind = len(found) % 4
        prediction = [other, one[:cut] + other[cut:], one[:cut], one[cut:] + one[:cut]][kind]
        found.append((prediction, one))
    return found
