"""Which engine a run gets, and what is refused before anything is loaded."""

import importlib.util
import json

import pytest

from chatglm_tuning.config.parsing import parse_train_arguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.training import engines
from chatglm_tuning.training.engines import check_bits, check_same_start, find_engine, fsdp_settings
from chatglm_tuning.training.start import Start, find_start


@pytest.fixture
def make_run(tmp_path):
    def make(method="lora", flags=(), **settings):
        file = tmp_path / "run.json"
        file.write_text(json.dumps({"output_dir": str(tmp_path / "output"), **settings}), encoding="utf-8")
        return parse_train_arguments(method, ["--train_args_file", str(file), "--data_path", "rows.json", *flags])

    return make


def refusal(run):
    with pytest.raises(UserError) as caught:
        find_engine(run)
    return str(caught.value)


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_without_an_engine_there_is_none(make_run, two_processes):
    assert find_engine(make_run()) == "plain"


@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_fsdp_is_found(make_run, two_processes, method):
    assert find_engine(make_run(method, fsdp=True)) == "fsdp"
    assert find_engine(make_run(method, fsdp="full_shard auto_wrap")) == "fsdp"


def test_fsdp_needs_several_processes(make_run):
    assert "one was started" in refusal(make_run(fsdp=True))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "version 1"),
        ({"fsdp": True, "fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}}, "state_dict_type SHARDED"),
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, "--activation_checkpointing"),
        ({"fsdp": True, "auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"fsdp": True, "predict_samples": 4, "eval_path": "rows.json"}, "predict_samples"),
        ({"fsdp": True, "model_parallel": True}, "fsdp and model_parallel are both asked for"),
        ({"fsdp": True, "deepspeed": {"zero_optimization": {"stage": 2}}}, "fsdp and deepspeed are both asked for"),
        ({"model_parallel": True}, "2 processes were started"),
    ],
)
def test_what_fsdp_and_model_parallel_cannot_do_is_refused(make_run, two_processes, settings, told):
    assert told in refusal(make_run(**settings))


def test_the_settings_of_fsdp_may_be_a_file_and_keep_what_is_free(tmp_path):
    file = tmp_path / "fsdp.json"
    file.write_text(json.dumps({"fsdp_reshard_after_forward": False}), encoding="utf-8")
    settings = fsdp_settings({"fsdp_config": str(file)})
    assert settings["reshard_after_forward"] is False
    assert settings["state_dict_type"] == "FULL_STATE_DICT"
    assert fsdp_settings({})["version"] == 2


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_that_is_missing_is_told_with_how_to_install_it(make_run):
    told = refusal(make_run("ptuning", deepspeed={"zero_optimization": {"stage": 2}}))
    assert (
        'deepspeed is not installed. Install what this command needs: pip install "chatglm-tuning[deepspeed]"' in told
    )


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_a_quantised_base_is_not_shared_out(engine):
    with pytest.raises(UserError, match="this base is held in int4"):
        check_bits(engine, 4)
    check_bits(engine, None)
    check_bits("plain", 4)


def test_torchruns_shared_store_is_warned_of_where_it_restarts(make_run, monkeypatch, caplog):
    find_engine(make_run())
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    find_engine(make_run())
    assert caplog.text == ""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    find_engine(make_run())
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text


def test_processes_that_see_different_checkpoints_do_not_start(tmp_path, two_processes, monkeypatch):
    start = Start(checkpoint=tmp_path / "checkpoint-4")
    monkeypatch.setattr(engines, "gather_object", lambda mine: [*mine, None])
    with pytest.raises(UserError, match=r"step 4, none\)\. Give an --output_dir on a disk that all machines share"):
        check_same_start(start, tmp_path)
    monkeypatch.setattr(engines, "gather_object", lambda mine: mine * 2)
    check_same_start(start, tmp_path)


def test_auto_without_a_checkpoint_starts_anew(make_run, caplog):
    run = make_run(resume_from_checkpoint="auto")
    assert find_start(run) == Start()
    assert "save_strategy" not in caplog.text
    find_start(make_run(resume_from_checkpoint="auto", save_strategy="no"))
    assert "save_strategy is no: there will be no checkpoint to resume from" in caplog.text
