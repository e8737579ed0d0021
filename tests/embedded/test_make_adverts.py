"""The sample adverts: the same each time, disjoint, varied, and each says its attributes."""

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import adverts
import pytest
from make_adverts import DEFAULT_FOLDER, DEV_NAME, TRAIN_NAME

SCRIPT = Path(adverts.__file__).with_name("make_adverts.py")


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEFAULT_FOLDER / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train() -> list[dict[str, str]]:
    return read(TRAIN_NAME)


@pytest.fixture(scope="module")
def dev() -> list[dict[str, str]]:
    return read(DEV_NAME)


def test_the_readme_command_writes_the_committed_files(tmp_path):
    flags = ["--train", "3600", "--dev", "240", "--seed", "20231", "--folder", str(tmp_path)]
    # -S hides installed packages: the generator needs the standard library alone.
    subprocess.run([sys.executable, "-S", str(SCRIPT), *flags], check=True)
    for name in (TRAIN_NAME, DEV_NAME):
        assert (tmp_path / name).read_bytes() == (DEFAULT_FOLDER / name).read_bytes()


def test_another_seed_gives_other_rows_and_a_smaller_count_the_first_rows():
    rows = adverts.generate_adverts(30, 1)
    assert rows == adverts.generate_adverts(60, 1)[:30]
    assert not {row["summary"] for row in rows} & {row["summary"] for row in adverts.generate_adverts(30, 2)}


def test_excluded_texts_never_come_back():
    rows = adverts.generate_adverts(20, 4)
    excluded = {row["content"] for row in rows} | {row["summary"] for row in rows}
    again = adverts.generate_adverts(20, 4, excluded)
    assert not excluded & ({row["content"] for row in again} | {row["summary"] for row in again})


def test_there_are_enough_rows_in_adgens_format(train, dev):
    assert len(train) >= 3000
    assert len(dev) >= 200
    for row in train + dev:
        assert list(row) == ["content", "summary"]
        assert re.fullmatch(r"类型#(裤|裙|上衣)(\*[^#*]+#[^#*]+){3,8}", row["content"])
        assert 60 <= len(row["summary"]) <= 120


@pytest.mark.parametrize("column", ["content", "summary"])
def test_no_text_occurs_twice_or_in_both_files(train, dev, column):
    texts = [row[column] for row in train + dev]
    assert len(set(texts)) == len(texts)


def test_the_shown_prompts_are_in_no_file(train, dev):
    assert not set(adverts.SHOWN_PROMPTS) & {row["content"] for row in train + dev}


def test_the_shown_prompts_use_only_values_that_adverts_know():
    known = adverts.phrases()["attributes"]
    for content in adverts.SHOWN_PROMPTS:
        _, attributes = adverts.attributes_of(content)
        assert [value for key, value in attributes if value not in known[key]["values"]] == []


def test_every_summary_says_every_value(train, dev):
    missing = [row for row in train + dev if adverts.attribute_coverage(row["content"], row["summary"]) < 1]
    assert missing == []


def test_summaries_are_varied(train):
    sentences = {sentence for row in train for sentence in re.split("[。？]", row["summary"]) if sentence}
    openings = {re.split("[，。？]", row["summary"])[0] for row in train}
    pairs = {row["summary"][i : i + 2] for row in train for i in range(len(row["summary"]) - 1)}
    assert len(sentences) > 8000
    assert len(openings) > 800
    assert len(pairs) > 4000


def test_summaries_read_cleanly(train, dev):
    for row in train + dev:
        assert not re.search(r"[{}]|的的|，，|。。|？。|，。|^[，。]", row["summary"]), row["summary"]
        assert row["summary"].endswith("。")


def test_values_that_cannot_be_worn_together_never_are(train):
    exclusions = {frozenset(pair) for pair in adverts.phrases()["never_together"]}
    for row in train:
        values = [value for _, value in adverts.attributes_of(row["content"])[1]]
        assert not [pair for pair in exclusions if pair <= set(values)], row["content"]


def test_coverage_is_the_share_of_values_that_occur():
    content = "类型#裤*版型#宽松*颜色#黑色*风格#简约*裤型#阔腿裤"
    assert adverts.attribute_coverage(content, "宽松的阔腿裤") == 0.5
    assert adverts.attribute_coverage(content, "裤子") == 0
    assert adverts.attribute_coverage(content, "黑色简约，宽松的阔腿裤") == 1


def test_content_and_attributes_are_inverse(train):
    for row in islice(train, 50):
        assert adverts.content_of(*adverts.attributes_of(row["content"])) == row["content"]


def test_every_name_in_the_phrase_book_is_a_known_value():
    book = adverts.phrases()
    values = {value for attribute in book["attributes"].values() for value in attribute["values"]}
    assert {value for pair in book["never_together"] for value in pair} <= values
    for narrowed in (*book["garment_values"].values(), *book["type_values"].values()):
        for key, allowed in narrowed.items():
            assert set(allowed) <= set(book["attributes"][key]["values"])
    for value, spoken in book["said_as"].items():
        assert value in spoken
