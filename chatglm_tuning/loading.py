"""The single place that assembles a model: base, precision, adapter.

The base is built without storage and filled tensor by tensor from its files, each converted or quantised as it is
read, so that the full-precision model is never in memory beside the one that is wanted.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import torch
from accelerate import dispatch_model
from torch import Tensor, nn

from chatglm_tuning.adapters.lora import load_lora, read_lora_config
from chatglm_tuning.adapters.ptuning import PREFIX_KEY, PrefixShape, add_prefix_encoder, check_prefix_fits
from chatglm_tuning.adapters.served import AdapterSet, ServedAdapter
from chatglm_tuning.base_folder import bits_to_hold, load_tokenizer, merged_adapters, read_config
from chatglm_tuning.checkpoint import (
    BaseModel,
    adapter_method,
    check_certificate,
    check_lora_folder,
    read_lora,
    read_manifest,
    read_prefix,
)
from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_tuning.quantization.linear import QuantizedLinear
from chatglm_tuning.quantization.packing import quantize_rows
from chatglm_tuning.shards import (
    StoredTensor,
    WeightFiles,
    find_weight_files,
    iterate_tensors,
    reading_progress,
    resolve_model_folder,
)
from chatglm_tuning.tensor_check import EMBEDDING_KEY, HEAD_KEY, TensorCheck
from chatglm_tuning.wording import told_precision

logger = logging.getLogger(__name__)

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Base:
    """A loaded base model with its tokenizer and what an adapter's manifest says of it.

    told: warnings of adapters that were given already.
    """

    model: ChatGLMForConditionalGeneration
    tokenizer: ChatGLMTokenizer
    identity: BaseModel
    told: set[str] = field(default_factory=set, compare=False, repr=False)

    @property
    def config(self) -> ChatGLMConfig:
        """The model's configuration."""
        return cast("ChatGLMConfig", self.model.config)


