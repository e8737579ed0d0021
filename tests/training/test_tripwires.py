"""What stops a run: injected into runs on a tiny base, and seen by message, exit code and what is left."""

import json
import logging
import shutil

import pytest
import torch
from torch import nn

from chatglm_tuning.checkpoint import read_manifest, whole_checkpoints
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.model.modeling import ChatGLMMLP
from chatglm_tuning.training import run as run_module
from chatglm_tuning.training.callbacks import read_log
from chatglm_tuning.training.expected import RATES
from chatglm_tuning.training.replay import Finding
from chatglm_tuning.training.stopped import BATCH_FILE, REPORT_FILE, read_micro_batch
from tests.model_folder import EMBEDDED, write_rows, write_tiny_model
from tests.training.commands import FAST

PREFIX = ["--pre_seq_len", "4"]
METHODS = {"lora": ("train-lora", []), "ptuning": ("train-ptuning", PREFIX), "full": ("train-ptuning", [])}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model", num_layers=3)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.json", 24)


@pytest.fixture
def tune(model, rows, tmp_path, monkeypatch):
    """Run a training command whose model `spoil` changes before it is trained."""
    monkeypatch.setenv("CHATGLM_TUNING_CACHE", str(tmp_path.parent / "cache"))

    def start(method, *flags, spoil=lambda _model: None, **changes):
        real = run_module.add_adapter

        def add_adapter(*arguments):
            adapted = real(*arguments)
            spoil(adapted)
            return adapted

        monkeypatch.setattr(run_module, "add_adapter", add_adapter)
        command, own = METHODS[method]
        folder = tmp_path / "run"
        rate = {"learning_rate": RATES[method].usual[1]}
        settings = {**FAST, "max_steps": 4, "save_strategy": "no", "output_dir": str(folder), **rate, **changes}
        (tmp_path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
        argv = ["--train_args_file", tmp_path / "run.json", "--model_name_or_path", model, "--data_path", rows]
        argv += ["--dtype", "float32", "--max_input_length", 64, "--max_output_length", 96, *own, *flags]
        return run_command(command, list(map(str, argv))), folder

    return start


def module_of(model, kind, index):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)][index]


def spoil_output(layer, at_passes):
    """Put a NaN into the output of one layer's MLP, at these of its forward passes in training, counted from 1."""

    def spoil(model):
        passes = []

        def hook(module, _inputs, output):
            if module.training:
                passes.append(1)
                if len(passes) in at_passes:
                    return output.index_fill(1, torch.tensor([0]), float("nan"))
            return None

        module_of(model, ChatGLMMLP, layer)[1].register_forward_hook(hook)

    return spoil


def spoil_gradient(layer):
    """Let the gradient that leaves one layer's MLP be infinite, while every value is finite."""

    def spoil(model):
        def hook(_module, _inputs, output):
            output.register_hook(lambda gradient: gradient * float("inf"))

        module_of(model, ChatGLMMLP, layer)[1].register_forward_hook(hook)

    return spoil


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_value_that_is_not_finite_stops_the_run_and_names_its_module(tune, capsys, method, layer):
    """It comes in the second micro-batch of the second step, and again when both are computed again."""
    code, folder = tune(method, spoil=spoil_output(layer, at_passes={4, 6}), **CHECKPOINTS)
    error = capsys.readouterr().err
    assert code == 2
    assert f"at step 2 the first number that is not finite is in the output of {prefix_of(method)}" in error
    assert f"layers.{layer}.mlp (" in error
    stopped = folder / "stopped-at-step-2"
    assert str(stopped) in error
    report = json.loads((stopped / REPORT_FILE).read_text(encoding="utf-8"))
    assert report["finding"]["micro_batch"] == 1
    assert (report["loss"] == "nan") == (layer < 2)  # the last layer's first token predicts nothing
    assert all(1 <= row <= 24 for row in report["rows"])
    # The step before is whole, and nothing was learned from the batch.
    assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-1"]
    assert [line["step"] for line in read_log(folder)] == [1]
    assert (read_manifest(stopped) is not None) == (method != "full")


def prefix_of(method):
    return "base_model.model.transformer" if method == "lora" else "transformer"


def test_the_batch_that_is_left_is_the_one_that_was_computed(tune, rows):
    _, folder = tune("lora", spoil=spoil_output(0, at_passes={1, 3}))
    stopped = folder / "stopped-at-step-1"
    batch = read_micro_batch(stopped)
    assert set(batch.inputs) == {"input_ids", "labels", "attention_mask"}
    assert len(batch.inputs["input_ids"]) == FAST["per_device_train_batch_size"]
    assert len(batch.rng_state) == len(torch.get_rng_state())
    assert (stopped / BATCH_FILE).is_file()


