"""Bases in every layout and precision, and adapters put into them."""

import json
import logging
import os
import re
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

import chatglm_tuning.loading
from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape
from chatglm_tuning.adapters.served import AdapterSet
from chatglm_tuning.base_folder import load_tokenizer, read_config
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import (
    add_prefix,
    add_served_adapter,
    add_trained_lora,
    compute_dtype,
    load_base,
    load_for_inference,
    peak_memory_bytes,
    read_identity,
    spread_layers,
)
from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_tuning.quantization.linear import QuantizedLinear
from chatglm_tuning.quantized_folder import write_quantized_folder
from chatglm_tuning.shards import find_weight_files
from tests.export.adapters import write_lora, write_prefix
from tests.model_folder import TOKENIZER_FILES, dequantize_linear, quantize_linear, write_tiny_model
from tests.weight_layouts import LAYOUTS, copy_without_weights, read_released_state, write_weights

QUANTIZED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("base") / "model")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    generator = torch.Generator().manual_seed(7)
    for key in [key for key, value in state.items() if value.dim() == 1]:
        # New biases and LayerNorms are all alike: a mix-up would not show.
        state[key] += 0.1 * torch.randn(state[key].shape, generator=generator).half()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def state(model_folder):
    return read_released_state(model_folder)


@pytest.fixture(scope="module")
def ids(model_folder):
    """Two rows: prompt, [gMASK], <sop>, answer."""
    tokenizer = ChatGLMTokenizer.from_pretrained(model_folder)
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(20, 300, (2, 12), generator=generator)
    words[:, 6], words[:, 7] = tokenizer.gmask_token_id, tokenizer.bos_token_id
    return words


@pytest.fixture(scope="module")
def golden_folder(golden, shared, tmp_path_factory):
    """The golden tiny model as a folder in the released layout, with the released tokenizer."""
    folder = tmp_path_factory.mktemp("golden") / "model"
    folder.mkdir()
    shutil.copy(golden.folder / "tiny_config.json", folder / "config.json")
    for name in TOKENIZER_FILES:
        shutil.copy(shared / "chatglm-6b" / name, folder)
    shutil.copy(golden.folder / "tiny_weights_fp16.safetensors", folder / "model.safetensors")
    return folder


def parameters_of(model):
    return dict(model.named_parameters(remove_duplicate=False))


def assert_same_parameters(actual, expected):
    actual, expected = parameters_of(actual), parameters_of(expected)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_layout_gives_the_stored_values(state, model_folder, tmp_path, layout, dtype):
    folder = write_weights(state, copy_without_weights(model_folder, tmp_path / "model"), layout)
    base = load_base(str(folder), dtype=dtype)
    parameters = parameters_of(base.model)
    assert parameters.keys() == {key for key in state if not key.endswith("inv_freq")}
    for key, parameter in parameters.items():
        assert torch.equal(parameter, state[key].to(dtype)), key
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
    assert base.model.lm_head.weight is base.model.transformer.word_embeddings.weight
    assert base.config.dtype == base.model.dtype == dtype
    assert not base.model.training
    assert base.identity.name_or_path == str(folder)


def test_the_fingerprint_is_that_of_the_model_not_of_its_files_or_precision(state, model_folder, tmp_path):
    folder = write_weights(state, copy_without_weights(model_folder, tmp_path / "a"), "sharded_safetensors")
    expected = load_base(str(model_folder)).identity.fingerprint
    assert load_base(str(folder), dtype=torch.bfloat16, quantization_bit=4).identity.fingerprint == expected
    changed = {key: value + 1 if "final_layernorm.bias" in key else value for key, value in state.items()}
    other = write_weights(changed, copy_without_weights(model_folder, tmp_path / "b"), "bin")
    assert load_base(str(other)).identity.fingerprint != expected


@pytest.mark.parametrize("layout", ["bin", "safetensors"])  # safetensors come sorted: the head before the embeddings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_different_head_stays_untied_and_survives_saving(state, model_folder, tmp_path, ids, caplog, layout, dtype):
    changed = {**state, "lm_head.weight": state["lm_head.weight"].flip(0)}
    folder = write_weights(changed, copy_without_weights(model_folder, tmp_path / "model"), layout)
    with caplog.at_level(logging.WARNING):
        base = load_base(str(folder), dtype=dtype)
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: lm_head differs from the word embeddings: it is kept apart (untied)"
    ]
    assert base.config.tie_word_embeddings is False
    assert torch.equal(base.model.lm_head.weight, changed["lm_head.weight"].to(dtype))
    tied = load_base(str(model_folder), dtype=dtype)
    with torch.no_grad():
        logits = base.model(input_ids=ids).logits
        torch.testing.assert_close(logits.flip(-1), tied.model(input_ids=ids).logits, rtol=1e-2, atol=2e-2)
        assert not torch.allclose(logits, tied.model(input_ids=ids).logits)

    base.model.save_pretrained(folder / "saved")
    for name in TOKENIZER_FILES:
        shutil.copy(folder / name, folder / "saved")
    assert_same_parameters(load_base(str(folder / "saved"), dtype=dtype).model, base.model)
    assert_same_parameters(AutoModel.from_pretrained(folder / "saved", dtype=dtype), base.model)


