"""Several gloo processes against one that has all of their rows: the same gradients, whichever engine trains.

Plain SGD at a fixed rate, without clipping: the change of the weights is the gradients' sum over the two steps of an
epoch. Neither the last batch nor the last step is full.
"""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from chatglm_tuning.training.callbacks import read_log
from tests.model_folder import write_rows, write_tiny_model
from tests.training.launches import arguments_file, run_in_turn

ROWS, EVAL_ROWS, BATCH = 22, 7, 3
SGD = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "warmup_ratio": 0.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": -1,
    "num_train_epochs": 1,
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": 2,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "tripwires": "warn",
}
FILES = {"lora": "adapter_model.safetensors", "ptuning": "prefix_encoder.safetensors", "full": "model.safetensors"}
CASES = {
    "lora": ("lora", ["--lora_dropout", "0", "--lora_target", "all"]),
    "lora_budget": ("lora", ["--lora_dropout", "0", "--max_tokens_per_batch", "200"]),
    "ptuning_int4": ("ptuning", ["--pre_seq_len", "4", "--quantization_bit", "4"]),
    "full": ("full", []),
}
SHARDED = {
    "lora": CASES["lora"],
    "ptuning": ("ptuning", ["--pre_seq_len", "4", "--prefix_projection"]),
    "full": CASES["full"],
}


class Launches:
    """Runs of the same rows with any number of processes, each result kept once."""

    def __init__(self, folder):
        self.folder = folder
        self.model = write_tiny_model(folder / "model", prefix_dropout=0.0)
        self.rows = write_rows(folder / "rows.json", ROWS)
        self.eval_rows = write_rows(folder / "eval.json", EVAL_ROWS, start=ROWS)

    def flags(self, name, cases, processes, **changes):
        """A run of two steps: 18 rows, and the 4 that are left; of a token budget one step, of all rows."""
        method, flags = cases[name]
        steps = {"gradient_accumulation_steps": 6 // processes}
        if "--max_tokens_per_batch" in flags:
            steps = {"gradient_accumulation_steps": 100, "train_sampling_strategy": "group_by_length"}
        output = self.folder / "-".join([name, str(processes), *map(str, changes)])
        file = arguments_file(output, **{**SGD, **steps, **changes})
        common = ["--model_name_or_path", str(self.model), "--data_path", str(self.rows), "--dtype", "float32"]
        common += ["--eval_path", str(self.eval_rows), "--max_input_length", "64", "--max_output_length", "96"]
        script = "lora" if method == "lora" else "ptuning"
        return output, [script, "--train_args_file", str(file), *common, *flags]

    def run(self, processes, cases=CASES, **changes):
        """Train every case; returns the folder of each."""
        plans = {name: self.flags(name, cases, processes, **changes) for name in cases}
        run_in_turn([argv for _, argv in plans.values()], processes, self.folder)
        return {name: output for name, (output, _) in plans.items()}


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    return Launches(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def alone(launches):
    """What one process makes of every case, and the weights it starts from."""
    both = CASES | {"ptuning": SHARDED["ptuning"]}
    return launches.run(1, both), launches.run(1, both, learning_rate=1e-30)


def values(folder, method):
    return load_file(folder / FILES[method])


def assert_same_gradients(found, expected, start, method):
    before = values(start, method)
    for key, one in values(expected, method).items():
        gradient = one.double() - before[key].double()
        other = values(found, method)[key].double() - before[key].double()
        # In the single step of a token budget: B starts at zero, and so does the gradient of A.
        assert gradient.norm() > 0 or ("lora_A" in key and torch.equal(other, gradient)), key
        assert (other - gradient).norm() <= 1e-5 * gradient.norm(), key


def assert_same_evaluation(*runs):
    losses = [next(line["eval_loss"] for line in read_log(run) if "eval_loss" in line) for run in runs]
    assert math.isclose(*losses, rel_tol=1e-5), runs


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ddp_gives_the_gradients_and_evaluation_of_one_process(launches, alone, processes):
    several = launches.run(processes)
    for name, (method, _) in CASES.items():
        assert_same_gradients(several[name], alone[0][name], alone[1][name], method)
        assert_same_evaluation(several[name], alone[0][name])


def test_fsdp_gives_the_gradients_of_one_process_in_the_same_files(launches, alone):
    # The evaluation, a forward pass without a backward, leaves some of the weights gathered when the checkpoint is due.
    sharded = launches.run(2, SHARDED, fsdp=True, save_strategy="epoch", eval_strategy="epoch")
    for name, (method, _) in SHARDED.items():
        assert_same_gradients(sharded[name], alone[0][name], alone[1][name], method)
        assert_same_evaluation(sharded[name], alone[0][name])
        # The optimizer's state in FSDP's form: accelerate would train DDP on CPUs without a word.
        assert (sharded[name] / "checkpoint-2" / "optimizer.bin").is_file()
        files = [{path.name for path in runs[name].iterdir() if path.is_file()} for runs in (sharded, alone[0])]
        assert files[0] == files[1]


@pytest.mark.slow
def test_a_run_under_fsdp_goes_on_from_its_checkpoint_to_the_same_bytes(launches):
    cases = {name: SHARDED[name] for name in ("lora", "full")}
    adamw = {"fsdp": True, "optim": "adamw_torch", "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    adamw |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = launches.run(2, cases, **adamw)
    for name, output in whole.items():
        continued, _ = launches.flags(name, cases, 2, **adamw, resume_from_checkpoint="auto")
        shutil.copytree(output / "checkpoint-2", continued / "checkpoint-2")
    resumed = launches.run(2, cases, **adamw, resume_from_checkpoint="auto")
    for name, (method, _) in cases.items():
        assert read_log(resumed[name])[0]["step"] == 3, "it did not begin anew"
        assert (resumed[name] / FILES[method]).read_bytes() == (whole[name] / FILES[method]).read_bytes()
        in_checkpoint = load_file(whole[name] / "checkpoint-4" / FILES[method])
        torch.testing.assert_close(in_checkpoint, values(whole[name], method), rtol=0, atol=0)
