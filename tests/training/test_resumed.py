"""What a run may go on from: the states of its own optimizer under its own engine, and nothing of another kind."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from chatglm_tuning.checkpoint import LORA_CONFIG_FILE, LORA_FILE, MANIFEST_NAME, read_manifest, write_manifest
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.errors import UserError
from chatglm_tuning.training import resumed
from chatglm_tuning.training import run as run_module
from chatglm_tuning.training.optimizer_state import load_apart
from chatglm_tuning.training.start import Start
from chatglm_tuning.training.state_files import make_schedule, read_state
from tests.model_folder import write_rows, write_tiny_model
from tests.training.commands import FAST

COMMANDS = {"lora": ("train-lora", []), "ptuning": ("train-ptuning", ["--pre_seq_len", "4"])}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Of each method a run of 2 steps with a checkpoint after the first."""
    root = tmp_path_factory.mktemp("place")
    write_tiny_model(root / "model")
    write_rows(root / "rows.json", 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATGLM_TUNING_CACHE", str(root / "cache"))
        for method in COMMANDS:
            assert train(root, method, root / method) == 0
        yield root


def train(root, method, output, *flags, **changes):
    settings = {**FAST, "max_steps": 2, "save_steps": 1, "learning_rate": 5e-3, "output_dir": str(output), **changes}
    file = output.with_name(f"{output.name}.json")
    file.write_text(json.dumps(settings), encoding="utf-8")
    command, own = COMMANDS[method]
    argv = ["--train_args_file", file, "--model_name_or_path", root / "model", "--data_path", root / "rows.json"]
    argv += ["--dtype", "float32", "--max_input_length", 64, "--max_output_length", 96, *own, *flags]
    return run_command(command, list(map(str, argv)))


@pytest.fixture
def checkpoint(place, tmp_path):
    return shutil.copytree(place / "lora" / "checkpoint-1", tmp_path / "run" / "checkpoint-1")


def trust_again(checkpoint):
    """Give a changed checkpoint a manifest that vouches for it."""
    manifest = read_manifest(checkpoint, verify_files=False)
    write_manifest(checkpoint, manifest, [path.name for path in checkpoint.iterdir() if path.name in manifest.files])


def change_pickle(name, change):
    def apply(checkpoint):
        with safe_globals():
            state = torch.load(checkpoint / name, weights_only=True)
        torch.save(change(state), checkpoint / name)

    return pytest.param(name, apply, id=f"{name}: {change.__doc__ or change.__name__}")


def change_state(key, value):
    def apply(checkpoint):
        file = checkpoint / "trainer_state.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))

    return pytest.param("trainer_state.json", apply, id=f"{key} {value}")


def becomes(value):
    def change(_state):
        return value

    change.__doc__ = f"{value!r}"
    return change


def with_value(path, value):
    def change(state):
        inner = state
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value(inner[path[-1]]) if callable(value) else value
        return state

    change.__doc__ = ".".join(map(str, path))
    return change


OF_OTHER_KINDS = [
    *(change_pickle("optimizer.pt", becomes(value)) for value in ({"a": 1}, [1], {"state": {}, "param_groups": []})),
    change_pickle("optimizer.pt", with_value(("state", 0), {})),
    change_pickle("optimizer.pt", with_value(("state", 0, "exp_avg"), "x")),
    change_pickle("optimizer.pt", with_value(("state", 0, "exp_avg_sq"), lambda old: old.long())),
    change_pickle("optimizer.pt", with_value(("state", 0, "exp_avg"), lambda old: old[:1, :1].expand(old.shape))),
    change_pickle("optimizer.pt", with_value(("param_groups", 0, "betas"), "x")),
    change_pickle("optimizer.pt", with_value(("param_groups", 0, "params"), [0, 0])),
    *(change_pickle("scheduler.pt", becomes(value)) for value in ({}, [1], {"last_epoch": 1})),
    change_pickle("scheduler.pt", with_value(("last_epoch",), "x")),
    change_pickle("scheduler.pt", with_value(("base_lrs",), [1.0])),
    change_pickle("rng_state.pth", becomes({})),
    change_pickle("rng_state.pth", with_value(("cpu",), lambda old: old[:100].clone())),
    change_pickle("rng_state.pth", with_value(("numpy",), ("MT19937", np.zeros(3, np.uint32), 0, 0, 0.0))),
    change_state("train_batch_size", "a"),
    change_state("log_history", 3),
    change_state("log_history", [{"eval_loss": "x", "step": 1}]),
    change_state("stateful_callbacks", []),
    change_state("stateful_callbacks", {"TrainerControl": {"args": {"no_such": 1}, "attributes": {}}}),
    change_state("epoch", "x"),
    change_state("global_step", -3),
    change_state("best_model_checkpoint", 5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "apply"), OF_OTHER_KINDS)
def test_a_state_of_another_kind_is_told_before_the_base_is_read(place, checkpoint, capsys, monkeypatch, name, apply):
    apply(checkpoint)
    trust_again(checkpoint)
    monkeypatch.setattr(run_module, "load_base", None)
    assert train(place, "lora", checkpoint.parent, "--resume_from_checkpoint", checkpoint) == 2
    assert f"error [C112]: {checkpoint / name}: this is no state of a training run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {**state, "state": {0: with_shape(state["state"][0], (1, 1)), **omit(state["state"], 0)}},
        lambda state: {**state, "state": {0: with_shape(state["state"][0], (4000, 1)), **omit(state["state"], 0)}},
        lambda state: {"state": omit(state["state"], 0), "param_groups": [{**state["param_groups"][0], "params": []}]},
    ],
)
def test_states_of_other_shapes_never_reach_the_optimizer(place, checkpoint, capsys, monkeypatch, change):
    """Its fused step would read and write past their ends."""
    state = torch.load(checkpoint / "optimizer.pt")
    torch.save(change(state), checkpoint / "optimizer.pt")
    trust_again(checkpoint)
    monkeypatch.setattr(AcceleratedOptimizer, "load_state_dict", None)
    assert train(place, "lora", checkpoint.parent, "--resume_from_checkpoint", checkpoint) == 2
    assert f"error [C112]: {checkpoint / 'optimizer.pt'}: " in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_optimizer_writes_to_no_file_and_only_what_stays_on_the_cpu_is_copied_there(place, tmp_path, device):
    file = shutil.copyfile(place / "lora" / "checkpoint-1" / "optimizer.pt", tmp_path / "optimizer.pt")
    state, expected = read_state(file), torch.load(file)
    parameters = [torch.zeros_like(values["exp_avg"], device=device) for values in state["state"].values()]
    given = []
    optimizer = torch.optim.AdamW([{"params": parameters}])
    optimizer.register_load_state_dict_pre_hook(lambda _optimizer, loaded: given.append(loaded))
    state["param_groups"] = [{**state["param_groups"][0], "fused": False, "params": list(range(len(parameters)))}]
    load_apart(optimizer, state)
    for number, parameter in enumerate(parameters):
        for name, value in optimizer.state[parameter].items():
            mapped = state["state"][number][name]
            assert given[0]["state"][number][name].data_ptr() == mapped.data_ptr(), "it was copied ahead"
            assert value.device.type == ("cpu" if name == "step" else device)
            if value.device.type == "cpu":
                assert value.data_ptr() != mapped.data_ptr()
                assert torch.equal(value, expected["state"][number][name])


