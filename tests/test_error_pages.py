"""Every code has one page in both languages, whose message is real and whose commands exist."""

import ast
import contextlib
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from chatglm_tuning.cli.main import COMMANDS, main
from chatglm_tuning.config.estimate import parse_estimate_arguments
from chatglm_tuning.config.evaluate import parse_eval_arguments
from chatglm_tuning.config.export import parse_export_arguments
from chatglm_tuning.config.parsing import parse_chat_arguments, parse_train_arguments
from chatglm_tuning.config.predict import parse_predict_arguments
from chatglm_tuning.config.quantize import parse_quantize_arguments
from chatglm_tuning.config.serve import parse_serve_arguments
from chatglm_tuning.config.web import parse_web_arguments
from chatglm_tuning.doctor.known import known_errors
from chatglm_tuning.doctor.pages import codes, page
from tests.conftest import REPOSITORY

PAGES = REPOSITORY / "docs" / "errors"
CODE = re.compile(r"[ADMCTOSEX]\d{3}")
# The calls that give a code, and which of their positional arguments is the sentence.
RAISES = {"UserError": 0, "QuestionTooLongError": 0, "warning": 1, "problem": 1}
LABELS = {"en": ("Cause.", "Fix.", "Check."), "zh": ("原因。", "解决办法。", "如何检查。")}
# Flags that pages name of other programs: pip, torchrun, docker.
FOREIGN_FLAGS = {"--shm-size", "--gpus", "--force-reinstall", "--nproc_per_node", "--master_port", "--ipc"}
FOREIGN_PROGRAMS = {"git", "pip", "python", "python3", "cp", "mkdir", "export", "NCCL_DEBUG=INFO"}
MODEL, DATA = "/path/to/chatglm-6b", "train.jsonl"


@cache
def sites() -> dict[str, list[re.Pattern[str] | None]]:
    """From each code to what its sentences look like; None where one is not written at the place that raises it."""
    found: dict[str, list[re.Pattern[str] | None]] = {}
    for file in (REPOSITORY / "chatglm_tuning").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for code, what in codes_of(node):
                found.setdefault(code, []).append(what)
    for known in known_errors():
        if known.code is not None:
            found.setdefault(known.code, []).append(known.pattern)
    return found


