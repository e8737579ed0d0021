"""The terminal chat: whole programs on a pseudo-terminal and on pipes, and single rules in this process."""

import contextlib
import copy
import io
import os
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from chatglm_tuning import loading
from chatglm_tuning.cli.chat import run
from chatglm_tuning.cli.main import main
from chatglm_tuning.errors import UserError
from chatglm_tuning.inference.session import ChatSession
from chatglm_tuning.inference.stream import GenerationSettings
from chatglm_tuning.model import ChatGLMTokenizer
from tests.conftest import REPOSITORY, load_golden_model

pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")

CLEAR_SCREEN = "\x1b[H\x1b[2J"
WELCOME = "欢迎使用 ChatGLM-6B 模型"


@pytest.fixture(scope="module")
def folder(golden, shared, tmp_path_factory):
    """A tiny model in the released layout."""
    folder = tmp_path_factory.mktemp("tiny")
    load_golden_model(golden).save_pretrained(folder)
    for name in ("ice_text.model", "tokenizer_config.json"):
        shutil.copy(shared / "chatglm-6b" / name, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(shared):
    return ChatGLMTokenizer.from_pretrained(shared / "chatglm-6b")


@pytest.fixture(scope="module")
def brief_model(golden_model):
    """The golden model with a token that it soon comes to in the place of <eop>, so that rounds fit into a prompt."""
    model = copy.copy(golden_model)
    model.config = copy.deepcopy(golden_model.config)
    model.config.eos_token_id = 17525
    return model


@pytest.fixture
def loaded(monkeypatch, brief_model, tokenizer):
    """`run` gets the brief model instead of loading one; the list holds what loading was asked for."""
    calls = []

    def load(name, **options):
        calls.append((name, options))
        return brief_model, tokenizer

    monkeypatch.setattr(loading, "load_for_inference", load)
    return calls


def answers(model, tokenizer, queries, *, max_length=60, keep_history=True, seed=None):
    """What a session answers: greedily, or drawn with `seed`."""
    settings = GenerationSettings(
        max_length=max_length, do_sample=seed is not None, temperature=0.95, top_p=0.7, seed=seed
    )
    session = ChatSession(model, tokenizer, settings, keep_history)
    return ["".join(session.reply(query)) for query in queries]


def command(folder, *flags):
    return [sys.executable, "cli_demo.py", "--model_name_or_path", str(folder), "--dtype", "float32", *flags]


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, arguments, **environment):
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(REPOSITORY)
            os.execve(arguments[0], arguments, {**os.environ, "TERM": "dumb", **environment})
        self.output = b""

    def wait_for(self, text, seconds=60):
        """Read until `text` comes, and return what came with it; what follows stays for the next call."""
        deadline = time.monotonic() + seconds
        while text.encode() not in self.output:
            self.output += self.read(1, deadline, f"no {text!r} in {self.output.decode(errors='replace')!r}")
        before, found, self.output = self.output.partition(text.encode())
        return (before + found).decode("utf-8")

    def read(self, size, deadline, complaint):
        ready, _, _ = select.select([self.file], [], [], max(0, deadline - time.monotonic()))
        assert ready, complaint
        return os.read(self.file, size)

    def wait_for_prompt(self, seconds=60):
        """Wait until the program reads a line; Ctrl-C between its prompt and its reading would wait for a key."""
        text = self.wait_for("\n用户: ", seconds)
        time.sleep(0.5)
        return text

    def send(self, text):
        os.write(self.file, text.encode())

    def exit_code(self, seconds=30):
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):  # Linux's way to say that the other end is closed
            while self.read(4096, deadline, "the program does not end"):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self):
        os.close(self.file)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(folder):
    with contextlib.ExitStack() as stack:

        def start(*flags, **environment):
            program = Terminal(command(folder, *flags), **environment)
            stack.callback(program.close)
            return program

        yield start


