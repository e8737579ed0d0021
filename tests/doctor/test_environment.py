"""Versions, shadowed and doubled libraries, variables, and what libraries need of each other."""

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from chatglm_tuning.doctor import combinations, environment
from chatglm_tuning.doctor.combinations import combination_findings
from chatglm_tuning.doctor.environment import (
    extra_findings,
    fits,
    python_findings,
    requirements,
    shadow_findings,
    variable_findings,
    version_findings,
)
from chatglm_tuning.doctor.findings import Finding, examined, ok


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install libraries of which there is nothing but their metadata, in front of the others."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(str(place))

    def put(name: str, version: str, *needs: str, where: Path = place) -> None:
        folder = where / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True)
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {n}" for n in needs),
        ]
        (folder / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return put


def by_name(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if finding.status != "ok"}


def test_this_environment_is_well():
    assert by_name(python_findings()) == {}
    assert by_name(version_findings()) == {}
    (libraries,) = [finding for finding in version_findings() if finding.name == "libraries"]
    assert "torch 2." in libraries.what


def test_requirements_are_those_of_the_package():
    names = {item.name for item in requirements()}
    assert {"torch", "transformers", "peft", "packaging"} <= names | {"packaging"}
    assert "gradio" not in names
    assert {item.name for item in requirements("web")} == {"gradio"}


@pytest.mark.parametrize(
    ("name", "version", "says"),
    [
        ("transformers", "4.40.0", "4.40.0 is installed, and ==5.23.* is needed"),
        ("peft", "0.9.0", "0.9.0 is installed, and <0.22,>=0.21 is needed"),
    ],
)
def test_a_version_that_is_not_supported(name, version, says, install):
    install(name, version)
    found = by_name(version_findings())[name]
    assert (found.status, found.code) == ("problem", "X103")
    assert found.what == says
    assert f'pip install "{name}' in (found.remedy or "")


def test_a_library_that_is_missing(monkeypatch):
    installed = environment.installed_version
    monkeypatch.setattr(environment, "installed_version", lambda name: None if name == "peft" else installed(name))
    found = by_name(version_findings())["peft"]
    assert (found.status, found.code) == ("problem", "X101")


def test_a_package_without_metadata_is_told(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGE", "no-such-package-at-all")
    found = by_name(version_findings())["libraries"]
    assert (found.status, found.code) == ("warning", "X103")
    assert next(python_findings()).status == "ok"


def test_an_old_python_is_a_problem(monkeypatch):
    monkeypatch.setattr(environment.platform, "python_version", lambda: "3.8.10")
    assert by_name(python_findings())["python"].code == "X103"


def test_an_optional_group_that_is_missing_is_no_problem(monkeypatch):
    monkeypatch.setattr(environment, "installed_version", lambda _name: None)
    found = list(extra_findings())
    assert [finding.status for finding in found] == ["ok"] * 3
    assert 'pip install "chatglm-tuning[web]"' in found[2].what


def test_an_optional_library_of_another_version_is_told(install):
    install("gradio", "4.0.0")
    assert by_name(extra_findings())["web"].code == "X103"


def test_builds_count_as_their_version():
    assert fits(Requirement("torch>=2.11"), "2.13.0+cpu")
    assert not fits(Requirement("torch>=2.11"), "2.10.0")
    assert fits(Requirement("torch>=2.11"), "2.14.0.dev1")


def test_a_file_that_takes_a_librarys_place(tmp_path, monkeypatch):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("", encoding="utf-8")
    assert "datasets" not in by_name(shadow_findings())
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = by_name(shadow_findings())["datasets"]
    assert str(tmp_path / "datasets" / "__init__.py") in found.what
    assert "datasets" not in sys.modules


def test_a_library_installed_twice(install):
    install("numpy", "1.26.4")
    first = next(finding for finding in shadow_findings() if finding.name == "numpy")
    assert (first.status, first.code) == ("problem", "X106")
    assert first.what.startswith("versions 1.26.4 and 2.")


def test_variables_that_spoil_runs():
    found = by_name(variable_findings({"TRANSFORMERS_CACHE": "/x", "KMP_DUPLICATE_LIB_OK": "TRUE", "LANG": "C"}))
    assert set(found) == {"TRANSFORMERS_CACHE", "KMP_DUPLICATE_LIB_OK"}
    (told,) = variable_findings({"HF_HUB_OFFLINE": "1"})
    assert told == ok("variables", "HF_HUB_OFFLINE=1")
    assert list(variable_findings({})) == []


def test_what_libraries_need_of_each_other_is_there():
    assert [finding.status for finding in combination_findings()] == ["ok"]


def test_a_need_that_is_not_met(install):
    install("accelerate", "1.15.0", "torch>=99", "no-such-thing>=1", 'only-there>=1; sys_platform == "none"')
    found = [finding for finding in combination_findings() if finding.status != "ok"]
    assert [finding.name for finding in found] == ["accelerate", "accelerate"]
    assert {finding.code for finding in found} == {"X106"}
    assert found[0].what.startswith("it needs torch>=99, and 2.")
    assert found[1].what == "it needs no-such-thing>=1, and it is not installed"


def test_torchvision_of_another_torch_is_a_problem_and_xformers_a_warning(install):
    install("torchvision", "0.15.0", "torch==2.0.0")
    install("xformers", "0.0.20", "torch==2.0.1")
    found = by_name(combination_findings())
    assert found["torchvision"].status == "problem"
    assert found["xformers"].status == "warning"
    assert "pip uninstall xformers" in (found["xformers"].remedy or "")


@pytest.mark.parametrize(
    ("name", "version", "is_told"),
    [
        ("icetk", "0.0.7", True),
        ("apex", "0.9.10.dev0", True),
        ("apex", "1.0", False),
        ("bitsandbytes", "0.39.0", True),
        ("bitsandbytes", "0.48.0", False),
        ("bitsandbytes", "not-a-version", False),
    ],
)
def test_leftovers_that_do_harm(name, version, is_told, install):
    install(name, version)
    assert (name in by_name(combination_findings())) is is_told


def test_a_line_that_is_no_requirement_is_passed_over(install):
    install("accelerate", "1.15.0", "torch (>=1.0,<)", "numpy>=1")
    assert by_name(combination_findings()) == {}
    assert [item.name for item in combinations._needs("accelerate")] == ["numpy"]


def test_a_check_that_cannot_be_made_does_not_keep_the_others():
    def lacks():
        yield ok("first", "well")
        raise ImportError("No module named 'psutil'", name="psutil")

    def may_not():
        raise PermissionError(13, "Permission denied", "/proc/x")
        yield

    first, second = examined("memory", lacks)
    assert first.status == "ok"
    assert second.line.startswith("problem  memory: psutil cannot be imported")
    (third,) = examined("limits", may_not)
    assert third.line.startswith("warning  limits: this could not be looked at (/proc/x: Permission denied)")
