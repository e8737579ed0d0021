"""The prompts and the base of a run, checked before anything slow is loaded; the base with one adapter at a time."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chatglm_tuning.base_folder import bits_to_hold, load_tokenizer, merged_adapters, read_config
from chatglm_tuning.checkpoint import BaseModel, digest_tensors, read_lora, read_prefix
from chatglm_tuning.config.arguments import ModelArguments
from chatglm_tuning.config.predict import AdapterArguments, AnswerArguments
from chatglm_tuning.data.records import read_records
from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.answers import Drawing
from chatglm_tuning.evaluation.compare import AnsweredBy
from chatglm_tuning.evaluation.files import sampled_digest
from chatglm_tuning.evaluation.prompts import Prompt, digest_prompts, group_prompts, shorten_prompt
from chatglm_tuning.loading import (
    Base,
    add_prefix,
    add_trained_lora,
    check_lora,
    check_prefix,
    compute_dtype,
    default_device,
    load_base_for_inference,
    read_identity,
    warn_of_base,
)
from chatglm_tuning.model import ChatGLMConfig, ChatGLMTokenizer
from chatglm_tuning.shards import find_weight_files, resolve_model_folder
from chatglm_tuning.wording import counted

logger = logging.getLogger(__name__)

_ADAPTER_FILES = ("adapter_config.json", "*.safetensors", "*.bin")
FORMAT_VERSION = 1
"""Of the files that a run leaves."""


@dataclass(frozen=True)
class Task:
    """Prompts to answer, and the base that answers them.

    prompts: distinct, in the order of the data. bits: of a weight, None for a base in full precision.
    """

    arguments: AnswerArguments
    model: ModelArguments
    folder: Path
    config: ChatGLMConfig
    tokenizer: ChatGLMTokenizer
    prompts: tuple[Prompt, ...]
    bits: int | None
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Pairs of a prompt and a reference."""
        return sum(len(prompt.references) for prompt in self.prompts)

    @property
    def drawing(self) -> Drawing:
        """How answers are drawn."""
        given = self.arguments
        return Drawing(
            max_output_length=given.max_output_length,
            do_sample=given.do_sample,
            temperature=given.temperature,
            top_p=given.top_p,
            top_k=given.top_k,
            seed=given.seed,
        )

    @cached_property
    def _shortened(self) -> list[tuple[list[int], bool]]:
        return [shorten_prompt(prompt, self.tokenizer, self.arguments.max_input_length) for prompt in self.prompts]

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        """The prompts as tokens."""
        return [ids for ids, _ in self._shortened]

    @property
    def cut_prompts(self) -> int:
        """How many prompts lost something to max_input_length."""
        return sum(is_cut for _, is_cut in self._shortened)

    @cached_property
    def base_digest(self) -> str:
        """Tells the base's files from those of another."""
        return sampled_digest([self.folder / "config.json", *find_weight_files(self.folder).files])


def prepare_task(model: ModelArguments, arguments: AnswerArguments, *, needs_references: bool = True) -> Task:
    """Read the data and all of the base but its weights; raises UserError for whatever does not go together.

    needs_references: whether a prompt without an answer is a bad row.
    """
    records = read_records(arguments.data_path, skip_bad_rows=arguments.skip_bad_rows, needs_answers=needs_references)
    if records.skipped:
        logger.warning("skipped: %s", counted(records.skipped, "bad row"))
    folder = resolve_model_folder(model.model_name_or_path)
    config = read_config(folder)
    total = arguments.max_input_length + arguments.max_output_length
    if total > config.max_sequence_length:
        raise UserError(
            f"max_input_length {arguments.max_input_length} and max_output_length {arguments.max_output_length} make "
            f"{total}, and the model's context is {config.max_sequence_length} tokens",
            code="A111",
            remedy="lower --max_input_length or --max_output_length",
        )
    bits = bits_to_hold(config, model.quantization_bit, folder)
    find_weight_files(folder)
    task = Task(
        arguments=arguments,
        model=model,
        folder=folder,
        config=config,
        tokenizer=load_tokenizer(folder, config),
        prompts=tuple(group_prompts(records.examples)),
        bits=bits,
        dtype=compute_dtype(model.dtype, default_device()),
    )
    _tell_unanswered(task, sum(not example.answer for example in records.examples))
    if task.cut_prompts:
        logger.warning(
            "%d of %s cut to max_input_length %d",
            task.cut_prompts,
            f"{counted(len(task.prompts), 'prompt')} {'was' if task.cut_prompts == 1 else 'were'}",
            arguments.max_input_length,
        )
    return task


