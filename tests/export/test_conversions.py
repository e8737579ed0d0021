"""Adapters as the original and peft 0.3 have them, there and back without a changed bit, and packaged prefixes."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from chatglm_tuning.checkpoint import read_lora, read_manifest, read_prefix
from chatglm_tuning.config.export import ExportArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.export import conversions
from chatglm_tuning.export.run import export
from chatglm_tuning.loading import add_trained_lora, load_base, load_for_inference, read_identity
from tests.export.adapters import write_lora, write_prefix
from tests.model_folder import write_tiny_model

# What LoraConfig of peft 0.3.0 takes (its src/peft/tuners/lora.py and utils/config.py).
PEFT_0_3 = {
    *("peft_type", "base_model_name_or_path", "task_type", "inference_mode"),
    *("r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save"),
    "init_lora_weights",
}


def convert(method, base_folder, adapter, output, kind, **more):
    export(ExportArguments(method, adapter, output, str(base_folder), format=kind, **more))
    return json.loads((output / "certificate.json").read_text(encoding="utf-8"))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_lora_goes_to_peft_0_3_and_back(base_folder, lora, tmp_path):
    assert convert("lora", base_folder, lora, tmp_path / "old", "original")["tensors"] == 16
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    assert set(config) == PEFT_0_3
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    state = torch.load(tmp_path / "old" / "adapter_model.bin", weights_only=True)
    assert "base_model.model.transformer.layers.0.attention.query_key_value.lora_A.weight" in state
    assert same(state, read_lora(lora))
    assert read_manifest(tmp_path / "old") is None
    convert("lora", base_folder, tmp_path / "old", tmp_path / "new", "adapter")
    assert same(read_lora(tmp_path / "new"), read_lora(lora))
    manifest, first = read_manifest(tmp_path / "new"), read_manifest(lora)
    assert (manifest.method, manifest.base_model.fingerprint) == ("lora", first.base_model.fingerprint)
    assert manifest.base_model.name_or_path == "model"


def test_the_released_form_of_peft_0_3_is_the_one_written(shared, tmp_path):
    released = shared / "golden" / "lora_adapter_peft030"
    conversions.write_peft_0_3(released, tmp_path)
    found, expected = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, released))
    assert found == expected
    states = [torch.load(folder / "adapter_model.bin", weights_only=True) for folder in (tmp_path, released)]
    assert same(*states)


def test_the_scale_of_rslora_is_kept_where_it_is_not_known(base_folder, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["dense"], use_rslora=True, task_type="CAUSAL_LM")
    adapter = write_lora(tmp_path / "lora", base_folder, config=config)
    convert("lora", base_folder, adapter, tmp_path / "old", "original")
    assert json.loads((tmp_path / "old" / "adapter_config.json").read_text())["lora_alpha"] == 16
    ids = torch.tensor([[20, 30, 40]])
    logits = [
        add_trained_lora(load_base(str(base_folder)), folder)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        for folder in (adapter, tmp_path / "old")
    ]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"use_dora": True}, {"rank_pattern": {"dense": 2}}, {"alpha_pattern": {"dense": 2}}]
)
def test_what_peft_0_3_has_not_is_refused(base_folder, tmp_path, changes):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["dense"], task_type="CAUSAL_LM", **changes)
    adapter = write_lora(tmp_path / "lora", base_folder, config=config)
    with pytest.raises(UserError, match=r"peft 0\.3 has no such LoRA"):
        convert("lora", base_folder, adapter, tmp_path / "old", "original")
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize("prefix_projection", [False, True])
def test_a_prefix_goes_to_the_original_and_back(base_folder, tmp_path, prefix_projection):
    adapter = write_prefix(tmp_path / "prefix", base_folder, prefix_projection=prefix_projection)
    convert("ptuning", base_folder, adapter, tmp_path / "old", "original")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    assert (config["pre_seq_len"], config["prefix_projection"]) == (3, prefix_projection)
    state = torch.load(tmp_path / "old" / "pytorch_model.bin", weights_only=True)
    assert all(key.startswith("transformer.prefix_encoder.") for key in state)
    assert not (tmp_path / "old" / "prefix_encoder.safetensors").exists()
    convert("ptuning", base_folder, tmp_path / "old", tmp_path / "new", "adapter")
    shape, tensors = read_prefix(tmp_path / "new")
    assert (shape, same(tensors, read_prefix(adapter)[1])) == (read_prefix(adapter)[0], True)
    assert read_manifest(tmp_path / "new").prefix_projection is prefix_projection


@pytest.mark.parametrize("include_base", [False, True])
def test_a_prefix_is_packaged_beside_its_base(base_folder, prefix, tmp_path, include_base):
    convert("ptuning", base_folder, prefix, tmp_path / "output", "folder", include_base=include_base)
    assert read_manifest(tmp_path / "output" / "adapter").settings == {"seed": 4}
    copied = tmp_path / "output" / "base"
    assert copied.exists() is include_base
    model, _ = load_for_inference(
        str(copied if include_base else base_folder),
        ptuning_checkpoint=tmp_path / "output" / "adapter",
        dtype="float32",
    )
    expected, _ = load_for_inference(str(base_folder), ptuning_checkpoint=prefix, dtype="float32")
    ids = torch.tensor([[20, 30, 40]])
    logits = [each(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for each in (model, expected)]
    assert torch.equal(*logits)


def test_a_conversion_that_changes_a_number_is_not_kept(base_folder, prefix, tmp_path, monkeypatch):
    full_names = conversions._full_names
    monkeypatch.setattr(
        conversions, "_full_names", lambda tensors: {k: v + 1e-6 for k, v in full_names(tensors).items()}
    )
    with pytest.raises(UserError, match="differs from the one given"):
        convert("ptuning", base_folder, prefix, tmp_path / "output", "original")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_is_refused(base_folder, lora, tmp_path):
    other = write_tiny_model(tmp_path / "other", num_layers=3)
    with pytest.raises(UserError, match="was trained on a base of 2 layers"):
        convert("lora", other, lora, tmp_path / "output", "adapter")


@pytest.mark.parametrize("kind", ["folder", "original", "adapter"])
@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_another_base_of_the_same_size_is_warned_of(
    base_folder, lora, prefix, another_base, tmp_path, caplog, method, kind
):
    adapter = lora if method == "lora" else prefix
    convert(method, another_base, adapter, tmp_path / "output", kind)
    says = f"{adapter} was trained on another base model (the base) than the one loaded ({another_base})"
    assert caplog.text.count(says) == 1
    card = (tmp_path / "output" / "README.md").read_text(encoding="utf-8")
    given, trained = (read_identity(str(folder)).fingerprint for folder in (another_base, base_folder))
    assert f"base fingerprint | `{given}` |" in card
    assert f"trained on another base | the base `{trained}` |" in card
    caplog.clear()
    convert(method, base_folder, adapter, tmp_path / "right", kind)
    assert "another base" not in caplog.text
    assert "another base" not in (tmp_path / "right" / "README.md").read_text(encoding="utf-8")


def test_another_base_is_not_copied_beside_a_prefix(base_folder, prefix, another_base, tmp_path):
    with pytest.raises(
        UserError, match=r"was trained on another base model \(the base\) than the one that --include_base"
    ):
        convert("ptuning", another_base, prefix, tmp_path / "output", "folder", include_base=True)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_numbers_that_are_not_finite_are_told_before_anything_is_written(base_folder, lora, prefix, tmp_path, method):
    adapter = shutil.copytree(lora if method == "lora" else prefix, tmp_path / "adapter")
    (adapter / "chatglm_tuning.json").unlink()
    (file,) = adapter.glob("*.safetensors")
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, file)
    for kind in ("adapter", "folder"):
        with pytest.raises(UserError, match=r"adapter: the adapter holds numbers that are not finite \(.*--learning_"):
            convert(method, base_folder, adapter, tmp_path / "output", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_one_tensor_is_counted_as_one(base_folder, prefix, tmp_path):
    said = export(ExportArguments("ptuning", prefix, tmp_path / "output", str(base_folder)))
    assert said == "1 tensor, the adapter's own bit for bit"
    assert "own 1 tensor, bit for bit" in (tmp_path / "output" / "README.md").read_text(encoding="utf-8")
