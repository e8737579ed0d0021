"""Adverts for clothes in ADGEN's shape, composed from the phrases in `phrases.json`.

A prompt lists attributes (`类型#裤*版型#宽松`); its advert says every value of them in running Chinese. All phrases
are this project's own words. Standard library only, and the same seed gives the same adverts.
"""

import json
import random
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path

Attribute = tuple[str, str]

# The prompts that the original's README shows: they are the demo, so neither data nor corpus may hold them.
SHOWN_PROMPTS = (
    "类型#裤*版型#宽松*风格#性感*图案#线条*裤型#阔腿裤",
    "类型#裤*风格#休闲*风格#潮*裤款式#口袋*裤款式#纽扣*裤口#卷边",
    "类型#裙*材质#蕾丝*颜色#墨绿色*风格#清新*图案#撞色*图案#蕾丝*裙长#长裙*裙款式#勾花镂空",
    "类型#上衣*材质#牛仔布*颜色#白色*风格#简约*图案#刺绣*衣样式#外套*衣款式#破洞",
    "类型#裤*版型#显瘦*材质#网纱*风格#潮*裤长#七分裤*裤款式#纱网",
)
FEWEST_ATTRIBUTES, MOST_ATTRIBUTES = 3, 8
SHORTEST_SUMMARY, LONGEST_SUMMARY = 60, 120
TRIES_PER_PROMPT = 12

# In an advert the garment's cut and cloth come first, then its looks, then its details from top to bottom.
TELLING_ORDER = (
    ("版型", "裤型", "裙型", "衣样式", "裙长", "裤长", "材质"),
    ("颜色", "图案"),
    ("裙领型", "衣领型", "裙袖型", "衣袖型", "衣袖长", "衣长", "衣门襟", "裤腰型", "裙腰型"),
    ("裤款式", "裙款式", "衣款式", "裙下摆", "裤口"),
)
# A head that starts like this is a clause of its own and cannot follow "搭配".
CLAUSE_STARTS = ("选用", "采用", "精选", "加入", "经过", "整体", "搭配", "版型", "颜色", "领口采", "袖子", "腰部")
CLAUSE_STARTS += ("用", "裤口做", "腰间做", "门襟采", "满满", "浓浓")
LINKS = ("搭配", "加上", "再配上")


@cache
def phrases() -> dict:
    """The phrase book, read once; callers don't change it."""
    return json.loads(Path(__file__).with_name("phrases.json").read_text(encoding="utf-8"))


def said(value: str) -> str:
    """How an advert says a value; it always contains the value itself."""
    return phrases()["said_as"].get(value, value)


def content_of(kind: str, attributes: Sequence[Attribute]) -> str:
    """Return ADGEN's prompt, such as `类型#裤*版型#宽松`."""
    return "*".join(f"{key}#{value}" for key, value in [("类型", kind), *attributes])


def attributes_of(content: str) -> tuple[str, list[Attribute]]:
    """Split ADGEN's prompt into the garment's kind and its other attributes."""
    pairs = [tuple(part.split("#", 1)) for part in content.split("*")]
    return pairs[0][1], pairs[1:]


def attribute_coverage(content: str, text: str) -> float:
    """The share, 0 to 1, of the prompt's attribute values (but its 类型) that stand literally in `text`."""
    _, attributes = attributes_of(content)
    values = {value for _, value in attributes}
    return sum(value in text for value in values) / len(values)


def _fits(key: str, value: str, chosen: Sequence[Attribute]) -> bool:
    book = phrases()
    values = {known for _, known in chosen}
    if value in values or any({value, other} in _exclusions() for other in values):
        return False
    for rule in (key, f"{key}#{value}"):
        for needed_key, allowed in book["only_with"].get(rule, {}).items():
            if not any(known == needed_key and worn in allowed for known, worn in chosen):
                return False
    return True


@cache
def _exclusions() -> frozenset[frozenset[str]]:
    return frozenset(frozenset(pair) for pair in phrases()["never_together"])


def sample_attributes(kind: str, rng: random.Random) -> list[Attribute]:
    """Draw attributes that can be worn together, in the order in which ADGEN lists them."""
    book = phrases()
    keys = book["types"][kind]["keys"]
    narrowed = dict(book["type_values"].get(kind, {}))
    chosen: list[Attribute] = []
    # The garment's length or style decides what else it may have, so it is drawn first.
    drawing_order = sorted(keys, key=lambda key: key not in ("裙长", "衣样式"))
    for key in drawing_order:
        wanted = (rng.random() < keys[key]) + (rng.random() < book["twice"].get(key, 0))
        values = list(narrowed.get(key, book["attributes"][key]["values"]))
        rng.shuffle(values)
        fitting = 0
        for value in values:
            if fitting == wanted:
                break
            if _fits(key, value, chosen):
                chosen.append((key, value))
                fitting += 1
                narrowed |= book["garment_values"].get(value, {})
    order = list(keys)
    return sorted(chosen, key=lambda attribute: order.index(attribute[0]))


def _bigrams(text: str) -> set[str]:
    return {text[i : i + 2] for i in range(len(text) - 1)}


def _freshest(candidates: Sequence[str], text: str, rng: random.Random) -> str:
    """Pick at random among the candidates that repeat the fewest of the text's character pairs."""
    told = _bigrams(text)
    shuffled = rng.sample(candidates, len(candidates))
    return min(shuffled, key=lambda candidate: len(_bigrams(candidate) & told))


