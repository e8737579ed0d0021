"""Several adapters on one base at once: every row of a batch has the base alone, a LoRA, or a prefix."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from chatglm_tuning.adapters.lora import load_lora
from chatglm_tuning.adapters.ptuning import PrefixShape, make_prefix_encoder
from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMForConditionalGeneration

# What peft calls a row that no adapter changes.
_NO_LORA = "__base__"


@dataclass(frozen=True, eq=False)
class ServedAdapter:
    """An adapter of an `AdapterSet`, or the base alone.

    lora_name: peft's name of it. prefix: `(layers * 2, 1, heads, prefix, head_dim)`, in the model's dtype; entries 2 l
    and 2 l + 1 are layer l's key and value. It stands in front of a row's cached keys and values.
    """

    lora_name: str = _NO_LORA
    prefix: Tensor | None = field(default=None, repr=False)


BASE_ALONE = ServedAdapter()


class AdapterSet:
    """A frozen base and the adapters that its rows may have.

    model: the base, which becomes a PeftModel with the first LoRA; nothing may run it while an adapter is added.
    """

    def __init__(self, model: ChatGLMForConditionalGeneration) -> None:
        self.model: ChatGLMForConditionalGeneration | PeftModel = model
        self._base = model
        self._count = 0

    def add_lora(self, folder: Path, tensors: Mapping[str, Tensor]) -> ServedAdapter:
        """Add the LoRA of `folder`; tensors: its own, named as peft saves them. Raises UserError as `load_lora` does.

        DoRA is refused: peft cannot give rows of one batch different ones.
        """
        name = f"served_{self._count}"
        self.model = load_lora(self.model, folder, tensors, is_trainable=False, adapter_name=name)
        self._count += 1
        if getattr(self.model.peft_config[name], "use_dora", False):
            self.model.delete_adapter(name)
            raise UserError(
                "this is a DoRA adapter, which cannot share a batch with others",
                code="C110",
                where=str(folder),
                remedy="Merge it into the base first, with chatglm-tuning export",
            )
        return ServedAdapter(lora_name=name)

    def add_prefix(self, shape: PrefixShape, tensors: Mapping[str, Tensor], where: str) -> ServedAdapter:
        """Add a prefix; tensors: named as in the encoder. Raises UserError where they do not fit the base."""
        encoder = make_prefix_encoder(self._base, shape, tensors, where).eval()
        with torch.inference_mode():
            return ServedAdapter(prefix=encoder(1, self._base.dtype))

    def keywords(self, adapters: Sequence[ServedAdapter]) -> dict[str, Any]:
        """Return the arguments of the model's forward that give every row its LoRA."""
        if not isinstance(self.model, PeftModel):
            return {}
        return {"adapter_names": [adapter.lora_name for adapter in adapters]}
