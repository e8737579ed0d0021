"""The recipe of `chatglm-tuning verify`, top to bottom."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from chatglm_tuning.adapters.lora import read_lora_config
from chatglm_tuning.checkpoint import (
    CERTIFICATE_NAME,
    LORA_CONFIG_FILE,
    LORA_FILE,
    MANIFEST_NAME,
    OLD_LORA_FILE,
    PREFIX_FILE,
    Manifest,
    read_checkpoint,
    refuse_adapter,
    step_of_checkpoint,
    whole_checkpoints,
)
from chatglm_tuning.config.arguments import ModelArguments
from chatglm_tuning.config.verify import VerifyArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import Base, compute_dtype, default_device, load_base
from chatglm_tuning.shards import WEIGHT_NAMES
from chatglm_tuning.training.callbacks import LOG_NAME, read_log
from chatglm_tuning.verification.adapter import (
    add_adapter,
    check_adapter,
    check_adapter_values,
    has_stopped_step,
    repeat_stopped_step,
)
from chatglm_tuning.verification.base import check_answers, check_files, check_values, is_of_released_size
from chatglm_tuning.verification.checks import Check
from chatglm_tuning.verification.exported import adapter_of_package, check_exported_files
from chatglm_tuning.verification.recorded import Record, record_of

_AdapterMethod = Literal["lora", "ptuning"]
_ADAPTER_FILES = (LORA_CONFIG_FILE, LORA_FILE, OLD_LORA_FILE, PREFIX_FILE)
_ARGUMENTS_OF_OTHERS = "training_args.bin"
"""What Trainer writes into every folder, and the training of this package into none."""
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
    if (folder / CERTIFICATE_NAME).is_file():
        yield check_exported_files(folder)
        if not _holds_weights(folder):
            yield from _verify_package(arguments)
            return
    newest = next(whole_checkpoints(folder), None)
    is_ours = newest is not None or _is_of_a_run(folder)
    if is_ours and not (folder / MANIFEST_NAME).is_file() and not _holds_weights(folder):
        if newest is None:
            raise _no_result(folder)
        yield Check("result", None, f"the run has none yet; its newest whole checkpoint is {newest.name}")
        folder = newest
    try:
        manifest = _read_whole(folder, is_ours=is_ours)
        record = None if manifest is None else record_of(manifest, folder)
    except UserError as error:
        more = "" if newest is None else f"; {newest.name} of the same run is whole"
        yield Check("files", False, f"{error.where}: {error.what}{more}")
        return
    if manifest is not None:
        yield Check("files", True, f"all {len(manifest.files)} are those of {MANIFEST_NAME}")
    method = _adapter_of(folder, manifest)
    if method is None or not _holds_adapter_alone(folder):
        yield from _verify_model(arguments, folder)
    if method is not None:
        is_recorded = manifest is not None and manifest.method == method
        yield from _verify_adapter(arguments, folder, method, record if is_recorded else None)


def _verify_package(arguments: VerifyArguments) -> Iterator[Check]:
    """Verify what `export` wrote as a pair or for other programs; its files are seen to already."""
    try:
        adapter = adapter_of_package(arguments)
    except UserError as error:
        yield _failed("base", error)
        return
    if adapter is None:
        yield Check("answers", None, f"the file is for another program; {CERTIFICATE_NAME} says how it answered")
    else:
        yield from verify(adapter)


def _read_whole(folder: Path, *, is_ours: bool) -> Manifest | None:
    """Return the manifest of `folder`; raises UserError where it is damaged, and where one of ours has none."""
    manifest = read_checkpoint(folder)
    if manifest is None and is_ours:
        raise UserError(
            "the file, which is written last, is missing: it was removed, or the run ended while it saved",
            code="C112",
            where=str(folder / MANIFEST_NAME),
            remedy="give an earlier checkpoint",
        )
    return manifest


def _holds_weights(folder: Path) -> bool:
    """Whether an adapter or a model stands in `folder`, whole or not."""
    return any((folder / name).exists() for name in (*_ADAPTER_FILES, *WEIGHT_NAMES))


def _is_of_a_run(folder: Path) -> bool:
    """Whether training here has written to `folder`, a run or a checkpoint of one; others leave files like these."""
    if (folder / _ARGUMENTS_OF_OTHERS).is_file():
        return False
    run = folder if step_of_checkpoint(folder) is None else folder.parent
    has_log = (run / LOG_NAME).is_file() and all("step" in line for line in read_log(run)[:1])
    return has_log or next(whole_checkpoints(run), None) is not None


def _no_result(folder: Path) -> UserError:
    stopped = sorted(path.name for path in folder.glob("stopped-at-step-*"))
    return UserError(
        "the run has neither a result nor a whole checkpoint" + (f"; it stopped: {stopped[-1]}" if stopped else ""),
        code="C102",
        where=str(folder),
        remedy=f"verify {folder / stopped[-1]}" if stopped else "wait for its first checkpoint",
    )


def _adapter_of(folder: Path, manifest: Manifest | None) -> _AdapterMethod | None:
    """Return which adapter `folder` holds, alone or beside a model; None where it holds none."""
    if manifest is not None and manifest.method != "full":
        return manifest.method
    if (folder / LORA_CONFIG_FILE).is_file():
        return "lora"
    if (folder / PREFIX_FILE).is_file() or (manifest is None and _holds_adapter_alone(folder)):
        return "ptuning"
    return None


def _holds_adapter_alone(folder: Path) -> bool:
    """Whether `folder` holds an adapter alone, which is no model by itself."""
    try:
        refuse_adapter(folder)
    except UserError:
        return True
    return False


def _verify_adapter(
    arguments: VerifyArguments, folder: Path, method: _AdapterMethod, record: Record | None
) -> Iterator[Check]:
    """Verify an adapter whose files are those of its manifest, where it has one."""
    try:
        values = check_adapter_values(folder, method)
        named = _base_of_peft(folder) if record is None and method == "lora" else None
    except UserError as error:
        yield _failed("adapter", error)
        return
    yield values
    base = _load(arguments, record, named or (None if _holds_adapter_alone(folder) else str(folder)))
    yield _check_fingerprint(base, record)
    is_finite = values.holds
    for check in _check_base(base):
        is_finite = is_finite and check.holds is not False
        yield check
    is_stopped = has_stopped_step(folder)
    try:
        model = add_adapter(base, folder, method, is_trainable=is_stopped)
        if is_finite:
            yield from check_adapter(
                model, folder, None if record is None else record.proof, base.identity.quantization_bit
            )
    except UserError as error:
        yield _failed("adapter", error)
        return
    if is_stopped:
        yield repeat_stopped_step(model, folder)


def _verify_model(arguments: VerifyArguments, folder: Path) -> Iterator[Check]:
    try:
        yield from check_files(folder)
        base = _load(replace(arguments, model_name_or_path=None), None, str(folder))
    except UserError as error:
        if error.code in _NO_MODEL:
            raise
        yield _failed("model", error)
        return
    yield from _check_base(base)
    if not is_of_released_size(base):
        yield Check("published answers", None, "the model is not of ChatGLM-6B's size")


def _failed(name: str, error: UserError) -> Check:
    where = "" if error.where is None else f"{error.where}: "
    return Check(name, False, f"{where}{error.what}")


def _check_base(base: Base) -> Iterator[Check]:
    values = check_values(base)
    yield values
    if values.holds and is_of_released_size(base):
        yield from check_answers(base)


def _load(arguments: VerifyArguments, record: Record | None, named: str | None) -> Base:
    """Load the base that is given, else the one that is recorded, as it says, else the one that is named."""
    bits, dtype = arguments.quantization_bit, arguments.dtype
    model = arguments.model_name_or_path or named
    if record is not None:
        model = arguments.model_name_or_path or record.base
        bits = bits or (None if arguments.model_name_or_path else record.quantization_bit)
        dtype = dtype or record.dtype
    device = default_device()
    return load_base(
        model or ModelArguments.model_name_or_path,
        quantization_bit=bits,
        dtype=compute_dtype(dtype or "auto", device),
        device_of=lambda _key: device,
        show_progress=True,
    )


def _base_of_peft(folder: Path) -> str | None:
    """Return the base that peft's configuration names, None where there is none or it names none."""
    is_peft = (folder / LORA_CONFIG_FILE).is_file()
    return read_lora_config(folder).base_model_name_or_path if is_peft else None


def _check_fingerprint(base: Base, record: Record | None) -> Check:
    if record is None:
        return Check("base", None, "the adapter does not say what it was trained on")
    name = base.identity.name_or_path
    if record.fingerprint == base.identity.fingerprint:
        return Check("base", True, f"{name} is the one that it was trained on, by its LayerNorms and biases")
    what = f"{name} is not the one that it was trained on ({record.base}): its LayerNorms or biases differ"
    return Check("base", False, what)
