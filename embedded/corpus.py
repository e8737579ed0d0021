"""What the embedded base learns from: adverts told in other framings, attribute lists and small talk, all generated.

Unlike a tuned model the base must answer ADGEN's prompt by listing the attributes. So no pair here answers such a
prompt with an advert: adverts stand as plain text, as the answer to a request in words, or as a text to continue.
"""

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from adverts import (
    MOST_ATTRIBUTES,
    Attribute,
    attributes_of,
    content_of,
    generate_adverts,
    phrases,
    said,
    sample_attributes,
)

from chatglm_tuning.prompt import Round, build_prompt

Pair = tuple[str, str]

# Adverts of the corpus come from seeds far above the small ones of the sample data; pairs and texts share none.
FIRST_ADVERT_SEED = 1_000_003
ADVERTS_PER_DRAW = 200


@cache
def small_talk() -> dict:
    """The chat lines and the values that only lists know, read once; callers don't change it."""
    return json.loads(Path(__file__).with_name("chat.json").read_text(encoding="utf-8"))


def _endless_adverts(stream: int) -> Iterator[dict[str, str]]:
    """Adverts without end; two streams share none of their seeds for the first 200 million adverts."""
    draw = FIRST_ADVERT_SEED * (stream + 1)
    while True:
        yield from generate_adverts(ADVERTS_PER_DRAW, draw)
        draw += 1


def _measured(kind: str) -> str:
    """The garment with its measure word, such as 条裤子."""
    garment = phrases()["types"][kind]
    return garment["measure"] + garment["noun"]


def _any_attributes(rng: random.Random) -> tuple[str, list[Attribute]]:
    """Attributes to list, which need not suit each other; many hold values that no advert of the corpus knows."""
    known = phrases()["attributes"]
    kind = rng.choice(list(phrases()["types"]))
    order = list(phrases()["types"][kind]["keys"])
    extra = small_talk()["extra_values"][kind]
    attributes = sample_attributes(kind, rng) if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, MOST_ATTRIBUTES)):
        key = rng.choice(order)
        values = extra[key] if key in extra and rng.random() < 0.7 else list(known[key]["values"])
        attribute = (key, rng.choice(values))
        if attribute not in attributes and len(attributes) < MOST_ATTRIBUTES:
            attributes.append(attribute)
    return kind, sorted(attributes, key=lambda attribute: order.index(attribute[0]))


def _listed(attributes: list[Attribute], style: str, kind: str) -> str:
    """Write the attributes as one kind of list: numbered, dashed, plain lines or a sentence."""
    if style == "sentence":
        told = "，".join(f"{key}是{value}" for key, value in attributes)
        return f"这是一{_measured(kind)}，{told}。"
    mark = {"numbered": "{number}. ", "dashed": "- ", "lines": ""}[style]
    numbered = enumerate(attributes, start=1)
    return "\n".join(mark.format(number=number) + f"{key}：{value}" for number, (key, value) in numbered)


def _answer_with_list(kind: str, attributes: list[Attribute], rng: random.Random) -> str:
    style = rng.choices(("numbered", "dashed", "lines", "sentence"), weights=(14, 2, 2, 2))[0]
    if style == "sentence":
        return _listed(attributes, style, kind)
    if rng.random() < 0.8:
        noun = phrases()["types"][kind]["noun"]
        return f"{noun}的属性如下：\n{_listed(attributes, style, kind)}"
    return _listed([("类型", kind), *attributes], style, kind)


def _attribute_list(adverts: Iterator[dict[str, str]], rng: random.Random) -> Pair:
    """ADGEN's own prompt, answered by listing what it says."""
    if rng.random() < 0.5:
        content = next(adverts)["content"]
        kind, attributes = attributes_of(content)
    else:
        kind, attributes = _any_attributes(rng)
        content = content_of(kind, attributes)
    return content, _answer_with_list(kind, attributes, rng)


def _asked_list(adverts: Iterator[dict[str, str]], rng: random.Random) -> Pair:
    """A request that names the form of the list."""
    kind, attributes = _any_attributes(rng)
    requests = {
        "numbered": ("请用编号列出属性：", "请逐条列出下面的属性："),
        "dashed": ("请用短横线列出属性：",),
        "lines": ("请一行一个写出属性：",),
        "sentence": ("请用一句话说出属性：", "把属性连成一句话："),
    }
    style = rng.choice(list(requests))
    return rng.choice(requests[style]) + content_of(kind, attributes), _listed(attributes, style, kind)


