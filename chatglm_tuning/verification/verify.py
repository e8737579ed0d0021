"""The recipe of `chatglm-tuning verify`, top to bottom."""

from collections.abc import Iterator
from pathlib import Path

from chatglm_tuning.adapters.lora import read_lora_config
from chatglm_tuning.checkpoint import (
    LORA_CONFIG_FILE,
    MANIFEST_NAME,
    Manifest,
    adapter_method,
    read_checkpoint,
    refuse_adapter,
    whole_checkpoints,
)
from chatglm_tuning.config.arguments import ModelArguments
from chatglm_tuning.config.verify import VerifyArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import Base, compute_dtype, default_device, load_base
from chatglm_tuning.training.callbacks import LOG_NAME
from chatglm_tuning.verification.adapter import (
    add_adapter,
    check_adapter,
    check_adapter_values,
    has_stopped_step,
    repeat_stopped_step,
)
from chatglm_tuning.verification.base import check_answers, check_files, check_values, is_of_released_size
from chatglm_tuning.verification.checks import Check

_NO_MODEL = ("M102", "M113")
"""Errors of a folder that holds no model; all others are of one that is not whole."""


def verify(arguments: VerifyArguments) -> Iterator[Check]:
    """Yield what was found, check by check, as soon as it is.

    Raises UserError for a folder that holds neither an adapter nor a model, and for an adapter whose base is missing.
    """
    folder = arguments.folder
    if not folder.is_dir():
        raise UserError(
            "there is no such folder", code="C101", where=str(folder), remedy="Give the folder of an adapter or a model"
        )
    newest = next(whole_checkpoints(folder), None)
    if newest is not None and not (folder / MANIFEST_NAME).is_file():
        yield Check("result", None, f"the run has none yet; its newest whole checkpoint is {newest.name}")
        folder = newest
    if newest is None and (folder / LOG_NAME).is_file() and adapter_method(folder) is None:
        stopped = sorted(path.name for path in folder.glob("stopped-at-step-*"))
        raise UserError(
            "the run has neither a result nor a whole checkpoint" + (f"; it stopped: {stopped[-1]}" if stopped else ""),
            code="C102",
            where=str(folder),
            remedy=f"verify {folder / stopped[-1]}" if stopped else "wait for its first checkpoint",
        )
    try:
        manifest = read_checkpoint(folder)
    except UserError as error:
        more = "" if newest is None else f"; {newest.name} of the same run is whole"
        yield Check("files", False, f"{error.where}: {error.what}{more}")
        return
    if manifest is not None:
        yield Check("files", True, f"all {len(manifest.files)} are those of {MANIFEST_NAME}")
    if not _holds_adapter(folder):
        yield from _verify_model(arguments, folder)
        return
    method = adapter_method(folder)
    assert method is not None
    base = _load(arguments, manifest)
    yield _check_fingerprint(base, manifest)
    yield check_values(base)
    if is_of_released_size(base):
        yield from check_answers(base)
    values = check_adapter_values(folder, method)
    yield values
    model = add_adapter(base, folder, method, is_trainable=has_stopped_step(folder))
    if values.holds:
        yield from check_adapter(model, folder, manifest)
    if has_stopped_step(folder):
        yield repeat_stopped_step(model, folder)


def _holds_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter alone, which is no model by itself."""
    try:
        refuse_adapter(folder)
    except UserError:
        return True
    return False


def _verify_model(arguments: VerifyArguments, folder: Path) -> Iterator[Check]:
    try:
        yield from check_files(folder)
        base = _load(arguments, None, str(folder))
    except UserError as error:
        if error.code in _NO_MODEL:
            raise
        where = "" if error.where is None else f"{error.where}: "
        yield Check("model", False, f"{where}{error.what}")
        return
    yield check_values(base)
    if is_of_released_size(base):
        yield from check_answers(base)
    else:
        yield Check("published answers", None, "the model is not of ChatGLM-6B's size")


def _load(arguments: VerifyArguments, manifest: Manifest | None, model: str | None = None) -> Base:
    """Load the base that is given, else the one that the manifest, or peft's configuration, names, as it says."""
    bits, dtype = arguments.quantization_bit, arguments.dtype
    if manifest is not None:
        model = arguments.model_name_or_path or manifest.base_model.name_or_path
        bits = bits or (None if arguments.model_name_or_path else manifest.base_model.quantization_bit)
        dtype = dtype or manifest.settings.get("dtype")
    elif model is None:
        model = arguments.model_name_or_path or _base_of_peft(arguments.folder)
    device = default_device()
    return load_base(
        model or arguments.model_name_or_path or ModelArguments.model_name_or_path,
        quantization_bit=bits,
        dtype=compute_dtype(dtype or "auto", device),
        device_of=lambda _key: device,
        show_progress=True,
    )


def _base_of_peft(folder: Path) -> str | None:
    """Return the base that peft's configuration names, None where there is none or it names none."""
    is_peft = (folder / LORA_CONFIG_FILE).is_file()
    return read_lora_config(folder).base_model_name_or_path if is_peft else None


def _check_fingerprint(base: Base, manifest: Manifest | None) -> Check:
    if manifest is None:
        return Check("base", None, "the adapter does not say what it was trained on")
    trained_on = manifest.base_model
    if trained_on.fingerprint == base.identity.fingerprint:
        return Check("base", True, f"{base.identity.name_or_path} is the one that it was trained on")
    what = f"{base.identity.name_or_path} is not the one that it was trained on ({trained_on.name_or_path})"
    return Check("base", False, what)
