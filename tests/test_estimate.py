"""`chatglm-tuning estimate`: its arithmetic, its answers, and its figures beside measured peaks."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from chatglm_tuning.cli.estimate import run
from chatglm_tuning.cli.main import main
from chatglm_tuning.estimate import (
    GIB,
    PLANS,
    Batch,
    ModelShape,
    Plan,
    Tuning,
    choose_plan,
    cost_per_token,
    estimate,
    fitting_options,
    kept_bytes,
    trainable_elements,
    weight_bytes,
)
from tests.model_folder import EMBEDDED, REPOSITORY, write_rows, write_tiny_model

RELEASED = ModelShape()
BATCH = Batch(samples=3, tokens=300, label_tokens=180, longest=120)
METHODS = [
    Tuning("lora"),
    Tuning("lora", bits=8),
    Tuning("lora", bits=4, lora_target=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    Tuning("ptuning", bits=4),
    Tuning("ptuning", prefix_projection=True),
    Tuning("full", value_bytes=4),
]
PASSES = ("off", "mlp", "on")
MEASURED = REPOSITORY / "benchmarks" / "results" / "full_size.json"


def test_the_released_model_has_its_known_number_of_parameters():
    assert sum(weight_bytes(RELEASED, Tuning("full", value_bytes=1))) == 6_173_286_400
    assert trainable_elements(RELEASED, Tuning("full")) == 6_173_286_400


@pytest.mark.parametrize(
    ("tuning", "expected"),
    [
        (Tuning("lora"), 3_670_016),
        (Tuning("ptuning"), 29_360_128),
        (Tuning("ptuning", prefix_projection=True), 957_059_072),
    ],
)
def test_trained_parameters_are_the_known_ones(tuning, expected):
    assert trainable_elements(RELEASED, tuning) == expected


@pytest.mark.parametrize(("plan", "elements"), [("off", 9 * 4096), ("mlp", 5 * 4096), ("on", 4096)])
def test_what_a_token_keeps_in_a_layer(plan, elements):
    kept = kept_bytes(RELEASED, Tuning("ptuning"), BATCH, Plan(plan))
    of_final_layernorm = BATCH.tokens * 4096 * 2
    assert kept == 28 * BATCH.tokens * elements * 2 + of_final_layernorm


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_sizes_are_those_of_a_real_model(bits):
    import torch

    from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration

    sizes = {"num_layers": 2, "hidden_size": 32, "inner_hidden_size": 64, "num_attention_heads": 2, "vocab_size": 100}
    with torch.device("meta"):
        config = ChatGLMConfig(**sizes, quantization_bit=bits, dtype=torch.bfloat16)
        model = ChatGLMForConditionalGeneration(config).to(torch.bfloat16)
        model.tie_weights()
    real = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(weight_bytes(ModelShape(**sizes), Tuning("lora", bits))) == real


@pytest.mark.parametrize("tuning", METHODS)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_peak_is_a_moment_and_holds_no_part_twice(tuning, device):
    found = estimate(RELEASED, tuning, BATCH, Plan("off"), device)
    assert found.peak_bytes == max(found.moments.values())
    assert found.peak_bytes <= sum(found.parts.values())
    for size in found.moments.values():
        assert size >= found.parts["weights"] + found.parts["embeddings"]
    assert all(size >= 0 for size in found.parts.values())


@pytest.mark.parametrize("tuning", METHODS)
def test_a_leaner_plan_needs_less_and_costs_more(tuning):
    recomputing = [Plan("off"), Plan("mlp"), Plan("on")]
    batch = Batch(samples=8, tokens=8 * 600, label_tokens=8 * 300, longest=600)
    sizes = [estimate(RELEASED, tuning, batch, plan).step_bytes for plan in recomputing]
    costs = [cost_per_token(tuning, batch, plan) for plan in recomputing]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    assert costs == sorted(costs)
    assert len(set(costs)) == 3


def test_a_smaller_workspace_needs_less():
    tuning = Tuning("lora", bits=4)
    sizes = [estimate(RELEASED, tuning, BATCH, Plan("on", size)).step_bytes for size in ("layer", "matrix", "chunk")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[1] == (12 * 4096**2 - 4 * 4096**2) * 2


@pytest.mark.parametrize("tuning", METHODS)
def test_the_chosen_plan_is_the_fastest_that_fits(tuning):
    batch = replace(BATCH, tokens=4000, longest=1000, label_tokens=2000)
    plans = PLANS if tuning.bits else [Plan("off"), Plan("mlp"), Plan("on"), Plan("on", "chunk")]
    needs = {plan: estimate(RELEASED, tuning, batch, plan).step_bytes for plan in plans}
    assert choose_plan(RELEASED, tuning, batch, 10**13)[0] == Plan("off")
    assert choose_plan(RELEASED, tuning, batch, 0)[0] == plans[-1]
    for free in needs.values():
        plan, found = choose_plan(RELEASED, tuning, batch, free)
        assert found.step_bytes == needs[plan] <= free
        assert all(needs[faster] > free for faster in plans[: list(plans).index(plan)])


def test_options_fit_and_are_in_order_of_cost():
    batches = [Batch(count, 700 * count, 400 * count, 700) for count in (8, 4, 2, 1)]
    limit = 7 * GIB
    options = fitting_options(RELEASED, Tuning("lora", bits=4), batches, limit)
    assert options
    assert {option.peak_bytes <= limit for option in options} == {True}
    assert [option.cost for option in options] == sorted(option.cost for option in options)
    assert not fitting_options(RELEASED, Tuning("lora"), batches, limit)


def write_config(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    config = json.loads((EMBEDDED / "config.json").read_text(encoding="utf-8")) | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def answer(capsys, *argv: str) -> dict:
    assert run([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_table_shows_every_part_and_moment(capsys):
    assert run(["--method", "ptuning", "--quantization_bit", "4", "--batch", "4", "--memory_gib", "5"]) == 0
    out = capsys.readouterr().out
    found = estimate(RELEASED, Tuning("ptuning", 4), Batch(4, 8192, 4096, 2048), Plan("on", "chunk"))
    for name, size in [*found.parts.items(), *found.moments.items()]:
        assert re.search(rf"^  {name} +{size / GIB:.2f} ", out, re.MULTILINE), name
    assert re.search(r"^  optimizer step +\d+\.\d+ +\d+\.\d+$", out, re.MULTILINE)
    assert "does not fit in 5 GiB of a CPU's RAM" in out


def test_json_has_bytes_and_what_fits(capsys):
    found = answer(
        capsys, "--batch", "2", "--memory_gib", "16", "--max_input_length", "64", "--max_output_length", "64"
    )
    assert found["batch"] == {"samples": 2, "tokens": 256, "label_tokens": 128, "longest": 128}
    assert found["cpu"]["peak_bytes"] == max(found["cpu"]["moments"].values())
    fitting = found["fitting"]["cpu"]
    assert {option["tuning"]["bits"] for option in fitting} == {None, 8, 4}
    assert all(option["peak_bytes"] <= 16 * GIB for option in fitting)


def test_each_device_has_the_fastest_plan_that_fits_it(capsys):
    flags = ("--batch", "1", "--memory_gib", "12", "--max_input_length", "128", "--max_output_length", "256")
    found = answer(capsys, *flags)
    for device in ("cpu", "gpu"):
        plan = Plan(**found[device]["plan"])
        batch = Batch(**found["batch"])
        assert found[device]["peak_bytes"] == estimate(RELEASED, Tuning("lora"), batch, plan, device).peak_bytes
        listed = [option["plan"] for option in found["fitting"][device] if option["tuning"]["bits"] is None]
        assert listed in ([], [found[device]["plan"]])
    assert found["cpu"]["plan"] != found["gpu"]["plan"]
    assert run([*flags]) == 0
    assert "of a GPU" in capsys.readouterr().out


def test_a_batch_beyond_all_bounds_is_counted_at_once(capsys):
    found = answer(capsys, "--batch", str(10**12), "--max_input_length", "8", "--max_output_length", "8")
    assert found["batch"] == {"samples": 10**12, "tokens": 16 * 10**12, "label_tokens": 8 * 10**12, "longest": 16}


def test_auto_takes_the_fastest_that_fits(capsys):
    lengths = ("--batch", "8", "--max_input_length", "256", "--max_output_length", "256")
    assert answer(capsys, *lengths)["cpu"]["plan"]["checkpointing"] == "off"
    assert answer(capsys, *lengths, "--memory_gib", "64")["cpu"]["plan"]["checkpointing"] == "off"
    assert answer(capsys, *lengths, "--memory_gib", "4")["cpu"]["plan"]["checkpointing"] == "on"


def test_lengths_of_a_file_are_those_of_training(capsys, tmp_path):
    from chatglm_tuning.data.encode import EncodingSettings, encode_examples
    from chatglm_tuning.data.records import read_records
    from chatglm_tuning.model import ChatGLMTokenizer

    rows = write_rows(tmp_path / "rows.jsonl", 40)
    extra = {"content": "a  b\tc\n\n 你好   世界", "summary": "0①ﬁ　é😀 <n> [gMASK]" * 20}
    with rows.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(extra, ensure_ascii=False) + "\n")
    encoded = encode_examples(
        read_records([rows]).examples, ChatGLMTokenizer.from_pretrained(EMBEDDED), EncodingSettings(24, 60)
    )
    longest = sorted((len(row.input_ids) for row in encoded), reverse=True)[:3]
    flags = ("--data_path", str(rows), "--model_name_or_path", str(EMBEDDED), "--batch", "3")
    found = answer(capsys, *flags, "--max_input_length", "24", "--max_output_length", "60")
    # An answer that is cut ends without <eop>, so that a row may be one token shorter than is counted.
    assert 0 <= found["batch"]["tokens"] - sum(longest) <= 3
    whole = answer(capsys, *flags, "--max_input_length", "200", "--max_output_length", "800")
    encoded = encode_examples(
        read_records([rows]).examples, ChatGLMTokenizer.from_pretrained(EMBEDDED), EncodingSettings(200, 800)
    )
    assert whole["batch"]["longest"] == max(len(row.input_ids) for row in encoded)


def test_a_quantised_folder_is_held_as_it_is_stored(capsys, tmp_path):
    folder = write_config(tmp_path / "int4", quantization_bit=4)
    found = answer(capsys, "--model_name_or_path", str(folder))
    assert found["tuning"]["bits"] == 4


MISTAKES = [
    (["--method", "lorra"], "--method must be lora, ptuning or full"),
    (["--batch", "0"], "--batch must be a whole number of at least 1"),
    (["--batch", "2", "--per_device_train_batch_size", "2"], "are both given"),
    (["--pre_seq_len", "8"], "--pre_seq_len belongs to --method ptuning"),
    (["--method", "full", "--quantization_bit", "4"], "4 bits cannot be tuned in full"),
    (["--memory_gib", "-1"], "--memory_gib must be a number above 0"),
    (["--max_input_length", "1500"], "the model's context is 2048 tokens"),
    (["--data_path", "{rows}"], "--data_path needs a tokenizer"),
    (["--data_path", "{missing}", "--model_name_or_path", "{embedded}"], "there is no such file"),
    (["--data_path", "{bad}", "--model_name_or_path", "{embedded}"], "bad.jsonl:1"),
    (["--data_path", "{rows}", "--model_name_or_path", "{bare}"], "has no ice_text.model"),
    (["--model_name_or_path", "{missing}"], "config.json cannot be read"),
    (["--model_name_or_path", "{other}"], "not that of a ChatGLM-6B"),
    (["--model_name_or_path", "{int4}", "--quantization_bit", "8"], "the folder holds int4 weights"),
    (["--model_name_or_path", "{int4}", "--method", "full"], "4 bits cannot be tuned in full"),
    (["--model_name_or_path", "{sizeless}"], "hidden_size must be a whole number above 0"),
    (["--no_such_flag"], "--no_such_flag is no flag"),
]


@pytest.mark.parametrize(("argv", "expected"), MISTAKES)
def test_a_mistake_is_one_sentence_and_code_2(argv, expected, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n", encoding="utf-8")
    places = {
        "rows": write_rows(tmp_path / "rows.jsonl", 2),
        "missing": tmp_path / "missing",
        "bad": bad,
        "embedded": EMBEDDED,
        "bare": write_config(tmp_path / "bare"),
        "other": write_config(tmp_path / "other", model_type="llama"),
        "int4": write_config(tmp_path / "int4", quantization_bit=4),
        "sizeless": write_config(tmp_path / "sizeless", hidden_size="4096"),
    }
    assert main(["estimate", *(word.format(**places) for word in argv)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error [")
    assert expected in error


def test_the_answer_is_there_within_a_second(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 3000)
    code = """