def with_shape(values, shape):
    return {name: torch.zeros(shape) if value.dim() else value for name, value in values.items()}


def omit(states, parameter):
    return {number: values for number, values in states.items() if number != parameter}


@pytest.mark.parametrize(
    ("before", "now"), [("adamw_torch", "sgd"), ("sgd", "adamw_torch"), ("adafactor", "adamw_torch")]
)
def test_another_optimizer_is_refused_before_the_base_is_read(place, tmp_path, capsys, monkeypatch, before, now):
    run = tmp_path / "run"
    assert train(place, "lora", run, "--tripwires", "warn", optim=before) == 0
    monkeypatch.setattr(run_module, "load_base", None)
    flags = ["--resume_from_checkpoint", run / "checkpoint-1", "--overwrite_output_dir", "--tripwires", "warn"]
    assert train(place, "lora", run, *flags, optim=now) == 2
    told = capsys.readouterr().err
    assert f"error [C114]: {run / 'checkpoint-1'}: the checkpoint was written with the optimizer {before}" in told
    assert f"this run has {now}" in told


def test_a_run_that_lacks_only_its_result_needs_no_states(place, tmp_path):
    run = tmp_path / "run"
    assert train(place, "lora", run, "--tripwires", "warn", optim="adafactor") == 0
    trained = (run / LORA_FILE).read_bytes()
    for name in (LORA_FILE, MANIFEST_NAME):
        (run / name).unlink()
    assert (
        train(place, "lora", run, "--tripwires", "warn", "--resume_from_checkpoint", "auto", optim="adamw_torch") == 0
    )
    assert (run / LORA_FILE).read_bytes() == trained


@pytest.mark.parametrize(
    ("before", "now"), [("adamw_bnb_8bit", "adamw_8bit"), ("paged_adamw_8bit", "adamw_bnb_8bit"),
                        ("lion_32bit", "paged_lion_32bit"), ("rmsprop_bnb", "rmsprop_bnb_32bit")]
)  # fmt: skip
def test_an_optimizer_that_cannot_be_tried_goes_on_under_its_other_names(checkpoint, monkeypatch, before, now):
    check_as_if_untried(checkpoint, monkeypatch, before, now)


@pytest.mark.parametrize(
    ("before", "now"), [("lion_8bit", "adamw_8bit"), ("paged_adamw_32bit", "paged_adamw_8bit"),
                        ("adamw_torch_8bit", "adamw_8bit")]
)  # fmt: skip
def test_an_optimizer_that_cannot_be_tried_is_refused_by_its_family(checkpoint, monkeypatch, before, now):
    with pytest.raises(UserError, match=f"the optimizer {before}, and this run has {now}"):
        check_as_if_untried(checkpoint, monkeypatch, before, now)


