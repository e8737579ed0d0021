"""kill -9 and resume: the same losses and the same final bytes as a run that nothing disturbed."""

import os
import random

import pytest

from chatglm_tuning.checkpoint import step_of_checkpoint, whole_checkpoints
from chatglm_tuning.training.checkpoints import PART_NAME
from tests.model_folder import write_rows, write_tiny_model
from tests.training.commands import adapter_bytes, command, losses, run, run_here, run_until_killed

METHODS = {
    "lora": ("train_lora.py", ["--lora_dropout", "0.1"]),
    "lora_int8": ("train_lora.py", ["--lora_dropout", "0.1", "--lora_target", "all", "--int8"]),
    "lora_token_budget": ("train_lora.py", ["--max_tokens_per_batch", "200"]),
    "ptuning_int4": ("train_ptuning.py", ["--pre_seq_len", "4", "--quantization_bit", "4"]),
}


def arguments_of(tmp_path, method):
    """The flags of a run of 12 steps on a tiny model, and where it caches."""
    model = write_tiny_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.json", 60)  # 6 rows a step: more than one epoch
    common = ["--model_name_or_path", str(model), "--data_path", str(rows), "--dtype", "float32", *METHODS[method][1]]
    return [*common, "--max_input_length", "64", "--max_output_length", "96"], tmp_path / "cache"


def resume_after_kills(tmp_path, method, kills, seed):
    """Kill the run `kills` times at random moments, resume it to its end, and compare it with an undisturbed one."""
    script = METHODS[method][0]
    common, cache = arguments_of(tmp_path, method)
    whole = tmp_path / "undisturbed"
    run_here(command(script, whole, *common), cache)

    draw = random.Random(seed)
    killed = tmp_path / "killed"
    moments = []
    for _ in range(kills):
        done = steps_done(killed)
        if done == 12:
            break
        moments.append(draw.randint(done + 1, 12))
        argv = command(script, killed, *common, *resume_flags(killed))
        run_until_killed(argv, cache, killed, at_step=moments[-1], delay=draw.random() * 0.1)
    print(f"{method}: killed after the steps {moments}")
    run(command(script, killed, *common, *resume_flags(killed)), cache)

    assert losses(killed) == losses(whole)
    assert len(losses(whole)) == 12
    assert adapter_bytes(killed) == adapter_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ptuning_int4"])
def test_a_run_killed_in_its_saves_resumes_to_the_same_bytes(tmp_path, method):
    """`make slow-kill`; CHATGLM_TUNING_SAVE_KILLS: kills that a half-written checkpoint must be seen after."""
    wanted = int(os.environ.get("CHATGLM_TUNING_SAVE_KILLS", "25"))
    common, cache = arguments_of(tmp_path, method)
    whole = tmp_path / "undisturbed"
    script = METHODS[method][0]
    run(command(script, whole, *common), cache)
    draw = random.Random(1)
    hits, runs = [], 0
    while len(hits) < wanted:
        runs += 1
        killed = tmp_path / f"killed-{runs}"
        while len(hits) < wanted and (done := steps_done(killed)) < 10:
            argv = command(script, killed, *common, *resume_flags(killed))
            step, delay = draw.randint(done + 1, 11), draw.random() * 0.12
            run_until_killed(argv, cache, killed, at_step=step, delay=delay, until=(killed / PART_NAME).is_dir)
            if (killed / PART_NAME).is_dir():
                names = sorted(path.name for path in (killed / PART_NAME).rglob("*") if path.is_file())
                hits.append((step, len(names)))
                assert steps_done(killed) >= done
        run(command(script, killed, *common, *resume_flags(killed)), cache)
        assert losses(killed) == losses(whole)
        assert adapter_bytes(killed) == adapter_bytes(whole)
        assert not (killed / PART_NAME).exists()
    print(f"{method}: killed in a save (after step, files written by then) {hits}, in {runs} runs")


def steps_done(output):
    """The step of the newest whole checkpoint, 0 where there is none."""
    newest = next(whole_checkpoints(output), None)
    return 0 if newest is None else step_of_checkpoint(newest)


def resume_flags(output):
    if next(whole_checkpoints(output), None) is not None:
        return ["--resume_from_checkpoint", str(output)]
    return ["--overwrite_output_dir"]


@pytest.mark.parametrize("method", ["lora", "lora_token_budget", "ptuning_int4"])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, method):
    resume_after_kills(tmp_path, method, kills=1, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_killed_many_times_resumes_to_the_same_bytes(tmp_path, method):
    """`make slow-kill`; CHATGLM_TUNING_KILLS sets how many runs of each method are killed until they end."""
    for seed in range(int(os.environ.get("CHATGLM_TUNING_KILLS", "5"))):
        folder = tmp_path / str(seed)
        folder.mkdir()
        resume_after_kills(folder, method, kills=6, seed=seed)


def test_a_full_run_that_lacks_only_its_result_writes_the_trained_weights(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.json", 12)
    flags = ["--model_name_or_path", str(model), "--data_path", str(rows), "--dtype", "float32"]
    output = tmp_path / "output"
    flags += ["--max_input_length", "64", "--max_output_length", "96"]
    settings = {"max_steps": 2, "resume_from_checkpoint": "auto", "tripwires": "warn"}
    run_here(command("train_ptuning.py", output, *flags, **settings), tmp_path / "cache")
    trained = (output / "model.safetensors").read_bytes()
    for name in ("model.safetensors", "chatglm_tuning.json"):
        (output / name).unlink()
    run_here(command("train_ptuning.py", output, *flags, **settings), tmp_path / "cache")
    assert (output / "model.safetensors").read_bytes() == trained