def default_device() -> torch.device:
    """Return the first GPU, or the CPU where there is none."""
    return torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the dtype that `name` means on `device`.

    `auto` is bf16 where the processor multiplies it natively; else fp16 on a GPU and fp32 on a CPU. fp16 is never
    used on a CPU, which has no fast fp16 product: a warning says what is used instead.
    """
    if device.type == "cuda":
        automatic = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    else:
        automatic = torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32
    if name == "auto":
        return automatic
    if name == "float16" and device.type == "cpu":
        logger.warning("float16 is not used on a CPU (its products run about 100 times slower): %s instead", automatic)
        return automatic
    return getattr(torch, name)


def _cpu_multiplies_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_base(
    model_name_or_path: str,
    *,
    quantization_bit: int | None = None,
    dtype: torch.dtype = torch.float32,
    device_of: Callable[[str], torch.device] | None = None,
    show_progress: bool = False,
) -> Base:
    """Load a base model in the released layout, frozen.

    quantization_bit: 8 or 4 to hold the four linears of every layer quantised; a folder that is quantised already is
        loaded as it is. dtype: of everything else.
    device_of: where the tensor of that key goes; everything goes to the CPU where it is None.
    Raises UserError, before the first tensor is read, for whatever keeps the folder from being a whole ChatGLM-6B.
    """
    folder = resolve_model_folder(model_name_or_path)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    files = find_weight_files(folder)
    check_certificate(folder)
    config.quantization_bit = bits_to_hold(config, quantization_bit, folder)
    config.dtype = dtype
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    filler = _Filler(model, dtype, device_of or (lambda _key: torch.device("cpu")), folder)
    start = time.perf_counter()
    with reading_progress("loading the base model", files, show=show_progress) as advance:
        for stored in iterate_tensors(files):
            filler.put(stored)
            advance(stored.tensor.nbytes)
    filler.finish()
    _log_speed(files, time.perf_counter() - start)
    model.requires_grad_(False)
    model.eval()
    return Base(model, tokenizer, _identity(model_name_or_path, config, filler.digests))


def read_identity(model_name_or_path: str) -> BaseModel:
    """Return what a manifest says of a base; reads no more of its weights than that takes.

    Raises UserError, as `load_base` does, for a folder that is no whole ChatGLM-6B.
    """
    folder = resolve_model_folder(model_name_or_path)
    config = read_config(folder)
    with torch.device("meta"):
        check = TensorCheck(ChatGLMForConditionalGeneration(config), folder)
    # Read ahead, the disk would be asked for all weights, for the sake of a thousandth of them.
    tensors = iterate_tensors(find_weight_files(folder), read_ahead=False)
    # Of a prefix among them a warning is due where the base is loaded.
    wanted = (stored for stored in tensors if not stored.key.startswith(PREFIX_KEY) and check.is_wanted(stored))
    digests = {stored.key: _fingerprint_part(stored) for stored in wanted if _is_in_fingerprint(stored)}
    check.finish()
    return _identity(model_name_or_path, config, digests)


def _identity(name_or_path: str, config: ChatGLMConfig, digests: Mapping[str, bytes]) -> BaseModel:
    return BaseModel(
        name_or_path=name_or_path,
        fingerprint=_fingerprint(digests, merged_adapters(config)),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        quantization_bit=config.quantization_bit or None,
    )


def _is_in_fingerprint(stored: StoredTensor) -> bool:
    """Whether it is a one-dimensional tensor of the released model: these stay unquantised, in whatever file format."""
    return stored.tensor.dim() == 1 and not stored.key.endswith(".weight_scale")


def _fingerprint_part(stored: StoredTensor) -> bytes:
    """Return a digest that is the same for all precisions that the tensor may be saved in.

    It is rounded to fp16, in which the model was released, and then to bf16.
    """
    rounded = stored.tensor.to(torch.float16).to(torch.bfloat16).view(torch.int16)
    return hashlib.sha256(rounded.numpy().tobytes()).digest()


def _fingerprint(digests: Mapping[str, bytes], merged: Mapping[str, str]) -> str:
    """Return SHA-256 over the parts, by their keys, and `merged`: adapters in the weights, which these do not show."""
    whole = hashlib.sha256()
    for key in sorted(digests):
        whole.update(key.encode() + digests[key])
    for digest in merged:
        whole.update(digest.encode())
    return whole.hexdigest()


def spread_layers(config: ChatGLMConfig, devices: list[torch.device]) -> Callable[[str], torch.device]:
    """Return a placement of a model's tensors that gives every device an equal share of the layers, in order.

    Embeddings and the head, which are tied, stand on the first, the final LayerNorm on the last.
    """

    def device_of(key: str) -> torch.device:
        parts = key.split(".")
        if "layers" in parts:
            layer = int(parts[parts.index("layers") + 1])
            return devices[layer * len(devices) // config.num_layers]
        return devices[-1] if "final_layernorm" in key else devices[0]

    return device_of


def connect_layers(
    model: ChatGLMForConditionalGeneration, device_of: Callable[[str], torch.device], *, force_hooks: bool = False
) -> None:
    """Let the hidden states of a model that `device_of` has spread follow its layers from device to device.

    An adapter is added afterwards; a prefix stays where the embeddings are, and its layers' parts follow too.
    force_hooks: also where all devices are one.
    """
    layers = (f"transformer.layers.{index}" for index in range(len(model.transformer.layers)))
    modules = ("transformer.word_embeddings", *layers, "transformer.final_layernorm", "lm_head")
    device_map: dict[str, str | int | torch.device] = {name: device_of(f"{name}.weight") for name in modules}
    dispatch_model(
        model, device_map, main_device=device_of(HEAD_KEY), skip_keys="past_key_values", force_hooks=force_hooks
    )


class _Filler:
    """Puts tensors into a model that has no storage yet."""

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        dtype: torch.dtype,
        device_of: Callable[[str], torch.device],
        where: Path,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._device_of = device_of
        self._where = where
        self._check = TensorCheck(model, where)
        self.digests: dict[str, bytes] = {}
        self._ends: dict[str, Tensor] = {}

    def put(self, stored: StoredTensor) -> None:
        """Convert or quantise a tensor and make it the parameter of its key."""
        if not self._check.is_wanted(stored):
            return
        key, tensor = stored
        device = self._device_of(key)
        if key in (EMBEDDING_KEY, HEAD_KEY):
            self._put_end(stored, device)
            return
        name, _, leaf = key.rpartition(".")
        module = self._model.get_submodule(name)
        dtype = self._dtype
        if isinstance(module, QuantizedLinear) and leaf == "weight":
            if tensor.dtype != torch.int8:
                weight, scale = quantize_rows(tensor.to(device), module.bits)
                self._check.check_scale(key, scale)
                self._assign(module, "weight", weight)
                self._assign(module, "weight_scale", scale)
                return
            dtype = torch.int8
        elif leaf == "weight_scale":
            dtype = torch.float16
        elif _is_in_fingerprint(stored):
            self.digests[key] = _fingerprint_part(stored)
        self._assign(module, leaf, _converted(stored, dtype, device))

    def _put_end(self, stored: StoredTensor, device: torch.device) -> None:
        """Keep one of embeddings and head, which are released equal; the second one too where it differs."""
        first = next(iter(self._ends.values()), None)
        if first is None or not _are_equal(stored, first):
            first = _converted(stored, self._dtype, device)
        self._ends[stored.key] = first

    def finish(self) -> None:
        """Tie the head, or leave it untied where it differs, and check that nothing is missing."""
        self._check.finish()
        embedding = self._ends[EMBEDDING_KEY]
        head = self._ends.get(HEAD_KEY, embedding)
        self._assign(self._model.transformer.word_embeddings, "weight", embedding)
        self._model.config.tie_word_embeddings = head is embedding
        if head is embedding:
            self._model.lm_head.weight = self._model.get_parameter(EMBEDDING_KEY)
            return
        logger.warning("%s: lm_head differs from the word embeddings: it is kept apart (untied)", self._where)
        self._assign(self._model.lm_head, "weight", head)

    @staticmethod
    def _assign(module: nn.Module, leaf: str, tensor: Tensor) -> None:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def _converted(stored: StoredTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a copy in `dtype` on `device`, made block by block."""
    copy = torch.empty(stored.tensor.shape, dtype=dtype, device=device)
    for place, block in stored.blocks():
        copy[place].copy_(_cast(block.to(device), dtype))
    return copy


