import importlib
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest

from chatglm_tuning import __version__
from chatglm_tuning.cli import main as main_module
from chatglm_tuning.cli.main import COMMANDS, Command, main, run_command
from chatglm_tuning.errors import UserError
from tests.doctor.fakes import BROKEN, fake_library

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "peft", "datasets")

# What every command does before it needs a model, with the time it takes and whether something heavy was imported.
PARSE = f"""
import sys, time
start = time.perf_counter()
sys.path.insert(0, {str(ROOT)!r})
from chatglm_tuning.cli.main import main
from chatglm_tuning.config import parsing
{{statement}}
heavy = [name for name in {HEAVY!r} if name in sys.modules]
print("heavy", heavy, "seconds", time.perf_counter() - start)
"""


@pytest.fixture
def stand_in(monkeypatch):
    """Put a function in the place of the chat command."""

    def place(function):
        module = types.ModuleType("stand_in")
        module.run = function
        monkeypatch.setitem(sys.modules, "stand_in", module)
        monkeypatch.setitem(main_module.COMMANDS, "chat", Command("stand_in:run", "stand-in"))

    return place


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert sum(name in line and command.help in line for line in lines) == 1


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"chatglm-tuning {__version__}\n"


def test_nothing_given_shows_the_help_as_a_mistake(capsys):
    assert main([]) == 2
    assert "usage: chatglm-tuning COMMAND" in capsys.readouterr().err


def test_unknown_command(capsys):
    assert main(["train_loar"]) == 2
    said = "train_loar is no command of chatglm-tuning. If train-lora was meant, write that."
    expected = f"error [A113]: {said} (chatglm-tuning doctor A113 explains)\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("returned", [0, 3, None])
def test_arguments_and_exit_code_pass_through(returned, stand_in):
    seen = []

    def run(argv):
        seen.append(list(argv))
        return returned

    stand_in(run)
    assert main(["chat", "--seed", "1"]) == (returned or 0)
    assert seen == [["--seed", "1"]]


def test_underscores_are_read_as_hyphens(monkeypatch, stand_in):
    stand_in(lambda argv: 7)
    monkeypatch.setitem(main_module.COMMANDS, "train-lora", Command("stand_in:run", "stand-in"))
    assert main(["train_lora"]) == 7


def raising(error):
    def run(argv):
        raise error

    return run


def test_a_users_mistake_is_one_message_and_code_2(stand_in, capsys):
    stand_in(raising(UserError("the file is empty", code="D103", remedy="Give another", where="a.json:1")))
    assert run_command("chat", []) == 2
    expected = "error [D103]: a.json:1: the file is empty. Give another. (chatglm-tuning doctor D103 explains)\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    ("rank", "expected"), [("0", "error [A101]: no. Do. (chatglm-tuning doctor A101 explains)\n"), ("1", "")]
)
def test_under_torchrun_one_process_of_a_machine_tells_it(rank, expected, stand_in, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    stand_in(raising(UserError("no", code="A101", remedy="Do")))
    assert run_command("chat", []) == 2
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(5), 5), (SystemExit(None), 0), (SystemExit("no"), 1)]
)
def test_interruption_and_exit(error, code, stand_in):
    stand_in(raising(error))
    assert run_command("chat", []) == code


