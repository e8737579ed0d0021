"""Adapter folders: what is in them, that they are whole, and that a failed save changes nothing."""

import json
import os
import stat
import warnings

import pytest
import torch
from safetensors.torch import load_file

from chatglm_tuning import checkpoint
from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape
from chatglm_tuning.checkpoint import (
    LORA_CONFIG_FILE,
    LORA_FILE,
    MANIFEST_NAME,
    ORIGINAL_PREFIX_FILE,
    PREFIX_FILE,
    Manifest,
    adapter_method,
    check_lora_folder,
    read_lora,
    read_manifest,
    read_prefix,
    save_adapter_files,
    save_full_files,
    whole_checkpoints,
    write_manifest,
)
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import add_prefix, add_trained_lora, load_base
from tests.model_folder import TOKENIZER_FILES, write_tiny_model

EMBEDDING = "transformer.prefix_encoder.embedding.weight"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def base(model_folder):
    return load_base(str(model_folder))


@pytest.fixture
def lora(base):
    torch.manual_seed(2)
    model = add_lora(base.model, make_lora_config(rank=2, alpha=4, dropout=0.0, targets=["query_key_value"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    return model


@pytest.fixture
def prefixed(base):
    torch.manual_seed(2)
    add_prefix(base, PrefixShape(3), None)
    return base.model


def save_lora(lora, base, folder):
    names = save_adapter_files(lora, folder, for_original=True)
    write_manifest(folder, Manifest("lora", base.identity, settings={"lora_rank": 2}), names)
    return names


def save_prefix(prefixed, base, folder):
    names = save_adapter_files(prefixed, folder, for_original=True)
    write_manifest(folder, Manifest("ptuning", base.identity, pre_seq_len=3), names)
    return names


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_lora_folder_holds_only_what_was_trained(lora, base, tmp_path):
    names = save_lora(lora, base, tmp_path)
    assert set(names) | {MANIFEST_NAME} == set(files_of(tmp_path)) == {LORA_CONFIG_FILE, LORA_FILE, MANIFEST_NAME}
    trained = {k.replace(".default", ""): p for k, p in lora.named_parameters() if p.requires_grad}
    saved = load_file(tmp_path / LORA_FILE)
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[key], value) for key, value in trained.items())
    config = json.loads((tmp_path / LORA_CONFIG_FILE).read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, ["query_key_value"])
    assert config["base_model_name_or_path"] == base.identity.name_or_path
    assert config["inference_mode"] is True
    assert adapter_method(tmp_path) == "lora"


def test_peft_itself_reads_a_lora_folder(lora, base, model_folder, tmp_path):
    from peft import PeftModel

    save_lora(lora, base, tmp_path)
    by_peft = PeftModel.from_pretrained(load_base(str(model_folder)).model, str(tmp_path))
    ids = torch.arange(20, 30)[None]
    ids[0, 6:8] = torch.tensor([base.tokenizer.gmask_token_id, base.tokenizer.bos_token_id])
    with torch.no_grad():
        expected = lora.eval()(input_ids=ids).logits
        assert torch.equal(by_peft.eval()(input_ids=ids).logits, expected)
        ours = add_trained_lora(load_base(str(model_folder)), tmp_path)
        assert torch.equal(ours(input_ids=ids).logits, expected)
        with ours.disable_adapter():
            disabled = ours(input_ids=ids).logits
        assert not torch.allclose(disabled, expected)
        assert torch.equal(disabled, load_base(str(model_folder)).model(input_ids=ids).logits)


def test_saving_a_lora_asks_the_hub_nothing_and_warns_of_nothing(lora, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_, **__: pytest.fail("the hub was asked")
    )
    lora.peft_config["default"].base_model_name_or_path = "THUDM/chatglm-6b"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter_files(lora, tmp_path, for_original=True)


def test_a_prefix_folder_holds_only_what_was_trained_in_both_formats(prefixed, base, tmp_path):
    names = save_prefix(prefixed, base, tmp_path)
    assert set(names) == {PREFIX_FILE, ORIGINAL_PREFIX_FILE}
    assert set(files_of(tmp_path)) == {*names, MANIFEST_NAME}
    weight = prefixed.transformer.prefix_encoder.embedding.weight
    for state in (load_file(tmp_path / PREFIX_FILE), torch.load(tmp_path / ORIGINAL_PREFIX_FILE, weights_only=True)):
        assert state.keys() == {EMBEDDING}
        assert torch.equal(state[EMBEDDING], weight)
    shape, tensors = read_prefix(tmp_path)
    assert shape == PrefixShape(3, prefix_projection=False)
    assert torch.equal(tensors["embedding.weight"], weight)


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_is_the_same_after_saving(base, model_folder, tmp_path, projection):
    add_prefix(base, PrefixShape(3, projection), None)
    save_adapter_files(base.model, tmp_path, for_original=False)
    assert set(files_of(tmp_path)) == {PREFIX_FILE}
    again = load_base(str(model_folder))
    add_prefix(again, None, tmp_path)
    expected = base.model.transformer.prefix_encoder.state_dict()
    actual = again.model.transformer.prefix_encoder.state_dict()
    assert len(expected) == (5 if projection else 1)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    assert (again.config.pre_seq_len, again.config.prefix_projection) == (3, projection)


def test_a_manifest_says_what_was_trained_on_what(prefixed, base, tmp_path):
    save_prefix(prefixed, base, tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.method == "ptuning"
    assert manifest.pre_seq_len == 3
    assert manifest.base_model == base.identity
    assert manifest.library_versions["torch"] == torch.__version__
    assert set(manifest.files) == {PREFIX_FILE, ORIGINAL_PREFIX_FILE}


@pytest.mark.parametrize("name", [PREFIX_FILE, ORIGINAL_PREFIX_FILE])
def test_a_flipped_bit_or_a_lost_file_is_damage(prefixed, base, tmp_path, name):
    save_prefix(prefixed, base, tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[-30] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"the adapter is damaged \(the file differs from what was saved\)"):
        read_prefix(tmp_path)
    assert read_manifest(tmp_path, verify_files=False) is not None
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"the adapter is damaged \(the file is missing\)"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("base_model"),
        lambda content: content.pop("format_version"),
        lambda content: content.update(files={"a": 3}),
        lambda content: content.update(files=[]),
        lambda content: content.update(base_model={"name": "x"}),
        lambda content: content.update(more=1),
    ],
)
def test_a_broken_manifest_is_damage(lora, base, tmp_path, change):
    save_lora(lora, base, tmp_path)
    content = json.loads((tmp_path / MANIFEST_NAME).read_text(encoding="utf-8"))
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({**content, "pre_seq_len": 7}), encoding="utf-8")
    with pytest.raises(UserError, match=r"its manifest differs from what was saved"):
        read_manifest(tmp_path)
    del content["sha256"]  # earlier versions wrote none
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(content), encoding="utf-8")
    assert read_manifest(tmp_path) is not None
    change(content)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"the adapter is damaged \(its manifest cannot be read\)"):
        check_lora_folder(tmp_path)