def codes_of(node):
    """The codes in one node: of a call that takes one, and of a name that is given one (`code = "S103"`)."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "code":
        return [(literal, None) for literal in literals(node.value)]
    if not isinstance(node, ast.Call):
        return []
    place = RAISES.get(getattr(node.func, "id", ""))
    given = next((keyword.value for keyword in node.keywords if keyword.arg in ("code", "missing", "damaged")), None)
    if given is None:
        return []
    what = pattern_of(node.args[place]) if place is not None and len(node.args) > place else None
    others = [keyword.value for keyword in node.keywords if keyword.arg in ("code", "missing", "damaged")]
    return [(literal, what) for value in others for literal in literals(value)]


def literals(node) -> list[str]:
    values = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return [value for value in values if isinstance(value, str) and CODE.fullmatch(value)]


def pattern_of(node) -> re.Pattern[str] | None:
    if isinstance(node, ast.Constant):
        return re.compile(re.escape(node.value))
    if isinstance(node, ast.JoinedStr):
        parts = (re.escape(part.value) if isinstance(part, ast.Constant) else "(?s:.+)" for part in node.values)
        return re.compile("".join(parts))
    return None


def text_of(code: str) -> str:
    return (PAGES / f"{code}.md").read_text(encoding="utf-8")


def halves(code: str) -> dict[str, str]:
    english, chinese = text_of(code).split("\n## 中文：")
    return {"en": english, "zh": chinese}


def blocks(text: str) -> list[str]:
    """Its indented blocks, each with its lines joined that a backslash continues."""
    found = re.findall(r"(?:^    .*\n?)+", text, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).replace("\\\n", " ") for block in found]


def command_lines(text: str) -> list[str]:
    lines = [line.strip() for block in blocks(text) for line in block.splitlines()]
    return [line for line in lines if line.startswith("chatglm-tuning ")]


def test_every_code_has_a_page_and_every_page_a_use():
    assert set(codes()) == set(sites())
    assert {path.stem for path in PAGES.glob("*.md")} - {"README"} == set(codes())


def test_one_code_is_one_kind_of_failure():
    assert 45 <= len(codes()) <= 110
    assert all(len(found) <= 30 for found in sites().values())


@pytest.mark.parametrize("code", codes())
def test_a_page_is_whole(code):
    text = text_of(code)
    assert text.startswith(f"# {code}\n\n## ")
    assert len(text.splitlines()) <= 70
    messages = []
    for language, half in halves(code).items():
        message, *_ = blocks(half)
        messages.append(message)
        for label in LABELS[language]:
            assert half.count(f"**{label}**") == 1, label
    assert messages[0] == messages[1]
    assert re.search(r"[\u4e00-\u9fff]", halves(code)["zh"])
    assert not re.search(r"[\u4e00-\u9fff]", halves(code)["en"])


@pytest.mark.parametrize("code", codes())
def test_its_message_is_one_that_the_program_writes(code):
    message = blocks(halves(code)["en"])[0].strip()
    assert message.startswith(f"error [{code}]: ") or message.endswith(f"[{code}]") or code in ("X107",)
    patterns = sites()[code]
    assert any(pattern is None or pattern.search(message) for pattern in patterns), patterns


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("code", codes())
def test_the_doctor_prints_one_half(code, language):
    printed = page(code, language)
    assert printed.startswith(f"{code} ")
    assert f"**{LABELS[language][0]}**" in printed
    assert "## " not in printed
    other = "zh" if language == "en" else "en"
    assert f"**{LABELS[other][0]}**" not in printed


def test_the_index_has_all_pages_with_their_titles():
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| (.+) \| (.+) \|$", index, re.MULTILINE)
    assert sorted(code for code, *_ in listed) == codes()
    for code, target, english, chinese in listed:
        assert code == target
        assert f"\n## {english}\n" in text_of(code)
        assert f"\n## 中文：{chinese}\n" in text_of(code)


@cache
def flags_of(name: str) -> frozenset[str]:
    words = [name, "check"] if name == "data" else [name]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*words, "--help"]) == 0
    return frozenset(re.findall(r"--\w[\w-]*", printed.getvalue())) | {"--help"}


def check_command(line: str) -> None:
    words = shlex.split(line)
    assert words[0] == "chatglm-tuning"
    if words[1] in ("--help", "--version"):
        return
    assert words[1] in COMMANDS, line
    for word in words[2:]:
        if word.startswith("--"):
            assert word in flags_of(words[1]), line


def texts() -> dict[str, str]:
    found = {f"{code}-{language}": half for code in codes() for language, half in halves(code).items()}
    for known in known_errors():
        for language in ("en", "zh"):
            found[f"{known.name['en']}-{language}"] = f"{known.cause[language]}\n{known.fix[language]}"
    return found


@pytest.mark.parametrize("name", texts())
def test_commands_and_flags_exist(name):
    text = texts()[name]
    for line in command_lines(text):
        check_command(line)
    everything = set().union(*map(flags_of, COMMANDS)) | FOREIGN_FLAGS
    prose = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    for span in re.findall(r"`([^`]+)`", prose):
        if span.startswith("chatglm-tuning "):
            check_command(span)
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", prose):
        assert flag in everything or flag.replace("-", "_").lstrip("_") in ("help", "version"), flag


@pytest.mark.parametrize("code", codes())
def test_other_programs_in_blocks_are_known_ones(code):
    for block in blocks(halves(code)["en"])[1:]:
        for line in block.splitlines():
            word = line.split(" ")[0]
            assert word == "chatglm-tuning" or word in FOREIGN_PROGRAMS or line.lstrip()[:1] in '{}"', line


PARSERS = {
    "train-lora": lambda words: parse_train_arguments("lora", words),
    "train-ptuning": lambda words: parse_train_arguments("ptuning", words),
    "chat": parse_chat_arguments,
    "predict": parse_predict_arguments,
    "eval": parse_eval_arguments,
    "export": parse_export_arguments,
    "estimate": parse_estimate_arguments,
    "quantize": parse_quantize_arguments,
    "serve": parse_serve_arguments,
    "web": parse_web_arguments,
}


@pytest.mark.parametrize("code", codes())
def test_its_commands_are_accepted(code, tmp_path, monkeypatch):
    """As far as that is seen without files: values, and what goes together. What a page leaves out is added."""
    monkeypatch.chdir(tmp_path)
    Path("output/lora").mkdir(parents=True)
    for name in ("chatglm_6b_lora.json", "chatglm_6b_ptuning.json"):
        Path(name).write_text((REPOSITORY / name).read_text(encoding="utf-8"), encoding="utf-8")
    for line in command_lines(halves(code)["en"]):
        _, command, *words = shlex.split(line)
        if command in PARSERS and "--help" not in words:
            assert PARSERS[command](words) is not None
