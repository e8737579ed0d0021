"""The JSON files in the repository's root: the original's values, and what the installed Trainer makes of them."""

import json
from pathlib import Path

import pytest
from transformers import TrainingArguments

from chatglm_tuning.config.parsing import parse_train_arguments

ROOT = Path(__file__).resolve().parents[2]

COMMON = {
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "cosine",
    "logging_steps": 5,
    "save_strategy": "no",
    "optim": "adamw_torch",
    "fp16": False,
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": False,
    "report_to": ["tensorboard"],
    "seed": 42,
}
LORA = COMMON | {
    "output_dir": "output/adgen-chatglm-6b-lora",
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-3,
    "max_steps": 3000,
    "warmup_steps": 0.03,
}
PTUNING = COMMON | {
    "output_dir": "output/adgen-chatglm-6b-ptuning",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "learning_rate": 2e-2,
    "max_steps": 3000,
}
DEEPSPEED = COMMON | {
    "output_dir": "output/chatglm-6b-deepspeed",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-5,
    "max_steps": 5000,
    "warmup_steps": 0.03,
    "deepspeed": "ds_config.json",
}


@pytest.mark.parametrize(
    ("script", "file", "expected"),
    [
        ("lora", "chatglm_6b_lora.json", LORA),
        ("ptuning", "chatglm_6b_ptuning.json", PTUNING),
        ("ptuning", "chatglm_6b_deepspeed.json", DEEPSPEED),
    ],
)
def test_values(script, file, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = parse_train_arguments(script, ["--train_args_file", file, "--data_path", "train.jsonl"])
    assert run.trainer.values == expected


@pytest.mark.parametrize(("script", "file"), [("lora", "chatglm_6b_lora.json"), ("ptuning", "chatglm_6b_ptuning.json")])
def test_trainer_takes_them(script, file, tmp_path):
    argv = ["--train_args_file", str(ROOT / file), "--data_path", "train.jsonl", "--output_dir", str(tmp_path)]
    run = parse_train_arguments(script, argv)
    arguments = TrainingArguments(**run.trainer.values, use_cpu=True)
    assert arguments.report_to == ["tensorboard"]
    assert arguments.get_warmup_steps(3000) == (90 if script == "lora" else 0)


def test_deepspeed_settings():
    assert json.loads((ROOT / "ds_config.json").read_text()) == {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "fp16": {
            "enabled": "auto",
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "zero_optimization": {
            "stage": 2,
            "allgather_partitions": True,
            "allgather_bucket_size": 5e8,
            "overlap_comm": False,
            "reduce_scatter": True,
            "reduce_bucket_size": 5e8,
            "contiguous_gradients": True,
        },
    }
