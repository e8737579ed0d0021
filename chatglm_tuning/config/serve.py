"""The settings of `chatglm-tuning serve`, from the command line and the environment to frozen arguments."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from chatglm_tuning.config.adapters import NamedAdapter, folder_name, named_adapters
from chatglm_tuning.config.arguments import ChatArguments, ModelArguments, PtuningArguments, Setting, settings_of
from chatglm_tuning.config.flags import FlagGroup, build_parser, read_flags
from chatglm_tuning.config.sources import Registry, resolve_flags
from chatglm_tuning.config.values import Value
from chatglm_tuning.errors import UserError

API_KEY_VARIABLE = "CHATGLM_TUNING_API_KEY"

_ADAPTER_FLAGS = ("adapter", "lora_checkpoint", "ptuning_checkpoint")
_ADAPTER = "NAME=FOLDER of a LoRA or a prefix; requests with this name as their model get it (may be repeated)"
_ONE_ADAPTER = "the same for one adapter, named as its folder is"


@dataclass(frozen=True)
class ServeArguments:
    """A base, its adapters, where they are served, and the limits of a request.

    model: its name_or_path, precision and dtype. served_model_name: what requests choose the base alone by.
    port: 0 takes a free one.
    api_key: what requests must carry, None where everyone may ask.
    max_length: tokens of prompt and answer together. max_output_tokens: of an answer, None for as many as fit.
    request_timeout, drain_seconds: seconds.
    """

    model: ModelArguments
    adapters: tuple[NamedAdapter, ...]
    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_rows: int = 16
    max_waiting: int = 64
    max_length: int = ChatArguments.max_length
    max_output_tokens: int | None = None
    max_body_bytes: int = 2**20
    request_timeout: float = 600.0
    drain_seconds: float = 30.0

    @property
    def model_names(self) -> list[str]:
        """What requests may name: the base, then the adapters."""
        return [self.served_model_name, *(adapter.name for adapter in self.adapters)]


def parse_serve_arguments(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> ServeArguments:
    """Return what `argv` (without the program's name) and the key in `environment` ask for.

    Prints and raises as training does. Reads no files.
    """
    groups = _groups()
    parser = build_parser("chatglm-tuning serve", "Answer the OpenAI protocol: one base, many adapters.", groups)
    registry = Registry.of([setting for group in groups for setting in group.settings], {})
    values = resolve_flags(read_flags(parser, argv, {}), registry)
    model_values = {
        setting.name: values.pop(setting.name) for setting in settings_of(ModelArguments) if setting.name in values
    }
    model = ModelArguments(**model_values)
    values.setdefault("served_model_name", folder_name(Path(model.model_name_or_path)))
    _check_model_name(values["served_model_name"])
    adapters = named_adapters(values, reserved=(values["served_model_name"],))
    for flag in _ADAPTER_FLAGS:
        values.pop(flag, None)
    if API_KEY_VARIABLE in environment:
        values.setdefault("api_key", environment[API_KEY_VARIABLE])
    _check_key(values.get("api_key"))
    return ServeArguments(model=model, adapters=adapters, **values)


def _groups() -> list[FlagGroup]:
    defaults = {item.name: item.default for item in fields(ServeArguments)}

    def own(name: str, value: Value, text: str) -> Setting:
        return Setting(name, value, text, defaults[name])

    max_length = next(setting for setting in settings_of(ChatArguments) if setting.name == "max_length")
    prefix = next(setting for setting in settings_of(PtuningArguments) if setting.name == "ptuning_checkpoint")
    text = Value("anything")  # which may be empty: that is told below, in words of its own
    count = Value("integer", at_least=1)
    seconds = Value("number", above=0, at_most=10**6)
    return [
        FlagGroup(
            "model",
            (
                *settings_of(ModelArguments),
                Setting("adapter", Value("paths"), _ADAPTER, None),
                Setting("lora_checkpoint", Value("path"), f"{_ONE_ADAPTER}, a LoRA", None),
                Setting("ptuning_checkpoint", prefix.value, f"{_ONE_ADAPTER}, a prefix", None),
                Setting("served_model_name", text, "name of the base; without it, its folder's", None),
            ),
        ),
        FlagGroup(
            "address",
            (
                own("host", Value("text"), "address to listen on; 0.0.0.0 lets other machines ask"),
                own("port", Value("integer", at_least=0, at_most=65535), "port to listen on; 0 takes a free one"),
                own("api_key", text, f"requests must carry it; ${API_KEY_VARIABLE} keeps it out of sight"),
            ),
        ),
        FlagGroup(
            "limits",
            (
                own("max_rows", count, "answers that are written at the same time"),
                own("max_waiting", count, "answers that may wait for their turn; more are refused with 503"),
                max_length,
                own("max_output_tokens", count, "an answer has at most this many tokens; without it, as many as fit"),
                own("max_body_bytes", Value("integer", at_least=1024), "a larger request is refused with 413"),
                own("request_timeout", seconds, "seconds until a request is given up"),
                own("drain_seconds", Value("number", at_least=0, at_most=10**6), "seconds to finish in after SIGTERM"),
            ),
        ),
    ]


def _check_key(key: str | None) -> None:
    """Raise UserError, which does not show it, for a key that no header can carry."""
    problem = None
    if key is not None and not key:
        problem = "must not be empty"
    elif key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        problem = "has more than ASCII letters, digits and signs"
    if problem is not None:
        raise UserError(
            f"the key in --api_key or ${API_KEY_VARIABLE} {problem}",
            code="S101",
            remedy="Give another one, or neither of the two to let everyone ask",
        )


def _check_model_name(name: str) -> None:
    if not name.strip():
        raise UserError(
            "--served_model_name must not be empty",
            code="A119",
            remedy="Leave it out to name the base as its folder is",
        )
    if not name.isprintable():
        raise UserError(f"{name!r} cannot be the name of a model", code="A119", remedy="Use printable characters")
