"""Which weights of the base a LoRA is merged onto: full precision, or those of 8 or 4 bits that it was trained on."""

import logging
from pathlib import Path

from chatglm_tuning.checkpoint import Manifest
from chatglm_tuning.config.export import ExportArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMConfig

logger = logging.getLogger(__name__)


def held_bits_of(
    arguments: ExportArguments, config: ChatGLMConfig, manifest: Manifest | None, folder: Path
) -> int | None:
    """Return 8 or 4 where a LoRA is merged onto weights of that many bits, None for full precision; says which and why.

    Raises UserError where flags, adapter and base contradict each other.
    """
    stored, asked = config.quantization_bit or None, arguments.quantization_bit
    trained = None if manifest is None else manifest.base_model.quantization_bit
    if arguments.merge_onto == "full":
        if stored:
            raise UserError(
                f"the folder holds int{stored} weights, which --merge_onto full cannot use",
                code="M121",
                where=str(folder),
                remedy="Give the full-precision model, or leave --merge_onto out",
            )
        return None
    if asked and stored and asked != stored:
        raise UserError(
            f"--quantization_bit says {asked}, and the base holds int{stored}",
            code="M121",
            where=str(folder),
            remedy="Leave it out, or give --merge_onto full with a full-precision base",
        )
    if asked and manifest is not None and not stored and asked != trained:
        raise UserError(
            f"--quantization_bit says {asked}, and the adapter was trained on {_named(trained)} weights",
            code="C111",
            where=str(arguments.adapter),
            remedy=f"Leave it out; --output_quantization_bit {asked} writes the merged weights in int{asked}",
        )
    held = stored or asked or trained
    _say(held, trained, is_known=manifest is not None)
    return held


def _named(bits: int | None) -> str:
    return f"int{bits}" if bits else "full-precision"


def _say(held: int | None, trained: int | None, *, is_known: bool) -> None:
    """Say what the LoRA is merged onto, and whether that is what it was trained on."""
    onto = f"int{held} weights of the base, dequantised" if held else "full-precision weights of the base"
    if not is_known:
        logger.info(
            "the LoRA is merged onto the %s; what it was trained on is not known, since its folder has no manifest",
            onto,
        )
    elif held == trained:
        logger.info("the LoRA is merged onto the %s: what it was trained on", onto)
    else:
        logger.warning(
            "the LoRA was trained on %s weights and is merged onto the %s: the export will answer as LoRA and int%s "
            "base do together. Give the base in full precision to merge it onto what it was trained on",
            _named(trained),
            onto,
            held,
        )
