"""Whether a base model is whole, and whether it is the released one."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from chatglm_tuning.checkpoint import CERTIFICATE_NAME, file_digest
from chatglm_tuning.evaluation.answers import Drawing, answer_batch
from chatglm_tuning.evaluation.prompts import Prompt, encode_prompt
from chatglm_tuning.loading import Base, first_not_finite
from chatglm_tuning.proof import probe_logits
from chatglm_tuning.shards import WeightFiles, find_weight_files, is_zip, reading_progress
from chatglm_tuning.verification.checks import Check
from chatglm_tuning.verification.digests import damaged_record, digests_of
from chatglm_tuning.verification.published import (
    ANSWERS,
    FILE_DIGESTS,
    HIDDEN_SIZE,
    LAYERS,
    VOCAB_SIZE,
    PublishedAnswer,
)
from chatglm_tuning.wording import counted


def check_files(folder: Path) -> Iterator[Check]:
    """Compare files with what is published of them, and with what records which bytes they had, but for a certificate.

    Raises UserError for weights that are not whole.
    """
    files = find_weight_files(folder)
    yield Check(
        "weight files", True, f"{counted(len(files.files), 'file')}, {files.size_bytes / 2**30:.2f} GiB, all there"
    )
    for name, digest in FILE_DIGESTS.items():
        if (folder / name).is_file():
            is_same = file_digest(folder / name) == digest
            yield Check(name, is_same or None, "as released" if is_same else "another than ChatGLM-6B's release has")
    if not (folder / CERTIFICATE_NAME).is_file():
        yield from _check_bytes(files)


def _check_bytes(files: WeightFiles) -> Iterator[Check]:
    """Compare every weight file with its recorded digest, else with the checksums that a `.bin` has inside."""
    recorded = digests_of(files.folder)
    changed: list[str] = []
    seen: dict[str, int] = {}
    unseen: list[str] = []
    with reading_progress("comparing", files, show=True) as advance:
        for file in files.files:
            size = file.stat().st_size
            if file.name in recorded:
                source, digest = recorded[file.name]
                if file_digest(file) != digest:
                    changed.append(f"{file.name} has another SHA-256 than {source} says")
                seen[source] = seen.get(source, 0) + 1
            elif is_zip(file):
                record = damaged_record(file)
                if record is not None:
                    changed.append(f"{file.name} is damaged: {record} has another CRC-32 than was written")
                seen["the CRC-32 of each tensor"] = seen.get("the CRC-32 of each tensor", 0) + 1
            else:
                unseen.append(file.name)
            advance(size)
    if changed:
        more = f" ({len(changed)} files differ)" if len(changed) > 1 else ""
        yield Check("bytes", False, changed[0] + more)
    elif seen:
        yield Check("bytes", True, "; ".join(f"{counted(count, 'file')} by {source}" for source, count in seen.items()))
    if unseen:
        yield Check("bytes", None, f"nothing says which bytes {counted(len(unseen), 'file')} had ({unseen[0]})")


def check_values(base: Base) -> Check:
    """See whether every value of the loaded weights is finite, and what is computed with them; before an adapter."""
    name = "values of the base"
    bad = first_not_finite(dict(base.model.named_parameters()))
    if bad is not None:
        return Check(name, False, f"{bad} holds values that are not finite")
    with torch.no_grad():
        is_finite = bool(probe_logits(base.model).isfinite().all())
    if not is_finite:
        return Check(name, False, "all are finite, and the logits that are computed with them are not")
    return Check(name, True, f"all are finite, as are its logits; fingerprint {base.identity.fingerprint[:16]}")


def is_of_released_size(base: Base) -> bool:
    """Whether the model has the size of ChatGLM-6B, so that published answers say something of it."""
    config = base.config
    return (config.num_layers, config.hidden_size, config.vocab_size) == (LAYERS, HIDDEN_SIZE, VOCAB_SIZE)


def check_answers(base: Base, answers: Sequence[PublishedAnswer] = ANSWERS) -> Iterator[Check]:
    """Ask the base what is published, greedily; call it before an adapter is added."""
    for published in answers:
        prompt = encode_prompt(Prompt(published.query, ()), base.tokenizer, base.config.max_sequence_length)
        (answer,) = answer_batch(base.model, base.tokenizer, [prompt], Drawing(max_output_length=published.length))
        is_given = published.is_given(answer.prediction)
        what = f"{published.query!r} is answered as published"
        if not is_given:
            what = (
                f"{published.query!r} is answered {answer.prediction!r}, and the release answers {published.answer!r}"
            )
        yield Check("published answers", is_given, what)
