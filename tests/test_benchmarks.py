"""The benchmarks' own logic: what they compare is the same computation, and their tables are right."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.model_folder import REPOSITORY, write_rows, write_tiny_model

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """Make the scripts importable as modules, as they are to each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["lora", "ptuning"])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_baseline_computes_the_same_step(benchmarks, tmp_path, monkeypatch, method, bits):
    import small

    monkeypatch.setattr(small, "compute_dtype", lambda *_: torch.float32)
    write_tiny_model(tmp_path)
    device = torch.device("cpu")
    batch = small.make_batch(small.ChatGLMTokenizer.from_pretrained(tmp_path), device)
    found = []
    for contender in small.load_contenders(tmp_path, method, bits, device):
        torch.manual_seed(0)
        for name, parameter in contender.model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        loss = contender.loss(contender.model, batch)
        loss.backward()
        found.append((loss.detach(), gradients(contender.model)))
    baseline_loss, baseline_gradients = found[0]
    assert baseline_gradients
    for loss, of_parameters in found[1:]:
        torch.testing.assert_close(loss, baseline_loss, rtol=1e-5, atol=1e-6)
        assert of_parameters.keys() == baseline_gradients.keys()
        for name, gradient in of_parameters.items():
            torch.testing.assert_close(gradient, baseline_gradients[name], rtol=1e-4, atol=1e-5)


def test_the_baseline_is_what_it_says(benchmarks, tmp_path):
    import small

    write_tiny_model(tmp_path)
    baseline, ours, lean = small.load_contenders(tmp_path, "lora", 4, torch.device("cpu"))
    linears = [type(module).__name__ for module in baseline.model.modules()]
    assert linears.count("InterleavedLinear") == 8
    assert "InterleavedLinear" not in {type(module).__name__ for module in ours.model.modules()}
    assert [c.model.is_gradient_checkpointing for c in (baseline, ours, lean)] == [True, False, True]


def test_live_memory_is_that_of_the_tensors(benchmarks):
    import measures

    def work():
        first = torch.ones(2**20)
        second = first + 1
        del first
        return second.sum()

    peak = measures.live_peak_bytes(work, torch.device("cpu"))
    assert 2 * 2**22 <= peak < 2.1 * 2**22


def test_useful_products_of_the_released_model(benchmarks):
    import measures

    from chatglm_tuning.model import ChatGLMConfig

    assert measures.useful_flop(ChatGLMConfig(), 100, 60) == 4 * (28 * 12 * 4096**2 * 100 + 60 * 4096 * 130528)


def full_size_row(name: str, unit: str, peak: float) -> dict:
    return {
        "name": name,
        "unit": unit,
        "gflops": [380, 400, 390],
        "utilisation": [0.7, 0.8, 0.75],
        "seconds": [3.0, 3.5, 4.0],
        "first_step_seconds": 9.0,
        "load_seconds": 20.0,
        "load_gib": 4.5,
        "peak_gib": peak,
    }


def test_full_size_rows_are_replaced_and_put_in_order(benchmarks):
    import full_size

    first, second = full_size.ROWS[0].name, full_size.ROWS[1].name
    old = [full_size_row(second, "amx_bf16", 5.0), full_size_row(first, "avx512_bf16", 6.0)]
    merged = full_size.merge(old, [full_size_row(second, "amx_bf16", 4.0), full_size_row(first, "amx_bf16", 7.0)])
    assert [(row["name"], row["unit"], row["peak_gib"]) for row in merged] == [
        (first, "amx_bf16", 7.0),
        (second, "amx_bf16", 4.0),
        (first, "avx512_bf16", 6.0),
    ]