def check_as_if_untried(checkpoint, monkeypatch, before, now):
    """Check a checkpoint of the optimizer `before` where that of `now` cannot be made, as without a GPU."""
    write_settings(checkpoint, optim=before)
    monkeypatch.setattr(resumed, "find_layout", lambda _arguments: None)
    arguments = arguments_of(checkpoint, optim=now, lr_scheduler_type="cosine")
    resumed.check_states(Start(checkpoint=checkpoint), "plain", arguments, "lora")


def arguments_of(checkpoint, **settings):
    return TrainingArguments(output_dir=str(checkpoint.parent), use_cpu=True, eval_strategy="epoch", **settings)


def write_settings(checkpoint, **changes):
    manifest = read_manifest(checkpoint, verify_files=False)
    changed = replace(manifest, settings={**manifest.settings, **changes})
    write_manifest(checkpoint, changed, list(manifest.files))


PLATEAU, GREEDY = "reduce_lr_on_plateau", "greedy"


@pytest.mark.parametrize(
    ("before", "now"), [(PLATEAU, "linear"), ("linear", PLATEAU), (PLATEAU, GREEDY), ("linear", GREEDY)]
)
def test_a_schedule_of_another_kind_is_refused_with_the_name_of_its_own(checkpoint, before, now):
    earlier = arguments_of(checkpoint, lr_scheduler_type=before)
    torch.save(make_schedule(earlier).state_dict(), checkpoint / "scheduler.pt")
    write_settings(checkpoint, lr_scheduler_type=before)
    resumed.check_states(Start(checkpoint=checkpoint), "plain", earlier, "lora")
    later = arguments_of(checkpoint, lr_scheduler_type=now)
    with pytest.raises(UserError, match=f"the schedule {before}, and this run has {now}") as refusal:
        resumed.check_states(Start(checkpoint=checkpoint), "plain", later, "lora")
    assert refusal.value.code == "C114"
    assert f"Give --lr_scheduler_type {before}, or start a new run from its values: " in str(refusal.value)


def test_an_optimizer_that_holds_the_same_goes_on_and_that_is_said(place, checkpoint, caplog):
    changes = {"optim": "adamw_torch"}
    manifest = read_manifest(checkpoint)
    assert manifest.settings["optim"] == "adamw_torch_fused"
    assert train(place, "lora", checkpoint.parent, "--resume_from_checkpoint", checkpoint, **changes) == 0
    assert "optim: adamw_torch_fused when the checkpoint was made, and adamw_torch now" in caplog.text


@pytest.mark.parametrize("method", list(COMMANDS))
@pytest.mark.parametrize(("file", "engine"), [("optimizer.bin", "FSDP"), ("global_step1", "DeepSpeed")])
def test_a_checkpoint_of_another_engine_is_refused_and_its_values_start_a_new_run(
    place, tmp_path, capsys, monkeypatch, method, file, engine
):
    checkpoint = shutil.copytree(place / method / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    (checkpoint / "optimizer.pt").unlink()
    if engine == "FSDP":
        torch.save({"state": {}, "param_groups": [{"params": []}]}, checkpoint / file)
    else:
        (checkpoint / file).mkdir()
    trust_again(checkpoint)
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "load_base", None)
        assert train(place, method, output, "--resume_from_checkpoint", checkpoint) == 2
    told = capsys.readouterr().err
    assert (
        f"error [C114]: {checkpoint}: the checkpoint was written under {engine}, and this run is under one process"
        in told
    )
    assert f"Go on under {engine}, or start a new run from its values: " in told
    if method == "ptuning":
        assert "give it with --ptuning_checkpoint in place of --resume_from_checkpoint" in told
        flags = ["--ptuning_checkpoint", checkpoint]
    else:
        (tmp_path / "values").mkdir()
        for name in (LORA_CONFIG_FILE, LORA_FILE):
            assert name in told
            shutil.copyfile(checkpoint / name, tmp_path / "values" / name)
        flags = ["--resume_from_checkpoint", tmp_path / "values"]
    assert train(place, method, tmp_path / "new", *flags, "--tripwires", "warn") == 0


# Its rate after the first evaluation is another than at the beginning.
RISES = {"lr_scheduler_type": GREEDY, "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "max_lr": 1.0}}


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "sgd"},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "cosine"},
        {**RISES, "eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=str,
)
def test_a_run_goes_on_from_the_states_of_its_own_optimizer(place, tmp_path, changes):
    run, flags = tmp_path / "run", ["--tripwires", "warn", "--eval_path", place / "rows.json"]
    assert train(place, "lora", run, *flags, **changes) == 0
    whole = (run / LORA_FILE).read_bytes()
    shutil.rmtree(run / "checkpoint-2")
    (run / LORA_FILE).unlink()
    assert train(place, "lora", run, *flags, "--resume_from_checkpoint", run, **changes) == 0
    assert (run / LORA_FILE).read_bytes() == whole