import sys, time
start = time.perf_counter()
from chatglm_tuning.cli.main import main
assert main(sys.argv[1:]) == 0
heavy = [name for name in ("torch", "transformers", "peft", "datasets", "numpy") if name in sys.modules]
print("heavy", heavy, "seconds", time.perf_counter() - start)
"""
    argv = ["estimate", "--data_path", str(rows), "--model_name_or_path", str(EMBEDDED), "--memory_gib", "8"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("heavy [] ")
    assert float(last.split()[-1]) < 1


CASES = [
    (script, bits, mode, "bfloat16")
    for script in ("train-lora", "train-ptuning")
    for bits in (None, 8, 4)
    for mode in PASSES
]
CASES += [(script, None, mode, "float32") for script in ("train-lora", "full") for mode in PASSES]
CASES += [("full", None, mode, "bfloat16") for mode in ("off", "on")]


@pytest.fixture(scope="module")
def medium_run(tmp_path_factory):
    """A model of 100 million parameters, and rows that fill its context by half."""
    folder = tmp_path_factory.mktemp("medium")
    sizes = {"hidden_size": 1024, "inner_hidden_size": 4096, "num_attention_heads": 8, "num_layers": 8}
    model = write_tiny_model(folder / "model", **sizes, vocab_size=20480, max_sequence_length=2048)
    lines = write_rows(folder / "short.jsonl", 300).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as stream:
        for start in range(0, 300, 25):
            part = rows[start : start + 25]
            row = {"content": "，".join(r["content"] for r in part), "summary": "".join(r["summary"] for r in part)}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    return model, folder / "rows.jsonl"


def peak_of_training(argv: list[str]) -> int:
    """Run `chatglm-tuning` with `argv` in a process of its own and return its peak resident memory."""
    command = [sys.executable, "-m", "chatglm_tuning", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, output
    return usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize(("script", "bits", "mode", "dtype"), CASES)
def test_measured_peaks_of_training_are_met_within_a_tenth(script, bits, mode, dtype, medium_run, tmp_path, capsys):
    model, data = medium_run
    shared = ["--model_name_or_path", str(model), "--data_path", str(data), "--activation_checkpointing", mode]
    shared += ["--per_device_train_batch_size", "6", "--max_input_length", "300", "--max_output_length", "300"]
    shared += ["--quantization_bit", str(bits)] if bits else []
    shared += ["--dtype", dtype]
    prefix = ["--pre_seq_len", "128"] if script == "train-ptuning" else []
    run_flags = ["--output_dir", str(tmp_path / "out"), "--max_steps", "3", "--report_to", "none"]
    command = "train-lora" if script == "train-lora" else "train-ptuning"
    measured = peak_of_training([command, *shared, *prefix, *run_flags, "--save_strategy", "no"])
    method = {"train-lora": "lora", "train-ptuning": "ptuning", "full": "full"}[script]
    found = answer(capsys, "--method", method, *shared, *prefix)
    assert found["cpu"]["peak_bytes"] == pytest.approx(measured, rel=0.1)


def measured_rows() -> list[dict]:
    return json.loads(MEASURED.read_text(encoding="utf-8"))["rows"] if MEASURED.is_file() else []


@pytest.mark.skipif(not MEASURED.is_file(), reason="benchmarks/full_size.py has written no results")
@pytest.mark.parametrize("row", measured_rows(), ids=lambda row: row["name"])
def test_measured_full_size_peaks_are_met_within_a_tenth(row):
    tuning = Tuning(row["method"], row["bits"])
    batch = Batch(row["batch"], row["tokens"], row["label_tokens"], row["longest"])
    found = estimate(RELEASED, tuning, batch, Plan(row["checkpointing"], row["workspace"]))
    assert found.peak_bytes == pytest.approx(row["peak_gib"] * GIB, rel=0.1)
