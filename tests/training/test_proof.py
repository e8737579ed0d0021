"""The proof after a save: it holds for what was trained, and fails for an adapter that is zero or another one."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.checkpoint import LORA_CONFIG_FILE, LORA_FILE, PREFIX_FILE, read_manifest, save_adapter_files
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import load_base
from chatglm_tuning.proof import prove
from chatglm_tuning.training import run as run_module
from chatglm_tuning.training import trainer as trainer_module
from chatglm_tuning.training.checkpoints import REFUSED_NAME
from tests.model_folder import write_rows, write_tiny_model
from tests.training.commands import FAST

METHODS = ["lora", "ptuning"]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.json", 12)


@pytest.fixture(params=[("lora", None), ("lora", 4), ("ptuning", None), ("ptuning", 8)], ids=str)
def saved(request, base_folder, tmp_path):
    """A model with an adapter that does something, and the folder it was saved to."""
    method, bits = request.param
    base = load_base(str(base_folder), quantization_bit=bits)
    torch.manual_seed(0)
    if method == "lora":
        model = add_lora(base.model, make_lora_config(rank=2, alpha=8, dropout=0.1, targets=["query_key_value"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    else:
        model = base.model
        add_prefix_encoder(model, PrefixShape(3), None, "test")
    save_adapter_files(model, tmp_path, for_original=False)
    return model, tmp_path


def change_file(folder, change):
    file = next(folder / name for name in (LORA_FILE, PREFIX_FILE) if (folder / name).is_file())
    save_file(change(load_file(file)), file)


def test_what_was_saved_is_proved_and_left_as_it_was(saved):
    model, folder = saved
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    generator = torch.get_rng_state()
    proof = prove(model, folder)
    assert proof.equals_live
    assert proof.gap_to_live == 0
    assert proof.differs_from_base
    assert len(proof.answer) == len(proof.logits) == 8
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_zeroed_adapter_fails(saved):
    model, folder = saved
    change_file(folder, lambda tensors: {name: torch.zeros_like(value) for name, value in tensors.items()})
    assert not prove(model, folder).equals_live


def test_one_value_of_one_tensor_is_seen(saved):
    model, folder = saved

    def change(tensors):
        name = max(tensors)
        tensors[name].view(-1)[0] += 0.5
        return tensors

    change_file(folder, change)
    assert not prove(model, folder).equals_live


def test_a_value_that_is_not_finite_fails(saved):
    model, folder = saved
    change_file(folder, lambda tensors: {name: value * float("nan") for name, value in tensors.items()})
    proof = prove(model, folder)
    assert not proof.equals_live
    assert proof.gap_to_live == float("inf")


def test_a_tensor_that_is_not_there_fails(saved):
    model, folder = saved
    change_file(folder, lambda tensors: dict(sorted(tensors.items())[1:]))
    live = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError):
        prove(model, folder)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in live.items())


def test_a_live_adapter_that_does_nothing_is_seen(base_folder, tmp_path):
    base = load_base(str(base_folder))
    model = add_lora(base.model, make_lora_config(rank=2, alpha=8, dropout=0.0, targets=["query_key_value"]))
    save_adapter_files(model, tmp_path, for_original=False)
    proof = prove(model, tmp_path)
    assert proof.equals_live
    assert not proof.differs_from_base


def test_another_scale_in_the_configuration_fails(base_folder, tmp_path):
    base = load_base(str(base_folder))
    model = add_lora(base.model, make_lora_config(rank=2, alpha=8, dropout=0.0, targets=["query_key_value"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter_files(model, tmp_path, for_original=False)
    file = tmp_path / LORA_CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "lora_alpha": 16}), encoding="utf-8")
    assert not prove(model, tmp_path).equals_live
    assert prove_again(model, tmp_path, alpha=8)


def prove_again(model, folder, alpha):
    file = folder / LORA_CONFIG_FILE
    content = {**json.loads(file.read_text(encoding="utf-8")), "lora_alpha": alpha}
    file.write_text(json.dumps(content), encoding="utf-8")
    return prove(model, folder).equals_live


@pytest.fixture
def tune(base_folder, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("CHATGLM_TUNING_CACHE", str(tmp_path.parent / "cache"))

    def start(method, *flags, **changes):
        folder = tmp_path / "run"
        settings = {**FAST, "max_steps": 2, "save_steps": 1, "output_dir": str(folder), **changes}
        (tmp_path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
        argv = ["--train_args_file", tmp_path / "run.json", "--model_name_or_path", base_folder, "--data_path", rows]
        argv += ["--max_input_length", 64, "--max_output_length", 96, *flags]
        argv += ["--pre_seq_len", 4] if method == "ptuning" else []
        return run_command(f"train-{method}", list(map(str, argv))), folder

    return start


@pytest.mark.parametrize("method", METHODS)
def test_every_save_of_a_run_is_proved_told_and_in_its_manifest(tune, method, caplog):
    caplog.set_level(logging.INFO)
    code, folder = tune(method, save_total_limit=None)
    assert code == 0
    for place in (folder / "checkpoint-1", folder / "checkpoint-2", folder):
        proof = read_manifest(place).proof
        assert proof["equals_live"]
        learned = place.name != "checkpoint-1" or method == "ptuning"  # the first step's learning rate is 0
        assert proof["differs_from_base"] == learned
        told = "read again, it answers as the live adapter does" if learned else "the adapter changes nothing"
        assert f"{place}: {told}" in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_a_save_that_is_another_adapter_stops_the_run_and_leaves_the_checkpoint_before(
    tune, capsys, monkeypatch, method
):
    real = trainer_module.save_adapter_files
    saves = []

    def save(model, folder, **keywords):
        names = real(model, folder, **keywords)
        saves.append(folder)
        if len(saves) == 2:
            change_file(folder, lambda tensors: {name: value * 0 for name, value in tensors.items()})
        return names

    monkeypatch.setattr(trainer_module, "save_adapter_files", save)
    code, folder = tune(method, max_steps=4, save_total_limit=1)
    assert code == 2
    assert "answers otherwise than the one that was trained" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["checkpoint-1"]
    assert read_manifest(folder / "checkpoint-1").proof["equals_live"]


def test_a_result_that_changes_nothing_is_an_error_and_is_kept(tune, capsys):
    code, folder = tune("lora", max_steps=1)
    assert code == 2
    assert "the adapter changes nothing" in capsys.readouterr().err
    assert not read_manifest(folder).proof["differs_from_base"]


def test_a_result_that_is_refused_is_kept_where_nothing_takes_it_for_one(tune, caplog, monkeypatch):
    real = run_module.save_adapter_files

    def save(model, folder, **keywords):
        names = real(model, folder, **keywords)
        change_file(folder, lambda tensors: {name: value + 0.25 for name, value in tensors.items()})
        return names

    monkeypatch.setattr(run_module, "save_adapter_files", save)
    code, folder = tune("lora", save_strategy="no")
    assert code == 2
    assert not (folder / LORA_FILE).exists()
    assert f"what was written is kept in {folder / REFUSED_NAME}, and is no result" in caplog.text
    assert (folder / REFUSED_NAME / LORA_FILE).is_file()
    monkeypatch.undo()
    monkeypatch.setenv("CHATGLM_TUNING_CACHE", str(folder.parent / "cache"))
    assert tune("lora", save_strategy="no")[0] == 0
