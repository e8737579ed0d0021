"""What all routes of a server share, and how it is loaded."""

import time
from dataclasses import dataclass, field

from chatglm_tuning.adapters.lora import read_lora_config
from chatglm_tuning.adapters.served import BASE_ALONE, AdapterSet, ServedAdapter
from chatglm_tuning.base_folder import read_config
from chatglm_tuning.config.adapters import NamedAdapter
from chatglm_tuning.config.serve import ServeArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.inference.engine import BatchEngine
from chatglm_tuning.loading import (
    add_served_adapter,
    check_adapter,
    check_lora,
    check_prefix,
    load_base_for_inference,
    resolve_model_folder,
)
from chatglm_tuning.model import ChatGLMConfig
from chatglm_tuning.model.tokenization import ChatGLMTokenizer
from chatglm_tuning.serving.metrics import Metrics
from chatglm_tuning.serving.protocol import ProtocolError, shortened


@dataclass
class Service:
    """What all routes share.

    adapters: by the name that requests choose them by, the base first. max_length: of the model and the flags together.
    is_draining: no new requests are taken. active: requests whose answer has not ended.
    """

    arguments: ServeArguments
    engine: BatchEngine
    tokenizer: ChatGLMTokenizer
    adapters: dict[str, ServedAdapter]
    max_length: int
    fingerprint: str
    metrics: Metrics
    created: int = field(default_factory=lambda: int(time.time()))
    is_draining: bool = False
    active: int = 0

    def adapter(self, model: str) -> ServedAdapter:
        """Return what `model` names; raises the protocol's 404."""
        try:
            return self.adapters[model]
        except KeyError:
            known = ", ".join(self.adapters)
            raise ProtocolError(
                404,
                f"There is no model {shortened(model)!r}; this server has {known}",
                code="model_not_found",
                param="model",
            ) from None


def load_service(arguments: ServeArguments, *, show_progress: bool = False) -> Service:
    """Load the base and its adapters, and start the engine, which whoever calls this must close.

    Raises UserError, before the base is read, for an adapter that is none, is damaged or does not fit.
    """
    model = arguments.model
    config = read_config(resolve_model_folder(model.model_name_or_path))
    for adapter in arguments.adapters:
        _check_adapter(adapter, config)
    base = load_base_for_inference(
        model.model_name_or_path,
        quantization_bit=model.quantization_bit,
        dtype=model.dtype,
        show_progress=show_progress,
    )
    adapters = AdapterSet(base.model)
    by_name = {arguments.served_model_name: BASE_ALONE}
    for adapter in arguments.adapters:
        by_name[adapter.name] = add_served_adapter(base, adapters, adapter.folder)
    engine = BatchEngine(adapters, max_rows=arguments.max_rows, max_waiting=arguments.max_waiting)
    return Service(
        arguments=arguments,
        engine=engine,
        tokenizer=base.tokenizer,
        adapters=by_name,
        max_length=min(arguments.max_length, base.config.max_sequence_length),
        fingerprint=f"fp_{base.identity.fingerprint[:12]}",
        metrics=Metrics(engine),
    )


def _check_adapter(adapter: NamedAdapter, config: ChatGLMConfig) -> None:
    """Raise UserError for an adapter that cannot be served on a base of `config`, or is none of the flag's method."""
    if adapter.method == "ptuning":
        check_prefix(adapter.folder, config, None)
        return
    if adapter.method == "lora":
        check_lora(adapter.folder, config)
    elif check_adapter(adapter.folder, config) != "lora":
        return
    if read_lora_config(adapter.folder).use_dora:
        raise UserError(
            "this is a DoRA adapter, which cannot share a batch with others",
            code="C110",
            where=str(adapter.folder),
            remedy="Merge it into the base first, with chatglm-tuning export",
        )
