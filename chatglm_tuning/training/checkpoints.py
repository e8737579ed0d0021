"""How a checkpoint appears: written beside its place, proved, described, and put there at once."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from peft import PeftModel, set_peft_model_state_dict
from torch import nn

from chatglm_tuning.adapters.ptuning import PREFIX_KEY
from chatglm_tuning.checkpoint import Manifest, fsync, read_lora, read_prefix, write_manifest
from chatglm_tuning.errors import UserError
from chatglm_tuning.proof import Proof
from chatglm_tuning.training.expected import tell

logger = logging.getLogger(__name__)

PART_NAME = ".checkpoint.part"
"""The folder in an output folder in which a checkpoint is written."""
REFUSED_NAME = "refused-result"
"""The folder in an output folder that a result is kept in which its proof has refused."""


def put_in_place(written: Path, place: Path, manifest: Manifest, proof: Proof | None) -> None:
    """Describe the checkpoint in `written`, file by file, and rename it to `place`, all of it on the disk."""
    names = [path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()]
    write_manifest(written, replace(manifest, proof=None if proof is None else proof.describe()), names)
    shutil.rmtree(place, ignore_errors=True)  # a damaged one, which an earlier run has left
    written.replace(place)
    fsync(place.parent)


def refuse_unproved(proof: Proof, folder: Path) -> None:
    """Raise UserError where the live adapter answers with NaN, or the one that was read answers otherwise.

    folder: where it was to be put.
    """
    if not proof.is_finite:
        raise UserError(
            "the adapter that was trained answers with numbers that are not finite",
            code="T101",
            where=str(folder),
            remedy="lower --learning_rate, and go on from a checkpoint before this one or start again",
        )
    if not proof.equals_live:
        raise UserError(
            "the adapter that was saved, read again, answers otherwise than the one that was trained (the largest "
            f"difference is {proof.gap_to_live:.2g} of the largest logit)",
            code="T106",
            where=str(folder),
            remedy="look at the disk, and resume from the last checkpoint",
        )


@contextmanager
def keeping_refused(written: Path, place: Path) -> Iterator[None]:
    """Move a result that is refused inside from `written` to `place`, where no command looks for one.

    A run may have nothing else to show for its hours.
    """
    try:
        yield
    except UserError:
        shutil.rmtree(place, ignore_errors=True)
        place.unlink(missing_ok=True)  # where it was a file
        written.replace(place)
        logger.error("what was written is kept in %s, and is no result", place)
        raise


def tell_proof(proof: Proof, folder: Path, *, stops: bool) -> None:
    """Say what the proof of `folder`, which holds, gave. stops: whether an adapter that changes nothing is an error."""
    if proof.differs_from_base:
        logger.info("%s: read again, it answers as the live adapter does, and not as the base alone", folder)
        return
    tell(
        "the adapter changes nothing: the model answers as its base alone",
        "look at the learning rate and its schedule (a warm-up begins at 0)",
        code="T108",
        stops=stops,
        where=str(folder),
    )


def load_adapter_values(model: nn.Module, folder: Path) -> None:
    """Set the values of the adapter in `model` to those saved in `folder`, a checkpoint of ours of the same shape.

    Raises UserError where it is damaged.
    """
    if isinstance(model, PeftModel):
        result = set_peft_model_state_dict(model, read_lora(folder))
        assert not result.unexpected_keys, result.unexpected_keys
    else:
        _shape, tensors = read_prefix(folder)
        model.get_submodule(PREFIX_KEY.removesuffix(".")).load_state_dict(tensors)
