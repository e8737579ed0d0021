"""Whether the tensors of a model's files are those that its config.json asks for."""

import logging
from pathlib import Path

import torch
from torch import Tensor

from chatglm_tuning.adapters.ptuning import PREFIX_KEY
from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMForConditionalGeneration
from chatglm_tuning.quantization.linear import QuantizedLinear
from chatglm_tuning.shards import StoredTensor

logger = logging.getLogger(__name__)

_IGNORED_KEY_END = ".rotary_emb.inv_freq"
HEAD_KEY = "lm_head.weight"
EMBEDDING_KEY = "transformer.word_embeddings.weight"


def is_ignored(key: str) -> bool:
    """Whether a tensor of that key is passed over where there is one: the model computes it."""
    return key.endswith(_IGNORED_KEY_END)


class TensorCheck:
    """Compares the tensors of a folder with those of its model, and says what does not fit.

    model: as config.json describes it, with or without storage; its linears may be quantised when the files' are not.
    """

    def __init__(self, model: ChatGLMForConditionalGeneration, where: Path) -> None:
        self._model = model
        self._where = where
        self._known = frozenset(key for key, _ in model.named_parameters(remove_duplicate=False))
        self._waiting = set(self._known)
        self._has_prefix = False

    def is_wanted(self, stored: StoredTensor) -> bool:
        """Return whether the tensor is one of the model's; of a prefix beside it, warn once.

        Raises UserError for a tensor that the model has not, has already got, or has in another form.
        """
        key, tensor = stored
        if is_ignored(key):
            return False
        if key.startswith(PREFIX_KEY):
            self._note_prefix()
            return False
        if key not in self._waiting:
            raise self._misfit(self._why_unexpected(key))
        name, _, leaf = key.rpartition(".")
        module = self._model.get_submodule(name)
        found = {key}
        expected = tuple(module.get_parameter(leaf).shape)
        is_stored_quantized = False
        if isinstance(module, QuantizedLinear) and leaf == "weight":
            is_stored_quantized = tensor.dtype == torch.int8
            if not is_stored_quantized:
                found.add(f"{name}.weight_scale")
                expected = (module.out_features, module.in_features)
        if not tensor.is_floating_point() and not is_stored_quantized:
            raise self._misfit(f"{key} is of {tensor.dtype}, which needs a quantization_bit in config.json")
        self._check_shape(key, tensor, expected)
        self._waiting -= found
        return True

    def check_scale(self, key: str, scale: Tensor) -> None:
        """Raise UserError where the scales that a weight was just quantised to show numbers that are not finite."""
        if scale.is_meta or scale.isfinite().all():
            return
        bad = (~scale.isfinite()).nonzero()
        raise UserError(
            f"{key} cannot be quantised: in row {int(bad[0])} a number is not finite, or too large for fp16",
            code="M120",
            where=str(self._where),
            remedy="Copy the weights again",
        )

    def finish(self) -> None:
        """Raise UserError where a tensor is missing; the head, which is tied, may be."""
        missing = sorted(self._waiting - {HEAD_KEY})
        if missing:
            raise self._misfit(
                f"{len(missing)} of its tensors are missing: {', '.join(missing[:3])}{', …' * (len(missing) > 3)}"
            )

    def _note_prefix(self) -> None:
        if not self._has_prefix:
            logger.warning(
                "%s holds a prefix beside the base model, which is left out: name it with --ptuning_checkpoint as well",
                self._where,
            )
        self._has_prefix = True

    def _why_unexpected(self, key: str) -> str:
        if key in self._known:
            return f"it has the tensor {key!r} twice"
        if key.endswith(".weight_scale"):
            return f"it is quantised (it has a tensor {key!r}), and config.json has no quantization_bit"
        return f"it has a tensor {key!r}, which ChatGLM-6B has not"

    def _check_shape(self, key: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
        found = tuple(tensor.shape)
        if found == expected:
            return
        if key in (EMBEDDING_KEY, HEAD_KEY) and found[1:] == expected[1:]:
            raise UserError(
                f"weights and tokenizer are of different revisions: {key} has {found[0]} rows, config.json says "
                f"vocab_size {expected[0]}",
                code="M112",
                where=str(self._where),
                remedy="Take the weights, config.json and the tokenizer from one download",
            )
        raise self._misfit(f"{key} is {found}, config.json asks for {expected}")

    def _misfit(self, what: str) -> UserError:
        return UserError(
            f"the weights do not fit config.json: {what}",
            code="M119",
            where=str(self._where),
            remedy="Take the weights and config.json from one download of ChatGLM-6B",
        )