@pytest.mark.parametrize("method", ["lora", "ptuning", "full"])
def test_a_gradient_that_is_not_finite_is_found_where_it_arises(tune, capsys, method):
    code, folder = tune(method, spoil=spoil_gradient(1))
    error = capsys.readouterr().err
    assert code == 2
    assert "the first number that is not finite is in the gradient of" in error
    finding = json.loads((folder / "stopped-at-step-1" / REPORT_FILE).read_text(encoding="utf-8"))["finding"]
    assert finding["kind"] == "gradient"
    assert "layers.1." in finding["name"] or "layers.0." in finding["name"]


def test_an_activation_that_the_loss_does_not_see_stops_the_run(tune, capsys):
    """Only the last layer's hidden state of a token that predicts nothing is infinite."""

    def spoil(model):
        layer = module_of(model, ChatGLMMLP, -1)[1]

        def hook(module, _inputs, output):
            if not module.training:
                return None
            spoiled = output.clone()
            spoiled[:, 0] = float("inf")
            return spoiled

        layer.register_forward_hook(hook)

    code, _ = tune("lora", spoil=spoil)
    assert code == 2
    assert "layers.2.mlp (" in capsys.readouterr().err


def test_a_parameter_of_the_base_that_is_not_finite_is_named(tune, capsys):
    def spoil(model):
        parameter = dict(model.named_parameters())["base_model.model.transformer.layers.1.mlp.dense_h_to_4h.bias"]
        with torch.no_grad():
            parameter[3] = float("nan")

    code, _ = tune("lora", spoil=spoil)
    error = capsys.readouterr().err
    assert code == 2
    assert "is in the parameter base_model.model.transformer.layers.1.mlp.dense_h_to_4h.bias" in error
    assert "Copy the base model again" in error


def test_an_adapter_that_no_gradient_reaches_stops_the_run(tune, capsys):
    def spoil(model):
        class Cut(torch.autograd.Function):
            @staticmethod
            def forward(_context, states):
                return states.view_as(states)

            @staticmethod
            def backward(_context, gradient):
                return torch.zeros_like(gradient)

        module_of(model, ChatGLMMLP, -1)[1].register_forward_hook(lambda _m, _i, output: Cut.apply(output))
        for name, module in model.named_modules():
            if name.endswith("final_layernorm"):
                module.register_forward_hook(lambda _m, _i, output: Cut.apply(output))

    code, _ = tune("lora", "--tripwires", "warn", spoil=spoil)
    assert code == 2
    assert "no gradient reaches 3 of the 3 parts that are trained" in capsys.readouterr().err


def test_one_dead_part_is_told_after_the_first_steps(tune, capsys, caplog):
    def spoil(model):
        for name, parameter in model.named_parameters():
            if "layers.1." in name and "lora_" in name:
                parameter.register_hook(torch.zeros_like)

    code, folder = tune("lora", spoil=spoil)
    assert code == 2
    error = capsys.readouterr().err
    assert "no gradient reaches 1 of the 3 parts" in error
    assert "layers.1.attention.query_key_value, layers" not in error
    assert [line["step"] for line in read_log(folder)] == [1, 2]
    code, _ = tune("lora", "--tripwires", "warn", "--overwrite_output_dir", spoil=spoil)
    assert code == 0
    assert "no gradient reaches 1 of the 3 parts" in caplog.text


def test_a_frozen_weight_that_changes_stops_the_run(tune, capsys):
    def spoil(model):
        weight = dict(model.named_parameters())["base_model.model.transformer.layers.2.mlp.dense_4h_to_h.bias"]

        def hook(module, _inputs, _output):
            if module.training:
                with torch.no_grad():
                    weight.add_(1e-3)

        module_of(model, nn.Embedding, 0)[1].register_forward_hook(hook)

    code, folder = tune("lora", spoil=spoil, **CHECKPOINTS)
    assert code == 2
    assert "1 weights that are not trained have changed" in capsys.readouterr().err
    assert next(whole_checkpoints(folder), None) is None


