"""The recipe of a training run, top to bottom."""

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape
from chatglm_tuning.audit.report import remarks_on_examples
from chatglm_tuning.base_folder import bits_to_hold, load_tokenizer, read_config
from chatglm_tuning.checkpoint import (
    MANIFEST_NAME,
    Manifest,
    new_result,
    read_manifest,
    save_adapter_files,
    save_full_files,
    step_of_checkpoint,
    write_manifest,
)
from chatglm_tuning.config.arguments import TrainRun
from chatglm_tuning.config.launch import is_first_rank
from chatglm_tuning.config.output_folder import check_output_folder
from chatglm_tuning.data.audit import overlap_of
from chatglm_tuning.data.collate import PrefixLMCollator
from chatglm_tuning.data.dataset import BuiltDataset, build_dataset
from chatglm_tuning.data.encode import EncodingSettings
from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.prompts import Prompt
from chatglm_tuning.folder_lock import only_writer
from chatglm_tuning.loading import (
    Base,
    add_prefix,
    add_trained_lora,
    check_lora,
    check_prefix,
    connect_layers,
    load_base,
    refuse_base_not_finite,
    spread_layers,
)
from chatglm_tuning.model import ChatGLMConfig, ChatGLMTokenizer
from chatglm_tuning.shards import find_weight_files, resolve_model_folder
from chatglm_tuning.training.answers import make_scorer, read_sample
from chatglm_tuning.training.arguments import base_dtype, make_training_arguments, training_device
from chatglm_tuning.training.best import Places, choose_best
from chatglm_tuning.training.callbacks import EarlyEnd, OwnIntervals, RunLog
from chatglm_tuning.training.checkpoints import REFUSED_NAME, keeping_refused, refuse_unproved, tell_proof
from chatglm_tuning.training.disk import check_room, told_disk_errors
from chatglm_tuning.training.engines import Engine, check_bits, check_same_start, find_engine
from chatglm_tuning.training.expected import check_learning_rate
from chatglm_tuning.training.interruption import Interruption, StopOnRequest, StoppedBeforeStart
from chatglm_tuning.training.lost import told_lost_processes
from chatglm_tuning.training.manifest import describe, warn_of_other_settings, with_progress
from chatglm_tuning.training.memory import apply_plan, plan_memory, told_memory_errors
from chatglm_tuning.training.resumed import check_engine, check_states
from chatglm_tuning.training.sharded import load_once
from chatglm_tuning.training.start import (
    Start,
    check_output_dir,
    check_sources_stay,
    check_steps,
    clear_output_dir,
    find_start,
    warn_of_other_batches,
)
from chatglm_tuning.training.trainer import BatchSettings, LossSettings, TuningTrainer
from chatglm_tuning.wording import BEFORE_START

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run left. metrics: Trainer's, the last evaluation among them. is_interrupted: whether SIGTERM ended it."""

    output_dir: Path
    metrics: dict[str, float]
    is_interrupted: bool = False


def train(run: TrainRun) -> Result:
    """Tune a model as `run` says and leave a self-describing folder.

    Everything that can be refused is, before the base model is read. SIGTERM ends the run with a checkpoint.
    """
    output_dir = run.trainer.output_dir
    with Interruption() as interruption:
        try:
            with told_lost_processes(output_dir), told_disk_errors(output_dir), told_memory_errors(output_dir):
                checked = _check(run)
                with only_writer(output_dir) if is_first_rank() else nullcontext():
                    check_output_dir(run, checked.start)  # again: another run may have ended since
                    return _tune(run, checked, interruption)
        except StoppedBeforeStart:
            logger.warning(BEFORE_START)
            return Result(output_dir, {}, is_interrupted=True)


@dataclass(frozen=True)
class Checked:
    """What a run was found to be, before its base is read. sample: prompts that are answered at every evaluation."""

    start: Start
    is_finished: bool
    device: torch.device
    dtype: torch.dtype
    engine: Engine
    arguments: TrainingArguments
    folder: Path
    config: ChatGLMConfig
    tokenizer: ChatGLMTokenizer
    train_rows: BuiltDataset
    eval_rows: BuiltDataset | None
    sample: list[Prompt]