def test_a_defect_is_not_hidden(stand_in):
    stand_in(raising(RuntimeError("defect")))
    with pytest.raises(RuntimeError, match="defect"):
        run_command("chat", [])


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Write a library with a body, and one that imports it; returns a command that imports the second."""

    def write(body):
        (tmp_path / "a_library.py").write_text(body, encoding="utf-8")
        (tmp_path / "another_library.py").write_text("import a_library\n", encoding="utf-8")
        return lambda argv: importlib.import_module("another_library")

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in ("a_library", "another_library"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("body", "code", "what"),
    [
        ("raise ImportError('libcudart.so.12: cannot open')", "X102", "(ImportError: libcudart.so.12: cannot open)"),
        ("raise OSError('libmkl.so: no such file')", "X102", "(OSError: libmkl.so: no such file)"),
        ("from json import nothing", "X102", "(ImportError: cannot import name 'nothing' from 'json'"),
        ("import no_such_library.at_all", "X101", "no_such_library is not installed."),
        ("try:\n import no_such_part\nexcept ImportError as e:\n raise ImportError('a part') from e", "X102", "a part"),
    ],
)
def test_a_library_that_cannot_be_imported_is_told(stand_in, library, capsys, body, code, what):
    stand_in(library(body))
    assert run_command("chat", []) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error [{code}]: ")
    assert what in err
    assert ("a_library cannot be imported" in err) == (code == "X102")
    assert "Run `chatglm-tuning doctor`" in err


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error"), ImportError("a part is missing"), ImportError("x", name="chatglm_tuning.cli")],
)
def test_an_error_like_that_of_an_import_is_not_hidden(stand_in, error):
    stand_in(raising(error))
    with pytest.raises(type(error)):
        run_command("chat", [])


@pytest.mark.parametrize(
    "body",
    [
        "from json import nothing",
        "try:\n import no_such_part\nexcept ImportError:\n from chatglm_tuning.errors import nothing",
    ],
)
def test_a_faulty_import_of_our_own_is_not_hidden(stand_in, body):
    def run(argv):
        exec(compile(body, "chatglm_tuning/part.py", "exec"), {"__name__": "chatglm_tuning.part"})

    stand_in(run)
    with pytest.raises(ImportError, match="nothing"):
        run_command("chat", [])


def test_an_error_while_a_library_is_imported_that_is_of_another_kind_is_not_hidden(stand_in, library):
    stand_in(library("raise ValueError('defect')"))
    with pytest.raises(ValueError, match="defect"):
        run_command("chat", [])


def test_a_broken_torch_is_told_by_a_command(tmp_path):
    fake_library(tmp_path, "torch", BROKEN["OSError"][0])
    command = [sys.executable, "-m", "chatglm_tuning", "train-lora", "--data_path", "a", "--output_dir", "b"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error [X102]: torch cannot be imported (OSError: libcudart.so.12: cannot open")


def needs(command):
    """Leave a command out where its module is not in the tree yet."""
    module = COMMANDS[command].target.split(":")[0]
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is not in the tree")


PARSED = [
    "main(['--help'])",
    "main(['no-such-command'])",
    "parsing.parse_chat_arguments(['--seed', '1'])",
    "parsing.parse_train_arguments('lora', ['--data_path', 'a', '--output_dir', 'b'])",
    "parsing.parse_train_arguments('ptuning', ['--data_path', 'a', '--output_dir', 'b', '--pre_seq_len', '8'])",
]
RUN = [
    pytest.param(f"main([{name!r}, {flag!r}])", marks=needs(name))
    for name in COMMANDS
    for flag in ("--help", "--no_such_flag")
]


@pytest.mark.parametrize("statement", PARSED + RUN)
def test_nothing_heavy_is_imported_and_the_answer_is_quick(statement):
    code = PARSE.format(statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, last = done.stdout.splitlines()
    assert last.startswith("heavy [] ")
    assert float(last.split()[-1]) < 1


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("train_lora.py", marks=needs("train-lora")),
        pytest.param("train_ptuning.py", marks=needs("train-ptuning")),
        pytest.param("cli_demo.py", marks=needs("chat")),
    ],
)
def test_scripts_of_the_clone(script, tmp_path):
    command = [sys.executable, str(ROOT / script), "--no_such_flag"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error [A101]: --no_such_flag is no flag of chatglm-tuning ")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_module(tmp_path):
    command = [sys.executable, "-m", "chatglm_tuning", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == f"chatglm-tuning {__version__}\n"