def test_a_frozen_nan_that_stays_is_no_change(tune):
    def spoil(model):
        embedding = module_of(model, nn.Embedding, 0)[1]
        values = embedding.weight.detach().clone()  # and apart from the head, which meets every row
        values.view(-1)[:: values.numel() // 64][40] = float("nan")  # of those that are looked at, in no row's token
        embedding.weight = nn.Parameter(values, requires_grad=False)

    code, _ = tune("lora", spoil=spoil, **CHECKPOINTS)
    assert code == 0


@pytest.mark.parametrize("bits", [None, 4])
def test_a_base_with_a_number_that_is_not_finite_is_refused_when_it_is_read(
    tune, capsys, tmp_path, model, monkeypatch, bits
):
    folder = shutil.copytree(model, tmp_path / "spoiled")
    for file in folder.glob("*.bin"):
        state = torch.load(file)
        state.get("transformer.word_embeddings.weight", torch.empty(1, 1))[-1, 0] = float("nan")
        torch.save(state, file)
    monkeypatch.setattr(run_module, "make_trainer", None)
    flags = [] if bits is None else ["--quantization_bit", bits]
    code, _ = tune("lora", "--model_name_or_path", folder, *flags)
    assert code == 2
    error = capsys.readouterr().err
    assert "M120" in error
    assert "not finite, or too large for torch.float32 (transformer.word_embeddings.weight)" in error


def test_a_loss_of_exactly_zero_stops_the_run(tune, capsys, monkeypatch):
    from chatglm_tuning.training.trainer import TuningTrainer

    real = TuningTrainer.compute_loss
    monkeypatch.setattr(TuningTrainer, "compute_loss", lambda self, *args, **kwargs: real(self, *args, **kwargs) * 0)
    code, _ = tune("lora")
    assert code == 2
    assert "the loss of step 1 is exactly 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "rate", "stops"),
    [
        ("lora", 2e-2, True),
        ("lora", 1e-8, True),
        ("lora", 8e-3, False),
        ("ptuning", 2e-5, True),
        ("ptuning", 0.5, True),
        ("ptuning", 5e-4, False),
        ("full", 2e-2, True),
        ("full", 5e-4, False),
    ],
)
def test_a_learning_rate_far_from_the_usual_is_refused_before_the_base_is_read(
    tune, capsys, caplog, monkeypatch, method, rate, stops
):
    def load_base(*_arguments, **_keywords):
        raise AssertionError("the base was read")

    monkeypatch.setattr(run_module, "load_base", load_base)
    told = f"learning_rate {rate:g} is"
    if stops:
        code, folder = tune(method, learning_rate=rate)
        assert code == 2
        assert told in capsys.readouterr().err
        assert not folder.exists()
    else:
        with pytest.raises(AssertionError, match="the base was read"):
            tune(method, learning_rate=rate)
        assert told in caplog.text


def test_a_usual_learning_rate_and_other_optimizers_are_not_mentioned(tune, caplog):
    code, _ = tune("lora", learning_rate=1e-3, max_steps=2)
    assert code == 0
    code, _ = tune("lora", "--overwrite_output_dir", learning_rate=0.5, max_steps=2, optim="sgd")
    assert code == 0
    assert "is tuned with" not in caplog.text


def test_a_first_loss_worse_than_guessing_stops_the_run(tune, capsys, caplog):
    def spoil(model):
        for name, parameter in model.named_parameters():
            if name.endswith("final_layernorm.weight"):
                parameter.data.mul_(40)

    code, _ = tune("lora", spoil=spoil)
    assert code == 2
    assert "guessing among all" in capsys.readouterr().err
    caplog.set_level(logging.WARNING)
    code, _ = tune("lora", "--tripwires", "warn", "--overwrite_output_dir", spoil=spoil)
    assert code == 0
    assert "guessing among all" in caplog.text


@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_a_run_that_collapses_after_its_first_step_is_stopped(tune, capsys, caplog, method):
    flags = ["--model_name_or_path", str(EMBEDDED)]  # which is trained: it starts below what guessing would give
    changes = {"learning_rate": 30.0, "max_steps": 8, "optim": "adafactor"}
    code, _ = tune(method, *flags, **changes)
    message = capsys.readouterr().err
    assert code == 2
    assert "error [T107]: " in message
    assert "the loss has grown from 2." in message
    code, _ = tune(method, *flags, "--tripwires", "warn", "--overwrite_output_dir", **changes)
    assert code == 0
    assert caplog.text.count("the loss has grown from") == 1


def test_findings_say_where():
    assert Finding("activation", "loss", 0).describe() == "the loss itself"
    assert Finding("gradient", "the output of a.b", 0).describe() == "the gradient of the output of a.b"
