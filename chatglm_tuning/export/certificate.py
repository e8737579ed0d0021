"""Whether an exported model answers as base and adapter did: what was measured, the limits, and the verdict.

All is computed in fp32, teacher-forced along the greedy answers of base and adapter. Where the export's likeliest token
is the same at every place, its own greedy answer is the same too.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chatglm_tuning.checkpoint import CERTIFICATE_NAME
from chatglm_tuning.errors import UserError
from chatglm_tuning.export.probes import Answers

_DIGITS = 4
# The tolerance of merged against unmerged fp32: sums in another order, over some thousand products.
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5
# How much of the adapter's own effect rounding may cost, in the mean and at the largest. The nearest of 15 levels a row
# is far from most weights: at half of the effect, an export is still nearer to the tuned model than to the base.
_SHARE_OF_EFFECT = {"int4": 0.5, "q4_0": 0.5}
_DEFAULT_SHARE = 0.25
# The most that rounding a number changes it by, of its size.
_ROUNDOFF = {"float16": 2**-11, "f16": 2**-11, "bfloat16": 2**-8}
# Rounding errors of weights are independent, and the 112 products of 28 layers add theirs: about ten roundoffs of the
# spread of the logits. Three times that is too much. Twice the roundoff is no more than what computing in that type
# does to the logits: a gap, or an adapter, below it cannot be seen there.
_MOST_ROUNDOFFS, _UNSEEN_ROUNDOFFS = 30, 2


@dataclass(frozen=True)
class Measures:
    """Distances between logits over the places of an answer.

    gap: of export to base and adapter; effect: of base alone to base and adapter; spread: the standard deviation of
    the logits at one place. equal_tokens, of so many tokens; equal_answers, of so many answers.
    """

    largest_gap: float
    mean_gap: float
    largest_effect: float
    mean_effect: float
    largest_logit: float
    spread: float
    equal_tokens: int
    tokens: int
    equal_answers: int
    answers: int

    @property
    def agreement(self) -> float:
        """The share of tokens that the export would choose, too."""
        return self.equal_tokens / self.tokens


def measure(reference: Answers, alone: Tensor, exported: Tensor) -> Measures:
    """Compare logits `(rows, new, vocab)`: those of base and adapter, of the base alone and of the export."""
    places = reference.is_answer
    wanted, without, found = (logits[places] for logits in (reference.logits, alone, exported))
    gap, effect = (wanted - found).abs(), (wanted - without).abs()
    is_equal = torch.ones_like(places)
    is_equal[places] = wanted.argmax(dim=-1) == found.argmax(dim=-1)
    return Measures(
        largest_gap=float(gap.max()),
        mean_gap=float(gap.mean()),
        largest_effect=float(effect.max()),
        mean_effect=float(effect.mean()),
        largest_logit=float(wanted.abs().max()),
        spread=float(wanted.std(dim=-1).mean()),
        equal_tokens=int(is_equal[places].sum()),
        tokens=int(places.sum()),
        equal_answers=int(is_equal.all(dim=1).sum()),
        answers=len(places),
    )


def limits_of(form: str, measures: Measures) -> dict[str, float]:
    """Return the largest and the mean gap that are allowed for weights in `form`.

    form: a dtype, "int8" or "int4", or a kind of GGML file.
    """
    exact = _RELATIVE * measures.largest_logit + _ABSOLUTE
    if form in ("float32", "f32"):
        return {"largest_logit_gap": exact, "mean_logit_gap": exact}
    share = _SHARE_OF_EFFECT.get(form, _DEFAULT_SHARE)
    largest, mean = share * measures.largest_effect, share * measures.mean_effect
    if (roundoff := _ROUNDOFF.get(form)) is not None:
        most, unseen = _MOST_ROUNDOFFS * roundoff, _UNSEEN_ROUNDOFFS * roundoff
        largest = max(largest, unseen * measures.largest_logit)
        mean = max(min(mean, most * measures.spread), unseen * measures.spread)
    # An adapter that does nothing is merged by changing nothing.
    return {"largest_logit_gap": max(largest, exact), "mean_logit_gap": max(mean, exact)}


def certify(form: str, measures: Measures, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the certificate of an export in `form`; facts: what it is of, put in front."""
    limits = limits_of(form, measures)
    found = {"largest_logit_gap": measures.largest_gap, "mean_logit_gap": measures.mean_gap}
    return {
        "format_version": 1,
        "holds": all(found[name] <= limit for name, limit in limits.items()),
        **facts,
        "weights": form,
        "measured": {
            **{name: _rounded(value) for name, value in found.items()},
            "largest_effect_of_adapter": _rounded(measures.largest_effect),
            "mean_effect_of_adapter": _rounded(measures.mean_effect),
            "largest_logit": _rounded(measures.largest_logit),
            "spread_of_logits": _rounded(measures.spread),
            "greedy_agreement": _rounded(measures.agreement),
            "equal_tokens": f"{measures.equal_tokens} of {measures.tokens}",
            "equal_answers": f"{measures.equal_answers} of {measures.answers}",
        },
        "limits": {name: _rounded(limit) for name, limit in limits.items()},
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def refuse_broken(certificate: Mapping[str, Any]) -> None:
    """Raise UserError where a certificate does not hold."""
    if certificate["holds"]:
        return
    measured, limits = certificate["measured"], certificate["limits"]
    gaps = ", ".join(
        f"{name.replace('_', ' ')} {measured[name]} (limit {limit})"
        for name, limit in limits.items()
        if measured[name] > limit
    )
    raise UserError(
        f"the exported model does not answer as base and adapter do: {gaps}, where the adapter itself moves the logits "
        f"by {measured['mean_effect_of_adapter']} in the mean; {measured['equal_tokens']} greedy tokens are equal. "
        "Nothing was kept",
        code="E108",
        remedy=_remedy(certificate["weights"]),
    )


def _remedy(form: str) -> str:
    if form in ("int4", "int8", "q4_0", "q8_0"):
        return (
            f"{form} is too coarse for this adapter: export more bits, or full precision, or serve base and adapter "
            "side by side"
        )
    if form in ("float16", "bfloat16", "f16"):
        return f"{form} is too coarse for this adapter: use --dtype float32 (GGML: --ggml_type f32)"
    return "This must not happen: report it with the certificate's figures"


def files_in(folder: Path) -> list[Path]:
    """Return every file under `folder`."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def facts_of_files(
    folder: Path, files: Iterable[Path], advance: Callable[[int], None] = lambda _count: None
) -> dict[str, dict[str, Any]]:
    """Return bytes and SHA-256 of files under `folder`, by their paths in it; `advance` is told of each."""
    facts = {}
    for path in sorted(files):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        facts[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
        advance(1)
    return facts


def digest_of_facts(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one SHA-256 over files, their names with them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_certificate(folder: Path, certificate: Mapping[str, Any]) -> None:
    """Write certificate.json into `folder`."""
    text = json.dumps(certificate, indent=2, ensure_ascii=False) + "\n"
    (folder / CERTIFICATE_NAME).write_text(text, encoding="utf-8")
