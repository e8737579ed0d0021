"""Libraries that fail, crash or hang at their import: findings, and everything else goes on."""

import os
import sys

import pytest

from chatglm_tuning.doctor import imports as module
from chatglm_tuning.doctor.imports import Imports, findings_of, import_libraries
from tests.doctor.fakes import BROKEN, fake_library

LIBRARIES = {"numpy": "numpy", "torch": "torch", "safetensors": "safetensors.torch", "sentencepiece": "sentencepiece"}


@pytest.fixture(autouse=True)
def few_libraries(monkeypatch):
    """Those that import quickly, and one that needs torch."""
    monkeypatch.setattr(module, "_MODULES", LIBRARIES)


def lines_of(imports: Imports) -> list[str]:
    return [finding.line for finding in findings_of(imports, {"torch": "torch>=2.11"})]


def test_whole_libraries_are_imported_and_torch_is_asked():
    found = import_libraries()
    assert list(found.seconds) == list(LIBRARIES)
    assert found.errors == {}
    assert found.torch["version"].split("+")[0].count(".") == 2
    assert found.torch["numpy"] is True
    assert [line.split()[0] for line in lines_of(found)] == ["ok"]


@pytest.mark.parametrize(("body", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_torch_is_a_problem_and_the_others_are_tried(body, says, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(fake_library(tmp_path, "torch", body)))
    found = import_libraries(time_limit_s=6)
    assert list(found.errors) == ["torch"]
    assert says in found.errors["torch"]
    assert "sentencepiece" in found.seconds
    assert "safetensors" not in found.seconds
    problems = [line for line in lines_of(found) if line.startswith("problem")]
    assert len(problems) == 1
    assert problems[0].startswith(f"problem  torch: it cannot be imported ({found.errors['torch']}). ")
    assert problems[0].endswith('"torch>=2.11" [X102]')


def test_what_a_library_prints_and_its_exit_do_no_harm(tmp_path, monkeypatch):
    body = "import sys\nprint('{\"imported\": \"nothing\"}')\nsys.stderr.write('noise')\nsys.exit(3)\n"
    monkeypatch.setenv("PYTHONPATH", str(fake_library(tmp_path, "sentencepiece", body)))
    found = import_libraries()
    assert found.errors == {"sentencepiece": "SystemExit: 3"}
    assert "torch" in found.seconds


def test_several_crashes_are_all_found(tmp_path, monkeypatch):
    crash = "import os, signal\nos.kill(os.getpid(), signal.SIGABRT)\n"
    fake_library(tmp_path, "numpy", crash)
    monkeypatch.setenv("PYTHONPATH", str(fake_library(tmp_path, "sentencepiece", crash)))
    monkeypatch.setattr(module, "_MODULES", {"numpy": "numpy", "pyarrow": "json", "sentencepiece": "sentencepiece"})
    found = import_libraries()
    assert list(found.errors) == ["numpy", "sentencepiece"]
    assert list(found.seconds) == ["pyarrow"]


def test_a_library_that_is_missing_is_told_with_the_versions_alone():
    missing = Imports(errors={"peft": "ModuleNotFoundError: No module named 'peft'"})
    assert lines_of(missing) == []
    needed_by_it = Imports(errors={"peft": "ModuleNotFoundError: No module named 'accelerate'"})
    assert lines_of(needed_by_it)[0].startswith("problem  peft: ")


def test_numpy_of_another_generation_is_seen():
    torch = {"version": "2.2.0", "numpy": False}
    line = lines_of(Imports(seconds={"torch": 1.0}, torch=torch))[-1]
    assert line.startswith("problem  numpy: torch 2.2.0 cannot use the numpy that is installed")
    raised = {"version": "2.2.0", "error": "RuntimeError: Numpy is not available"}
    assert lines_of(Imports(torch=raised))[-1].startswith("problem  numpy: ")


@pytest.mark.parametrize(
    ("libraries", "is_told"),
    [
        (["/a/torch/lib/libgomp-24e2ab19.so.1.0.0", "/b/sklearn/libgomp-a34b3233.so.1"], False),
        (["/a/torch/lib/libgomp-24e2ab19.so.1.0.0", "/conda/lib/libiomp5.so"], True),
        ([], False),
    ],
)
def test_two_kinds_of_openmp_are_told(libraries, is_told):
    lines = lines_of(Imports(openmp=libraries))
    assert [line.startswith("warning  OpenMP: ") for line in lines] == [True] * is_told


def test_the_probe_sees_the_runtimes_of_its_process():
    found = import_libraries()
    if sys.platform.startswith("linux"):
        assert any("omp" in os.path.basename(path) for path in found.openmp)