def _check(run: TrainRun) -> Checked:
    """Refuse what can be refused; nothing is written."""
    start = find_start(run)
    check_output_folder(run.trainer.output_dir)
    check_output_dir(run, start)
    is_finished = check_steps(run, start)
    device = training_device(run)
    dtype = base_dtype(run, device)
    engine = find_engine(run)
    arguments = make_training_arguments(run, device, dtype)
    if not is_finished:
        check_engine(start, engine, run.method)
        check_states(start, engine, arguments, run.method)
    check_same_start(start, run.trainer.output_dir)
    folder = resolve_model_folder(run.model.model_name_or_path)
    config = read_config(folder)
    check_sources_stay(run, start, folder)
    check_learning_rate(run)
    warn_of_other_batches(run, start)
    check_lengths(run, config)
    check_bits(engine, bits_to_hold(config, run.model.quantization_bit, folder))
    check_adapter(run, start, config)
    find_weight_files(folder)
    tokenizer = load_tokenizer(folder, config)
    train_rows, eval_rows = build_datasets(run, tokenizer)
    sample = read_sample(run.data, run.options.predict_samples) if run.options.predict_samples else []
    return Checked(
        start,
        is_finished,
        device,
        dtype,
        engine,
        arguments,
        folder,
        config,
        tokenizer,
        train_rows,
        eval_rows,
        sample,
    )


def _tune(run: TrainRun, checked: Checked, interruption: Interruption) -> Result:
    output_dir, start, arguments = run.trainer.output_dir, checked.start, checked.arguments
    train_rows, eval_rows = checked.train_rows, checked.eval_rows
    set_seed(run.trainer.seed)
    base = load(run, checked)
    model = add_adapter(run, base, start)
    manifest = describe(run, arguments, base, model, checked.dtype, len(train_rows.dataset))
    before = None if start.checkpoint is None else read_manifest(start.checkpoint, verify_files=False)
    if before is not None:
        warn_of_other_settings(before, manifest)
    apply_plan(plan_memory(run, base.config, model, train_rows.dataset["length"], checked.device), model)
    log_model(model, manifest, checked.dtype)
    check_room(model, output_dir)
    clear_output_dir(run, start)
    stopping = StopOnRequest(interruption)
    trainer = make_trainer(run, checked, model, manifest, stopping)
    metrics: dict[str, float] = {}
    interruption.begin_steps()
    if checked.is_finished:
        state = finished_state(run, start, trainer)
    else:
        resume_from = None if start.checkpoint is None else str(start.checkpoint)
        metrics |= trainer.train(resume_from_checkpoint=resume_from).metrics
        state = trainer.state
    if not stopping.has_stopped:
        result_step = trainer.loaded_step or state.global_step
        if eval_rows is not None:
            metrics |= logged_evaluation(state, result_step, start) or trainer.evaluate()
        progress = with_progress(manifest, state, arguments, result_step=result_step)
        save_result(trainer, output_dir, progress, stops_on_suspicion=run.options.tripwires == "stop")
    else:
        logger.info("ended by SIGTERM; go on with --resume_from_checkpoint %s", output_dir)
    # torchrun ends the first process, which writes, as soon as another has ended badly.
    trainer.accelerator.wait_for_everyone()
    return Result(output_dir, metrics, is_interrupted=stopping.has_stopped)


def logged_evaluation(state: TrainerState, result_step: int, start: Start) -> dict[str, float] | None:
    """Return the evaluation of the last step, None where this run has made none or the result is an earlier step's."""
    began = 0 if start.checkpoint is None else step_of_checkpoint(start.checkpoint) or 0
    if not began < state.global_step == result_step:
        return None
    return next((line for line in state.log_history if line.get("step") == result_step and "eval_loss" in line), None)