def test_a_manifest_of_a_later_format_is_told(lora, base, tmp_path):
    save_lora(lora, base, tmp_path)
    text = (tmp_path / MANIFEST_NAME).read_text(encoding="utf-8")
    (tmp_path / MANIFEST_NAME).write_text(text.replace('"format_version": 1', '"format_version": 2'), encoding="utf-8")
    with pytest.raises(UserError, match="the manifest is of format 2, and this version reads format 1"):
        check_lora_folder(tmp_path)


def test_a_save_that_fails_leaves_the_old_files(lora, prefixed, base, tmp_path, monkeypatch):
    for model, save in ((lora, save_lora), (prefixed, save_prefix)):
        folder = tmp_path / save.__name__
        save(model, base, folder)
        before = files_of(folder)

        def fail(_state, target, **_):
            with open(target, "wb") as stream:
                stream.write(b"half")
            raise OSError(28, "No space left on device")

        for parameter in model.parameters():
            parameter.data = parameter.data + 1
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, "save_file", fail)
            patched.setattr(torch, "save", fail)
            with pytest.raises(OSError, match="No space left"):
                save(model, base, folder)
        assert files_of(folder) == before


def test_a_full_save_that_fails_leaves_the_old_files(base, tmp_path, monkeypatch):
    save_full_files(base.model, tmp_path, None)
    before = files_of(tmp_path)
    base.model.transformer.final_layernorm.bias.data += 1

    def fail(self, folder, **_):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(type(base.model), "save_pretrained", fail)
        with pytest.raises(OSError, match="No space left"):
            save_full_files(base.model, tmp_path, None)
    assert files_of(tmp_path) == before


