"""The `chatglm-tuning` command: finds the subcommand, imports only that one, and turns errors into exit codes."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from chatglm_tuning import __version__
from chatglm_tuning.config.launch import is_first_on_machine
from chatglm_tuning.config.values import nearest
from chatglm_tuning.errors import UserError
from chatglm_tuning.optional import import_refusal
from chatglm_tuning.wording import printable

_MISTAKE = 2
_INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """A subcommand. target: "module:function", which takes the arguments after its name and returns an exit code."""

    target: str
    help: str


COMMANDS: dict[str, Command] = {
    "train-lora": Command("chatglm_tuning.cli.train_lora:run", "tune LoRA matrices on a full, int8 or int4 base"),
    "train-ptuning": Command("chatglm_tuning.cli.train_ptuning:run", "tune a P-Tuning v2 prefix, or the whole model"),
    "chat": Command("chatglm_tuning.cli.chat:run", "chat with the model, tuned or not"),
    "web": Command("chatglm_tuning.cli.web:run", "chat in a browser: before and after, adapters side by side"),
    "serve": Command("chatglm_tuning.cli.serve:run", "answer the OpenAI protocol, one base with many adapters"),
    "predict": Command("chatglm_tuning.cli.predict:run", "answer the prompts of a data file"),
    "eval": Command("chatglm_tuning.cli.evaluate:run", "score answers against references, and compare adapters"),
    "export": Command("chatglm_tuning.cli.export:run", "merge, convert and package an adapter for others to use"),
    "estimate": Command("chatglm_tuning.cli.estimate:run", "say how much memory a training run needs, by part"),
    "quantize": Command("chatglm_tuning.cli.quantize:run", "write a base in int8 or int4 as a folder of its own"),
    "verify": Command("chatglm_tuning.cli.verify:run", "see whether an adapter or a model is whole, and answers"),
    "data": Command("chatglm_tuning.cli.data:run", "data check: look at data before they are trained on"),
    "doctor": Command("chatglm_tuning.cli.doctor:run", "look at the environment, explain an error or a traceback"),
    "convert-to-instruct": Command(
        "chatglm_tuning.cli.convert_to_instruct:run", "turn ADGEN's content/summary rows into instruction rows"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `chatglm-tuning` with `argv` (sys.argv's by default) and return its exit code.

    0: done. 2: a mistake in what was given, told in one message on standard error. 130: interrupted with Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(_help(), file=sys.stderr)
        return _MISTAKE
    name = arguments[0]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"chatglm-tuning {__version__}")
        return 0
    return run_command(name, arguments[1:])


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run one subcommand and return its exit code, as `main` does; underscores in `name` are read as hyphens."""
    try:
        module, function = _find(name).target.split(":")
        return getattr(import_module(module), function)(argv) or 0
    except UserError as error:
        return _tell(error)
    except (ImportError, OSError) as error:
        refusal = import_refusal(error)
        if refusal is None:
            raise
        return _tell(refusal)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1


def _tell(error: UserError) -> int:
    # Under torchrun all processes of a machine meet the same mistake: one tells it, all of them end.
    if is_first_on_machine():
        print(printable(error.for_terminal()), file=sys.stderr)
    return _MISTAKE


def _find(name: str) -> Command:
    key = name.replace("_", "-")
    if key in COMMANDS:
        return COMMANDS[key]
    near = nearest(name, [known.replace("-", "_") for known in COMMANDS])
    remedy = f"If {near.replace('_', '-')} was meant, write that" if near else "See chatglm-tuning --help"
    raise UserError(f"{name} is no command of chatglm-tuning", code="A113", remedy=remedy)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: chatglm-tuning COMMAND [flags]",
            "",
            "Tune ChatGLM-6B with LoRA and P-Tuning v2.",
            "",
            "commands:",
            *lines,
            "",
            "`chatglm-tuning COMMAND --help` lists a command's flags; --version shows the version.",
        ]
    )
