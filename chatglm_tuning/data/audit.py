"""Training examples looked at as they stream by: what is wrong with their texts, and which of them are the same."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from chatglm_tuning.data.faults import damage_of, ends_like_a_sentence, language_of, oddities_of
from chatglm_tuning.data.records import Example

SHOWN_PLACES = 5

# Where most answers end like a sentence, those that do not were probably cut; elsewhere they are names or numbers.
_SHARE_OF_SENTENCES = 0.8
# Answers of this many characters are no names and no numbers: where some of them end like a sentence, all should.
_LONG_ANSWER = 40
_SHARE_OF_LONG_SENTENCES = 0.1

SAME_TWICE = "the same prompt and answer again"
EMPTY_TURNS = "rounds of the history with an empty question or answer"
ECHOES = "answers that repeat their prompt"
CUT_SENTENCES = "answers that end in mid-sentence"


@dataclass
class Finding:
    """How many examples have one thing. places: `file:line` of the first of them."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str) -> None:
        """Count one example."""
        self.count += 1
        if len(self.places) < SHOWN_PLACES:
            self.places.append(place)


@dataclass(frozen=True)
class ExampleReport:
    """What was found in some examples.

    languages: examples by the language of prompt and answer. findings: by what was found, the most frequent first.
    prompts, pairs: 64-bit digests of every prompt, and of every prompt with its answer, both `(examples,)`.
    """

    examples: int
    languages: dict[str, int]
    findings: dict[str, Finding]
    prompts: np.ndarray
    pairs: np.ndarray


class ExampleAudit:
    """Looks at one example after the other; what it keeps of each is 16 bytes."""

    def __init__(self) -> None:
        self._count = 0
        self._languages: Counter[str] = Counter()
        self._findings: dict[str, Finding] = {}
        self._unended, self._unended_long = Finding(), Finding()
        self._long = 0
        self._prompts, self._pairs = array("Q"), array("Q")
        self._seen: set[int] = set()

    def watch(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Yield the examples as they are, and look at each."""
        for example in examples:
            self.add(example)
            yield example

    def add(self, example: Example) -> None:
        """Look at one example."""
        self._count += 1
        for what in {what for text in _texts_of(example) for what in _problems_of(text)}:
            self._find(what, example)
        if any(not question.strip() or not answer.strip() for question, answer in example.history):
            self._find(EMPTY_TURNS, example)
        if example.answer.strip() == example.query.strip():
            self._find(ECHOES, example)
        is_long = len(example.answer) >= _LONG_ANSWER
        self._long += is_long
        if not ends_like_a_sentence(example.answer):
            self._unended.add(example.source)
            if is_long:
                self._unended_long.add(example.source)
        self._languages[language_of(f"{example.query}\n{example.answer}")] += 1
        self._note_digests(example)

    def _note_digests(self, example: Example) -> None:
        prompt = _digest(example.prompt)
        pair = _digest(example.prompt, example.answer)
        if pair in self._seen:
            self._find(SAME_TWICE, example)
        self._seen.add(pair)
        self._prompts.append(prompt)
        self._pairs.append(pair)

    def _find(self, what: str, example: Example) -> None:
        self._findings.setdefault(what, Finding()).add(example.source)

    def report(self) -> ExampleReport:
        """Return what was found so far."""
        findings = dict(self._findings)
        for unended, of, share in (
            (self._unended, self._count, _SHARE_OF_SENTENCES),
            (self._unended_long, self._long, _SHARE_OF_LONG_SENTENCES),
        ):
            if unended.count and unended.count <= (1 - share) * of:
                findings.setdefault(CUT_SENTENCES, unended)
        return ExampleReport(
            self._count,
            dict(self._languages.most_common()),
            dict(sorted(findings.items(), key=lambda item: -item[1].count)),
            np.array(self._prompts, dtype=np.uint64),
            np.array(self._pairs, dtype=np.uint64),
        )


def _texts_of(example: Example) -> Iterator[str]:
    yield example.query
    yield example.answer
    for question, answer in example.history:
        yield question
        yield answer


def _problems_of(text: str) -> Iterator[str]:
    yield from oddities_of(text)
    if damage := damage_of(text):
        yield damage


def _digest(*texts: str) -> int:
    """A 64-bit digest of texts, in which a run of whitespace is one space."""
    joined = "\0".join(" ".join(text.split()) for text in texts)
    return int.from_bytes(hashlib.blake2b(joined.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Overlap:
    """Examples of the evaluation that training holds too: prompt and answer, and the prompt with another answer."""

    pairs: int
    prompts: int


def overlap_of(trained: ExampleReport, evaluated: ExampleReport) -> Overlap:
    """Count the examples of `evaluated` that are in `trained`."""
    same_pairs = np.isin(evaluated.pairs, trained.pairs)
    same_prompts = np.isin(evaluated.prompts, trained.prompts)
    return Overlap(int(same_pairs.sum()), int((same_prompts & ~same_pairs).sum()))


def prompts_with_other_answers(report: ExampleReport) -> int:
    """Count the prompts that have several different answers."""
    pairs = np.unique(np.stack([report.prompts, report.pairs]), axis=1)
    _, answers = np.unique(pairs[0], return_counts=True)
    return int((answers > 1).sum())