def test_a_conversation_on_a_terminal(terminal):
    program = terminal("--greedy", "--max_length", "4000", LC_ALL="C")
    greeting = program.wait_for_prompt(60)
    assert WELCOME in greeting
    assert "float32 on cpu; adapter: none" in greeting
    program.send("你好\n")
    assert program.wait_for("\nChatGLM-6B: ").startswith("你好\r\n")
    program.wait_for("N")  # the answer has begun, and 4000 tokens take far longer than this test
    program.send("\x03")
    answer = program.wait_for("（已停止）", 10)
    assert CLEAR_SCREEN not in answer
    program.wait_for_prompt()
    program.send("\n")
    assert "ChatGLM" not in program.wait_for_prompt()
    program.send("clear\n")
    cleared = program.wait_for_prompt()
    assert f"{CLEAR_SCREEN}{WELCOME}" in cleared
    program.send("\x03")
    assert "再按一次 Ctrl-C 退出" in program.wait_for_prompt()
    program.send("\x03")
    assert program.exit_code() == 130


def test_a_pipe_gets_answers_only_in_whole_characters(folder, golden_model, tokenizer):
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0", "LC_ALL": "C"}
    with subprocess.Popen(
        command(folder, "--greedy", "--max_length", "60"),
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        program.stdin.write("你好\n\n".encode() + b"\xff" + "坏\nstop\n你好\n".encode())
        program.stdin.close()
        pieces = []
        while chunk := os.read(program.stdout.fileno(), 65536):
            pieces.append(chunk.decode("utf-8"))
        errors = program.stderr.read().decode("utf-8")
    assert program.returncode == 0, errors
    expected = answers(golden_model, tokenizer, ["你好", "\ufffd坏"])
    assert "".join(pieces) == "".join(f"{answer}\n" for answer in expected)
    assert len(pieces) > 5
    assert f"model {folder}; float32 on cpu; adapter: none" in errors


def pipe(monkeypatch, capsys, lines, *flags):
    """Run in this process with `lines` on a pipe; returns the exit code and the lines of standard output."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode())))
    code = run(["--max_length", "60", *flags])
    return code, capsys.readouterr().out.splitlines()


def type_in(monkeypatch, entries):
    """Make standard input a terminal at which `entries` are typed; an exception class is raised instead."""
    typed = iter(entries)

    def read(prompt):
        entry = next(typed)
        if isinstance(entry, type):
            raise entry
        return entry

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())


@pytest.mark.parametrize("keep_history", [True, False])
def test_no_history_starts_each_question_anew(monkeypatch, capsys, loaded, brief_model, tokenizer, keep_history):
    flags = ["--greedy"] if keep_history else ["--greedy", "--no_history"]
    expected = answers(brief_model, tokenizer, ["你好", "你好"], keep_history=keep_history)
    assert (expected[0] != expected[1]) is keep_history
    assert pipe(monkeypatch, capsys, ["你好", "你好"], *flags) == (0, expected)


def test_clear_forgets_the_rounds_and_a_pipe_sees_no_control_codes(monkeypatch, capsys, loaded):
    code, lines = pipe(monkeypatch, capsys, ["你好", "clear", "你好"], "--greedy")
    assert code == 0
    assert len(lines) == 2
    assert lines[0] == lines[1]


def test_flags_reach_the_session(monkeypatch, capsys, loaded, brief_model, tokenizer):
    expected = answers(brief_model, tokenizer, ["你好"], max_length=20, seed=5)
    assert pipe(monkeypatch, capsys, ["你好"], "--seed", "5", "--max_length", "20") == (0, expected)
    assert pipe(monkeypatch, capsys, ["你好"], "--seed", "6", "--max_length", "20")[1] != expected
    sharp = ["--seed", "5", "--max_length", "20", "--temperature", "0.0001"]
    greedy = pipe(monkeypatch, capsys, ["你好"], "--greedy", "--max_length", "20")
    assert pipe(monkeypatch, capsys, ["你好"], *sharp) == greedy
    narrow = ["--seed", "5", "--max_length", "20", "--top_p", "0.00001"]
    assert pipe(monkeypatch, capsys, ["你好"], *narrow) == greedy


def test_flags_reach_the_loading_and_are_told(monkeypatch, capsys, loaded, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    flags = ["--model_name_or_path", "base", "--ptuning_checkpoint", str(tmp_path), "--pre_seq_len", "8"]
    assert run([*flags, "--prefix_projection", "--quantization_bit", "4", "--dtype", "bfloat16"]) == 0
    name, options = loaded[0]
    assert name == "base"
    assert options["ptuning_checkpoint"] == tmp_path
    assert options["lora_checkpoint"] is None
    assert (options["pre_seq_len"], options["prefix_projection"]) == (8, True)
    assert (options["quantization_bit"], options["dtype"]) == (4, "bfloat16")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == f"model base; float32 on cpu; adapter: P-Tuning v2 {tmp_path}"
    assert run(["--model_name_or_path", "base", "--lora_checkpoint", str(tmp_path)]) == 0
    assert loaded[1][1]["lora_checkpoint"] == tmp_path
    assert f"adapter: LoRA {tmp_path}" in capsys.readouterr().err


def test_a_question_that_is_too_long_is_told_and_the_chat_goes_on(monkeypatch, capsys, loaded):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(("很长的问题" * 30 + "\n你好\n").encode())))
    assert run(["--greedy", "--max_length", "20"]) == 0
    captured = capsys.readouterr()
    assert "error [S104]: the question has" in captured.err
    assert len(captured.out.splitlines()) == 1


def test_rounds_that_no_longer_fit_are_told(monkeypatch, capsys, loaded):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n你好\n你好\n".encode())))
    assert run(["--greedy", "--max_length", "20"]) == 0
    assert capsys.readouterr().err.count("note: rounds at the start that the model no longer sees") == 2


@pytest.mark.parametrize(
    ("entries", "code"),
    [
        (["stop"], 0),
        ([" stop "], 0),
        ([EOFError], 0),
        ([KeyboardInterrupt, "", "stop"], 0),
        ([KeyboardInterrupt, KeyboardInterrupt], 130),
        ([KeyboardInterrupt, "", KeyboardInterrupt, "stop"], 0),
    ],
)
def test_ways_to_leave(monkeypatch, capsys, loaded, entries, code):
    type_in(monkeypatch, entries)
    assert run([]) == code
    assert WELCOME in capsys.readouterr().out


def test_clear_leaves_the_screen_alone_where_output_is_no_terminal(monkeypatch, capsys, loaded):
    type_in(monkeypatch, ["clear", "stop"])
    run([])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count(WELCOME) == 2


def test_an_interrupt_stops_the_answer_and_restores_the_handler(monkeypatch, capsys, loaded):
    type_in(monkeypatch, ["你好", "stop"])
    before = signal.getsignal(signal.SIGINT)
    interrupted = []

    def reply(self, query, *, stop):
        yield "一"
        signal.raise_signal(signal.SIGINT)
        interrupted.append(stop())

    monkeypatch.setattr(ChatSession, "reply", reply)
    assert run([]) == 0
    assert interrupted == [True]
    assert "\nChatGLM-6B: 一（已停止）\n" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reader_that_wants_no_more_ends_the_chat_quietly(monkeypatch, loaded):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n你好\n".encode())))
    with open(writing, "w", encoding="utf-8") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert run(["--greedy"]) == 0


def test_broken_logits_end_the_chat_with_one_message(monkeypatch, capsys, loaded):
    def reply(self, query, *, stop):
        raise UserError("the model computed NaN", code="T102", remedy="Pass --dtype float32")
        yield

    monkeypatch.setattr(ChatSession, "reply", reply)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode())))
    assert main(["chat"]) == 2
    assert "error [T102]: the model computed NaN. Pass --dtype float32." in capsys.readouterr().err
