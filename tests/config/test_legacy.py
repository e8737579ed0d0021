import pytest

from chatglm_tuning.config.legacy import LEGACY_KEYS, translate
from chatglm_tuning.config.parsing import parse_train_arguments
from chatglm_tuning.config.training_arguments import TRAINING_ARGUMENTS
from chatglm_tuning.errors import UserError


def label(key):
    return f'"{key}"', "args.json:1"


def texts(values):
    return [replacement.text for replacement in translate(values, label)[1]]


TRANSLATIONS = [
    ({"warmup_ratio": 0.03}, {"warmup_steps": 0.03}),
    ({"warmup_ratio": 0}, {"warmup_steps": 0}),
    ({"warmup_ratio": 0.03, "warmup_steps": 0}, {"warmup_steps": 0.03}),
    ({"warmup_ratio": 0.03, "warmup_steps": 100}, {"warmup_steps": 100}),
    ({"evaluation_strategy": "steps"}, {"eval_strategy": "steps"}),
    ({"no_cuda": True}, {"use_cpu": True}),
    ({"per_gpu_train_batch_size": 2}, {"per_device_train_batch_size": 2}),
    ({"per_gpu_eval_batch_size": 2}, {"per_device_eval_batch_size": 2}),
    ({"push_to_hub_model_id": "a"}, {"hub_model_id": "a"}),
    ({"push_to_hub_token": "a"}, {"hub_token": "a"}),
    ({"activation_checkpointing": False}, {"activation_checkpointing": "off"}),
    ({"activation_checkpointing": True}, {"activation_checkpointing": "on"}),
    ({"group_by_length": False}, {"bucket_by_length": False}),
    ({"optim": "adamw_hf"}, {"optim": "adamw_torch"}),
    ({"adafactor": True}, {"optim": "adafactor"}),
    ({"adafactor": False, "optim": "sgd"}, {"optim": "sgd"}),
    (
        {"train_sampling_strategy": "sequential"},
        {"train_sampling_strategy": "sequential", "bucket_by_length": False},
    ),
    (
        {"train_sampling_strategy": "group_by_length"},
        {"train_sampling_strategy": "group_by_length", "bucket_by_length": True},
    ),
    ({"logging_dir": "logs", "sharded_ddp": "simple"}, {}),
]


@pytest.mark.parametrize(("old", "new"), TRANSLATIONS, ids=[str(case[0]) for case in TRANSLATIONS])
def test_translation_and_one_message_for_each(old, new):
    assert translate(old, label)[0] == new
    assert len(texts(old)) == len([key for key in old if key in LEGACY_KEYS or key == "train_sampling_strategy"]) + (
        old.get("optim") == "adamw_hf"
    )


def test_current_keys_pass_unchanged():
    current = {"warmup_steps": 5, "optim": "adamw_torch", "lora_rank": 8}
    assert translate(current, label) == (current, [])


def test_every_legacy_key_says_where_and_why():
    for key in LEGACY_KEYS:
        (text,) = texts({key: 0})
        assert text.startswith(f'args.json:1: "{key}" ')


def test_a_setting_under_both_names_is_refused():
    with pytest.raises(UserError, match='"no_cuda" is the old name of use_cpu, which is given too'):
        translate({"no_cuda": True, "use_cpu": False}, label)


def test_a_ratio_has_to_be_below_one():
    with pytest.raises(UserError, match=r'^args\.json:1: "warmup_ratio" must be a number of at least 0 and below 1'):
        translate({"warmup_ratio": 1.0}, label)


def test_everything_translated_is_known():
    for key in LEGACY_KEYS:
        current, _ = translate({key: 0}, label)
        assert set(current) <= {*TRAINING_ARGUMENTS, "bucket_by_length"}


def test_a_typed_ratio_beats_the_files_steps(tmp_path):
    path = tmp_path / "args.json"
    path.write_text('{"warmup_steps": 100, "output_dir": "out", "data_path": "a"}')
    run = parse_train_arguments("lora", ["--train_args_file", str(path), "--warmup_ratio", "0.1"])
    assert run.trainer.values["warmup_steps"] == 0.1