def test_the_full_size_table_and_picture(benchmarks, tmp_path):
    import full_size

    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- full-size:begin -->\nold\n<!-- full-size:end -->\nafter\n", encoding="utf-8")
    rows = [full_size_row(full_size.ROWS[0].name, unit, 6.25) for unit in full_size.UNITS]
    machine = {"processor": "P", "cores": 2, "torch": "2", "python": "3"}
    full_size.render({"machine": machine, "rows": rows}, document, tmp_path / "picture.png")
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert (
        f"| {full_size.ROWS[0].name} | amx_bf16 | 390 | **0.75** (0.70–0.80) | 3.50 | 9.0 | 20 | 6.25 | 4.50 |" in text
    )
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_full_size_row_is_run_and_described(benchmarks, tmp_path, monkeypatch):
    import full_size

    script = tmp_path / "benchmarks" / "train_step.py"
    script.parent.mkdir()
    steps = [{"utilisation": value, "seconds": value, "gflops": 400} for value in (0.1, 0.5, 0.6)]
    last = {"activation_checkpointing": "on", "workspace": "chunk", "load_seconds": 1, "load_gib": 2, "peak_gib": 3}
    script.write_text(
        "import json, os, sys\n"
        f"for line in {[*steps, last]!r}: print(json.dumps(line))\n"
        "print(sys.argv[1:], os.environ.get('ONEDNN_MAX_CPU_ISA'), file=open('seen', 'w'))\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(full_size, "REPOSITORY", tmp_path)
    model, data = write_tiny_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 12)
    arguments = full_size.parse_arguments(["--model", str(model), "--data", str(data), "--steps", "3"])
    row = full_size.Row("r", "lora", 4, 4, ("--lean",))
    found = full_size.measure(row, "avx512_bf16", arguments, tmp_path)
    seen = Path("seen").read_text(encoding="utf-8")
    assert "'--lean', '--quantization_bit', '4'" in seen
    assert "AVX512_CORE_BF16" in seen
    assert found["utilisation"] == [0.5, 0.6]
    assert found["first_step_seconds"] == 0.1
    assert (found["checkpointing"], found["workspace"], found["peak_gib"]) == ("on", "chunk", 3)
    assert found["longest"] <= found["label_tokens"] <= found["tokens"] <= 4 * found["longest"]


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_through_on_a_cpu():
    done = subprocess.run(
        ["bash", str(BENCHMARKS / "gpu.sh"), "--dry_run"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ tests collected", done.stdout)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 7
    tables = done.stdout[done.stdout.rindex("}") :]
    assert tables.count("\n| LoRA") == 3
    assert "| decoding, int4 base |" in tables


def test_the_script_for_a_gpu_refuses_an_unknown_flag():
    done = subprocess.run(["bash", str(BENCHMARKS / "gpu.sh"), "--dry"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--dry is no flag" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--lean"], ["--activation_checkpointing", "off"]])
def test_the_step_benchmark_takes_what_the_table_gives_it(tmp_path, flags):

    write_rows(tmp_path / "rows.jsonl", 4)
    model = write_tiny_model(tmp_path / "model")
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), "--model", str(model), "--method", "lora"]
    command += ["--data", str(tmp_path / "rows.jsonl"), "--quantization_bit", "4", "--batch", "2", "--steps", "2"]
    done = subprocess.run([*command, *flags], stdout=subprocess.PIPE, text=True, check=True)
    *steps, run = [json.loads(line) for line in done.stdout.splitlines()]
    assert (run["activation_checkpointing"], run["workspace"]) == (
        ("on", "chunk") if flags == ["--lean"] else ("off", "matrix")
    )
    assert len(steps) == len(run["utilisation"]) == 2
    assert all(step["utilisation"] > 0 and step["peak_gib"] > 0 for step in steps)


def test_the_bytes_that_processes_send_are_those_of_a_ring(benchmarks):
    import communication
    from transformers import PretrainedConfig

    from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration

    config = json.loads((communication.BASE / "config.json").read_text(encoding="utf-8"))
    for sizes, settings in ((communication.TINY, config), (communication.CHATGLM_6B, {})):
        known = {name: value for name, value in settings.items() if not hasattr(PretrainedConfig, name)}
        with torch.device("meta"):
            model = ChatGLMForConditionalGeneration(ChatGLMConfig(**known))
        assert sizes.numbers == sum(parameter.numel() for parameter in model.parameters())
        assert sizes.layer_numbers == sum(parameter.numel() for parameter in model.transformer.layers[0].parameters())
    assert communication.CHATGLM_6B.trained("LoRA") == 3_670_016
    assert communication.CHATGLM_6B.trained("P-Tuning v2") == 29_360_128
    assert communication.sent_by_each(communication.CHATGLM_6B, "LoRA", 8) == 2 * 7 / 8 * 4 * 3_670_016


def test_the_counted_bytes_are_those_of_the_formulas():
    found = json.loads((BENCHMARKS / "results" / "communication.json").read_text(encoding="utf-8"))
    assert {row["processes"] for row in found["measured"]} == {2, 3, 4}
    for row in found["measured"]:
        assert row["expected"] <= row["bytes"] <= 1.01 * row["expected"] + 30_000, row
    assert all(0 < row["least"] <= row["most"] <= 1 for row in found["expected"])
