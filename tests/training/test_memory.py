"""What is recomputed, chosen by the free memory, and what is free."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from chatglm_tuning import kernels
from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.config.arguments import DataArguments, ModelArguments, RunOptions, TrainerArguments, TrainRun
from chatglm_tuning.estimate import GIB, Plan, estimate
from chatglm_tuning.loading import load_base
from chatglm_tuning.model import ChatGLMConfig
from chatglm_tuning.quantization.workspace import workspace
from chatglm_tuning.training import memory
from chatglm_tuning.training.memory import apply_plan, free_bytes, largest_batch, plan_memory
from tests.model_folder import write_tiny_model

CPU = torch.device("cpu")
PLENTY = 1000 * GIB


def make_run(asked="auto", **trainer):
    data = DataArguments((Path("rows.json"),), max_output_length=200)
    values = {"per_device_train_batch_size": 4, **trainer}
    return TrainRun(
        "lora", ModelArguments(), data, RunOptions(activation_checkpointing=asked), TrainerArguments(values)
    )


def plan_with(monkeypatch, free, *, bits=4, asked="auto"):
    """Plan the real size's LoRA with batches of 4 × 600 tokens and so many bytes free."""
    monkeypatch.setattr(memory, "free_bytes", lambda _device: free)
    config = ChatGLMConfig(quantization_bit=bits, dtype="bfloat16")
    return plan_memory(make_run(asked), config, nn.Linear(1, 1), [600] * 10)


def step_bytes(plan, bits=4):
    config = ChatGLMConfig(quantization_bit=bits, dtype="bfloat16")
    shape = memory.ModelShape.of(config.to_dict(), "")
    tuning = memory._tuning(make_run(), config, nn.Linear(1, 1))
    return estimate(shape, tuning, largest_batch(make_run(), [600] * 10), plan, "cpu").step_bytes