def _opening(kind: str, untold: list[Attribute], rng: random.Random) -> str:
    """Write the first clause, which names the garment; what it says is removed from `untold`."""
    book = phrases()
    garment = book["types"][kind]
    noun = garment["noun"]
    named = [(key, value) for wanted in garment["noun_keys"] for key, value in untold if key == wanted]
    if named:
        noun = said(named[0][1])
        untold.remove(named[0])
    describing = [
        (key, value) for key, value in untold if "modifier" in book["attributes"][key] and value != "立体剪裁"
    ]
    one_each = list({key: (key, value) for key, value in describing}.values())
    picked = rng.sample(one_each, min(len(one_each), rng.choice((0, 1, 1, 2))))
    # From the noun outwards; of two modifiers only the outer keeps its 的: 复古风的黑色长裙.
    picked.sort(key=lambda attribute: ("颜色", "版型", "风格").index(attribute[0]))
    for nearness, (key, value) in enumerate(picked):
        modifier = rng.choice(book["attributes"][key]["modifier"]).format(v=said(value))
        noun = (modifier if nearness == len(picked) - 1 else modifier.removesuffix("的")) + noun
        untold.remove((key, value))
    hook = rng.choice(book["hooks"][""] + book["hooks"][kind])
    return rng.choice(book["openings"]).format(noun=noun, measure=garment["measure"], hook=hook)


def _telling_order(untold: Sequence[Attribute], rng: random.Random) -> list[Attribute]:
    ordered = []
    for group in TELLING_ORDER:
        members = [attribute for attribute in untold if attribute[0] in group]
        ordered += rng.sample(members, len(members))
    styles = [attribute for attribute in untold if attribute[0] == "风格"]
    return styles + ordered if rng.random() < 0.4 else ordered + styles


def _statement(kind: str, attributes: Sequence[Attribute], told: str, rng: random.Random) -> str:
    """Say one attribute, or two in one breath, and what is good about the last; `told` is the text before it."""
    book = phrases()
    garment = book["types"][kind]
    said_heads = []
    for key, value in attributes:
        entry = book["attributes"][key]["values"][value]
        heads = entry.get("heads", book["attributes"][key]["heads"])
        filled = [head.format(v=said(value), body=garment["body"], edge=garment["edge"]) for head in heads]
        if len(attributes) > 1:
            filled = [head for head in filled if not head.startswith(CLAUSE_STARTS)]
        said_heads.append(_freshest(filled, told, rng))
    head = rng.choice(("搭配", "配上")).join(said_heads)
    key, value = attributes[-1]
    effect = _freshest(book["attributes"][key]["values"][value]["effects"], told + head, rng)
    return f"{head}，{effect}"


def _breaths(attributes: Sequence[Attribute], rng: random.Random) -> list[list[Attribute]]:
    """Group the attributes into those that are said alone and pairs that share a clause; a style is said alone."""
    groups: list[list[Attribute]] = []
    for attribute in attributes:
        previous = groups[-1] if groups else []
        can_pair = len(previous) == 1 and "风格" not in (previous[0][0], attribute[0])
        if can_pair and rng.random() < 0.25:
            previous.append(attribute)
        else:
            groups.append([attribute])
    return groups


def write_summary(kind: str, attributes: Sequence[Attribute], rng: random.Random) -> str:
    """Write one advert that says every value of `attributes`; its length is whatever comes out."""
    book = phrases()
    untold = list(attributes)
    text = _opening(kind, untold, rng)
    room = rng.choice((0, 0, 1))  # how many more statements fit into the sentence
    for group in _breaths(_telling_order(untold, rng), rng):
        statement = _statement(kind, group, text, rng)
        if room and not text.endswith("？"):
            can_link = "。" in text and len(group) == 1 and group[0][0] != "风格"
            link = rng.choice(LINKS) if can_link and not statement.startswith(CLAUSE_STARTS) else ""
            text += f"，{link}{statement}"
            room -= 1
        else:
            text += ("" if text.endswith("？") else "。") + statement
            room = rng.choice((0, 1))
    text += "" if text.endswith("？") else "。"
    if rng.random() < 0.6:
        text += _freshest(book["closings"][""] + book["closings"][kind], text, rng) + "。"
    return text


def generate_adverts(count: int, seed: int, excluded: Collection[str] = ()) -> list[dict[str, str]]:
    """Return `count` rows of `content` and `summary`, no text twice and none of `excluded` (contents or summaries).

    Same seed, same rows; a smaller count gives the first rows of a larger one.
    """
    rng = random.Random(seed)
    seen = {*excluded, *SHOWN_PROMPTS}
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        kind = rng.choice(list(phrases()["types"]))
        attributes = sample_attributes(kind, rng)
        content = content_of(kind, attributes)
        if content in seen or not FEWEST_ATTRIBUTES <= len(attributes) <= MOST_ATTRIBUTES:
            continue
        for _ in range(TRIES_PER_PROMPT):
            summary = write_summary(kind, attributes, rng)
            if SHORTEST_SUMMARY <= len(summary) <= LONGEST_SUMMARY and summary not in seen:
                seen |= {content, summary}
                rows.append({"content": content, "summary": summary})
                break
    return rows