def load(run: TrainRun, checked: Checked) -> Base:
    """Return the base of the run: on one device, with --model_parallel spread over all GPUs, with FSDP read once."""
    devices = devices_of(run, checked.device)
    device_of = spread_layers(checked.config, devices)
    is_shared_out = checked.engine == "fsdp"

    def read() -> Base:
        base = load_base(
            str(checked.folder),
            quantization_bit=run.model.quantization_bit,
            dtype=checked.dtype,
            device_of=None if is_shared_out else device_of,
            show_progress=is_first_rank(),
        )
        refuse_base_not_finite(base, checked.folder)
        return base

    base = load_once(read, checked.folder, checked.config, checked.dtype) if is_shared_out else read()
    if len(devices) > 1:
        connect_layers(base.model, device_of)
    return replace(base, identity=replace(base.identity, name_or_path=run.model.model_name_or_path))


def given_shape(run: TrainRun) -> PrefixShape | None:
    """Return the shape of the prefix that the flags ask for, None where they leave it to a checkpoint."""
    if run.ptuning is None or run.ptuning.pre_seq_len is None:
        return None
    return PrefixShape(run.ptuning.pre_seq_len, run.ptuning.prefix_projection)


def first_adapter(run: TrainRun, start: Start) -> Path | None:
    """Return the folder of the adapter that the run starts from, None where it starts with a new one."""
    given = None if run.ptuning is None else run.ptuning.ptuning_checkpoint
    return start.checkpoint or start.weights or given


def check_adapter(run: TrainRun, start: Start, config: ChatGLMConfig) -> None:
    """Raise UserError where the adapter to start from is damaged, or fits neither the base nor the flags."""
    folder = first_adapter(run, start)
    if folder is not None and run.method == "ptuning":
        check_prefix(folder, config, given_shape(run))
    elif folder is not None and run.method == "lora":
        check_lora(folder, config)


def check_lengths(run: TrainRun, config: ChatGLMConfig) -> None:
    """Refuse lengths that the model's context cannot hold."""
    total = run.data.max_input_length + run.data.max_output_length
    if total > config.max_sequence_length:
        raise UserError(
            f"max_input_length {run.data.max_input_length} and max_output_length {run.data.max_output_length} make "
            f"{total}, and the model's context is {config.max_sequence_length} tokens",
            code="A111",
            remedy="lower --max_input_length or --max_output_length",
        )


def finished_state(run: TrainRun, start: Start, trainer: TuningTrainer) -> TrainerState:
    """Return the state of a run whose steps are all done; loads its values, the best ones where it keeps those."""
    assert start.checkpoint is not None
    state = TrainerState.load_from_json(str(start.checkpoint / TRAINER_STATE_NAME))
    best = None
    if trainer.args.load_best_model_at_end:
        places = Places(run.trainer.output_dir).going_on_from(start.checkpoint, state.global_step)
        best = choose_best(state, places, trainer.args)
    if best is not None:
        trainer.load_values(best)
    elif run.method == "full":  # an adapter already has its values; this model has those of the base
        trainer.set_values(start.checkpoint)
    return state


def build_datasets(run: TrainRun, tokenizer: ChatGLMTokenizer) -> tuple[BuiltDataset, BuiltDataset | None]:
    """Read and tokenise the training and the evaluation rows."""
    settings = EncodingSettings(run.data.max_input_length, run.data.max_output_length)

    def build(paths: tuple[Path, ...]) -> BuiltDataset:
        return build_dataset(
            paths,
            tokenizer,
            settings,
            skip_bad_rows=run.data.skip_bad_rows,
            num_proc=run.data.preprocessing_num_workers,
            cache_dir=run.data.data_cache_dir,
        )

    trained, evaluated = build(run.data.data_path), build(run.data.eval_path) if run.data.eval_path else None
    reports = [built.examples for built in (trained, evaluated) if built is not None]
    remarks = remarks_on_examples(reports, overlap_of(*reports) if evaluated else None)
    for remark in remarks:
        logger.warning("data: %s", remark)
    if remarks:
        logger.warning("data: `chatglm-tuning data check` tells more")
    return trained, evaluated


