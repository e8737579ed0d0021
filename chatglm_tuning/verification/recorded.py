"""What a manifest records that a verification uses, each value of the kind that it must be.

The digest of a manifest is optional, so that what it says may be anything that JSON holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from chatglm_tuning.checkpoint import MANIFEST_NAME, Manifest
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import DtypeName
from chatglm_tuning.proof import RECORDED

_LARGEST = 3.4e38
"""Of fp32, in which logits are computed."""


@dataclass(frozen=True)
class RecordedProof:
    """What the adapter answered when it was saved: `RECORDED` logits with it and without, and in which precision.

    quantization_bit: of the base, 4 or 8, None in full precision.
    """

    quantization_bit: int | None
    dtype: str
    logits: Sequence[float]
    base_logits: Sequence[float]


@dataclass(frozen=True)
class Record:
    """The base, the precision and the proof of a manifest. dtype, proof: None where there is none."""

    base: str
    fingerprint: str
    quantization_bit: Literal[4, 8] | None
    dtype: DtypeName | None
    proof: RecordedProof | None


def record_of(manifest: Manifest, folder: Path) -> Record:
    """Return what the manifest of `folder` records; raises UserError for a value that cannot be used."""
    base, dtype = manifest.base_model, manifest.settings.get("dtype")
    wrong = None
    if not isinstance(base.name_or_path, str) or not isinstance(base.fingerprint, str):
        wrong = "name or fingerprint of the base"
    elif base.quantization_bit not in (None, 4, 8):
        wrong = "quantization_bit"
    elif dtype is not None and dtype not in get_args(DtypeName):
        wrong = "dtype"
    elif manifest.proof is not None and not _is_proof(manifest.proof):
        wrong = "proof"
    if wrong is not None:
        raise UserError(
            f"the manifest cannot be used (its {wrong} is none)",
            code="C104",
            where=str(folder / MANIFEST_NAME),
            remedy="Copy the folder again, or use an earlier checkpoint",
        )
    proof, bits = None, cast("Literal[4, 8] | None", base.quantization_bit)
    if manifest.proof is not None:
        proof = RecordedProof(bits, **{name: manifest.proof[name] for name in ("dtype", "logits", "base_logits")})
    return Record(base.name_or_path, base.fingerprint, bits, cast("DtypeName | None", dtype), proof)


def _is_proof(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("dtype"), str):
        return False
    return all(_are_logits(content.get(name)) for name in ("logits", "base_logits"))


def _are_logits(content: Any) -> bool:
    return isinstance(content, list) and len(content) == RECORDED and all(map(_is_finite_number, content))


def _is_finite_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST  # NaN is not
