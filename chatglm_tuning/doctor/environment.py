"""Python and the installed libraries, by their metadata: nothing is imported."""

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from chatglm_tuning.doctor.findings import Finding, ok, problem, warning

PACKAGE = "chatglm-tuning"
_INSTALL = "pip install -c constraints.txt -e . in a clone of the repository"
# Libraries whose name in Python another file on the path may take.
_IMPORTED = ("torch", "numpy", "transformers", "peft", "accelerate", "datasets", "safetensors", "sentencepiece")
_NOTED_VARIABLES = {
    "TRANSFORMERS_CACHE": ("it has no effect on transformers 5", "Set HF_HOME"),
    "CUDA_LAUNCH_BLOCKING": ("it slows every run on a GPU", "Unset it when you have found what you looked for"),
    "KMP_DUPLICATE_LIB_OK": ("it hides that two OpenMP runtimes are loaded, which may give wrong results", "Unset it"),
}

_TOLD_VARIABLES = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HOME", "OMP_NUM_THREADS")


def python_findings() -> Iterator[Finding]:
    """Yield the interpreter, its environment and the system."""
    version = platform.python_version()
    wanted = _metadata_of_package("Requires-Python")
    if wanted and not SpecifierSet(wanted).contains(version, prereleases=True):
        yield problem(
            "python",
            f"{version} runs this, and {wanted} is needed",
            code="X103",
            remedy="Make an environment with a newer Python",
        )
    else:
        place = sys.prefix if sys.prefix != sys.base_prefix else f"{sys.prefix}, no virtual environment"
        yield ok("python", f"{version} in {place}")
    yield ok(
        "system", f"{platform.system()} {platform.release()}, {platform.machine()}, {' '.join(platform.libc_ver())}"
    )


def requirements(extra: str = "") -> list[Requirement]:
    """Return what this package needs here, with `extra` only what that adds; empty where it is not installed."""
    try:
        lines = distribution(PACKAGE).requires or []
    except PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    needed = [item for item in found if item.marker is None or item.marker.evaluate({"extra": extra})]
    return [item for item in needed if ("extra" in str(item.marker)) == bool(extra)]


def version_findings() -> Iterator[Finding]:
    """Yield the versions of the libraries beside those that this package needs."""
    needed = requirements()
    if not needed:
        yield warning(
            "libraries",
            f"{PACKAGE} is not installed here, so that nothing says which versions it needs",
            code="X103",
            remedy=f"Install it: {_INSTALL}",
        )
        return
    fitting = []
    for item in needed:
        version = installed_version(item.name)
        if version is None:
            yield problem(
                item.name, "it is not installed", code="X101", remedy=f'Install it: pip install "{plain(item)}"'
            )
        elif not fits(item, version):
            yield problem(
                item.name,
                f"{version} is installed, and {item.specifier} is needed",
                code="X103",
                remedy=f'Install what fits: pip install "{plain(item)}"',
            )
        else:
            fitting.append(f"{item.name} {version}")
    yield ok("libraries", ", ".join(fitting))


def extra_findings() -> Iterator[Finding]:
    """Yield which of the optional groups are there."""
    for extra in ("eval", "serve", "web"):
        needed = requirements(extra)
        missing = [item.name for item in needed if installed_version(item.name) is None]
        wrong = [item for item in needed if (version := installed_version(item.name)) and not fits(item, version)]
        install = f'pip install "{PACKAGE}[{extra}]"'
        for item in wrong:
            yield warning(
                extra,
                f"{item.name} {installed_version(item.name)} is installed, and {item.specifier} is needed",
                code="X103",
                remedy=f"Install what fits: {install}",
            )
        if missing:
            yield ok(extra, f"not installed ({', '.join(missing)}); where it is wanted: {install}")
        elif needed and not wrong:
            yield ok(extra, "installed")


def shadow_findings() -> Iterator[Finding]:
    """Yield libraries that are imported from elsewhere than they are installed, and those installed twice."""
    for name in _IMPORTED:
        versions = sorted({found.version for found in distributions(name=name)})
        if len(versions) > 1:
            yield problem(
                name,
                f"versions {' and '.join(versions)} are installed over each other",
                code="X106",
                remedy=f"Run pip uninstall {name} until there is none, and install it once more",
            )
        spec = find_spec(name)
        if spec is None or spec.origin is None or not (found := _distribution(name)):
            continue
        home = Path(str(found.locate_file(""))).resolve()
        is_editable = "editable" in (found.read_text("direct_url.json") or "")
        if not is_editable and home not in Path(spec.origin).resolve().parents:
            yield warning(
                name,
                f"it is imported from {spec.origin}, and installed in {home}",
                code="X102",
                remedy="Rename or remove that file, or take its folder out of PYTHONPATH",
            )


def variable_findings(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Yield environment variables that slow or spoil runs."""
    for name, (what, remedy) in _NOTED_VARIABLES.items():
        if environment.get(name):
            yield warning(name, what, code="X106", remedy=remedy)
    chosen = [f"{name}={environment[name]}" for name in _TOLD_VARIABLES if name in environment]
    if chosen:
        yield ok("variables", ", ".join(chosen))


def installed_version(name: str) -> str | None:
    """Return the version of a library, None where it is not installed."""
    found = _distribution(name)
    return None if found is None else found.version


def fits(requirement: Requirement, version: str) -> bool:
    """Whether `version` is one of those that are asked for; builds as +cpu count as their version."""
    return requirement.specifier.contains(version, prereleases=True)


def plain(requirement: Requirement) -> str:
    """Return a requirement as pip takes it, without its marker."""
    return f"{canonicalize_name(requirement.name)}{requirement.specifier}"


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _metadata_of_package(key: str) -> str | None:
    found = _distribution(PACKAGE)
    return None if found is None else found.metadata[key]


def environment_findings() -> Iterator[Finding]:
    """Yield all of the above."""
    yield from python_findings()
    yield from version_findings()
    yield from extra_findings()
    yield from shadow_findings()
    yield from variable_findings(os.environ)