@pytest.mark.parametrize("bits", [None, 4])
def test_the_less_is_free_the_more_is_recomputed(bits, monkeypatch, caplog):
    chosen = []
    for free in range(30 * GIB, 0, -GIB // 16):
        caplog.clear()
        plan = plan_with(monkeypatch, free, bits=bits)
        fits = step_bytes(plan, bits) <= 0.9 * free
        chosen.append((plan, fits))
    plans = list(dict.fromkeys(plan for plan, _ in chosen))
    assert plans[0] == Plan("off", "matrix")
    assert list(dict.fromkeys(plan.checkpointing for plan in plans)) == ["off", "mlp", "on"]
    leanest = Plan("on", "chunk")
    assert plans[-1] == leanest
    assert all(fits or plan == leanest for plan, fits in chosen)
    assert not chosen[-1][1]


def test_a_tenth_of_what_is_free_is_left_to_others(monkeypatch):
    needed = step_bytes(Plan("off"))
    assert plan_with(monkeypatch, int(needed / 0.9) + 10).checkpointing == "off"
    assert plan_with(monkeypatch, int(needed / 0.9) - 10).checkpointing != "off"


@pytest.mark.parametrize(
    ("free", "asked", "words"),
    [
        (PLENTY, "auto", ["checkpointing: off (chosen)", "costs no time", "of 1000.0 free"]),
        (PLENTY, "on", ["checkpointing: on (as asked)", "adds 33% to the products of a step"]),
        (PLENTY, "mlp", ["checkpointing: mlp (as asked)", "adds 17% to the products of a step"]),
        (GIB, "auto", ["checkpointing: on (chosen)", "adds 33%", "of 1.0 free"]),
        (GIB, "off", ["checkpointing: off (as asked)", "costs no time"]),
    ],
)
def test_the_log_names_the_choice_and_its_cost(free, asked, words, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, memory.logger.name):
        plan = plan_with(monkeypatch, free, asked=asked)
    line = caplog.records[0].getMessage()
    assert all(word in line for word in words), line
    needed = float(re.search(r"needs about ([\d.]+) GiB", line).group(1))
    assert needed == pytest.approx(step_bytes(plan) / GIB, abs=0.06)
    assert plan.checkpointing in words[0]


@pytest.mark.parametrize("asked", ["auto", "off"])
def test_what_fits_nowhere_is_warned_of(asked, monkeypatch, caplog):
    lines = {}
    for free in (GIB // 4, PLENTY):
        caplog.clear()
        plan_with(monkeypatch, free, asked=asked)
        lines[free] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines[GIB // 4]) == 1
    assert "may not fit into memory" in lines[GIB // 4][0]
    assert "per_device_train_batch_size" in lines[GIB // 4][0]
    assert not lines[PLENTY]


def test_the_largest_batch_is_that_of_the_longest_rows():
    batch = largest_batch(make_run(per_device_train_batch_size=2), [5, 90, 7, 40])
    assert (batch.samples, batch.tokens, batch.label_tokens, batch.longest) == (2, 130, 130, 90)
    batch = largest_batch(make_run(per_device_train_batch_size=2), [900, 7, 400])
    assert (batch.tokens, batch.label_tokens, batch.longest) == (1300, 400, 900)
    assert largest_batch(make_run(), [30, 20]).samples == 2


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A folder that stands for the control group's, and 100 GiB that are free beside it."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path


def write_group(folder, version, limit, used, cached=0):
    if version == 2:
        names, prefix = ("memory.max", "memory.current", "memory.stat"), ""
    else:
        folder = folder / "memory"
        folder.mkdir(exist_ok=True)
        names, prefix = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"), "total_"
    parts = f"anon 5\n{prefix}inactive_file {cached // 2}\n{prefix}active_file {cached - cached // 2}\n"
    for name, text in zip(names, (f"{limit}\n", f"{used}\n", parts), strict=True):
        (folder / name).write_text(text, encoding="ascii")


def test_without_a_limit_what_the_machine_has_is_free(container):
    assert free_bytes(CPU) == 100 * GIB


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [
        (30 * GIB, 10 * GIB, 0, 20 * GIB),
        (30 * GIB, 29 * GIB, 13 * GIB, 14 * GIB),  # copies of the files that were read go when memory is asked for
        (500 * GIB, 10 * GIB, 0, 100 * GIB),
        (2**63 - 4096, 10 * GIB, 0, 100 * GIB),
        (GIB, 2 * GIB, 0, 0),
        ("max", 10 * GIB, 0, 100 * GIB),
        ("?", 10 * GIB, 0, 100 * GIB),
    ],
)
def test_the_limit_of_a_container_is_kept(container, version, limit, used, cached, free):
    write_group(container, version, limit, used, cached)
    assert free_bytes(CPU) == free


@pytest.mark.parametrize("has_limit", [True, False])
def test_processes_of_one_machine_share_what_is_free(container, has_limit, monkeypatch):
    if has_limit:
        write_group(container, 2, 50 * GIB, 10 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(CPU) == (10 * GIB if has_limit else 25 * GIB)


@pytest.mark.parametrize("is_adapted", [True, False])
@pytest.mark.parametrize("plan", [Plan("off", "layer"), Plan("mlp", "matrix"), Plan("on", "chunk")])
def test_a_plan_sets_model_and_process_up(plan, is_adapted, tmp_path, monkeypatch):
    model = load_base(str(write_tiny_model(tmp_path / "model"))).model
    base = model
    if is_adapted:
        model = add_lora(model, make_lora_config(rank=2, alpha=2, dropout=0.0, targets=("dense",)))
    kept, returned = [], []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(memory, "return_freed_memory", lambda: returned.append(True))
    size, is_compiling = workspace.size, kernels.is_compiling()
    try:
        apply_plan(plan, model)
        assert base.is_activation_checkpointing == (plan.checkpointing == "on")
        assert {layer.recomputes_mlp for layer in base.transformer.layers} == {plan.checkpointing == "mlp"}
        assert workspace.size == plan.workspace
        # A compiler and kept memory take some: the leanest plan has neither.
        assert kernels.is_compiling() is bool(kept) is (plan.workspace != "chunk")
        assert bool(returned) is not bool(kept)
    finally:
        workspace.set_size(size)
        kernels.set_compiling(is_compiling)