def _are_equal(stored: StoredTensor, kept: Tensor) -> bool:
    """Return whether the tensor, converted to the dtype of `kept`, equals it; reads it block by block."""
    return all(torch.equal(_cast(block.to(kept.device), kept.dtype), kept[place]) for place, block in stored.blocks())


def _cast(block: Tensor, dtype: torch.dtype) -> Tensor:
    # Through fp32, which holds both: torch converts between fp16 and bf16 one value at a time.
    return block.float().to(dtype) if block.is_floating_point() and block.dtype != dtype else block


def peak_memory_bytes() -> int | None:
    """Return the largest resident memory of this process so far (Linux's VmHWM), None where that is not told."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def _log_speed(files: WeightFiles, seconds: float) -> None:
    size_gib, peak_bytes = files.size_bytes / 2**30, peak_memory_bytes()
    peak = "" if peak_bytes is None else f", peak memory {peak_bytes / 2**30:.2f} GiB"
    logger.info("%s: %.2f GiB read in %.1f s (%.2f GiB/s)%s", files.folder, size_gib, seconds, size_gib / seconds, peak)


def check_prefix(checkpoint: Path, config: ChatGLMConfig, shape: PrefixShape | None) -> None:
    """Raise UserError where `checkpoint` holds no whole prefix of `shape` (None: of any) for a base of `config`.

    Nor is one taken that holds numbers that are not finite.
    """
    _found, tensors = _read_fitting_prefix(checkpoint, config, shape)
    refuse_values_not_finite(tensors, checkpoint)


def check_lora(checkpoint: Path, config: ChatGLMConfig) -> None:
    """Raise UserError where `checkpoint` holds no whole LoRA adapter, or says that its base was of another size.

    Nor is one taken that holds numbers that are not finite.
    """
    _check_lora_fits(checkpoint, config)
    refuse_values_not_finite(read_lora(checkpoint), checkpoint)


def refuse_values_not_finite(tensors: Mapping[str, Tensor], adapter: Path) -> None:
    """Raise UserError where a number in the tensors of `adapter`, a folder, is not finite."""
    bad = first_not_finite(tensors)
    if bad is not None:
        raise UserError(
            f"the adapter holds numbers that are not finite ({bad})",
            code="C107",
            where=str(adapter),
            remedy="Give an earlier checkpoint, or train anew with a lower --learning_rate",
        )


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds a number that is not finite, None where none does."""
    return next((key for key in sorted(tensors) if not _is_finite(tensors[key])), None)


def _is_finite(tensor: Tensor) -> bool:
    # The extremes carry NaN on, and need neither copies nor, on a CPU, a tenth of isfinite's time.
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def refuse_base_not_finite(base: Base, folder: Path) -> None:
    """Raise UserError where a number in the weights of `base`, as they are held, is not finite: used or not."""
    bad = first_not_finite(dict(base.model.named_parameters()))
    if bad is not None:
        raise UserError(
            f"the base model holds numbers that are not finite, or too large for {base.config.dtype} ({bad})",
            code="M120",
            where=str(folder),
            remedy="Copy the weights again: `chatglm-tuning verify` says which files differ",
        )


