"""Training runs inside this process: what they leave, and what each flag does."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file

from chatglm_tuning.checkpoint import read_manifest, read_prefix, whole_checkpoints
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.loading import load_base, load_for_inference
from chatglm_tuning.training.callbacks import read_log
from tests.model_folder import EMBEDDED, TOKENIZER_FILES, write_rows, write_tiny_model
from tests.training.commands import FAST


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.json", 24)


@pytest.fixture
def tune(model, rows, tmp_path, monkeypatch):
    """Run a training command; returns its exit code and output folder. JSON changes are keywords, flags positional."""
    monkeypatch.setenv("CHATGLM_TUNING_CACHE", str(tmp_path.parent / "cache"))

    def start(name, *flags, output="run", data=rows, base=model, **changes):
        folder = tmp_path / output
        arguments = tmp_path / f"{output}.json"
        settings = {**FAST, "max_steps": 3, "save_strategy": "no", "output_dir": str(folder), **changes}
        arguments.write_text(json.dumps(settings), encoding="utf-8")
        argv = ["--train_args_file", str(arguments), "--model_name_or_path", str(base), "--data_path", str(data)]
        argv += ["--dtype", "float32", "--max_input_length", "64", "--max_output_length", "96", *map(str, flags)]
        return run_command(name, argv), folder

    return start


PREFIX = ["--pre_seq_len", "4"]
MEANT = ["--tripwires", "warn"]  # a learning rate that no one would tune with


def train_loss(folder):
    return [line["loss"] for line in read_log(folder) if "loss" in line]


@pytest.mark.parametrize(
    ("name", "flags", "files", "method"),
    [
        ("train-lora", [], {"adapter_config.json", "adapter_model.safetensors"}, "lora"),
        ("train-lora", ["--quantization_bit", "4"], {"adapter_config.json", "adapter_model.safetensors"}, "lora"),
        ("train-lora", ["--load_in_8bit"], {"adapter_config.json", "adapter_model.safetensors"}, "lora"),
        ("train-ptuning", PREFIX, {"prefix_encoder.safetensors", "pytorch_model.bin"}, "ptuning"),
        (
            "train-ptuning",
            [*PREFIX, "--prefix_projection", "--quantization_bit", "8"],
            {"prefix_encoder.safetensors", "pytorch_model.bin"},
            "ptuning",
        ),
    ],
)
def test_a_run_leaves_the_adapter_alone_and_lowers_the_loss(tune, model, name, flags, files, method, caplog):
    caplog.set_level(logging.INFO)
    code, folder = tune(name, *flags, *MEANT, max_steps=12, learning_rate=0.05)
    assert code == 0
    assert caplog.text.count("the first step is done ") == 1
    assert {path.name for path in folder.iterdir()} == files | {"chatglm_tuning.json", "trainer_log.jsonl", "loss.png"}
    manifest = read_manifest(folder)
    assert manifest.method == method
    assert set(manifest.files) == files
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    losses = train_loss(folder)
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])

    ids = torch.tensor([[5, 20, 30, *special_ids(model)]])
    before = load_for_inference(str(model), dtype="float32")[0](input_ids=ids).logits
    checkpoint = {"lora": "lora_checkpoint", "ptuning": "ptuning_checkpoint"}[method]
    tuned, _ = load_for_inference(str(model), dtype="float32", **{checkpoint: folder})
    assert (tuned(input_ids=ids).logits - before).abs().max() > 1e-3


def special_ids(model):
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return config["gmask_token_id"], config["bos_token_id"]


def test_full_tuning_leaves_a_model_that_loads(tune, model):
    code, folder = tune("train-ptuning", learning_rate=1e-3)
    assert code == 0
    assert read_manifest(folder).method == "full"
    tuned = load_base(str(folder)).model
    base = load_base(str(model)).model
    name = "transformer.layers.0.mlp.dense_h_to_4h.weight"
    assert not torch.equal(tuned.get_parameter(name), base.get_parameter(name))


def test_full_tuning_resumes_from_its_checkpoint(tune):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-3}
    _, whole = tune("train-ptuning", output="whole", **changes)
    _, folder = tune("train-ptuning", output="cut", **changes)
    resume = ["--resume_from_checkpoint", folder / "checkpoint-2", "--overwrite_output_dir"]
    code, folder = tune("train-ptuning", *resume, output="cut", **changes)
    assert code == 0
    assert train_loss(folder) == train_loss(whole)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_seed_decides_the_adapter(tune):
    contents = []
    for output, seed in [("a", 1), ("b", 1), ("c", 2)]:
        _, folder = tune("train-lora", "--seed", seed, output=output)
        contents.append((folder / "adapter_model.safetensors").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_lora_flags_reach_peft(tune):
    _, folder = tune("train-lora", "--lora_rank", 2, "--lora_alpha", 6, "--lora_dropout", 0.2, "--lora_target", "all")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 6, 0.2)
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 2 * 4 * 2  # layers, linears, A and B
    assert all(w.shape[0] == 2 for key, w in weights.items() if "lora_A" in key)


def test_a_prefix_goes_on_from_a_checkpoint(tune):
    _, first = tune("train-ptuning", *PREFIX, output="first")
    code, second = tune("train-ptuning", "--ptuning_checkpoint", first, *MEANT, output="second", learning_rate=1e-30)
    assert code == 0
    start, end = read_prefix(first)[1], read_prefix(second)[1]
    torch.testing.assert_close(end["embedding.weight"], start["embedding.weight"], rtol=0, atol=0)


def test_an_adapter_alone_starts_a_new_run_from_its_values(tune, caplog):
    _, first = tune("train-lora", output="first")
    code, second = tune("train-lora", "--resume_from_checkpoint", first, *MEANT, output="second", learning_rate=1e-30)
    assert code == 0
    assert "the optimizer starts anew" in caplog.text
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_evaluation_weighs_tokens_whatever_the_batches(tune, rows):
    found = []
    for output, size in [("one", 1), ("many", 7)]:
        changes = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": size}
        _, folder = tune("train-lora", "--eval_path", rows, output=output, **changes)
        found.append(next(line["eval_loss"] for line in read_log(folder) if "eval_loss" in line))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_loss_average_changes_what_long_rows_weigh(tune):
    losses = {}
    for average in ("tokens", "micro_batches"):
        changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6, "max_steps": 1}
        _, folder = tune("train-lora", "--loss_average", average, "--no_bucket_by_length", output=average, **changes)
        losses[average] = train_loss(folder)[0]
    assert losses["tokens"] != pytest.approx(losses["micro_batches"], rel=1e-6)


def test_a_token_budget_decides_how_many_rows_a_batch_has(tune, monkeypatch):
    from chatglm_tuning.data import collate

    sizes = []
    call = collate.PrefixLMCollator.__call__

    def keep(self, batch):
        sizes.append((len(batch), sum(len(row["input_ids"]) for row in batch)))
        return call(self, batch)

    monkeypatch.setattr(collate.PrefixLMCollator, "__call__", keep)
    code, folder = tune("train-lora", "--max_tokens_per_batch", "300", max_steps=-1, num_train_epochs=1)
    assert code == 0
    assert max(tokens for _, tokens in sizes) <= 300
    assert len({rows for rows, _ in sizes}) > 1
    assert all(line["samples_per_second"] > 0 for line in read_log(folder) if "loss" in line)


def test_another_token_budget_than_the_checkpoint_s_is_named(tune, caplog):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    _, folder = tune("train-lora", "--max_tokens_per_batch", "300", **changes)
    for budget, count in (("300", 0), ("200", 1)):
        flags = ["--resume_from_checkpoint", folder, "--max_tokens_per_batch", budget]
        caplog.clear()
        assert tune("train-lora", *flags, **{**changes, "max_steps": 3, "save_strategy": "no"})[0] == 0
        assert caplog.text.count("was made with max_tokens_per_batch 300, and this run has 200") == count


def test_bucketed_batches_hold_rows_of_like_length(tune, monkeypatch):
    from chatglm_tuning.data import collate

    spread = {}
    for flag in ([], ["--no_bucket_by_length"]):
        widths = []
        call = collate.PrefixLMCollator.__call__

        def keep(self, batch, call=call, widths=widths):
            lengths = [len(row["input_ids"]) for row in batch]
            widths.append(max(lengths) - min(lengths))
            return call(self, batch)

        with monkeypatch.context() as patch:
            patch.setattr(collate.PrefixLMCollator, "__call__", keep)
            tune("train-lora", *flag, output=f"b{len(flag)}", max_steps=4)
        spread[len(flag)] = sum(widths) / len(widths)
    assert spread[0] < 0.5 * spread[1]


def test_checkpoints_beyond_the_limit_go_and_the_rest_is_whole(tune):
    _, folder = tune("train-lora", save_strategy="steps", save_steps=1, max_steps=4, save_total_limit=2)
    assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-4", "checkpoint-3"]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_torn_checkpoint_is_passed_over(tune):
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    _, whole = tune("train-lora", output="whole", **changes)
    _, folder = tune("train-lora", output="torn", **changes)
    damaged = folder / "checkpoint-4" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00")
    assert next(whole_checkpoints(folder)).name == "checkpoint-2"
    code, folder = tune("train-lora", "--resume_from_checkpoint", folder, output="torn", **changes)
    assert code == 0
    assert train_loss(folder) == train_loss(whole)
    assert (folder / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


def test_a_result_is_not_overwritten_unless_asked(tune, capsys):
    _, folder = tune("train-lora")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, _ = tune("train-lora")
    assert code == 2
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    code, _ = tune("train-lora", "--overwrite_output_dir")
    assert code == 0


def test_a_loss_that_is_not_finite_ends_the_run(tune, capsys):
    code, folder = tune("train-lora", *MEANT, learning_rate=1e30, max_steps=6)
    assert code == 2
    assert "number that is not finite" in capsys.readouterr().err
    assert not (folder / "chatglm_tuning.json").exists()


def test_fp16_on_a_cpu_is_replaced_and_said(model, caplog):
    with caplog.at_level(logging.WARNING):
        loaded, _ = load_for_inference(str(model), dtype="float16")
    assert loaded.dtype in (torch.bfloat16, torch.float32)
    assert len([record for record in caplog.records if "float16 is not used on a CPU" in record.message]) == 1


def test_label_smoothing_raises_the_training_loss(tune):
    losses = []
    for output, smoothing in [("plain", 0.0), ("smooth", 0.5)]:
        _, folder = tune("train-lora", output=output, label_smoothing_factor=smoothing, max_steps=1)
        losses.append(train_loss(folder)[0])
    assert losses[0] != losses[1]


def test_tensorboard_gets_the_curves_by_default(tune):
    _, folder = tune("train-lora", report_to="tensorboard", max_steps=1)
    assert list(folder.rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("bits", [[], ["--quantization_bit", "4"]])
def test_recomputing_activations_changes_nothing(tune, bits):
    contents = []
    for mode in ("off", "mlp", "on", "auto"):
        _, folder = tune("train-ptuning", *PREFIX, *bits, "--activation_checkpointing", mode, output=mode)
        contents.append((folder / "prefix_encoder.safetensors").read_bytes())
    assert contents.count(contents[0]) == 4


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def test_a_run_that_is_at_its_last_step_only_writes_its_result(tune):
    _, folder = tune("train-lora", **SAVING)
    before = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").unlink()  # as after a kill between the last checkpoint and the result
    code, folder = tune("train-lora", "--resume_from_checkpoint", folder, **SAVING)
    assert code == 0
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_checkpoint_beyond_max_steps_is_refused(tune, capsys):
    _, folder = tune("train-lora", **SAVING)
    code, _ = tune("train-lora", "--resume_from_checkpoint", folder, **{**SAVING, "max_steps": 3})
    assert code == 2
    assert "the checkpoint stands at step 4, and max_steps is 3" in capsys.readouterr().err


def test_later_checkpoints_are_given_up_only_when_asked(tune, capsys):
    _, folder = tune("train-lora", **SAVING)
    flags = ["--resume_from_checkpoint", folder / "checkpoint-2"]
    code, _ = tune("train-lora", *flags, **SAVING)
    assert code == 2
    assert "checkpoint-4" in capsys.readouterr().err
    assert (folder / "checkpoint-4").is_dir()
    code, _ = tune("train-lora", *flags, "--overwrite_output_dir", **{**SAVING, "max_steps": 3})
    assert code == 0
    assert not (folder / "checkpoint-4").exists()


def test_the_manifest_says_what_a_continued_adapter_is(tune, caplog):
    _, first = tune("train-lora", "--lora_rank", 2, output="first")
    code, second = tune("train-lora", "--lora_rank", 4, "--resume_from_checkpoint", first, output="second")
    assert code == 0
    assert "lora_rank 4 is not used" in caplog.text
    assert read_manifest(second).settings["lora_rank"] == 2


def test_overwriting_with_another_method_leaves_nothing_of_the_first(tune):
    _, folder = tune("train-lora")
    (folder / "checkpoint-notes").mkdir()  # not ours: stays
    code, folder = tune("train-ptuning", *PREFIX, "--overwrite_output_dir")
    assert code == 0
    assert not (folder / "adapter_config.json").exists()
    assert (folder / "checkpoint-notes").is_dir()


def test_the_base_model_is_never_overwritten(tune, tmp_path, capsys):
    base = write_tiny_model(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    code, _ = tune("train-ptuning", base=base)
    assert code == 2
    assert "folder of the base model" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"report_to": "wandb"}, "wandb"), ({"metric_for_best_model": "rouge"}, "metric_for_best_model is 'rouge'")],
)
def test_settings_that_trainer_meets_late_are_refused_early(tune, capsys, changes, what):
    code, folder = tune("train-lora", **changes)
    assert code == 2
    assert what in capsys.readouterr().err
    assert not folder.exists()


def test_a_checkpoint_that_is_the_base_is_not_given_up(tune, capsys):
    _, folder = tune("train-ptuning", *MEANT, output="run", **SAVING)
    base = folder / "checkpoint-4"
    for name in TOKENIZER_FILES:
        shutil.copy(EMBEDDED / name, base)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    code, _ = tune("train-lora", "--overwrite_output_dir", base=base, output="run")
    assert code == 2
    assert "would remove what the run reads" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_a_resumed_run_has_its_own_rate_schedule_and_intervals_and_tells_what_differs(tune, caplog, tmp_path):
    """As a run with the new rate throughout would have them: the checkpoint's own are of the run that wrote it."""
    steps = {"save_strategy": "steps", "lr_scheduler_type": "linear", "warmup_ratio": 0.0}
    _, folder = tune("train-lora", **steps, save_steps=2, max_steps=4, learning_rate=4e-3)
    _, whole = tune("train-lora", output="whole", **steps, save_steps=1, max_steps=8, learning_rate=2e-3)
    code, _ = tune(
        "train-lora",
        "--resume_from_checkpoint",
        folder,
        **steps,
        save_steps=1,
        max_steps=8,
        learning_rate=2e-3,
        seed=7,
    )
    assert code == 0
    rates = {line["step"]: line["learning_rate"] for line in read_log(whole) if "learning_rate" in line}
    assert {
        line["step"]: line["learning_rate"] for line in read_log(folder) if line["step"] > 4 and "loss" in line
    } == {step: rate for step, rate in rates.items() if step > 4}
    assert [path.name for path in whole_checkpoints(folder)][:4] == [f"checkpoint-{step}" for step in (8, 7, 6, 5)]
    assert "learning_rate: 0.004 when the checkpoint was made, and 0.002 now" in caplog.text
    assert "seed: 42 when the checkpoint was made, and 7 now" in caplog.text
