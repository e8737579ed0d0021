"""Libraries that are known to spoil each other, by their metadata alone."""

from collections import deque
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from chatglm_tuning.doctor.environment import fits, installed_version, plain, requirements
from chatglm_tuning.doctor.findings import Finding, ok, problem, warning

# Libraries that ours import where they are installed: the wrong version of one keeps ours from being imported.
_IMPORTED_WHERE_THERE = ("torchvision", "torchaudio")
# Others that come with ChatGLM-6B's own programs; nothing here uses them.
_USED_BY_OTHERS = ("xformers", "deepspeed", "flash-attn", "bitsandbytes", "cpm-kernels", "icetk")


def combination_findings() -> Iterator[Finding]:
    """Yield requirements of the installed libraries that are not met, and leftovers that are known to do harm."""
    found = [*_unmet(), *_leftovers()]
    yield from found
    if not found:
        yield ok("combinations", "what the installed libraries need of each other is there")


def _unmet() -> Iterator[Finding]:
    """Walk from what this package needs along the requirements of each library, as `pip check` does for all."""
    ours = [item.name for item in requirements()]
    roots = [*ours, *_IMPORTED_WHERE_THERE, *_USED_BY_OTHERS]
    waiting, seen = deque(canonicalize_name(name) for name in roots), set()
    others = {canonicalize_name(name) for name in _USED_BY_OTHERS}
    while waiting:
        name = waiting.popleft()
        if name in seen:
            continue
        seen.add(name)
        for item in _needs(name):
            version = installed_version(item.name)
            if version is not None and fits(item, version):
                if name not in others:
                    waiting.append(canonicalize_name(item.name))
                continue
            there = "it is not installed" if version is None else f"{version} is installed"
            tell = warning if name in others else problem
            yield tell(
                name,
                f"it needs {plain(item)}, and {there}",
                code="X106",
                remedy=f"Remove it, since nothing here uses it: pip uninstall {name}"
                if name in others
                else f'Install what fits: pip install "{plain(item)}", or everything anew from constraints.txt',
            )


def _needs(name: str) -> list[Requirement]:
    """Return what a library needs here, without its extras; nothing of one that is not installed."""
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            item = Requirement(line)
        except InvalidRequirement:  # of a library from before the present form
            continue
        if item.marker is None or item.marker.evaluate({"extra": ""}):
            found.append(item)
    return found


def _leftovers() -> Iterator[Finding]:
    for name, most, harm in (
        ("apex", "0.9.99", "it is not NVIDIA's apex but a web framework's of that name, whose import fails"),
        ("icetk", None, "it is of ChatGLM-6B's first code and holds protobuf back, which TensorBoard needs newer"),
        ("bitsandbytes", "0.42.99", "its import fails on newer libraries, and nothing here uses it"),
    ):
        version = installed_version(name)
        if version is not None and (most is None or _is_at_most(version, most)):
            yield warning(
                name, f"{version} is installed: {harm}", code="X106", remedy=f"Remove it: pip uninstall {name}"
            )


def _is_at_most(version: str, most: str) -> bool:
    try:
        return Version(version) <= Version(most)
    except InvalidVersion:
        return False
