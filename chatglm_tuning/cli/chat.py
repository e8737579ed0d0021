"""`chatglm-tuning chat`: the original's cli_demo, a token at a time.

On a terminal: `clear` forgets the conversation, `stop` or Ctrl-D leaves. Ctrl-C during an answer ends the answer only;
at the prompt it says how to leave, and a second one leaves with exit code 130. From a pipe every line is a question,
only answers are written, and Ctrl-C ends the program.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

from chatglm_tuning.config.arguments import ChatArguments
from chatglm_tuning.config.parsing import parse_chat_arguments
from chatglm_tuning.wording import printable

if TYPE_CHECKING:
    from chatglm_tuning.inference.session import ChatSession

_WELCOME = "欢迎使用 ChatGLM-6B 模型，输入内容即可进行对话，clear 清空对话历史，stop 终止程序"
_HOW_TO_LEAVE = "再按一次 Ctrl-C 退出，或输入 stop"
_STOPPED = "（已停止）"
_USER = "\n用户: "
_MODEL = "\nChatGLM-6B: "
_CLEAR_SCREEN = "\033[H\033[2J"
_INTERRUPTED = 130


def run(argv: Sequence[str]) -> int:
    """Chat until the user leaves, and return the exit code: 0, or 130 after two Ctrl-C at the prompt.

    Raises UserError for wrong flags and folders, and where the model computes NaN.
    """
    arguments = parse_chat_arguments(argv)
    _use_utf8()
    session = _load_session(arguments)
    try:
        return _chat_on_terminal(session) if sys.stdin.isatty() else _answer_lines(session)
    except BrokenPipeError:  # whoever read the answers wants no more, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would fail again
        return 0


def _use_utf8() -> None:
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    if isinstance(sys.stderr, TextIOWrapper):
        sys.stderr.reconfigure(encoding="utf-8")


def _load_session(arguments: ChatArguments) -> "ChatSession":
    from chatglm_tuning.inference.session import ChatSession
    from chatglm_tuning.inference.stream import GenerationSettings
    from chatglm_tuning.loading import load_for_inference

    base, prefix = arguments.model, arguments.ptuning
    model, tokenizer = load_for_inference(
        base.model_name_or_path,
        lora_checkpoint=arguments.lora_checkpoint,
        ptuning_checkpoint=prefix.ptuning_checkpoint,
        pre_seq_len=prefix.pre_seq_len,
        prefix_projection=prefix.prefix_projection,
        quantization_bit=base.quantization_bit,
        dtype=base.dtype,
        show_progress=sys.stdout.isatty(),
    )
    print(_describe(arguments, model), file=sys.stderr, flush=True)
    config: Any = model.config
    context = config.max_sequence_length
    if arguments.max_length > context:
        print(f"note: --max_length is {context}, the whole context of this model", file=sys.stderr, flush=True)
    settings = GenerationSettings(
        max_length=min(arguments.max_length, context),
        do_sample=not arguments.greedy,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    return ChatSession(model, tokenizer, settings, keep_history=arguments.history)


def _describe(arguments: ChatArguments, model: Any) -> str:
    precision = str(model.dtype).removeprefix("torch.")
    if model.config.quantization_bit:
        precision = f"int{model.config.quantization_bit} weights, {precision}"
    if arguments.lora_checkpoint is not None:
        adapter = f"LoRA {arguments.lora_checkpoint}"
    elif arguments.ptuning.ptuning_checkpoint is not None:
        adapter = f"P-Tuning v2 {arguments.ptuning.ptuning_checkpoint}"
    else:
        adapter = "none"
    return f"model {arguments.model.model_name_or_path}; {precision} on {model.device}; adapter: {adapter}"


def _answer_lines(session: "ChatSession") -> int:
    for line in sys.stdin:
        query = line.rstrip("\n")
        command = query.strip()
        if command == "stop":
            break
        if command == "clear":
            session.clear()
        elif command:
            _print_answer(session, query)
    return 0


def _chat_on_terminal(session: "ChatSession") -> int:
    _enable_line_editing()
    print(_WELCOME)
    was_interrupted = False
    while True:
        try:
            query = input(_USER)
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            if was_interrupted:
                print()
                return _INTERRUPTED
            was_interrupted = True
            print(f"\n{_HOW_TO_LEAVE}")
            continue
        was_interrupted = False
        command = query.strip()
        if command == "stop":
            return 0
        if command == "clear":
            session.clear()
            print(f"{_CLEAR_SCREEN if sys.stdout.isatty() else ''}{_WELCOME}")
        elif command:
            print(_MODEL, end="", flush=True)
            with _interrupts_as_event() as is_interrupted:
                _print_answer(session, query, is_interrupted)


def _enable_line_editing() -> None:
    try:
        import readline  # importing it is what gives `input` its editing keys
    except ImportError:  # on Windows
        return
    # Under LC_ALL=C it would take the bytes of a Chinese character for commands, and a pasted tab completes file names.
    for setting in ("set convert-meta off", "set input-meta on", "set output-meta on", "tab: self-insert"):
        readline.parse_and_bind(setting)


def _print_answer(session: "ChatSession", query: str, is_interrupted: threading.Event | None = None) -> None:
    """Print the answer as it is written. A question that is too long is told on standard error."""
    from chatglm_tuning.inference.session import QuestionTooLongError

    is_interrupted = is_interrupted or threading.Event()
    dropped_before = session.dropped_rounds
    try:
        with closing(session.reply(query, stop=is_interrupted.is_set)) as pieces:
            for piece in pieces:
                print(printable(piece), end="", flush=True)
    except QuestionTooLongError as error:
        print(error.for_terminal(), file=sys.stderr, flush=True)
        return
    print(_STOPPED if is_interrupted.is_set() else "", flush=True)
    if session.dropped_rounds > dropped_before:
        dropped = session.dropped_rounds
        print(f"note: rounds at the start that the model no longer sees: {dropped}", file=sys.stderr, flush=True)


@contextmanager
def _interrupts_as_event() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event: an exception could surface anywhere and lose the round."""
    is_interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: is_interrupted.set())
    try:
        yield is_interrupted
    finally:
        signal.signal(signal.SIGINT, before)
