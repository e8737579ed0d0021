"""What `export` wrote: every file against the certificate beside it, and the adapter that a package holds."""

from dataclasses import replace
from pathlib import Path

from chatglm_tuning.base_folder import read_config
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


def adapter_of_package(arguments: VerifyArguments) -> VerifyArguments | None:
    """Return what verifies the adapter that an export has packaged in `arguments.folder`, on the base beside it.

    None where there is no adapter. Raises UserError for a base that is none.
    """
    base, adapter = arguments.folder / BASE_NAME, arguments.folder / ADAPTER_NAME
    if not adapter.is_dir():
        return None
    if base.is_dir() and arguments.model_name_or_path is None:
        manifest = read_manifest(adapter, verify_files=False)
        trained = None if manifest is None else manifest.base_model.quantization_bit
        bits = arguments.quantization_bit or (None if read_config(base).quantization_bit else trained)
        arguments = replace(arguments, model_name_or_path=str(base), quantization_bit=bits)
    return replace(arguments, folder=adapter)
