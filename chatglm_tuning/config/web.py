"""The settings of `chatglm-tuning web`, from the command line to frozen arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatglm_tuning.config.arguments import ChatArguments, ModelArguments, PtuningArguments, Setting, settings_of
from chatglm_tuning.config.flags import FlagGroup, build_parser, read_flags
from chatglm_tuning.config.sources import Registry, resolve_flags
from chatglm_tuning.config.values import Value
from chatglm_tuning.errors import UserError

Language = Literal["zh", "en"]

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
    """One chat page. adapters: name and folder of every adapter that was given, in order."""

    model: ModelArguments
    adapters: tuple[tuple[str, Path], ...]
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
        model=ModelArguments(**{name: values[name] for name in model}), adapters=_named_adapters(values), **own
    )


def _named_adapters(values: Mapping[str, Any]) -> tuple[tuple[str, Path], ...]:
    """Return the adapters of all flags; those of chat's flags are named after their folders.

    Raises UserError for one that is no NAME=FOLDER and for a name that is given twice.
    """
    named = [
        (values[flag].name or str(values[flag]), values[flag])
        for flag in ("lora_checkpoint", "ptuning_checkpoint")
        if flag in values
    ]
    for text in values.get("adapter", ()):
        name, is_named, folder = str(text).partition("=")
        if not (name.strip() and is_named and folder):
            raise UserError(
                f"--adapter must be NAME=FOLDER, not {str(text)!r}", remedy="Write it as --adapter lora=output/my-lora"
            )
        named.append((name.strip(), Path(folder).expanduser()))
    for index, (name, folder) in enumerate(named):
        if name in {earlier for earlier, _ in named[:index]}:
            raise UserError(
                f"two adapters are named {name}", where=str(folder), remedy="Name each with --adapter NAME=FOLDER"
            )
    return tuple(named)