def _check_lora_fits(checkpoint: Path, config: ChatGLMConfig) -> None:
    check_lora_folder(checkpoint)
    read_lora_config(checkpoint)
    manifest = read_manifest(checkpoint, verify_files=False)
    if manifest is None:
        return
    trained_on = manifest.base_model
    if (trained_on.num_layers, trained_on.hidden_size) != (config.num_layers, config.hidden_size):
        raise UserError(
            f"the adapter was trained on a base of {trained_on.num_layers} layers and hidden size "
            f"{trained_on.hidden_size}, and this one has {config.num_layers} and {config.hidden_size}",
            code="C106",
            where=str(checkpoint),
            remedy=f"Give the base that it was trained on ({trained_on.name_or_path})",
        )


def add_prefix(base: Base, shape: PrefixShape | None, checkpoint: Path | None) -> None:
    """Give the base a prefix encoder: from `checkpoint`, or new in `shape`.

    Raises UserError where both are given and disagree, and where the checkpoint does not fit the base.
    """
    tensors = None
    if checkpoint is not None:
        shape, tensors = _read_fitting_prefix(checkpoint, base.config, shape)
        _warn_of_base(base, checkpoint)
    assert shape is not None
    add_prefix_encoder(base.model, shape, tensors, str(checkpoint))


def _read_fitting_prefix(
    checkpoint: Path, config: ChatGLMConfig, shape: PrefixShape | None
) -> tuple[PrefixShape, dict[str, Tensor]]:
    found, tensors = read_prefix(checkpoint)
    if shape is not None and found != shape:
        raise UserError(
            f"the checkpoint holds a prefix of {_describe(found)}, and the flags say {_describe(shape)}",
            code="C109",
            where=str(checkpoint),
            remedy="Leave --pre_seq_len and --prefix_projection out: they are read from the checkpoint",
        )
    check_prefix_fits(config, found, tensors, str(checkpoint))
    return found, tensors


def _describe(shape: PrefixShape) -> str:
    return f"pre_seq_len {shape.pre_seq_len} {'with' if shape.prefix_projection else 'without'} prefix_projection"


def add_trained_lora(base: Base, checkpoint: Path, *, is_trainable: bool = False) -> nn.Module:
    """Return the base with the LoRA adapter of `checkpoint` in it, whatever its numbers are.

    Raises UserError where there is none, it is damaged, or it does not fit the base.
    """
    _check_lora_fits(checkpoint, base.config)
    _warn_of_base(base, checkpoint)
    return load_lora(base.model, checkpoint, read_lora(checkpoint), is_trainable=is_trainable)


def check_adapter(checkpoint: Path, config: ChatGLMConfig) -> Literal["lora", "ptuning"]:
    """Return which adapter `checkpoint` holds; raises UserError where it holds none, or one for another base."""
    method = adapter_method(checkpoint) if checkpoint.is_dir() else None
    if method == "lora":
        check_lora(checkpoint, config)
        return "lora"
    if method == "ptuning":
        check_prefix(checkpoint, config, None)
        return "ptuning"
    raise UserError(
        "there is no LoRA and no prefix of P-Tuning v2 in it" if checkpoint.is_dir() else "there is no such folder",
        code="C102" if checkpoint.is_dir() else "C101",
        where=str(checkpoint),
        remedy="Give the folder of a trained adapter",
    )


def add_served_adapter(base: Base, adapters: AdapterSet, checkpoint: Path) -> ServedAdapter:
    """Add the adapter of `checkpoint`, of either method, to those that the rows of `base` may have.

    Raises UserError where there is none, it is damaged, or it does not fit the base.
    """
    method = check_adapter(checkpoint, base.config)
    _warn_of_base(base, checkpoint)
    if method == "lora":
        return adapters.add_lora(checkpoint, read_lora(checkpoint))
    shape, tensors = read_prefix(checkpoint)
    return adapters.add_prefix(shape, tensors, str(checkpoint))


def _warn_of_base(base: Base, checkpoint: Path) -> None:
    warn_of_base(base.identity, merged_adapters(base.config), checkpoint, base.told)


def warn_of_base(identity: BaseModel, merged: Mapping[str, str], checkpoint: Path, told: set[str]) -> None:
    """Say in what a base, loaded or not, is not the one that the adapter of `checkpoint` was trained on.

    identity: with the bits that the base is held in. merged: as `merged_adapters` returns them.
    told: what is in it is not said again; what is said is added.
    """
    unlike = _compare(identity, merged, checkpoint)
    precision = None
    if unlike.trained_on is not None:
        trained = unlike.trained_on.quantization_bit
        precision = (
            f"{checkpoint} was trained on a base {told_precision(trained)} and is used on one "
            f"{told_precision(identity.quantization_bit)}: to have it answer as it was trained, "
            f"{f'give --quantization_bit {trained}' if trained else 'give the base in full precision'}"
        )
    for warning in (unlike.another_base, precision):
        if warning is not None and warning not in told:
            told.add(warning)
            logger.warning("%s", warning)


