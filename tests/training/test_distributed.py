"""torchrun with two gloo processes against one process that accumulates twice as much."""

import pytest
import torch
from safetensors.torch import load_file

from tests.model_folder import write_rows, write_tiny_model
from tests.training.commands import command, run

CASES = {
    "lora": ("train_lora.py", ["--lora_dropout", "0"], "adapter_model.safetensors"),
    "ptuning": ("train_ptuning.py", ["--pre_seq_len", "4", "--quantization_bit", "4"], "prefix_encoder.safetensors"),
}


@pytest.mark.parametrize("method", list(CASES))
def test_two_processes_give_the_gradients_of_one_with_twice_the_accumulation(tmp_path, method, monkeypatch):
    """One step of plain SGD at learning rate 1 without clipping: the change of the weights is the gradient."""
    script, flags, file = CASES[method]
    model = write_tiny_model(tmp_path / "model", prefix_dropout=0.0)
    rows = write_rows(tmp_path / "rows.json", 24)
    common = ["--model_name_or_path", str(model), "--data_path", str(rows), "--dtype", "float32", *flags]
    common += ["--max_input_length", "64", "--max_output_length", "96", "--tripwires", "warn"]
    plain = {"optim": "sgd", "learning_rate": 1.0, "warmup_ratio": 0.0, "lr_scheduler_type": "constant"}
    plain |= {"max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "save_steps": 1, "save_strategy": "no"}
    weights = {}
    for name, processes, accumulation, steps in [("one", 1, 4, 1), ("two", 2, 2, 1), ("start", 1, 4, 1)]:
        changes = {**plain, "gradient_accumulation_steps": accumulation, "max_steps": steps}
        if name == "start":
            changes["learning_rate"] = 1e-30
        run(command(script, tmp_path / name, *common, processes=processes, **changes), tmp_path / "cache")
        weights[name] = load_file(tmp_path / name / file)
    for key, start in weights["start"].items():
        one, two = weights["one"][key] - start, weights["two"][key] - start
        if "lora_A" in key:  # B starts at zero, and so does the gradient of A
            assert torch.equal(one, two)
            continue
        assert one.norm() > 0, key
        assert (two - one).norm() <= 1e-5 * one.norm(), key
