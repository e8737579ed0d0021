"""A certificate holds where the export answers as base and adapter, and an export without one is not kept."""

import hashlib
import json

import pytest
import torch

import chatglm_tuning.export.merge as merging
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.export.certificate import Measures, certify, limits_of, measure
from chatglm_tuning.export.probes import PROMPTS, Answers
from tests.export.adapters import write_lora
from tests.model_folder import write_rows


def run(base_folder, adapter, output, *flags):
    argv = ["--model_name_or_path", str(base_folder), "--lora_checkpoint", str(adapter), "--output_dir", str(output)]
    return run_command("export", [*argv, *flags])


def test_it_says_what_was_compared_and_of_which_files(base_folder, lora, tmp_path):
    rows = write_rows(tmp_path / "rows.json", 20)
    flags = ["--data_path", str(rows), "--probe_tokens", "5"]
    assert run(base_folder, lora, tmp_path / "output", *flags) == 0
    certificate = json.loads((tmp_path / "output" / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["probes"] == {"prompts": len(PROMPTS) + 8, "of_data_path": 8, "new_tokens": 5}
    files = certificate["output"]["files"]
    assert {path.name for path in (tmp_path / "output").iterdir()} == {*files, "certificate.json", "README.md"}
    for name, fact in files.items():
        data = (tmp_path / "output" / name).read_bytes()
        assert fact == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert str(tmp_path) not in (tmp_path / "output" / "certificate.json").read_text()
    assert str(tmp_path) not in (tmp_path / "output" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("broken", ["no adapter", "one layer", "one number"])
def test_an_export_that_answers_otherwise_is_not_kept(base_folder, lora, tmp_path, monkeypatch, capsys, broken):
    read = merging.MergedWeights.read

    def read_wrongly(self, key, dtype=torch.float32):
        if broken == "no adapter" or (broken == "one layer" and ".layers.1." in key):
            return self._base.read(key, dtype)
        tensor = read(self, key, dtype)
        if key == "transformer.final_layernorm.bias" and broken == "one number":
            tensor[0] += 0.5
        return tensor

    monkeypatch.setattr(merging.MergedWeights, "read", read_wrongly)
    assert run(base_folder, lora, tmp_path / "output", "--dtype", "float32") == 2
    message = capsys.readouterr().err
    assert "does not answer as base and adapter do" in message
    assert "Nothing was kept" in message
    assert list(tmp_path.iterdir()) == []


def test_int4_that_loses_a_faint_adapter_is_refused_and_what_helps_is_said(base_folder, tmp_path, capsys):
    adapter = write_lora(tmp_path / "lora", base_folder, bits=4, strength=1e-3)
    assert run(base_folder, adapter, tmp_path / "output", "--output_quantization_bit", "4") == 2
    assert "Int4 is too coarse for this adapter: export more bits" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()
    assert run(base_folder, adapter, tmp_path / "output", "--dtype", "float32") == 0


def test_an_adapter_that_does_nothing_is_merged(base_folder, tmp_path):
    adapter = write_lora(tmp_path / "lora", base_folder, strength=0.0)
    assert run(base_folder, adapter, tmp_path / "output") == 0


def measures(**changes):
    given = {"largest_gap": 0.0, "mean_gap": 0.0, "largest_effect": 4.0, "mean_effect": 0.4}
    more = {"largest_logit": 10.0, "spread": 2.0, "equal_tokens": 9, "tokens": 10, "equal_answers": 1, "answers": 2}
    return Measures(**{**given, **more, **changes})


@pytest.mark.parametrize(
    ("form", "mean"),
    [("float32", 1.01e-3), ("f32", 1.01e-3), ("float16", 60 * 2**-11), ("bfloat16", 0.1), ("int8", 0.1), ("int4", 0.2)],
)
def test_limits(form, mean):
    limit = limits_of(form, measures())["mean_logit_gap"]
    assert limit == pytest.approx(mean)
    assert certify(form, measures(mean_gap=0.99 * limit), {})["holds"] is True
    assert certify(form, measures(mean_gap=1.01 * limit), {})["holds"] is False
    largest = limits_of(form, measures())["largest_logit_gap"]
    assert certify(form, measures(largest_gap=1.01 * largest), {})["holds"] is False


@pytest.mark.parametrize(("form", "roundoff"), [("float16", 2**-11), ("f16", 2**-11), ("bfloat16", 2**-8)])
def test_an_adapter_too_faint_for_half_precision_is_allowed_what_computing_in_it_changes(form, roundoff):
    limits = limits_of(form, measures(largest_effect=1e-4, mean_effect=1e-5))
    assert limits == {
        "largest_logit_gap": pytest.approx(2 * roundoff * 10.0),
        "mean_logit_gap": pytest.approx(2 * roundoff * 2.0),
    }


def test_nan_does_not_hold():
    assert certify("int8", measures(mean_gap=float("nan")), {})["holds"] is False


def test_places_behind_the_end_of_an_answer_do_not_count():
    generator = torch.Generator().manual_seed(0)
    wanted, alone = torch.randn(2, 3, 5, generator=generator), torch.randn(2, 3, 5, generator=generator)
    is_answer = torch.tensor([[True, True, True], [True, False, False]])
    exported = wanted.clone()
    exported[1, 1:] += 100
    reference = Answers(wanted.argmax(-1), wanted, is_answer)
    found = measure(reference, alone, exported)
    assert (found.largest_gap, found.tokens, found.equal_tokens, found.equal_answers) == (0.0, 4, 4, 2)
    assert found.largest_effect == (wanted - alone)[is_answer].abs().max()
    exported[0, 2] = -wanted[0, 2]
    assert measure(reference, alone, exported).equal_tokens == 3
    assert measure(reference, alone, exported).equal_answers == 1
