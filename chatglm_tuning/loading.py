"""The single place that assembles a model: base, precision, adapter.

The base is built without storage and filled tensor by tensor from its files, each converted or quantised as it is
read, so that the full-precision model is never in memory beside the one that is wanted.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import Tensor, nn

from chatglm_tuning.adapters.lora import load_lora
from chatglm_tuning.adapters.ptuning import PREFIX_KEY, PrefixShape, add_prefix_encoder
from chatglm_tuning.checkpoint import BaseModel, check_lora_folder, read_manifest, read_prefix
from chatglm_tuning.errors import UserError
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_tuning.model.configuration import OLD_REVISION_VOCABULARY, refuse_other_architectures
from chatglm_tuning.quantization.linear import QuantizedLinear
from chatglm_tuning.quantization.packing import quantize_rows
from chatglm_tuning.shards import WeightFiles, find_weight_files, iterate_tensors, resolve_model_folder

logger = logging.getLogger(__name__)

_IGNORED_KEY_END = ".rotary_emb.inv_freq"
_HEAD_KEY = "lm_head.weight"
_EMBEDDING_KEY = "transformer.word_embeddings.weight"
_ROWS_COMPARED_AT_ONCE = 8192

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Base:
    """A loaded base model with its tokenizer and what an adapter's manifest says of it."""

    model: ChatGLMForConditionalGeneration
    tokenizer: ChatGLMTokenizer
    identity: BaseModel


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


def read_config(folder: Path) -> ChatGLMConfig:
    """Read `config.json`; raises UserError for another architecture and for the revision with 150528 words."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            "the folder has no config.json", where=str(folder), remedy="give the folder of a downloaded ChatGLM-6B"
        ) from error
    except ValueError as error:
        raise UserError(f"this is not JSON ({error})", where=str(path), remedy="download it again") from error
    refuse_other_architectures(content, str(folder))
    if content.get("vocab_size") == OLD_REVISION_VOCABULARY:
        raise UserError(
            f"this is the earlier revision of ChatGLM-6B (vocabulary {OLD_REVISION_VOCABULARY}, with image tokens)",
            where=str(folder),
            remedy="use the final revision (vocabulary 130528) with its own tokenizer",
        )
    if content.get("quantization_embeddings"):
        raise UserError(
            "this folder has quantised embeddings (chatglm-6b-int4-qe), which are not supported",
            where=str(folder),
            remedy="use chatglm-6b-int4, or chatglm-6b with --quantization_bit 4",
        )
    return ChatGLMConfig.from_dict({**content, "name_or_path": str(folder)})


def load_tokenizer(folder: Path, config: ChatGLMConfig) -> ChatGLMTokenizer:
    """Load the tokenizer of `folder`; raises UserError where it is not the one of `config`'s revision."""
    if not (folder / "ice_text.model").is_file():
        raise UserError(
            "the folder has no ice_text.model (the tokenizer)",
            where=str(folder),
            remedy="copy it from the model's download",
        )
    try:
        tokenizer = ChatGLMTokenizer.from_pretrained(folder)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the tokenizer cannot be read ({str(error).splitlines()[0]})",
            where=str(folder / "ice_text.model"),
            remedy="download it again",
        ) from error
    names = ("bos_token_id", "eos_token_id", "gmask_token_id", "mask_token_id", "pad_token_id")
    of_tokenizer = {name: getattr(tokenizer, name) for name in names}
    of_config = {name: getattr(config, name) for name in names}
    if tokenizer.num_image_tokens or of_tokenizer != of_config or tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            "tokenizer and model are of different revisions: the tokenizer has "
            f"{tokenizer.vocab_size} pieces, {tokenizer.num_image_tokens} image tokens and {of_tokenizer}; config.json "
            f"has vocab_size {config.vocab_size} and {of_config}",
            where=str(folder),
            remedy="take ice_text.model, tokenizer_config.json and config.json from one download",
        )
    return tokenizer


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
    stored_bit = config.quantization_bit or None
    if stored_bit and quantization_bit and stored_bit != quantization_bit:
        raise UserError(
            f"the folder holds int{stored_bit} weights, and --quantization_bit says {quantization_bit}",
            where=str(folder),
            remedy=f"leave --quantization_bit out, or say {stored_bit}, or give the full-precision model",
        )
    config.quantization_bit = stored_bit or quantization_bit
    config.dtype = dtype
    with torch.device("meta"):
        model = ChatGLMForConditionalGeneration(config)
    filler = _Filler(model, dtype, device_of or (lambda _key: torch.device("cpu")), folder)
    with _progress(files, show_progress) as advance:
        for key, tensor in iterate_tensors(files):
            filler.put(key, tensor)
            advance(tensor.nbytes)
    filler.finish()
    model.requires_grad_(False)
    model.eval()
    identity = BaseModel(
        name_or_path=model_name_or_path,
        fingerprint=filler.fingerprint(),
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        quantization_bit=config.quantization_bit,
    )
    return Base(model, tokenizer, identity)


