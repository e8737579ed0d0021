"""All checks, in the order in which they are told."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from chatglm_tuning.doctor.combinations import combination_findings
from chatglm_tuning.doctor.devices import cpu_findings, gpu_findings
from chatglm_tuning.doctor.environment import environment_findings, plain, requirements
from chatglm_tuning.doctor.findings import Finding, examined, warning
from chatglm_tuning.doctor.imports import findings_of, import_libraries
from chatglm_tuning.doctor.model_check import command_findings
from chatglm_tuning.doctor.model_folder import model_findings, read_shape
from chatglm_tuning.doctor.room import disk_findings, limit_findings, memory_findings
from chatglm_tuning.errors import UserError
from chatglm_tuning.estimate import ModelShape
from chatglm_tuning.wording import counted


def examine(model: str | None, output_dir: Path) -> Iterator[Finding]:
    """Yield what each check finds, as soon as it is known. model: folder of a base, None = none is looked at."""
    yield from examined("environment", environment_findings)
    yield from examined("combinations", combination_findings)
    imports = import_libraries()
    wanted = {item.name: plain(item) for item in requirements()}
    yield from examined("imports", lambda: findings_of(imports, wanted))
    torch = imports.torch
    yield from examined("cpu", lambda: cpu_findings(torch))
    yield from examined("gpu", lambda: gpu_findings(torch, os.environ))
    yield from examined("disk", lambda: disk_findings(output_dir, os.environ))
    has_gpu, multiplies_bf16 = bool(torch.get("is_available")), bool(torch.get("multiplies_bf16", True))
    shape = _shape(model)
    yield from examined("memory", lambda: memory_findings(shape, has_gpu=has_gpu, multiplies_bf16=multiplies_bf16))
    yield from examined("limits", limit_findings)
    if model is not None:
        yield from _model_findings(model, torch_works="torch" not in imports.errors)


def summary_of(findings: Sequence[Finding]) -> str:
    """Return the last line of the report."""
    problems = sum(finding.status == "problem" for finding in findings)
    warnings = sum(finding.status == "warning" for finding in findings)
    if not problems and not warnings:
        return f"Nothing is wrong in {counted(len(findings), 'check')}."
    codes = sorted({finding.code for finding in findings if finding.code})
    return (
        f"{counted(problems, 'problem')}, {counted(warnings, 'warning')} in {counted(len(findings), 'check')}. "
        f"`chatglm-tuning doctor {codes[0]}` explains a code ({', '.join(codes)})."
    )


def _shape(model: str | None) -> ModelShape | None:
    try:
        return ModelShape.of(read_shape(model), str(model))
    except UserError:
        return None


def _model_findings(model: str, *, torch_works: bool) -> Iterator[Finding]:
    """Yield the checks without torch, and those of the commands where torch works and no problem is known yet."""
    found = list(examined("model", lambda: model_findings(model)))
    yield from found
    if any(finding.status != "ok" for finding in found):
        return
    if torch_works:
        yield from examined("folder", lambda: command_findings(model))
    else:
        yield warning(
            "folder",
            "the checks that commands make themselves need torch, and did not take place",
            code="X102",
            remedy="Mend torch and run this again",
        )
