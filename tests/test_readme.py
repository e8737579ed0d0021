"""The commands of both READMEs: the same in both, the original's among them, and each runs on the tiny base.

Running them takes minutes and is marked slow: `make readme`.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from chatglm_tuning.config.data_check import parse_data_check_arguments
from chatglm_tuning.config.doctor import parse_doctor_arguments
from chatglm_tuning.config.estimate import parse_estimate_arguments
from chatglm_tuning.config.evaluate import parse_eval_arguments
from chatglm_tuning.config.export import parse_export_arguments
from chatglm_tuning.config.parsing import parse_chat_arguments, parse_train_arguments
from chatglm_tuning.config.predict import parse_predict_arguments
from chatglm_tuning.config.quantize import parse_quantize_arguments
from chatglm_tuning.config.serve import parse_serve_arguments
from chatglm_tuning.config.verify import parse_verify_arguments
from chatglm_tuning.config.web import parse_web_arguments
from tests.conftest import REPOSITORY

READMES = ("README.md", "README_zh.md")
BASE = "embedded/chatglm-tiny"
QUESTION = "类型#裤*版型#宽松*风格#性感\n"
# What a fresh clone does not have, and the one folder that runs write to.
LEFT_OUT = (".git", ".venv", "output", "dist", "build", "__pycache__", ".*_cache", ".hypothesis")


def blocks(name: str, language: str = "bash") -> list[str]:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """The words of every line of `block`, continued lines joined, up to the first pipe into the last command."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line.rpartition("|")[2]) for line in lines]


OTHERS = {
    "predict": parse_predict_arguments,
    "eval": parse_eval_arguments,
    "web": parse_web_arguments,
    "web_demo": parse_web_arguments,
    "serve": parse_serve_arguments,
    "export": parse_export_arguments,
}
COMMANDS = [command for block in blocks("README.md") for command in commands(block)]
RUNNABLE = [block for block in blocks("README.md") if not block.startswith("make ")]


def is_server(block: str) -> bool:
    return bool(re.search(r"^(python web_demo\.py|chatglm-tuning (serve|web)) ", block))


def is_training(command: str) -> bool:
    return bool(re.search(r"(train_(lora|ptuning)\.py|chatglm-tuning train-)", command)) and "--help" not in command


def on_tiny_base(block: str) -> str:
    """The block as it runs here: the tiny base for the released one, two steps, twelve answers, two processes."""
    block = block.replace("/path/to/chatglm-6b", BASE).replace("--nproc_per_node=4", "--nproc_per_node=2")
    if re.search(r"tuning (predict|eval) ", block):
        # Answers take most of the time: of twelve rows here.
        return f"head -n 12 data/AdvertiseGen/sample_dev.json > data/AdvertiseGen/dev.json\n{block}"
    if not is_training(block):
        return block
    steps = 3 if "--resume_from_checkpoint" in block else 2
    block = block.replace("--save_steps 500", "--save_steps 1")
    # Several blocks train into one folder, which is refused without a word.
    return f"{block.rstrip()} --max_steps {steps} --overwrite_output_dir\n"


def test_both_readmes_have_the_same_commands():
    assert blocks("README.md") == blocks("README_zh.md")
    assert len(RUNNABLE) > 10


def test_they_link_each_other():
    for name, other in (READMES, READMES[::-1]):
        first_line = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()[0]
        assert f"]({other})" in first_line


@pytest.mark.parametrize("name", READMES)
def test_links_into_the_repository_lead_somewhere(name):
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (REPOSITORY / target).exists(), target


def test_the_originals_commands_are_there_as_it_prints_them(shared):
    original = (shared / "reference" / "original-readme.zh.md").read_text(encoding="utf-8")
    printed = re.findall(r"^```shell\n(.*?)^```$", original, re.MULTILINE | re.DOTALL)
    assert len(printed) == 6
    assert set(printed) <= set(blocks("README.md"))


def test_make_targets_exist():
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = {command[1] for command in COMMANDS if command[0] == "make"}
    assert targets >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}: setup\b", makefile, re.MULTILINE), target