def _tell_unanswered(task: Task, rows: int) -> None:
    """Say how many rows had no answer, and what that means for their scores."""
    if not rows:
        return
    without = sum(not prompt.references for prompt in task.prompts)
    logger.info(
        "%s no answer: %d of %s no reference, and eval cannot score %s",
        f"{counted(rows, 'row')} {'has' if rows == 1 else 'have'}",
        without,
        f"{counted(len(task.prompts), 'prompt')} {'has' if without == 1 else 'have'}",
        "it" if without == 1 else "them",
    )


def check_adapter_of(task: Task, adapter: AdapterArguments | None) -> None:
    """Raise UserError where an adapter is none of its method, is damaged or does not fit the base."""
    if adapter is None:
        return
    if adapter.method == "lora":
        check_lora(adapter.folder, task.config)
    else:
        check_prefix(adapter.folder, task.config, None)


def identify(task: Task, adapter: AdapterArguments | None) -> dict[str, Any]:
    """Return everything that decides the answers: two runs of which this is equal give the same bytes."""
    given = task.arguments
    return {
        "format_version": FORMAT_VERSION,
        "data": digest_prompts(task.prompts),
        "base": task.base_digest,
        "quantization_bit": task.bits,
        "dtype": str(task.dtype).removeprefix("torch."),
        "method": None if adapter is None else adapter.method,
        "adapter": None if adapter is None else _digest_adapter(adapter.folder),
        "max_input_length": given.max_input_length,
        "max_output_length": given.max_output_length,
        "batch_size": given.batch_size,
        "do_sample": given.do_sample,
        **{
            name: getattr(given, name) if given.do_sample else None
            for name in ("temperature", "top_p", "top_k", "seed")
        },
    }


def _digest_adapter(folder: Path) -> str:
    return sampled_digest(sorted(path for pattern in _ADAPTER_FILES for path in folder.glob(pattern)))


class Models:
    """The base of a task, loaded when it is first needed, with one adapter after another."""

    def __init__(self, task: Task, *, show_progress: bool = False) -> None:
        self._task = task
        self._show_progress = show_progress
        self._base: Base | None = None
        self._told: set[str] = set()

    @cached_property
    def _identity(self) -> BaseModel:
        """What manifests say of the base, as it answers; of one that is not loaded, read without its weights."""
        if self._base is not None:
            return self._base.identity
        return replace(read_identity(str(self._task.folder)), quantization_bit=self._task.bits)

    def warn_of_base(self, adapter: AdapterArguments | None) -> None:
        """Say, once, loaded or not, in what the base is not the one that `adapter` was trained on."""
        if adapter is not None:
            warn_of_base(self._identity, merged_adapters(self._task.config), adapter.folder, self._told)

    def answered_by(self, adapter: AdapterArguments | None) -> AnsweredBy:
        """Return what makes the answers, by digests that stay the same however adapter and base are stored."""
        if adapter is None:
            return AnsweredBy(None, self._identity.fingerprint)
        tensors = read_lora(adapter.folder) if adapter.method == "lora" else read_prefix(adapter.folder)[1]
        return AnsweredBy(digest_tensors(tensors), self._identity.fingerprint)

    @contextmanager
    def using(self, adapter: AdapterArguments | None) -> Iterator[nn.Module]:
        """Give the base with `adapter` in it, for generating; afterwards the base is as it was."""
        base = self._load()
        if adapter is None:
            yield base.model
        elif adapter.method == "lora":
            adapted: Any = add_trained_lora(base, adapter.folder).eval()
            try:
                yield adapted
            finally:
                adapted.unload()
        else:
            add_prefix(base, None, adapter.folder)
            base.model.eval()
            try:
                yield base.model
            finally:
                base.model.transformer.prefix_encoder = None
                base.config.pre_seq_len, base.config.prefix_projection = None, False

    def _load(self) -> Base:
        if self._base is None:
            model = self._task.model
            self._base = load_base_for_inference(
                str(self._task.folder),
                quantization_bit=model.quantization_bit,
                dtype=model.dtype,
                show_progress=self._show_progress,
            )
            self._base.told.update(self._told)
        return self._base