def test_a_full_save_is_a_base_of_its_own(base, model_folder, tmp_path):
    base.model.transformer.final_layernorm.bias.data += 1
    (tmp_path / "trainer_log.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "trainer_state.json").write_text("{}\n", encoding="utf-8")
    names = save_full_files(base.model, tmp_path, None)
    assert {"config.json", "model.safetensors", *TOKENIZER_FILES} <= set(names)
    assert not {"trainer_log.jsonl", "trainer_state.json"} & set(names)
    again = load_base(str(tmp_path))
    for key, value in base.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key
    assert again.identity.fingerprint != load_base(str(model_folder)).identity.fingerprint


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_of_any_new_file(lora, base, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        save_lora(lora, base, tmp_path / "lora")
        (tmp_path / "full").mkdir()
        save_full_files(load_base(base.identity.name_or_path).model, tmp_path / "full", None)
    finally:
        os.umask(before)
    files = [*(tmp_path / "lora").iterdir(), *(tmp_path / "full").iterdir()]
    assert len(files) >= 7
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == mode, file.name


def test_the_wrong_kind_of_folder_is_told(lora, base, model_folder, tmp_path):
    save_lora(lora, base, tmp_path / "lora")
    fresh = load_base(str(model_folder))
    add_prefix(fresh, PrefixShape(3), None)
    save_prefix(fresh.model, fresh, tmp_path / "prefix")
    with pytest.raises(UserError, match=r"holds a LoRA adapter, not a prefix.*Give it with --lora_checkpoint"):
        read_prefix(tmp_path / "lora")
    with pytest.raises(
        UserError, match=r"holds a prefix of P-Tuning v2, not a LoRA.*Give it with --ptuning_checkpoint"
    ):
        read_lora(tmp_path / "prefix")
    with pytest.raises(UserError, match=r"there is no prefix in it"):
        read_prefix(model_folder)
    (tmp_path / "empty").mkdir()
    for read in (read_prefix, read_lora):
        with pytest.raises(UserError, match="the folder holds no"):
            read(tmp_path / "empty")
        with pytest.raises(UserError, match="there is no such folder"):
            read(tmp_path / "absent")
    assert adapter_method(tmp_path / "empty") is None


@pytest.mark.parametrize("name", [LORA_FILE, "adapter_model.bin"])
def test_a_damaged_adapter_without_a_manifest_is_told(tmp_path, name):
    (tmp_path / LORA_CONFIG_FILE).write_text("{}", encoding="utf-8")
    (tmp_path / name).write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="truncated"):
        check_lora_folder(tmp_path)


def test_whole_checkpoints_come_newest_first_and_torn_ones_are_passed_over(lora, base, tmp_path):
    for step in (2, 10, 4, 6):
        save_lora(lora, base, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-10" / MANIFEST_NAME).unlink()
    (tmp_path / "checkpoint-6" / LORA_FILE).write_bytes(b"half")
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-12").mkdir()
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-2"]