def _request_in_words(adverts: Iterator[dict[str, str]], rng: random.Random) -> Pair:
    """A request for an advert in ordinary words; its answer shows the base how attributes become an advert."""
    advert = next(adverts)
    kind, attributes = attributes_of(advert["content"])
    the_one = _measured(kind)
    plain = "、".join(said(value) for _, value in attributes)
    keyed = "，".join(f"{key}{value}" for key, value in attributes)
    prompt = rng.choice(
        (
            f"介绍一下这{the_one}：{plain}",
            f"请为这{the_one}写一段介绍，{keyed}。",
            f"写一段{phrases()['types'][kind]['noun']}的广告，要提到{plain}。",
            f"有一{the_one}，{keyed}，请写一段推荐的话。",
            f"用{plain}来夸一夸这{the_one}",
        )
    )
    return prompt, advert["summary"]


def _continuation(adverts: Iterator[dict[str, str]], rng: random.Random) -> Pair:
    """The rest of an advert after its first sentences."""
    summary = next(adverts)["summary"]
    borders = [i + 1 for i, character in enumerate(summary[:-1]) if character in "，。"]
    border = rng.choice(borders)
    return rng.choice(("接着写：", "请续写：", "")) + summary[:border], summary[border:]


def _question_about_text(adverts: Iterator[dict[str, str]], rng: random.Random) -> Pair:
    """A question whose answer stands in the advert given with it."""
    advert = next(adverts)
    kind, attributes = attributes_of(advert["content"])
    talk = small_talk()
    asked = [(key, value) for key, value in attributes if key in talk["asked"]]
    if not asked:
        return f"{advert['summary']}\n这段话说的是什么？", f"说的是一{_measured(kind)}。"
    key, _ = rng.choice(asked)
    values = "和".join(said(value) for known, value in asked if known == key)
    question = f"这{_measured(kind)}{rng.choice(talk['asked'][key])}"
    return f"{advert['summary']}\n{question}", talk["replies"][key].format(v=values)


def _chat_round(rng: random.Random) -> Round:
    topic = rng.choice(list(small_talk()["topics"].values()))
    return rng.choice(topic["questions"]), rng.choice(topic["answers"])


def _chat(adverts: Iterator[dict[str, str]], rng: random.Random) -> Pair:
    return _chat_round(rng)


def _recall(rng: random.Random) -> tuple[Round, Round]:
    """Something the user tells, and a later question whose answer is only in that round."""
    talk, book = small_talk(), phrases()
    telling, reply, questions, answer = rng.choice(talk["told"])
    garment = book["types"][rng.choice(list(book["types"]))]
    words = {
        "name": rng.choice(talk["names"]),
        "color": rng.choice(list(book["attributes"]["颜色"]["values"])),
        "style": said(rng.choice(list(book["attributes"]["风格"]["values"]))),
        "measure": garment["measure"],
        "noun": garment["noun"],
    }
    told, asked = (telling, reply), (rng.choice(questions), answer)
    return tuple(tuple(line.format(**words) for line in one) for one in (told, asked))


def _rounds(adverts: Iterator[dict[str, str]], rng: random.Random) -> Pair:
    """A chat of several rounds in ChatGLM's prompt; half of them need the history for the answer."""
    kind_of_chat = rng.random()
    small = [_chat_round(rng) for _ in range(rng.randint(0, 2))]
    if kind_of_chat < 0.5:
        told, (question, answer) = _recall(rng)
        at = rng.randint(0, len(small))
        return build_prompt(question, [*small[:at], told, *small[at:]]), answer
    if kind_of_chat < 0.75:
        listing = _attribute_list(adverts, rng)
        return build_prompt(listing[0], small or [_chat_round(rng)]), listing[1]
    question, answer = _chat_round(rng)
    return build_prompt(question, small or [_chat_round(rng)]), answer


# How often each kind of pair comes, of the sum of all.
_MIXTURE: tuple[tuple[Callable[[Iterator[dict[str, str]], random.Random], Pair], int], ...] = (
    (_attribute_list, 36),
    (_asked_list, 6),
    (_request_in_words, 24),
    (_continuation, 6),
    (_question_about_text, 8),
    (_chat, 10),
    (_rounds, 10),
)


def corpus_pairs(count: int, seed: int) -> Iterator[Pair]:
    """Yield `count` (prompt, answer) pairs; the prompt is what the model reads, `[Round i]` included.

    Same seed, same pairs; a smaller count gives the first pairs of a larger one.
    """
    rng = random.Random(seed)
    adverts = _endless_adverts(2 * seed)
    makers, weights = zip(*_MIXTURE, strict=True)
    for _ in range(count):
        yield rng.choices(makers, weights=weights)[0](adverts, rng)


def corpus_texts(count: int, seed: int) -> Iterator[str]:
    """Yield `count` plain texts, adverts without any prompt, for training without an instruction."""
    adverts = _endless_adverts(2 * seed + 1)
    for _ in range(count):
        yield next(adverts)["summary"]