def test_files_that_commands_name_are_there(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    for command in COMMANDS:
        for word in command:
            if word.endswith((".py", ".json")) and Path(word).parent == Path():
                found = Path(word).exists() or Path("data/AdvertiseGen", f"sample_{word}").exists()
                assert found or Path("data/AdvertiseGen", word).exists(), word


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_flags_are_known(command, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    if "--help" in command or command[0] == "export":
        return
    names = "chat|data|doctor|estimate|verify|quantize|predict|eval|export|serve|web"
    program = re.compile(rf"train[-_]|cli_demo|web_demo|({names})$")
    start = next((i for i, word in enumerate(command) if program.match(word)), None)
    if start is None:
        assert command[0] in ("make", "cp", "cd", "export", "source", "curl") or "convert" in " ".join(command)
        return
    name, flags = command[start].removesuffix(".py"), command[start + 1 :]
    if name in OTHERS:
        monkeypatch.chdir(tmp_path)
        Path("output/adgen-chatglm-6b-lora").mkdir(parents=True)  # an earlier command's
        assert OTHERS[name](flags) is not None
    elif name == "data":
        assert flags[0] == "check"
        assert parse_data_check_arguments(flags[1:]).model == "/path/to/chatglm-6b"
    elif name == "doctor":
        assert parse_doctor_arguments(flags, {}) is not None
    elif name == "verify":
        assert parse_verify_arguments(flags).folder == Path(flags[0])
    elif name == "estimate":
        assert parse_estimate_arguments(flags).model == "/path/to/chatglm-6b"
    elif name == "quantize":
        assert parse_quantize_arguments(flags).model_name_or_path == "/path/to/chatglm-6b"
    elif name in ("cli_demo", "chat"):
        assert parse_chat_arguments(flags).model.model_name_or_path.startswith("/path/to/chatglm-6b")
    else:
        method = name.removeprefix("train").strip("-_")
        assert parse_train_arguments(method, flags).method == method


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository, for commands to write into."""
    folder = tmp_path_factory.mktemp("readme") / "clone"
    shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RUNNABLE)), ids=lambda i: f"{i}:{' '.join(RUNNABLE[i].split()[:3])}")
def test_a_block_runs(number, clone):
    """Blocks run in the README's order in one folder, each in a fresh shell as a reader's: later ones need earlier."""
    block = RUNNABLE[number]
    if is_server(block):
        run_server(block, clone)
        return
    if block.startswith("curl"):
        run_server(RUNNABLE[number - 1], clone, question=block)
        return
    done = run_block(on_tiny_base(block), clone)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    if is_training(block):
        folder = re.findall(r"^(output/\S+): ", done.stdout, re.MULTILINE)[-1]
        assert (clone / folder / "chatglm_tuning.json").is_file()
    elif "--help" not in block and ("cli_demo" in block or "tuning chat" in block):
        assert done.stdout.strip(), done.stderr


def environment_of(clone):
    return (
        os.environ
        | os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "CHATGLM_TUNING_CACHE": str(clone.parent / "cache"),
            "HF_HUB_OFFLINE": "1",
            # torchrun's --master_port: its usual one may be taken by another run on this machine.
            "PET_MASTER_PORT": str(free_port()),
        }
    )


def run_block(block, clone):
    return subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", block],
        cwd=clone,
        env=environment_of(clone),
        input=QUESTION,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


def run_server(block, clone, question=None):
    """Start what the block starts, on a free port; ask what `question` asks; end it as an operator would."""
    port = free_port()
    command = [*shlex.split(on_tiny_base(block).replace("\\\n", " ")), "--port", str(port)]
    with subprocess.Popen(
        command, cwd=clone, env=environment_of(clone), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            wait_for_answer(f"http://127.0.0.1:{port}/", server)
            if question is not None:
                done = run_block(question.replace(":8000/", f":{port}/"), clone)
                assert done.returncode == 0, done.stderr
                assert json.loads(done.stdout)["choices"][0]["message"]["role"] == "assistant"
            server.terminate()
            said, _ = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 0, said


def wait_for_answer(address, server):
    deadline = time.monotonic() + 120
    while True:
        assert server.poll() is None, server.stdout.read()
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.3)
