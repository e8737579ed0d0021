"""What runs of a method usually look like: the learning rates and first losses that a run is compared with.

Sources of the ranges: P-Tuning v2 (Liu et al., arXiv:2110.07602) searches 5e-3 to 3e-2 and the model's authors tune
with 2e-2; LoRA (Hu et al., arXiv:2106.09685, appendix D) uses 2e-4 and the original 1e-3; full tuning of models of this
size uses 1e-5 to 1e-4. The original's two published runs on ADGEN start at a loss of 5.5 (LoRA) and 5.2 (P-Tuning v2).
"""

import logging
import math
from dataclasses import dataclass

from chatglm_tuning.config.arguments import Method, TrainRun
from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMConfig

logger = logging.getLogger(__name__)

_NAMES = {"lora": "LoRA", "ptuning": "P-Tuning v2", "full": "full tuning"}
_RELEASED_SIZE = (28, 4096)  # layers, hidden
_LOSS_OF_RELEASED = 9.0
"""Well above where runs on the released weights start, and below what weights that know nothing give."""
_WORSE_THAN_GUESSING = 1.1
_GROWN = 1.5
_LOWEST_FIRST_LOSS = 0.02


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of AdamW: the usual ones, and those beyond which a run cannot be meant."""

    usual: tuple[float, float]
    limits: tuple[float, float]


RATES: dict[Method, Rates] = {
    "lora": Rates((1e-5, 5e-3), (1e-7, 1e-2)),
    "ptuning": Rates((1e-3, 5e-2), (1e-4, 2e-1)),
    "full": Rates((1e-6, 1e-4), (1e-8, 1e-3)),
}


def check_learning_rate(run: TrainRun) -> None:
    """Warn of a learning rate that the method is not usually tuned with; raises UserError for one far from those.

    With --tripwires warn nothing is raised. Optimizers other than AdamW have other rates and are passed over.
    """
    rate = run.trainer.values.get("learning_rate")
    if rate is None or not str(run.trainer.values.get("optim", "adamw_torch")).startswith("adamw"):
        return
    rates = RATES[run.method]
    low, high = rates.usual
    if low <= rate <= high:
        return
    what = f"learning_rate {rate:g} is {'below' if rate < low else 'above'} what {_NAMES[run.method]} is tuned with"
    usual = f"{low:g} to {high:g}"
    if not rates.limits[0] <= rate <= rates.limits[1]:
        tell(
            f"{what} ({usual}), by far",
            "give one of these, or pass --tripwires warn where it is meant",
            code="T103",
            stops=run.options.tripwires == "stop",
        )
        return
    logger.warning("%s (%s)", what, usual)


def check_first_loss(loss: float, config: ChatGLMConfig, *, stops: bool) -> None:
    """Tell of a loss of the first step of a new run that similar runs do not show.

    loss: per label token. stops: whether one that is worse than guessing ends the run, as a UserError.
    """
    guessing = math.log(config.vocab_size)
    if loss > _WORSE_THAN_GUESSING * guessing:
        tell(
            f"the loss of the first step is {loss:.2f}, and guessing among all {config.vocab_size:,} tokens would give "
            f"{guessing:.2f}: the base model or its tokenizer is damaged, or they do not belong together",
            "see what `chatglm-tuning verify` says of the base, or pass --tripwires warn to go on",
            code="T107",
            stops=stops,
        )
    elif (config.num_layers, config.hidden_size) == _RELEASED_SIZE and loss > _LOSS_OF_RELEASED:
        logger.warning(
            "the loss of the first step is %.2f: runs on the released ChatGLM-6B start below 6; are these its weights?",
            loss,
        )
    elif loss < _LOWEST_FIRST_LOSS:
        logger.warning(
            "the loss of the first step is %.4f: the answers are known before they are learned; do the prompts hold "
            "them, or was the base tuned on these rows?",
            loss,
        )


def check_no_collapse(loss: float, first: float, step: int, config: ChatGLMConfig, *, stops: bool) -> bool:
    """Tell of a loss, per label token, that is worse than guessing where that of the run's first step was better.

    stops: whether it ends the run, as a UserError. Returns whether something was told.
    """
    guessing = math.log(config.vocab_size)
    has_collapsed = loss > _WORSE_THAN_GUESSING * guessing and loss > _GROWN * first
    if has_collapsed:
        tell(
            f"the loss has grown from {first:.2f} to {loss:.2f} by step {step}, and guessing among all "
            f"{config.vocab_size:,} tokens would give {guessing:.2f}: the run has diverged",
            "lower --learning_rate, or warm up longer (--warmup_ratio), or pass --tripwires warn to go on",
            code="T107",
            stops=stops,
        )
    return has_collapsed


def tell(what: str, remedy: str, *, code: str, stops: bool, where: str | None = None) -> None:
    """Raise a UserError, or where the run is not to be stopped, say what is seen."""
    if stops:
        raise UserError(what, code=code, where=where, remedy=remedy)
    logger.warning("%s%s", f"{where}: " if where else "", what)