def test_an_equal_head_is_tied_whatever_the_config_says(state, model_folder, tmp_path):
    folder = copy_without_weights(model_folder, tmp_path / "model", tie_word_embeddings=False)
    base = load_base(str(write_weights(state, folder, "safetensors")))
    assert base.config.tie_word_embeddings is True
    assert base.model.lm_head.weight is base.model.transformer.word_embeddings.weight


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantizing_while_loading_equals_quantizing_afterwards(model_folder, bits, dtype):
    quantized = load_base(str(model_folder), quantization_bit=bits, dtype=dtype)
    assert quantized.config.quantization_bit == quantized.identity.quantization_bit == bits
    plain = load_base(str(model_folder), dtype=torch.float32)
    found = 0
    for name, module in plain.model.named_modules():
        if name.split(".")[-1] not in QUANTIZED:
            continue
        expected, actual = quantize_linear(module, bits), quantized.model.get_submodule(name)
        assert torch.equal(actual.weight, expected.weight), name
        assert torch.equal(actual.weight_scale, expected.weight_scale), name
        assert torch.equal(actual.bias, module.bias.to(dtype)), name
        found += 1
    assert found == 2 * len(QUANTIZED)
    assert quantized.model.transformer.word_embeddings.weight.dtype == dtype


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_while_loading_gives_the_released_bytes(golden, golden_folder, bits):
    import hashlib

    model = load_base(str(golden_folder), quantization_bit=bits).model
    digests = {k: v for k, v in golden.json("quant")["tiny_model_digests"].items() if k.endswith(f"|int{bits}")}
    assert len(digests) == 3 * len(QUANTIZED)
    for key, expected in digests.items():
        linear = model.get_submodule(key.split("|")[0].removesuffix(".weight"))
        assert list(linear.weight.shape) == expected["shape"]
        assert hashlib.sha256(linear.weight.numpy().tobytes()).hexdigest() == expected["packed_sha256"], key
        assert hashlib.sha256(linear.weight_scale.numpy().tobytes()).hexdigest() == expected["scale_sha256"], key


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_saved_base_is_bit_equal_when_it_is_loaded_again(model_folder, tmp_path, ids, bits, dtype):
    base = load_base(str(model_folder), quantization_bit=bits, dtype=dtype)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["dtype"] == str(dtype).removeprefix("torch.")
    assert written["quantization_bit"] == bits
    again = load_base(str(tmp_path), dtype=dtype)
    assert_same_parameters(again.model, base.model)
    assert again.identity.fingerprint == base.identity.fingerprint
    by_auto_class = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert_same_parameters(by_auto_class, base.model)
    assert AutoTokenizer.from_pretrained(tmp_path)("一件上衣")["input_ids"] == base.tokenizer("一件上衣")["input_ids"]
    with torch.no_grad():
        expected = base.model(input_ids=ids).logits
        assert torch.equal(again.model(input_ids=ids).logits, expected)
        assert torch.equal(by_auto_class(input_ids=ids).logits, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_released_quantized_folder_loads_as_it_is(state, model_folder, tmp_path, bits, caplog):
    """chatglm-6b-int8 and -int4: `weight` int8 and `weight_scale` fp16 for the four linears, all else fp16."""
    quantized = load_base(str(model_folder), quantization_bit=bits, dtype=torch.float16).model
    stored = {key: value.detach() for key, value in quantized.state_dict().items()}
    stored |= {key: value for key, value in state.items() if key.endswith("inv_freq")}
    assert sum(key.endswith("weight_scale") for key in stored) == 2 * len(QUANTIZED)
    changes = {"quantization_bit": bits, "quantization_embeddings": False}
    folder = write_weights(stored, copy_without_weights(model_folder, tmp_path / "model", **changes), "bin")
    assert_same_parameters(load_base(str(folder), dtype=torch.float16).model, quantized)
    assert_same_parameters(load_base(str(folder), dtype=torch.float16, quantization_bit=bits).model, quantized)
    assert not caplog.records


def as_dense(quantized: ChatGLMForConditionalGeneration, model_folder) -> ChatGLMForConditionalGeneration:
    """The model in fp32 whose linears hold what the quantised ones stand for."""
    dense = load_base(str(model_folder)).model
    for name, module in quantized.named_modules():
        if isinstance(module, QuantizedLinear):
            dense.get_submodule(name).weight.data = dequantize_linear(module)
    return dense


def put_lora(base):
    torch.manual_seed(3)
    model = add_lora(base.model, make_lora_config(rank=4, alpha=8, dropout=0.0, targets=QUANTIZED))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros would leave no gradient for A
            nn.init.normal_(parameter, std=0.05)
    return model


def put_prefix(base):
    torch.manual_seed(3)
    add_prefix(base, PrefixShape(3), None)
    base.model.transformer.prefix_encoder.requires_grad_(True)
    return base.model


@pytest.mark.parametrize("put", [put_lora, put_prefix])
@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_on_a_quantized_base_get_the_gradients_of_the_dense_model_it_stands_for(model_folder, ids, put, bits):
    from dataclasses import replace

    quantized = load_base(str(model_folder), quantization_bit=bits)
    dense = replace(quantized, model=as_dense(quantized.model, model_folder))
    gradients = []
    for base in (quantized, dense):
        model = put(base)
        model.eval()  # no dropout
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for key, expected in gradients[1].items():
        assert expected.norm() > 0, key
        assert (gradients[0][key] - expected).norm() <= 1e-5 * expected.norm(), key


def test_the_auto_classes_read_the_released_files_without_remote_code(shared):
    folder = shared / "chatglm-6b"
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is ChatGLMConfig
    assert (config.num_layers, config.hidden_size, config.vocab_size, config.dtype) == (28, 4096, 130528, torch.float16)
    assert type(AutoTokenizer.from_pretrained(folder)) is ChatGLMTokenizer
    assert load_tokenizer(folder, read_config(folder)).vocab_size == 130344
    with torch.device("meta"):
        assert type(AutoModel.from_config(config)) is ChatGLMForConditionalGeneration


def count(model, *, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def test_parameter_counts_at_full_size(shared):
    """Printed (pytest -s): the counts that users of ChatGLM-6B know."""
    config = read_config(shared / "chatglm-6b")
    with torch.device("meta"):
        whole = ChatGLMForConditionalGeneration(config).requires_grad_(False)
        counts = {"all, lm_head tied": count(whole)}
        lora = add_lora(whole, make_lora_config(rank=8, alpha=32, dropout=0.0, targets=["query_key_value"]))
        counts["LoRA r 8, trainable"] = count(lora, trainable=True)
        counts["all with LoRA"] = count(lora)
        for projection in (False, True):
            config.pre_seq_len, config.prefix_projection = 128, projection
            encoder = ChatGLMForConditionalGeneration(config).transformer.prefix_encoder
            counts[f"prefix 128, projection {projection}"] = count(encoder)
    print(*(f"{name}: {number:,}" for name, number in counts.items()), sep="\n")
    assert list(counts.values()) == [6_173_286_400, 3_670_016, 6_176_956_416, 29_360_128, 957_059_072]


def test_an_adapter_of_peft_0_3_loads_with_the_released_loss(golden, golden_folder):
    model, _ = load_for_inference(
        str(golden_folder), lora_checkpoint=golden.folder / "lora_adapter_peft030", dtype="float32"
    )
    assert count(model, trainable=True) == 0
    tensors, facts = golden.tensors("lora"), golden.json("lora")
    batch = {"input_ids": tensors["input_ids"], "labels": tensors["labels"]}
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(facts["loss"], abs=5e-6)
        with model.disable_adapter():
            assert model(**batch).loss.item() == pytest.approx(facts["loss_adapter_disabled"], abs=5e-6)


@pytest.fixture(params=["alone", "beside the whole model", "in shards of the whole model"])
def original_prefix(request, golden, tmp_path):
    """The original's checkpoint: only the prefix, or all of the model's tensors too."""
    prefix = torch.load(golden.folder / "ptuning_pytorch_model.bin", weights_only=True)
    if request.param == "alone":
        torch.save(prefix, tmp_path / "pytorch_model.bin")
    else:
        layout = "sharded_bin" if "shards" in request.param else "bin"
        write_weights({**golden.tensors("tiny_weights_fp16"), **prefix}, tmp_path, layout)
    return tmp_path


def test_a_prefix_of_the_original_loads_without_flags(golden, golden_folder, original_prefix):
    model, tokenizer = load_for_inference(str(golden_folder), ptuning_checkpoint=original_prefix, dtype="float32")
    tensors, facts = golden.tensors("ptuning"), golden.json("ptuning")
    with torch.no_grad():
        loss = model(input_ids=tensors["input_ids"], labels=tensors["labels"]).loss
    assert loss.item() == pytest.approx(facts["loss"], abs=5e-6)
    case = golden.json("generation")["ptuning_single0"]
    prompt = tokenizer(golden.json("generation")["single0"]["prompts"], return_tensors="pt")
    assert prompt["input_ids"].tolist() == case["input_ids"]
    new = model.generate(**prompt, do_sample=False, max_new_tokens=32)[:, prompt["input_ids"].shape[1] :]
    assert new.tolist() == case["new_ids"]
    model.transformer.prefix_encoder = None
    with torch.no_grad():
        without = model(input_ids=tensors["input_ids"], labels=tensors["labels"]).loss
    assert abs(without.item() - facts["loss"]) > 1e-3


def test_a_prefix_in_the_base_folder_is_left_out_with_a_warning(state, model_folder, tmp_path, caplog):
    folder = copy_without_weights(model_folder, tmp_path / "model", pre_seq_len=3)
    prefix = {"transformer.prefix_encoder.embedding.weight": torch.randn(3, 128)}
    write_weights({**state, **prefix}, folder, "bin")
    base = load_base(str(folder))
    assert base.model.transformer.prefix_encoder is None
    assert base.config.pre_seq_len is None
    assert "--ptuning_checkpoint" in caplog.text
    model, _ = load_for_inference(str(folder), ptuning_checkpoint=folder, dtype="float32")
    assert torch.equal(model.transformer.prefix_encoder.embedding.weight, next(iter(prefix.values())))


def test_flags_that_contradict_a_prefix_are_refused_before_the_base_is_read(model_folder, tmp_path, monkeypatch):
    torch.save({"transformer.prefix_encoder.embedding.weight": torch.randn(3, 128)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr("chatglm_tuning.loading.load_base", lambda *_, **__: pytest.fail("the base was read"))
    for flags in ({"pre_seq_len": 4}, {"prefix_projection": True}):
        with pytest.raises(UserError, match="holds a prefix of pre_seq_len 3 without prefix_projection"):
            load_for_inference(str(model_folder), ptuning_checkpoint=tmp_path, **flags)


def test_an_adapter_of_another_base_of_the_same_size_is_warned_of(model_folder, tmp_path, caplog):
    from chatglm_tuning.checkpoint import Manifest, save_adapter_files, write_manifest

    base = load_base(str(model_folder))
    lora = put_lora(base)
    write_manifest(tmp_path, Manifest("lora", base.identity), save_adapter_files(lora, tmp_path, for_original=True))
    other = write_tiny_model(tmp_path / "other")
    state = torch.load(other / "pytorch_model.bin", weights_only=True)
    state["transformer.final_layernorm.bias"] += 1
    torch.save(state, other / "pytorch_model.bin")
    add_trained_lora(load_base(str(model_folder)), tmp_path)
    assert not caplog.records
    add_trained_lora(load_base(str(other)), tmp_path)
    assert f"was trained on another base model ({model_folder}) than the one loaded ({other})" in caplog.text


@pytest.mark.parametrize("method", ["lora", "ptuning"])
def test_an_adapter_of_another_precision_is_warned_of_once_on_every_path(model_folder, tmp_path, caplog, method):
    if method == "lora":
        folder = write_lora(tmp_path / "lora", model_folder, bits=4)
        says = f"{folder} was trained on a base in int4 and is used on one in full precision"
        bits = None
    else:
        folder = write_prefix(tmp_path / "prefix", model_folder)
        says = f"{folder} was trained on a base in full precision and is used on one in int8"
        bits = 8
    caplog.clear()
    load_for_inference(str(model_folder), **{f"{method}_checkpoint": folder}, quantization_bit=bits, dtype="float32")
    assert caplog.text.count(says) == 1
    caplog.clear()
    base = load_base(str(model_folder), quantization_bit=bits)
    adapters = AdapterSet(base.model)
    for _ in range(2):
        add_served_adapter(base, adapters, folder)
    assert caplog.text.count(says) == 1
    caplog.clear()
    base = load_base(str(model_folder), quantization_bit=4 if method == "lora" else None)
    add_served_adapter(base, AdapterSet(base.model), folder)
    assert "was trained on" not in caplog.text


@pytest.mark.parametrize("layout", ["bin", "int4"])
def test_an_identity_is_read_without_the_weights(model_folder, tmp_path, layout):
    folder = model_folder
    if layout == "int4":
        folder = tmp_path / "int4"
        write_quantized_folder(str(model_folder), folder, 4)
    assert read_identity(str(folder)) == load_base(str(folder)).identity


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs a system that can be asked to read ahead")
@pytest.mark.parametrize("layout", ["sharded_bin", "sharded_safetensors"])
def test_an_identity_does_not_ask_the_disk_for_the_weights(state, model_folder, tmp_path, monkeypatch, layout):
    folder = write_weights(state, copy_without_weights(model_folder, tmp_path / "model"), layout)
    size = find_weight_files(folder).size_bytes
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _file, _start, length, _advice: asked.append(length))
    read_identity(str(folder))
    assert sum(asked) < size / 100
    load_base(str(folder))
    assert sum(asked) >= size, "a load is read ahead: else the line above could not fail"


@pytest.mark.parametrize(
    ("name", "has_bf16", "expected"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
    ],
)
def test_dtype_on_a_cpu(monkeypatch, name, has_bf16, expected):
    monkeypatch.setattr("chatglm_tuning.loading._cpu_multiplies_bf16", lambda: has_bf16)
    assert compute_dtype(name, torch.device("cpu")) == expected


def test_fp16_is_never_used_on_a_cpu(monkeypatch, caplog):
    monkeypatch.setattr("chatglm_tuning.loading._cpu_multiplies_bf16", lambda: False)
    assert compute_dtype("float16", torch.device("cpu")) == torch.float32
    assert "float16 is not used on a CPU" in caplog.text


def test_layers_are_spread_in_order_with_the_tied_ends_on_the_first_device():
    place = spread_layers(ChatGLMConfig(num_layers=5), [torch.device("cuda", n) for n in range(2)])
    layers = [place(f"transformer.layers.{n}.mlp.dense_h_to_4h.bias").index for n in range(5)]
    assert layers == [0, 0, 0, 1, 1]
    assert place("transformer.word_embeddings.weight").index == place("lm_head.weight").index == 0
    assert place("transformer.final_layernorm.bias").index == 1


def test_tensors_go_where_they_are_placed(model_folder):
    seen = []

    def device_of(key):
        seen.append(key)
        return torch.device("meta") if ".layers.1." in key else torch.device("cpu")

    model = load_base(str(model_folder), device_of=device_of, quantization_bit=8).model
    assert {p.device.type for p in model.transformer.layers[1].parameters()} == {"meta"}
    assert {p.device.type for p in model.transformer.layers[0].parameters()} == {"cpu"}
    assert "transformer.word_embeddings.weight" in seen


def test_progress_is_shown_on_a_terminal_alone(model_folder, capsys, monkeypatch):
    load_base(str(model_folder), show_progress=True)
    assert capsys.readouterr() == ("", "")
    # Not by environment variables: tokenising in processes replaces os.environ, which rich keeps from its import.
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr("rich.console.Console.is_dumb_terminal", False)
    load_base(str(model_folder))
    assert capsys.readouterr() == ("", "")
    load_base(str(model_folder), show_progress=True)
    shown = capsys.readouterr()
    assert "loading the base model" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("layout", ["bin", "safetensors"])  # the head after, and before the embeddings
def test_of_equal_ends_one_is_ever_in_memory(state, model_folder, tmp_path, monkeypatch, layout):
    copies = []
    converted = chatglm_tuning.loading._converted
    monkeypatch.setattr(
        chatglm_tuning.loading,
        "_converted",
        lambda stored, *rest: copies.append(stored.key) or converted(stored, *rest),
    )
    folder = write_weights(state, copy_without_weights(model_folder, tmp_path / "model"), layout)
    base = load_base(str(folder), dtype=torch.bfloat16)
    assert base.model.lm_head.weight is base.model.transformer.word_embeddings.weight
    assert len({"lm_head.weight", "transformer.word_embeddings.weight"} & set(copies)) == 1


def test_what_was_read_how_fast_and_in_how_much_memory_is_logged(model_folder, caplog):
    with caplog.at_level(logging.INFO, logger="chatglm_tuning.loading"):
        load_base(str(model_folder))
    peak = r", peak memory \d+\.\d\d GiB" if peak_memory_bytes() else ""
    pattern = rf"{re.escape(str(model_folder))}: 0\.00 GiB read in \d+\.\d s \(\d+\.\d\d GiB/s\){peak}"
    assert [re.fullmatch(pattern, record.getMessage()) is not None for record in caplog.records] == [True]


@pytest.mark.skipif(peak_memory_bytes() is None, reason="this operating system does not tell it")
def test_the_peak_memory_is_that_of_this_process():
    resource = pytest.importorskip("resource")
    assert peak_memory_bytes() / 1024 == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, rel=0.02)