class _Filler:
    """Puts tensors into a model that has no storage yet."""

    def __init__(
        self, model: ChatGLMForConditionalGeneration, dtype: torch.dtype, device_of: Callable[[str], torch.device], where: Path
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._device_of = device_of
        self._where = where
        self._waiting = {key for key, _ in model.named_parameters(remove_duplicate=False)}
        self._digests: dict[str, bytes] = {}
        self._head: Tensor | None = None

    def put(self, key: str, tensor: Tensor) -> None:
        """Convert or quantise `tensor` and make it the parameter `key`."""
        if key.endswith(_IGNORED_KEY_END) or key.startswith(PREFIX_KEY):
            return
        if key not in self._waiting:
            raise self._misfit(f"it has a tensor {key!r}, which ChatGLM-6B has not")
        device = self._device_of(key)
        if key == _HEAD_KEY:
            self._put_head(tensor, device)
            return
        name, _, leaf = key.rpartition(".")
        module = self._model.get_submodule(name)
        if isinstance(module, QuantizedLinear) and leaf == "weight" and tensor.is_floating_point():
            self._check_shape(key, tensor, (module.out_features, module.in_features))
            weight, scale = quantize_rows(tensor.to(device), module.bits)
            self._assign(module, "weight", weight)
            self._assign(module, "weight_scale", scale)
            self._waiting -= {key, f"{name}.weight_scale"}
            return
        self._check_shape(key, tensor, tuple(module.get_parameter(leaf).shape))
        if leaf != "weight_scale" and tensor.is_floating_point():
            if tensor.dim() == 1:
                self._digests[key] = hashlib.sha256(tensor.to(torch.float16).numpy().tobytes()).digest()
            tensor = tensor.to(device=device, dtype=self._dtype, copy=True)
        else:
            tensor = tensor.to(device=device, copy=True)
        self._assign(module, leaf, tensor)
        self._waiting.discard(key)

    def _put_head(self, tensor: Tensor, device: torch.device) -> None:
        """Drop the head where it equals the embeddings, which is how it is released; keep and untie it else."""
        self._waiting.discard(_HEAD_KEY)
        embedding = self._model.transformer.word_embeddings.weight
        if embedding.is_meta:  # the files hold the head first
            self._head = tensor.to(device=device, dtype=self._dtype, copy=True)
            return
        self._check_shape(_HEAD_KEY, tensor, tuple(embedding.shape))
        same = all(
            torch.equal(part.to(device=embedding.device, dtype=self._dtype), rows)
            for part, rows in zip(
                tensor.split(_ROWS_COMPARED_AT_ONCE), embedding.split(_ROWS_COMPARED_AT_ONCE), strict=True
            )
        )
        if not same:
            self._head = tensor.to(device=device, dtype=self._dtype, copy=True)

    def finish(self) -> None:
        """Tie the head, or leave it untied where it differs, and check that nothing is missing."""
        self._waiting.discard(_HEAD_KEY)
        if self._waiting:
            some = ", ".join(sorted(self._waiting)[:3])
            raise self._misfit(f"{len(self._waiting)} tensors are missing, among them {some}")
        embedding = self._model.transformer.word_embeddings.weight
        if self._head is None or torch.equal(self._head, embedding):
            self._model.lm_head.weight = embedding
            return
        logger.warning("lm_head differs from the word embeddings: it is kept apart (untied)")
        self._model.config.tie_word_embeddings = False
        self._assign(self._model.lm_head, "weight", self._head)

    def fingerprint(self) -> str:
        """SHA-256 over the one-dimensional tensors in fp16, which every precision and file format has alike."""
        whole = hashlib.sha256()
        for key in sorted(self._digests):
            whole.update(key.encode() + self._digests[key])
        return whole.hexdigest()

    def _check_shape(self, key: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
        found = tuple(tensor.shape)
        if found == expected:
            return
        if key in (_EMBEDDING_KEY, _HEAD_KEY) and found[1:] == expected[1:]:
            raise UserError(
                f"weights and tokenizer are of different revisions: {key} has {found[0]} rows, config.json says "
                f"vocab_size {expected[0]}",
                where=str(self._where),
                remedy="take the weights, config.json and the tokenizer from one download",
            )
        raise self._misfit(f"{key} is {found}, config.json asks for {expected}")

    def _misfit(self, what: str) -> UserError:
        return UserError(
            f"the weights do not fit config.json: {what}",
            where=str(self._where),
            remedy="take the weights and config.json from one download of ChatGLM-6B",
        )

    @staticmethod
    def _assign(module: nn.Module, leaf: str, tensor: Tensor) -> None:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


@contextmanager
def _progress(files: WeightFiles, show: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not show, transient=True) as progress:
        task = progress.add_task("loading the base model", total=files.size_bytes)
        yield lambda size: progress.advance(task, size)


def add_prefix(base: Base, shape: PrefixShape | None, checkpoint: Path | None) -> None:
    """Give the base a prefix encoder: from `checkpoint`, or new in `shape`.

    Raises UserError where both are given and disagree, and where the checkpoint does not fit the base.
    """
    tensors = None
    if checkpoint is not None:
        found, tensors = read_prefix(checkpoint)
        if shape is not None and found != shape:
            raise UserError(
                f"the checkpoint holds {_describe(found)}, and the flags say {_describe(shape)}",
                where=str(checkpoint),
                remedy="leave --pre_seq_len and --prefix_projection out: they are read from the checkpoint",
            )
        shape = found
        _check_base(base, checkpoint)
    assert shape is not None
    add_prefix_encoder(base.model, shape, tensors, str(checkpoint))


def _describe(shape: PrefixShape) -> str:
    return f"pre_seq_len {shape.pre_seq_len} {'with' if shape.prefix_projection else 'without'} prefix_projection"


def add_trained_lora(base: Base, checkpoint: Path, *, is_trainable: bool = False) -> nn.Module:
    """Return the base with the LoRA adapter of `checkpoint` in it."""
    check_lora_folder(checkpoint)
    _check_base(base, checkpoint)
    return load_lora(base.model, checkpoint, is_trainable=is_trainable)


def _check_base(base: Base, checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    if manifest is not None and manifest.base_model.fingerprint != base.identity.fingerprint:
        logger.warning(
            "%s was trained on another base model (%s) than the one loaded (%s): expect poor answers",
            checkpoint,
            manifest.base_model.name_or_path,
            base.identity.name_or_path,
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

    Raises UserError, before the base is read, for an adapter that is none or damaged.
    """
    if lora_checkpoint is not None:
        check_lora_folder(Path(lora_checkpoint))
    shape = None
    if ptuning_checkpoint is not None:
        found, _ = read_prefix(Path(ptuning_checkpoint))
        # Like the original's flags, prefix_projection alone says nothing: False may mean that it was not given.
        shape = None if pre_seq_len is None else PrefixShape(pre_seq_len, prefix_projection or found.prefix_projection)
    device = default_device()
    base = load_base(
        model_name_or_path,
        quantization_bit=quantization_bit,
        dtype=compute_dtype(dtype, device),
        device_of=lambda _key: device,
        show_progress=show_progress,
    )
    if ptuning_checkpoint is not None:
        add_prefix(base, shape, Path(ptuning_checkpoint))
        base.model.eval()
    if lora_checkpoint is not None:
        return add_trained_lora(base, Path(lora_checkpoint)).eval(), base.tokenizer
    return base.model, base.tokenizer
