"""What `export` wrote: every file against the certificate beside it, and what a package holds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from chatglm_tuning.checkpoint import CERTIFICATE_NAME, file_digest, read_manifest
from chatglm_tuning.config.verify import VerifyArguments
from chatglm_tuning.export.usage import ADAPTER_NAME, BASE_NAME
from chatglm_tuning.small_json import read_small_json
from chatglm_tuning.verification.checks import Check


def check_exported_files(folder: Path) -> Check:
    """Compare every file that the certificate of `folder` names with its digest there."""
    try:
        files = read_small_json(folder / CERTIFICATE_NAME)["output"]["files"]
        changed = [
            name
            for name, fact in files.items()
            if not (folder / name).is_file() or file_digest(folder / name) != fact["sha256"]
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Check(CERTIFICATE_NAME, False, "it is no certificate of an export")
    if changed:
        return Check(CERTIFICATE_NAME, False, f"{changed[0]} is not the file that was exported ({len(changed)} differ)")
    return Check(CERTIFICATE_NAME, True, f"all {len(files)} files are those that were exported")


def parts_of_package(arguments: VerifyArguments) -> Iterator[VerifyArguments]:
    """Yield what verifies the base and the adapter that an export has packaged in `arguments.folder`."""
    base, adapter = arguments.folder / BASE_NAME, arguments.folder / ADAPTER_NAME
    if base.is_dir():
        yield replace(arguments, folder=base, model_name_or_path=None)
    if not adapter.is_dir():
        return
    if base.is_dir() and arguments.model_name_or_path is None:
        manifest = read_manifest(adapter, verify_files=False)
        bits = arguments.quantization_bit or (manifest.base_model.quantization_bit if manifest else None)
        arguments = replace(arguments, model_name_or_path=str(base), quantization_bit=bits)
    yield replace(arguments, folder=adapter)