def devices_of(run: TrainRun, device: torch.device) -> list[torch.device]:
    """Return where the base goes: to one device, or with --model_parallel its layers to all GPUs in turn."""
    if not run.options.model_parallel:
        return [device]
    if torch.cuda.device_count() < 2:
        logger.warning("--model_parallel has no effect: there are fewer than two GPUs")
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def add_adapter(run: TrainRun, base: Base, start: Start) -> nn.Module:
    """Return the model to train, with nothing but what is trained requiring a gradient."""
    if run.method == "full":
        return base.model.requires_grad_(True)
    source = first_adapter(run, start)
    if run.method == "ptuning":
        add_prefix(base, given_shape(run), source)
        base.model.transformer.get_submodule("prefix_encoder").requires_grad_(True)
        return base.model
    assert run.lora is not None
    if source is not None:
        return add_trained_lora(base, source, is_trainable=True)
    config = make_lora_config(
        rank=run.lora.lora_rank,
        alpha=run.lora.lora_alpha,
        dropout=run.lora.lora_dropout,
        targets=run.lora.lora_target,
    )
    return add_lora(base.model, config)


def log_model(model: nn.Module, manifest: Manifest, dtype: torch.dtype) -> None:
    """Say what is trained, of how much, and how the base is held."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bits = manifest.base_model.quantization_bit
    held = f"int{bits}, the rest {dtype}" if bits else str(dtype)
    logger.info("training %s: %s trainable parameters on a base in %s", manifest.method, f"{trainable:,}", held)


def make_trainer(
    run: TrainRun, checked: Checked, model: nn.Module, manifest: Manifest, stopping: StopOnRequest
) -> TuningTrainer:
    """Put Trainer together."""
    train_rows, eval_rows, sample, tokenizer = checked.train_rows, checked.eval_rows, checked.sample, checked.tokenizer
    callbacks: list[TrainerCallback] = [
        OwnIntervals(),
        RunLog(run.trainer.output_dir, len(train_rows.dataset)),
        stopping,
    ]
    if run.options.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(run.options.early_stopping_patience))
        callbacks.append(EarlyEnd(run.options.early_stopping_patience, stopping))
    return TuningTrainer(
        model,
        checked.arguments,
        manifest=manifest,
        train_dataset=train_rows.dataset,
        eval_dataset=None if eval_rows is None else eval_rows.dataset,
        data_collator=PrefixLMCollator(tokenizer.pad_token_id),
        loss=LossSettings(run.options.loss_average, run.trainer.values.get("label_smoothing_factor", 0.0)),
        batches=BatchSettings(run.options.bucket_by_length, run.options.max_tokens_per_batch),
        checkpoint_limit=run.trainer.values.get("save_total_limit"),
        callbacks=callbacks,
        score_answers=make_scorer(sample, tokenizer, run.data, checked.arguments) if sample else None,
        stops_on_suspicion=run.options.tripwires == "stop",
    )


def save_result(trainer: TuningTrainer, output_dir: Path, manifest: Manifest, *, stops_on_suspicion: bool) -> None:
    """Write what was trained, prove it, and put it into the run's folder, the manifest last.

    stops_on_suspicion: whether an adapter that changes nothing is an error, once all is written.
    """
    state = trainer.gather_trained()
    if not trainer.args.should_save:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with new_result(output_dir) as part:
        if manifest.method == "full":
            names = save_full_files(model, part, state)
        else:
            assert isinstance(model, PeftModel) == (manifest.method == "lora")
            names = save_adapter_files(model, part, for_original=True, state=state)
        proof = trainer.prove_saved(part)
        if proof is not None:
            with keeping_refused(part, output_dir / REFUSED_NAME):
                refuse_unproved(proof, output_dir)
        write_manifest(part, replace(manifest, proof=None if proof is None else proof.describe()), names)
    logger.info("saved to %s: %s", output_dir, ", ".join([*names, MANIFEST_NAME]))
    if proof is not None:
        tell_proof(proof, output_dir, stops=stops_on_suspicion)
