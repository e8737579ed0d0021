"""What is the matter with a model's folder: the same codes as commands give, and more, without torch."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chatglm_tuning.cli.main import run_command
from chatglm_tuning.doctor import model_folder, weight_files
from chatglm_tuning.doctor.model_check import command_findings
from chatglm_tuning.doctor.model_folder import model_findings, read_shape
from chatglm_tuning.doctor.whole_check import check_folder
from chatglm_tuning.errors import UserError
from chatglm_tuning.model import configuration
from chatglm_tuning.shards import WEIGHT_NAMES
from tests.model_folder import EMBEDDED, write_tiny_model
from tests.weight_layouts import read_released_state, write_weights

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A tiny model in three safetensors shards with an index."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model") / "whole")
    state = read_released_state(folder)
    (folder / "pytorch_model.bin").unlink()
    write_weights(state, folder, "sharded_safetensors")
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def wrong(folder: Path) -> list[tuple[str, str | None]]:
    return [(finding.name, finding.code) for finding in model_findings(str(folder)) if finding.status != "ok"]


def change_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def shard(folder: Path, number: int = 0) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def test_a_whole_folder_is_well(folder):
    assert wrong(folder) == []
    names = [finding.name for finding in model_findings(str(folder))]
    assert names == ["config.json", "ice_text.model", "weights"]


def test_the_embedded_base_is_well():
    assert wrong(EMBEDDED) == []


def test_constants_are_those_of_the_commands(shared):
    assert weight_files.WEIGHT_NAMES == WEIGHT_NAMES
    assert model_folder.LATER_ARCHITECTURE_KEYS == configuration._LATER_ARCHITECTURE_KEYS
    assert model_folder.OLD_REVISION_VOCABULARY == configuration.OLD_REVISION_VOCABULARY
    from hashlib import sha256

    released = shared / "chatglm-6b" / "ice_text.model"
    assert sha256(released.read_bytes()).hexdigest() == model_folder.RELEASED_TOKENIZER
    assert json.loads((shared / "chatglm-6b" / "config.json").read_text())["vocab_size"] == 130528


CONFIGS = {
    "ChatGLM2": ({"multi_query_attention": True}, "M105"),
    "another model": ({"model_type": "llama"}, "M105"),
    "the earlier revision": ({"vocab_size": 150528}, "M106"),
    "quantised embeddings": ({"quantization_embeddings": True}, "M107"),
    "two bits": ({"quantization_bit": 2}, "M108"),
    "plain positions": ({"position_encoding_2d": False}, "M108"),
}


@pytest.mark.parametrize(("changes", "code"), CONFIGS.values(), ids=CONFIGS)
def test_another_model(changes, code, folder, capsys):
    change_json(folder / "config.json", **changes)
    assert wrong(folder) == [("config.json", code)]
    assert run_command("chat", ["--model_name_or_path", str(folder)]) == 2
    assert f"error [{code}]: " in capsys.readouterr().err


def cut(folder):
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:-100])


def lengthen(folder):
    path = shard(folder)
    path.write_bytes(path.read_bytes() + b"x")


def swap_shards(folder):
    first, second = shard(folder), shard(folder, 2)
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def single_bin(data: bytes):
    def change(folder):
        for path in folder.glob("model*"):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(data)

    return change


def half_a_zip(folder):
    single_bin(b"")(folder)
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


def index(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def index_of_an_adapter(folder):
    for path in folder.glob("model*"):
        path.unlink()
    save_file({"lora_A": torch.zeros(2)}, folder / "model-00001-of-00001.safetensors")
    content = {"weight_map": {"lora_A": "model-00001-of-00001.safetensors"}}
    index(folder).write_text(json.dumps(content), encoding="utf-8")


WEIGHTS = {
    "none": (lambda folder: [path.unlink() for path in folder.glob("model*")], "M113"),
    "a missing shard": (lambda folder: shard(folder).unlink(), "M114"),
    "a pointer": (lambda folder: shard(folder).write_bytes(POINTER), "M115"),
    "a cut file": (cut, "M116"),
    "a file with more": (lengthen, "M116"),
    "an empty file": (lambda folder: shard(folder).write_bytes(b""), "M116"),
    "a header that is none": (lambda folder: shard(folder).write_bytes(struct.pack("<Q", 2**40) + b"x" * 99), "M116"),
    "a header of another form": (lambda folder: shard(folder).write_bytes(struct.pack("<Q", 8) + b'{"a": 1}'), "M116"),
    "a web page": (single_bin(b"<!DOCTYPE html><html>404</html>"), "M116"),
    "no weight file": (single_bin(b"hello"), "M116"),
    "half a zip": (half_a_zip, "M116"),
    "an index that is none": (lambda folder: index(folder).write_text("[]"), "M117"),
    "an index that is no JSON": (lambda folder: index(folder).write_bytes(POINTER), "M117"),
    "files that the index describes otherwise": (swap_shards, "M117"),
    "the weights of an adapter": (index_of_an_adapter, "M119"),
}


@pytest.mark.parametrize(("change", "code"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_are_not_whole(change, code, folder):
    change(folder)
    found = wrong(folder)
    assert found
    assert {found_code for _, found_code in found} == {code}


def test_files_that_are_too_small_for_their_index(folder):
    change_json(index(folder), metadata={"total_size": 10**9})
    (line,) = [finding.line for finding in model_findings(str(folder)) if finding.status != "ok"]
    assert "the index says 1,000,000,000 at least" in line
    assert line.endswith("[M116]")


def test_every_broken_file_is_told(folder):
    for path in folder.glob("*.safetensors"):
        path.write_bytes(POINTER)
    assert len(wrong(folder)) == 3


TOKENIZERS = {
    "none": (lambda folder: (folder / "ice_text.model").unlink(), "ice_text.model", "M109"),
    "a pointer": (lambda folder: (folder / "ice_text.model").write_bytes(POINTER), "ice_text.model", "M110"),
    "not the released one": (
        lambda folder: change_json(folder / "config.json", vocab_size=130528),
        "ice_text.model",
        "M111",
    ),
    "an option that is not supported": (
        lambda folder: change_json(folder / "tokenizer_config.json", do_lower_case=True),
        "tokenizer_config.json",
        "M111",
    ),
    "of the earlier revision": (
        lambda folder: change_json(folder / "tokenizer_config.json", num_image_tokens=20000),
        "tokenizer_config.json",
        "M112",
    ),
    "settings that are no JSON": (
        lambda folder: (folder / "tokenizer_config.json").write_text("{"),
        "tokenizer_config.json",
        "M110",
    ),
}


@pytest.mark.parametrize(("change", "name", "code"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_cannot_be_used(change, name, code, folder):
    change(folder)
    assert wrong(folder) == [(name, code)]


def test_the_released_tokenizer_is_known(folder, shared):
    shutil.copy(shared / "chatglm-6b" / "ice_text.model", folder)
    change_json(folder / "config.json", vocab_size=130528)
    lines = [finding.line for finding in model_findings(str(folder))]
    assert "ok       ice_text.model: the released one (sha256 5e974d9a69c2)" in lines


@pytest.mark.parametrize(("text", "code"), [(None, "M103"), ("{", "M104"), ("[]", "M104")])
def test_a_config_that_cannot_be_read(text, code, folder):
    path = folder / "config.json"
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    assert ("config.json", code) in wrong(folder)
    assert read_shape(str(folder)) == {}


def test_an_unfinished_download_is_told(folder):
    (folder / "model-00003.safetensors.incomplete").write_bytes(b"")
    assert wrong(folder) == [("download", "M114")]


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [("THUDM/chatglm-6b", "warning", "M102"), ("/no/such/folder", "problem", "M101"), ("./x", "problem", "M101")],
)
def test_no_folder(given, status, code):
    (finding,) = model_findings(given)
    assert (finding.status, finding.code) == (status, code)


def test_a_file_in_the_place_of_the_folder(folder):
    (finding,) = model_findings(str(folder / "config.json"))
    assert (finding.status, finding.code) == ("problem", "M101")


def test_commands_are_asked_in_another_process(folder):
    assert [finding.status for finding in command_findings(str(folder))] == ["ok"]
    # What only they see: a pickle with more than tensors.
    single_bin(b"")(folder)
    torch.save({"weight": print}, folder / "pytorch_model.bin")
    assert wrong(folder) == []
    (finding,) = command_findings(str(folder))
    assert (finding.status, finding.code) == ("problem", "M118")


def bin_shard(folder, number):
    return sorted(folder.glob("*.bin"))[number]


def change_index(folder, **changes):
    content = json.loads((folder / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))
    content["weight_map"] |= changes
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content), encoding="utf-8")


TENSORS = {
    "a shard in the place of another": (
        lambda folder: shutil.copyfile(bin_shard(folder, 0), bin_shard(folder, 1)),
        "M117",
    ),
    "an index that names another shard": (
        lambda folder: change_index(folder, **{"transformer.final_layernorm.bias": bin_shard(folder, 0).name}),
        "M117",
    ),
    "an index that names a tensor that is nowhere": (
        lambda folder: change_index(folder, more=bin_shard(folder, 0).name),
        "M117",
    ),
    "fewer layers than the weights have": (lambda folder: change_json(folder / "config.json", num_layers=3), "M119"),
    "more layers than the weights have": (lambda folder: change_json(folder / "config.json", num_layers=5), "M119"),
    "another vocabulary": (lambda folder: change_json(folder / "config.json", vocab_size=2433), "M112"),
}


@pytest.mark.parametrize(("change", "code"), TENSORS.values(), ids=TENSORS)
def test_tensors_of_bin_files_that_do_not_fit(change, code, tmp_path):
    """Without torch in its process, the doctor does not look into them; where torch works, another process does."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "model"))
    check_folder(folder)
    change(folder)
    assert wrong(folder) == []
    with pytest.raises(UserError) as raised:
        check_folder(folder)
    assert raised.value.code == code


def test_tensors_of_safetensors_are_compared_with_config_json(folder):
    check_folder(folder)
    change_json(folder / "config.json", num_layers=3)
    with pytest.raises(UserError, match="tensors are missing"):
        check_folder(folder)


def test_a_check_that_crashes_is_a_finding(folder, tmp_path, monkeypatch):
    from tests.doctor.fakes import fake_library

    body = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"
    monkeypatch.setenv("PYTHONPATH", str(fake_library(tmp_path, "torch", body)))
    (finding,) = command_findings(str(folder))
    assert (finding.status, finding.code) == ("problem", "X102")
