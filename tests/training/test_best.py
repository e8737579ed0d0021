"""What an evaluation measures, which checkpoint is kept, and when a run ends early."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import chatglm_tuning.loading
from chatglm_tuning.checkpoint import LORA_FILE, MANIFEST_NAME, read_manifest
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.config.arguments import GENERATION_METRICS
from chatglm_tuning.data.records import read_records
from chatglm_tuning.evaluation.answers import Drawing, answer_all
from chatglm_tuning.evaluation.metrics import Answered, score_all
from chatglm_tuning.evaluation.prompts import encode_prompt, group_prompts, sample_prompts
from chatglm_tuning.loading import load_for_inference
from chatglm_tuning.training.callbacks import read_log
from chatglm_tuning.training.trainer import TuningTrainer
from tests.model_folder import EMBEDDED, write_rows
from tests.training.commands import FAST

EVALUATING = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST = {**EVALUATING, "load_best_model_at_end": True, "save_total_limit": 1}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.json", 12)


def commands_in(root, rows):
    """Return what runs a training command on the embedded base, and gives its exit code and output folder."""

    def start(name, *flags, output="run", **changes):
        folder = root / output
        arguments = root / f"{output}.json"
        settings = {**FAST, "max_steps": 4, "save_strategy": "no", "output_dir": str(folder), **changes}
        arguments.write_text(json.dumps(settings), encoding="utf-8")
        argv = ["--train_args_file", arguments, "--model_name_or_path", EMBEDDED, "--data_path", rows]
        argv += ["--eval_path", rows, "--dtype", "float32", "--max_input_length", 48, "--max_output_length", 16]
        argv += ["--tripwires", "warn", *flags]
        return run_command(name, list(map(str, argv))), folder

    return start


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATGLM_TUNING_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tune(rows, tmp_path):
    return commands_in(tmp_path, rows)


def evaluated(folder):
    """The evaluations of the log, by step; the last of a step counts, as after the best was loaded."""
    return {line["step"]: line for line in read_log(folder) if "eval_loss" in line}


@pytest.mark.parametrize(
    ("command", "flags", "checkpoint"),
    [("train-lora", [], "lora_checkpoint"), ("train-ptuning", ["--pre_seq_len", "4"], "ptuning_checkpoint")],
)
def test_the_scores_of_a_sample_are_logged(tune, rows, command, flags, checkpoint):
    rate = 0.05 if command == "train-lora" else 5.0
    changes = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": rate, "report_to": "tensorboard"}
    code, folder = tune(command, *flags, "--predict_samples", 5, **changes)
    assert code == 0
    last = evaluated(folder)[4]
    model, tokenizer = load_for_inference(str(EMBEDDED), dtype="float32", **{checkpoint: folder})
    prompts = sample_prompts(group_prompts(read_records([rows]).examples), 5)
    ids = [encode_prompt(prompt, tokenizer, 48) for prompt in prompts]
    answers = answer_all(model, tokenizer, ids, Drawing(max_output_length=16), 8)
    expected = score_all(
        [Answered(p.text, answer.prediction, p.references) for p, answer in zip(prompts, answers, strict=True)]
    )
    assert {name: last[f"eval_{name}"] for name in GENERATION_METRICS} == pytest.approx(expected, abs=1e-3)
    assert len({line["eval_rouge-1"] for line in evaluated(folder).values()}) > 1
    events = b"".join(path.read_bytes() for path in folder.rglob("events.out.tfevents.*"))
    assert b"eval/rouge-l" in events


def test_answering_changes_nothing_of_the_training(tune):
    contents = []
    for output, flags in (("silent", []), ("answering", ["--predict_samples", 3])):
        changes = {"eval_strategy": "steps", "eval_steps": 1}
        _, folder = tune("train-lora", "--lora_dropout", 0.1, *flags, output=output, **changes)
        contents.append((folder / "adapter_model.safetensors").read_bytes())
        assert ("eval_rouge-l" in evaluated(folder)[2]) == bool(flags)
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("command", "flags", "file"),
    [
        ("train-lora", [], "adapter_model.safetensors"),
        ("train-ptuning", ["--pre_seq_len", "4"], "prefix_encoder.safetensors"),
    ],
)
def test_the_result_is_the_best_checkpoint(tune, command, flags, file):
    # greater_is_better the wrong way round: the first is best, and cannot be taken for the last.
    code, folder = tune(command, *flags, "--greater_is_better", "true", learning_rate=0.02, **BEST)
    assert code == 0
    losses = {step: line["eval_loss"] for step, line in evaluated(folder).items() if step < 4}
    best = max(losses, key=losses.__getitem__)
    assert best == 1
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    result, kept, last = (load_file(path / file) for path in (folder, folder / "checkpoint-1", folder / "checkpoint-4"))
    assert all(torch.equal(result[name], kept[name]) for name in kept)
    assert not all(torch.equal(result[name], last[name]) for name in last)
    assert [line["eval_loss"] for line in read_log(folder) if "eval_loss" in line][-1] == pytest.approx(losses[1])


def test_the_best_may_be_named_by_a_score_of_answers(tune):
    flags = ["--predict_samples", 4, "--metric_for_best_model", "rouge-l", "--load_best_model_at_end"]
    code, folder = tune(
        "train-lora", *flags, learning_rate=0.05, save_strategy="best", eval_strategy="steps", eval_steps=1
    )
    assert code == 0
    lines = [line for line in read_log(folder) if "eval_rouge-l" in line]
    state = json.loads((folder / _newest(folder) / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_metric"] == max(line["eval_rouge-l"] for line in lines)
    assert lines[-1]["eval_rouge-l"] == state["best_metric"]


def _newest(folder):
    return max((path.name for path in folder.glob("checkpoint-*")), key=lambda name: int(name.rpartition("-")[2]))


WORSE = {"learning_rate": 0.02, "max_steps": 5, "greater_is_better": True}


def test_a_run_ends_after_evaluations_without_a_better_one_and_says_so(tune, caplog):
    with caplog.at_level("INFO"):
        code, folder = tune("train-lora", "--early_stopping_patience", 2, **{**EVALUATING, **WORSE})
    assert code == 0
    steps = [line["step"] for line in read_log(folder) if "loss" in line]
    assert steps[-1] == 3  # the first is the best, and two more were not better
    loss = evaluated(folder)[1]["eval_loss"]
    says = f"ended early at step 3: 2 evaluations in a row were not better than loss {loss:.4f} of step 1"
    assert caplog.text.count(says) == 1
    caplog.clear()
    with caplog.at_level("INFO"):
        code, folder = tune("train-lora", "--early_stopping_patience", 4, output="patient", **{**EVALUATING, **WORSE})
    assert [line["step"] for line in read_log(folder) if "loss" in line][-1] == 5
    assert "ended early" not in caplog.text


@pytest.mark.parametrize("killed_after", [2, 3])
def test_a_run_that_is_resumed_ends_where_it_would_have(tune, killed_after):
    flags = ["--early_stopping_patience", 2, "--load_best_model_at_end"]
    _, whole = tune("train-lora", *flags, output="whole", **{**EVALUATING, **WORSE})
    _, folder = tune("train-lora", *flags, output="killed", **{**EVALUATING, **WORSE})
    for step in range(killed_after + 1, 6):
        shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
    (folder / "adapter_model.safetensors").unlink()
    code, folder = tune(
        "train-lora", *flags, "--resume_from_checkpoint", folder, output="killed", **{**EVALUATING, **WORSE}
    )
    assert code == 0
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert (folder / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


BEST_OF_TWO = {**EVALUATING, "load_best_model_at_end": True, "greater_is_better": True, "max_steps": 2}
BEST_OF_TWO |= {"learning_rate": 0.02, "warmup_ratio": 0}


@pytest.fixture(scope="module")
def first_run(rows, tmp_path_factory):
    """A run of 2 steps whose best is checkpoint-1, moved from the folder in which another run was then written."""
    root = tmp_path_factory.mktemp("first")
    tune = commands_in(root, rows)
    assert tune("train-lora", **BEST_OF_TWO)[0] == 0
    moved = (root / "run").rename(root / "moved")
    assert tune("train-lora", "--lora_rank", 4, **BEST_OF_TWO)[0] == 0
    return moved


@pytest.fixture
def go_on(tune, first_run, tmp_path, caplog):
    """Resume a copy of the first run to a number of steps; returns what its result says, and of which step it is."""
    caplog.set_level("INFO")
    folder = shutil.copytree(first_run, tmp_path / "copy")

    def resume(steps):
        settings = {**BEST_OF_TWO, "max_steps": steps}
        code, _ = tune("train-lora", "--resume_from_checkpoint", folder, output="copy", **settings)
        assert code == 0
        [step] = {
            path.parent.name
            for path in folder.glob(f"checkpoint-*/{LORA_FILE}")
            if path.read_bytes() == (folder / LORA_FILE).read_bytes()
        }
        return step, read_manifest(folder).settings["best"]["step"]

    return folder, resume


@pytest.mark.parametrize("steps", [2, 3], ids=["finished", "goes on"])
def test_the_best_checkpoint_is_that_of_the_run_wherever_it_was_copied_to(go_on, caplog, steps):
    folder, resume = go_on
    assert resume(steps) == ("checkpoint-1", 1)
    assert f"the result is that of {folder / 'checkpoint-1'}, the best checkpoint" in caplog.text
    assert "does not exist anymore" not in caplog.text


@pytest.mark.parametrize("steps", [2, 3], ids=["finished", "goes on"])
def test_a_damaged_best_checkpoint_gives_way_to_the_best_of_the_others(go_on, caplog, steps):
    folder, resume = go_on
    file = folder / "checkpoint-1" / LORA_FILE
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 0x40]))
    assert resume(steps) == ("checkpoint-2", 2)
    assert f"{file}: the adapter is damaged (the file differs from what was saved)" in caplog.text
    assert "the best checkpoint (checkpoint-1) is not there or not whole" in caplog.text


def test_a_best_checkpoint_that_is_damaged_while_the_run_goes_on_is_not_taken(go_on, monkeypatch):
    folder, resume = go_on
    real = TuningTrainer._load_best_model

    def damage_and_load(self):
        (folder / "checkpoint-1" / LORA_FILE).write_bytes(b"of a broken disk")
        real(self)

    monkeypatch.setattr(TuningTrainer, "_load_best_model", damage_and_load)
    assert resume(3) == ("checkpoint-2", 2)


def test_rotation_keeps_the_best_however_the_checkpoint_is_named(go_on, tune, tmp_path):
    folder, _ = go_on
    (tmp_path / "link").symlink_to(folder)
    changes = {**BEST_OF_TWO, "max_steps": 4, "save_total_limit": 1}
    code, _ = tune(
        "train-lora", "--resume_from_checkpoint", tmp_path / "link" / "checkpoint-2", output="copy", **changes
    )
    assert code == 0
    assert (folder / LORA_FILE).read_bytes() == (folder / "checkpoint-1" / LORA_FILE).read_bytes()


def test_the_best_of_the_folder_that_a_run_came_from_is_taken_after_another_resumption(go_on, tune):
    folder, _ = go_on
    for steps, start in ((3, folder), (4, "auto")):
        settings = {**BEST_OF_TWO, "max_steps": steps}
        code, other = tune("train-lora", "--resume_from_checkpoint", start, output="other", **settings)
        assert code == 0
    assert (other / LORA_FILE).read_bytes() == (folder / "checkpoint-1" / LORA_FILE).read_bytes()


STEPS = {"eval_strategy": "steps", "eval_steps": 2}
BAD = [
    (["--predict_samples", "-1"], {}, "--predict_samples must be a whole number of at least 0"),
    (["--early_stopping_patience", "0"], STEPS, "--early_stopping_patience must be a whole number of at least 1"),
    (["--early_stopping_patience", "2"], {}, "early_stopping_patience needs evaluations while the run goes on"),
    (["--load_best_model_at_end"], {}, "load_best_model_at_end needs evaluations while the run goes on"),
    (["--load_best_model_at_end"], STEPS, "save_strategy is no, and eval_strategy steps"),
    (
        ["--load_best_model_at_end", "--save_strategy", "epoch"],
        STEPS,
        "save_strategy is epoch, and eval_strategy steps",
    ),
    (
        ["--load_best_model_at_end", "--save_strategy", "steps", "--save_steps", "3"],
        STEPS,
        "an evaluation at every checkpoint: save_steps is 3, and eval_steps 2",
    ),
    (["--save_strategy", "best"], {}, "save_strategy best needs evaluations while the run goes on"),
    (
        ["--metric_for_best_model", "rouge-l"],
        STEPS,
        "metric_for_best_model is 'rouge-l', and training evaluates loss; ",
    ),
    (
        ["--metric_for_best_model", "meteor", "--predict_samples", "2"],
        STEPS,
        "metric_for_best_model is 'meteor', and training evaluates loss, rouge-1",
    ),
]


@pytest.mark.parametrize(("flags", "changes", "says"), BAD)
def test_mistakes_are_refused_before_the_base_is_read(tune, capsys, monkeypatch, flags, changes, says):
    monkeypatch.setattr(chatglm_tuning.loading, "iterate_tensors", None)
    code, folder = tune("train-lora", *flags, **changes)
    assert code == 2
    assert says in capsys.readouterr().err
    assert not folder.exists()


def test_a_sample_needs_prompts(tmp_path, rows, capsys):
    argv = ["--model_name_or_path", EMBEDDED, "--data_path", rows, "--output_dir", tmp_path / "run"]
    assert run_command("train-lora", [*map(str, argv), "--predict_samples", "2"]) == 2
    assert "predict_samples has no prompts to answer. Give --eval_path" in capsys.readouterr().err


def test_the_picture_of_few_points_hides_none_and_marks_the_best_checkpoint(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    from chatglm_tuning.training.callbacks import LOG_NAME, draw_loss

    drawn = []
    for name in ("plot", "axvline"):
        method = getattr(Axes, name)
        monkeypatch.setattr(
            Axes, name, lambda *given, m=method, **more: (drawn.append(more["label"]), m(*given, **more))[1]
        )
    lines = [{"step": step, "loss": 3.0} for step in range(1, 6)] + [{"step": 4, "eval_loss": 2.0}]
    (tmp_path / LOG_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    draw_loss(tmp_path, best=(4, "best checkpoint: loss 2.0000 of step 4"))
    assert drawn == ["training loss", "evaluation loss", "best checkpoint: loss 2.0000 of step 4"]
    drawn.clear()
    lines = [{"step": step, "loss": 3.0} for step in range(1, 60)]
    (tmp_path / LOG_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    draw_loss(tmp_path)
    assert drawn == ["training loss", "moving mean"]


@pytest.mark.parametrize("changes", [EVALUATING, {}], ids=["at its last step", "none before"])
def test_the_last_step_is_evaluated_once(tune, changes):
    code, folder = tune("train-lora", **{**changes, "max_steps": 2})
    assert code == 0
    assert [line["step"] for line in read_log(folder) if "eval_loss" in line] == ([1, 2] if changes else [2])


def test_an_evaluation_of_an_earlier_run_is_not_taken_for_this_one(tune, rows, tmp_path):
    changes = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch", "eval_strategy": "epoch"}
    code, folder = tune("train-lora", **changes)
    assert code == 0
    (folder / MANIFEST_NAME).unlink()
    other = write_rows(tmp_path / "other.json", 5)
    assert tune("train-lora", "--resume_from_checkpoint", "auto", "--eval_path", other, **changes)[0] == 0
    losses = [line["eval_loss"] for line in read_log(folder) if "eval_loss" in line]
    assert len(losses) == 2
    assert losses[0] != losses[1]
