"""The settings of `chatglm-tuning web`, from the command line to frozen arguments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from chatglm_tuning.config.adapters import NamedAdapter, named_adapters
from chatglm_tuning.config.arguments import ChatArguments, ModelArguments, PtuningArguments, Setting, settings_of
from chatglm_tuning.config.flags import FlagGroup, build_parser, read_flags
from chatglm_tuning.config.sources import Registry, resolve_flags
from chatglm_tuning.config.values import Value

Language = Literal["zh", "en"]

BASE_NAME = ":base:"
"""The name of the base alone among those of the adapters."""

_ADAPTER = Setting(
    "adapter", Value("paths"), "NAME=FOLDER: an adapter of either method that the page offers; any number of them", ()
)
_HOST = Setting(
    "host", Value("text"), "address to listen on; 0.0.0.0 lets other machines see the page too", "127.0.0.1"
)
_PORT = Setting("port", Value("integer", at_least=0, at_most=65535), "port to listen on; 0 takes a free one", 7860)
_LANGUAGE = Setting(
    "language", Value("text", choices=("zh", "en")), "language that the page begins in; it has a switch", "zh"
)
_IN_THE_FOLDER = "Leave it out: it is read from the folder of --ptuning_checkpoint"
_ON_THE_PAGE = "Leave it out: it is set on the page"
_ELSEWHERE = {
    "pre_seq_len": _IN_THE_FOLDER,
    "prefix_projection": _IN_THE_FOLDER,
    "share": "Leave it out: the page is only shown from this machine; --host lets others of its network see it",
    **dict.fromkeys(("temperature", "top_p", "greedy", "no_history", "history"), _ON_THE_PAGE),
}


@dataclass(frozen=True)
class WebArguments:
    """One chat page. adapters: every one that was given, the first is chosen."""

    model: ModelArguments
    adapters: tuple[NamedAdapter, ...]
    host: str = _HOST.default
    port: int = _PORT.default
    language: Language = _LANGUAGE.default
    max_length: int = ChatArguments.max_length
    seed: int | None = None


def parse_web_arguments(argv: Sequence[str]) -> WebArguments:
    """Return the page that `argv` (without the program's name) asks for; prints and raises as training does."""
    chat = {setting.name: setting for setting in settings_of(ChatArguments)}
    prefix = next(setting for setting in settings_of(PtuningArguments) if setting.name == "ptuning_checkpoint")
    groups = [
        FlagGroup("model", tuple(settings_of(ModelArguments))),
        FlagGroup("adapters (the page takes more)", (chat["lora_checkpoint"], prefix, _ADAPTER)),
        FlagGroup("page", (_HOST, _PORT, _LANGUAGE)),
        FlagGroup("what the page begins with", (chat["max_length"], chat["seed"])),
    ]
    settings = [setting for group in groups for setting in group.settings]
    parser = build_parser("chatglm-tuning web", "Chat with ChatGLM-6B, tuned or not, in a browser.", groups)
    values = resolve_flags(read_flags(parser, argv, _ELSEWHERE), Registry.of(settings, {}))
    own = {name: values[name] for name in ("host", "port", "language", "max_length", "seed") if name in values}
    model = {setting.name for setting in settings_of(ModelArguments)} & values.keys()
    return WebArguments(
        model=ModelArguments(**{name: values[name] for name in model}),
        adapters=named_adapters(values, reserved=(BASE_NAME,)),
        **own,
    )
