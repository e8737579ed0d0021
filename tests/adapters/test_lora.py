"""LoRA on plain and quantised linears."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm_tuning.adapters.lora import (
    QuantizedLoraLinear,
    add_lora,
    load_lora,
    lora_state_dict,
    make_lora_config,
    read_lora_config,
)
from chatglm_tuning.checkpoint import LORA_CONFIG_FILE, LORA_FILE, read_lora, save_adapter_files
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import load_base
from tests.model_folder import write_tiny_model

TARGETS = ("query_key_value", "dense_4h_to_h")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model")


def make_lora(model_folder, bits=None, dtype=torch.float32):
    torch.manual_seed(4)
    base = load_base(str(model_folder), quantization_bit=bits, dtype=dtype).model
    model = add_lora(base, make_lora_config(rank=2, alpha=6, dropout=0.1, targets=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_is_trained_and_it_is_in_fp32(model_folder, bits, dtype, recwarn):
    model = make_lora(model_folder, bits, dtype)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * len(TARGETS)
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in trained.items())
    assert not [str(warning.message) for warning in recwarn if "Unsupported layer" in str(warning.message)]
    wrapped = [module for module in model.modules() if isinstance(module, QuantizedLoraLinear)]
    assert len(wrapped) == (0 if bits is None else 2 * len(TARGETS))


def test_merged_and_unmerged_agree(model_folder):
    model = make_lora(model_folder).eval()
    ids = torch.arange(20, 32)[None]
    ids[0, 6:8] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        merged = model.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_merging_into_a_quantized_base_is_refused(model_folder):
    model = make_lora(model_folder, 4)
    with pytest.raises(UserError, match="cannot be merged into int8 or int4 weights"):
        model.merge_adapter()


@pytest.mark.parametrize("is_trainable", [True, False])
def test_a_loaded_adapter_has_the_saved_values(model_folder, tmp_path, is_trainable):
    model = make_lora(model_folder)
    save_adapter_files(model, tmp_path, for_original=True)
    again = load_lora(load_base(str(model_folder)).model, tmp_path, read_lora(tmp_path), is_trainable=is_trainable)
    expected = lora_state_dict(model)
    assert lora_state_dict(again).keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in lora_state_dict(again).items())
    assert any(parameter.requires_grad for parameter in again.parameters()) is is_trainable
    assert again.training is is_trainable
    config = read_lora_config(tmp_path)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (2, 6, 0.1, set(TARGETS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop(min(state)), "it has no base_model"),
        (lambda state: state.update(more=torch.ones(1)), "it has more, which this model has not"),
        (lambda state: state.update({min(state): torch.ones(2, 3)}), r"is \(2, 3\), and \(2, 32\) is needed"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(model_folder, tmp_path, change, message):
    save_adapter_files(make_lora(model_folder), tmp_path, for_original=True)
    state = load_file(tmp_path / LORA_FILE)
    state = {key: value for key, value in state.items()}
    change(state)
    save_file(state, tmp_path / LORA_FILE)
    with pytest.raises(UserError, match=message):
        load_lora(load_base(str(model_folder)).model, tmp_path, read_lora(tmp_path), is_trainable=False)


def test_targets_of_another_model_are_refused(model_folder, tmp_path):
    save_adapter_files(make_lora(model_folder), tmp_path, for_original=True)
    config = json.loads((tmp_path / LORA_CONFIG_FILE).read_text(encoding="utf-8"))
    config["target_modules"] = ["q_proj"]
    (tmp_path / LORA_CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=r"the adapter's targets \(q_proj\) are not in this model"):
        load_lora(load_base(str(model_folder)).model, tmp_path, read_lora(tmp_path), is_trainable=False)


@pytest.mark.parametrize("text", ["", "[]", '{"peft_type": "NONE"}'])
def test_a_broken_adapter_config_is_told(tmp_path, text):
    (tmp_path / LORA_CONFIG_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"adapter_config\.json is no configuration of peft"):
        read_lora_config(tmp_path)
