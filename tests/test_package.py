"""What the package says of itself agrees everywhere, and its checks are switched on."""

import re
import tomllib
import warnings
from pathlib import Path

import pytest

import chatglm_tuning
from chatglm_tuning.cli.main import COMMANDS
from tests.conftest import REPOSITORY

NAME = re.compile(r"[A-Za-z0-9_.-]+")


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def canonical(requirement: str) -> str:
    """The name of a requirement, as package indexes compare names."""
    name = NAME.match(requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name.group()).lower()


def requirements() -> set[str]:
    """The names of what the package needs, with all that is optional."""
    declared = project()["project"]
    wanted = sum(declared["optional-dependencies"].values(), declared["dependencies"])
    return {canonical(requirement) for requirement in wanted} - {"chatglm-tuning"}


def constraints() -> list[str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_the_version_is_the_same_everywhere():
    assert project()["project"]["version"] == chatglm_tuning.__version__
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{chatglm_tuning.__version__}]" in changelog


def test_constraints_pin_every_requirement_by_a_version_any_index_has():
    pinned = {canonical(line) for line in constraints()}
    assert requirements() | {canonical(requirement) for requirement in project()["build-system"]["requires"]} <= pinned
    for line in constraints():
        # No local versions (+cpu), addresses or paths, which only some machines have.
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line), line


def test_every_import_is_a_requirement():
    imported = set()
    for file in (REPOSITORY / "chatglm_tuning").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        imported |= set(re.findall(r"^\s*(?:from|import) ([a-z_0-9]+)", text, re.MULTILINE))
    installed = {canonical(line) for line in constraints()}
    assert {canonical(name) for name in imported} & installed <= requirements()


def test_every_command_is_a_module_of_the_package():
    for command in COMMANDS.values():
        module = command.target.split(":")[0].replace(".", "/")
        assert (REPOSITORY / f"{module}.py").is_file(), module


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["transformers.models.glm", "peft.tuners.lora", "chatglm_tuning.training.run"])
def test_deprecations_fail_the_suite(category, module):
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "file.py", 1, module=module)


def test_no_registry_or_path_of_one_machine_is_in_what_is_installed_from():
    for name in (
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        ".ci/run",
        ".ci/try-wheel",
        "README.md",
        "README_zh.md",
    ):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        assert not re.search(r"(pypi|pythonhosted|npmjs)\.org|(^|[^\w.-])/(home|root|work|opt)/", text), name


def test_the_licence_is_apache_2():
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "The chatglm_tuning authors" in text
    assert project()["project"]["license"] == "Apache-2.0"
    assert Path(REPOSITORY / project()["project"]["license-files"][0]).is_file()