@dataclass(frozen=True)
class Unlike:
    """In what a base is not the one that an adapter was trained on.

    another_base: what is said of it. trained_on: the adapter's base, where its weights had more or fewer bits.
    """

    another_base: str | None = None
    trained_on: BaseModel | None = None


def compare_base(base: Base, checkpoint: Path) -> Unlike:
    """Return in what `base` is not the one that the adapter of `checkpoint` was trained on."""
    return _compare(base.identity, merged_adapters(base.config), checkpoint)


def _compare(identity: BaseModel, merged: Mapping[str, str], checkpoint: Path) -> Unlike:
    return Unlike(
        describe_another_base(identity, merged, checkpoint), _trained_in_another_precision(identity, checkpoint)
    )


def describe_another_base(identity: BaseModel, merged: Mapping[str, str], checkpoint: Path) -> str | None:
    """Say that the adapter of `checkpoint` was trained on another base than this one, or may have been.

    merged: the adapters in this one's weights, as `merged_adapters` returns them. None where there is nothing to say.
    """
    manifest = read_manifest(checkpoint, verify_files=False)
    names = ", ".join(merged.values())
    if manifest is not None and manifest.base_model.fingerprint != identity.fingerprint:
        already = f", which already has the adapter {names} merged into its weights" if names else ""
        return (
            f"{checkpoint} was trained on another base model ({manifest.base_model.name_or_path}) than the one loaded "
            f"({identity.name_or_path}{already}): expect poor answers"
        )
    if manifest is None and names:
        return (
            f"{identity.name_or_path} already has the adapter {names} merged into its weights: {checkpoint} answers "
            "well only if it was trained on that"
        )
    return None


def _trained_in_another_precision(identity: BaseModel, checkpoint: Path) -> BaseModel | None:
    manifest = read_manifest(checkpoint, verify_files=False)
    if manifest is None or manifest.base_model.quantization_bit == identity.quantization_bit:
        return None
    return manifest.base_model


def load_base_for_inference(
    model_name_or_path: str,
    *,
    quantization_bit: int | None = None,
    dtype: DtypeName = "auto",
    show_progress: bool = False,
) -> Base:
    """Load a base on the GPU where there is one, else on the CPU, in the type that `dtype` means there."""
    device = default_device()
    return load_base(
        model_name_or_path,
        quantization_bit=quantization_bit,
        dtype=compute_dtype(dtype, device),
        device_of=lambda _key: device,
        show_progress=show_progress,
    )


def load_for_inference(
    model_name_or_path: str,
    *,
    lora_checkpoint: Path | str | None = None,
    ptuning_checkpoint: Path | str | None = None,
    pre_seq_len: int | None = None,
    prefix_projection: bool = False,
    quantization_bit: int | None = None,
    dtype: DtypeName = "auto",
    show_progress: bool = False,
) -> tuple[nn.Module, ChatGLMTokenizer]:
    """Load a base and at most one adapter for generating, on the GPU where there is one.

    pre_seq_len, prefix_projection: only compared with what the prefix itself says, where they are given.
    Raises UserError, before the base is read, for an adapter that is none, is damaged or does not fit.
    """
    config = read_config(resolve_model_folder(model_name_or_path))
    shape = None
    if lora_checkpoint is not None:
        check_lora(Path(lora_checkpoint), config)
    if ptuning_checkpoint is not None:
        found, _ = read_prefix(Path(ptuning_checkpoint))
        # As with the original's flags, False may mean that prefix_projection was not given.
        shape = PrefixShape(pre_seq_len or found.pre_seq_len, prefix_projection or found.prefix_projection)
        check_prefix(Path(ptuning_checkpoint), config, shape)
    base = load_base_for_inference(
        model_name_or_path, quantization_bit=quantization_bit, dtype=dtype, show_progress=show_progress
    )
    if ptuning_checkpoint is not None:
        add_prefix(base, shape, Path(ptuning_checkpoint))
        base.model.eval()
    if lora_checkpoint is not None:
        return add_trained_lora(base, Path(lora_checkpoint)).eval(), base.tokenizer
    return base.model, base.tokenizer
