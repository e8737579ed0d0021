"""Keys that the original's transformers (4.28) took and the current one (5.23) does not, and what becomes of each.

Source of what is gone: transformers, src/transformers/training_args.py, v4.28.1 against v5.23.0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from chatglm_tuning.config.values import Value
from chatglm_tuning.errors import UserError

Label = Callable[[str], tuple[str, str | None]]
"""From a setting's key to how the user wrote it and the file and line where (None for a flag)."""

_SHORTER = "transformers shortened the name"
_HUB = "one name for every use of the hub"
_RENAMED = {
    "evaluation_strategy": ("eval_strategy", _SHORTER),
    "no_cuda": ("use_cpu", "there are more devices than CUDA"),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", "there are more devices than GPUs"),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", "there are more devices than GPUs"),
    "push_to_hub_model_id": ("hub_model_id", _HUB),
    "push_to_hub_token": ("hub_token", _HUB),
    "group_by_length": ("bucket_by_length", "rows of similar length are put together here, not by Trainer"),
}

_RECOMPUTING = "activation_checkpointing says all there is to choose"
_NO_SUCH_BACKEND = "that backend is no longer in transformers"
_DROPPED = {
    "logging_dir": "the curves go into output_dir; the environment variable TENSORBOARD_LOGGING_DIR moves them",
    "save_safetensors": "weights are always written as safetensors",
    "fp16_opt_level": _NO_SUCH_BACKEND,
    "fp16_backend": _NO_SUCH_BACKEND,
    "half_precision_backend": _NO_SUCH_BACKEND,
    "use_ipex": _NO_SUCH_BACKEND,
    "jit_mode_eval": _NO_SUCH_BACKEND,
    "xpu_backend": "ddp_backend says it for every device",
    "use_mps_device": "an Apple GPU is found by itself",
    "tpu_num_cores": _NO_SUCH_BACKEND,
    "tpu_metrics_debug": _NO_SUCH_BACKEND,
    "sharded_ddp": "its library, fairscale, is no longer in transformers: use deepspeed or fsdp",
    "fsdp_min_num_params": "it is an entry of fsdp_config now",
    "fsdp_transformer_layer_cls_to_wrap": "it is an entry of fsdp_config now",
    "mp_parameters": _NO_SUCH_BACKEND,
    "ray_scope": "there is no hyperparameter search here",
    "torchdynamo": "torch_compile_backend says it now",
    "past_index": "ChatGLM keeps no state from batch to batch",
    "use_legacy_prediction_loop": "there is one evaluation loop",
    "push_to_hub_organization": "hub_model_id takes organization/name",
    "include_inputs_for_metrics": "no metric here reads the inputs",
    "include_tokens_per_second": "the rate is always shown",
    "gradient_checkpointing_kwargs": _RECOMPUTING,
    "activation_checkpointing_kwargs": _RECOMPUTING,
}

LEGACY_KEYS = ("warmup_ratio", "adafactor", *_RENAMED, *_DROPPED)

_WARMUP_RATIO = Value("number", at_least=0, below=1, hint="Give the share of all steps, as 0.03")


@dataclass(frozen=True)
class Replacement:
    """One key that was replaced or left out. is_dropped: whether it has no effect any more."""

    text: str
    is_dropped: bool = False


def translate(values: Mapping[str, Any], label: Label) -> tuple[dict[str, Any], list[Replacement]]:
    """Return `values` under current names, and what was replaced; nothing is replaced silently.

    Raises UserError where an old name stands beside its new one, or a ratio is none.
    """
    current = {key: value for key, value in values.items() if key not in LEGACY_KEYS}
    replacements: list[Replacement] = []
    for key in values:
        if key in _DROPPED:
            replacements.append(Replacement(f"{_place(key, label)} has no effect: {_DROPPED[key]}", is_dropped=True))
        elif key in _RENAMED:
            new, why = _RENAMED[key]
            _rename(key, new, values, current, label)
            replacements.append(Replacement(f"{_place(key, label)} is read as {new}: {why}"))
    for step in (_translate_warmup, _translate_optimizer, _translate_sampling, _translate_checkpointing):
        replacements += step(values, current, label)
    return current, replacements


def written_key(key: str, values: Mapping[str, Any]) -> str:
    """Return the name under which `values`, as the user wrote them, hold the current `key`."""
    return next((old for old, (new, _) in _RENAMED.items() if new == key and old in values), key)


def _place(key: str, label: Label) -> str:
    name, where = label(key)
    return f"{where}: {name}" if where else name


def _rename(old: str, new: str, values: Mapping[str, Any], current: dict[str, Any], label: Label) -> None:
    if new in values:
        name, where = label(old)
        raise UserError(
            f"{name} is the old name of {new}, which is given too", code="A105", remedy=f"Keep {new}", where=where
        )
    current[new] = values[old]


def _translate_warmup(values: Mapping[str, Any], current: dict[str, Any], label: Label) -> list[Replacement]:
    """A share of all steps is a warmup_steps below 1 now; a number of steps beside it decided, and still does."""
    if values.get("warmup_ratio") is None:
        return []
    name, where = label("warmup_ratio")
    ratio = _WARMUP_RATIO.convert(values["warmup_ratio"], name=name, where=where)
    if values.get("warmup_steps"):
        return [Replacement(f"{_place('warmup_ratio', label)} has no effect: warmup_steps decides", is_dropped=True)]
    current["warmup_steps"] = ratio
    return [Replacement(f"{_place('warmup_ratio', label)} is read as warmup_steps {ratio:g}: below 1 it is a share")]


def _translate_optimizer(values: Mapping[str, Any], current: dict[str, Any], label: Label) -> list[Replacement]:
    if values.get("optim") == "adamw_hf":
        current["optim"] = "adamw_torch"
        reason = "transformers has no own AdamW any more"
        return [Replacement(f"{_place('optim', label)} adamw_hf is read as adamw_torch: {reason}")]
    if "adafactor" not in values:
        return []
    name, where = label("adafactor")
    if Value("boolean").convert(values["adafactor"], name=name, where=where):
        current["optim"] = "adafactor"
    return [Replacement(f"{_place('adafactor', label)} is read as optim, where adafactor is one of the choices")]


def _translate_checkpointing(values: Mapping[str, Any], current: dict[str, Any], _label: Label) -> list[Replacement]:
    """transformers' own setting of this name is a boolean, which gradient_checkpointing still is."""
    if isinstance(values.get("activation_checkpointing"), bool):
        current["activation_checkpointing"] = "on" if values["activation_checkpointing"] else "off"
    return []


def _translate_sampling(values: Mapping[str, Any], current: dict[str, Any], label: Label) -> list[Replacement]:
    """Trainer's way to group by length is our bucketing; another of its ways is taken only with bucketing off."""
    strategy = values.get("train_sampling_strategy")
    if strategy is None or "bucket_by_length" in current:
        return []
    current["bucket_by_length"] = strategy == "group_by_length"
    state = "on" if current["bucket_by_length"] else "off"
    return [Replacement(f"{_place('train_sampling_strategy', label)} {strategy} turns bucket_by_length {state}")]
