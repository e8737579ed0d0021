"""The command: what it prints, its exit codes, and that a broken torch does not break it."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from chatglm_tuning.cli.main import main
from chatglm_tuning.config.doctor import language_of, parse_doctor_arguments
from chatglm_tuning.doctor import report
from chatglm_tuning.doctor.findings import ok, problem, warning
from chatglm_tuning.errors import UserError
from tests.conftest import REPOSITORY
from tests.doctor.fakes import BROKEN, fake_library
from tests.model_folder import EMBEDDED

OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.fixture
def english(monkeypatch):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)


def test_a_page_is_printed_in_the_language_of_the_locale(capsys, english, monkeypatch):
    assert main(["doctor", "D103"]) == 0
    assert capsys.readouterr().out.startswith("D103 Rows that cannot be used\n")
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert main(["doctor", "d103"]) == 0
    assert capsys.readouterr().out.startswith("D103 有不能使用的行\n")
    for argv in (["[D103]", "--language", "en"], ["--language", "en", "D103"], ["--language=en", "D103"]):
        assert main(["doctor", *argv]) == 0
        assert capsys.readouterr().out.startswith("D103 Rows that cannot be used\n")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LANG": "zh_CN", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LANG": "de_DE", "LC_MESSAGES": "zh_CN"}, "zh"),
        ({"LANG": "zh_CN", "LC_ALL": ""}, "zh"),
    ],
)
def test_the_language_of_a_locale(environment, expected):
    assert language_of(environment) == expected
    assert parse_doctor_arguments([], environment).language == expected
    assert parse_doctor_arguments(["--language", "en"], environment).language == "en"


def test_an_unknown_code_is_a_mistake_that_names_a_near_one(capsys):
    assert main(["doctor", "D199"]) == 2
    assert "error [X108]: D199 is no error code. Write one as it is printed, such as D10" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["D103", "--traceback", "log"], "A105"),
        (["D103", "--output_dir", "out"], "A106"),
        (["--traceback", "log", "--model_name_or_path", "m"], "A106"),
        (["--langauge", "en"], "A101"),
        (["--language", "fr"], "A103"),
        (["D103", "D104"], "A105"),
        (["--traceback", "/no/such/file"], "X108"),
    ],
)
def test_mistakes(argv, code, capsys):
    assert main(["doctor", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error [{code}]: ")


def test_a_traceback_is_explained(capsys, english, tmp_path, monkeypatch):
    log = tmp_path / "log.txt"
    log.write_text(OOM, encoding="utf-8")
    assert main(["doctor", "--traceback", str(log)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("the GPU's memory is used up\nCause: ")
    assert "doctor X107" in told
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(OOM.encode())))
    assert main(["doctor", "--traceback", "-", "--language", "zh"]) == 0
    assert "\n原因: " in capsys.readouterr().out


def test_an_unknown_traceback_has_code_1(capsys, english, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("ZeroDivisionError: division by zero", encoding="utf-8")
    assert main(["doctor", "--traceback", str(log)]) == 1
    assert capsys.readouterr().out.startswith("This error is not known here.\n")


@pytest.mark.parametrize(
    ("findings", "code", "last"),
    [
        ([ok("a", "b")], 0, "Nothing is wrong in 1 check."),
        ([ok("a", "b"), warning("c", "d", code="X105", remedy="e")], 0, "0 problems, 1 warning in 2 checks. "),
        ([problem("c", "d", code="X102", remedy="e")], 1, "1 problem, 0 warnings in 1 check. "),
    ],
)
def test_exit_codes_and_the_summary(findings, code, last, capsys, monkeypatch):
    monkeypatch.setattr(report, "examine", lambda model, output_dir: iter(findings))
    assert main(["doctor"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(findings)] == [finding.line for finding in findings]
    assert lines[-1].startswith(last)
    if findings[-1].code:
        assert f"`chatglm-tuning doctor {findings[-1].code}` explains" in lines[-1]


def test_what_no_terminal_takes_is_written_out(capsys, monkeypatch):
    """An error of a library may hold anything, as half of a surrogate pair."""
    broken = problem("torch", "it cannot be imported (ValueError: \ud800\x1b[2J)", code="X102", remedy="Install it")
    monkeypatch.setattr(report, "examine", lambda model, output_dir: iter([broken]))
    assert main(["doctor"]) == 1
    assert r"(ValueError: \ud800\x1b[2J)" in capsys.readouterr().out


def run(argv, tmp_path, **environment):
    command = [sys.executable, "-m", "chatglm_tuning", "doctor", *argv]
    variables = {**os.environ, "LANG": "C", **environment}
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(REPOSITORY)]))
    return subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_whole_look_at_this_machine(tmp_path):
    done = run(["--output_dir", "out"], tmp_path)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    names = [line[9:].split(":")[0] for line in lines if line[:9].strip() in ("ok", "warning", "problem")]
    for name in ("python", "libraries", "combinations", "imports", "cpu", "output_dir", "memory"):
        assert name in names, done.stdout
    assert list(tmp_path.iterdir()) == []
    assert done.returncode == (1 if any(line.startswith("problem") for line in lines) else 0)


@pytest.mark.parametrize("kind", [kind for kind in BROKEN if kind != "hang"])
def test_a_broken_torch_is_one_finding_among_the_others(kind, tmp_path):
    """The hang, whose time limit is minutes, is tried in tests/doctor/test_imports.py."""
    body, says = BROKEN[kind]
    place = tmp_path / "fake"
    place.mkdir()
    fake_library(place, "torch", body)
    done = run(["--model_name_or_path", str(EMBEDDED)], tmp_path, PYTHONPATH=str(place))
    assert done.returncode == 1
    assert done.stderr == ""
    assert f"problem  torch: it cannot be imported ({says}" in done.stdout
    assert f"warning  torch: it is imported from {place / 'torch.py'}, and installed in" in done.stdout
    assert "\nok       memory: " in done.stdout
    assert "\nok       weights: " in done.stdout
    assert "warning  folder: the checks that commands make themselves need torch" in done.stdout


@pytest.mark.parametrize("argv", [["D103"], ["--traceback", "log"]])
def test_pages_and_tracebacks_need_no_library(argv, tmp_path):
    """Not even those that are always installed: nothing but the standard library is imported."""
    (tmp_path / "log").write_text(OOM, encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
    code += f"from chatglm_tuning.cli.main import main; sys.exit(main(['doctor', *{argv!r}]))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_model_is_looked_at_and_this_process_imports_no_torch():
    code = (
        "import sys; from chatglm_tuning.doctor import imports, report; from pathlib import Path\n"
        "imports._MODULES = {'numpy': 'numpy'}\n"
        f"print(*(finding.name for finding in report.examine({str(EMBEDDED)!r}, Path('out'))))\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=300
    )
    names, imported = done.stdout.splitlines()
    assert names.endswith(" config.json ice_text.model weights folder")
    assert imported == "[]"


def test_the_default_output_is_that_of_training():
    assert parse_doctor_arguments([], {}).output_dir == Path("output")


def test_a_user_error_has_its_code_for_programs():
    with pytest.raises(UserError) as raised:
        parse_doctor_arguments(["--langauge"], {})
    assert raised.value.code == "A101"
