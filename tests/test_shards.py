"""Weight files: which are taken, and what is told of those that cannot be read."""

import json
import mmap
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from chatglm_tuning.errors import UserError
from chatglm_tuning.shards import find_weight_files, iterate_tensors, load_bin, resolve_model_folder
from tests.weight_layouts import LAYOUTS, write_weights

STATE = {f"layer.{n}.weight": torch.randn(4, 3, generator=torch.Generator().manual_seed(n)).half() for n in range(7)}

MAPS = Path("/proc/self/maps")


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_all_tensors(tmp_path, layout):
    files = find_weight_files(write_weights(STATE, tmp_path, layout))
    assert len(files.files) == (3 if layout.startswith("sharded") else 1)
    assert files.size_bytes == sum(file.stat().st_size for file in files.files) > 0
    found = {key: tensor.clone() for key, tensor in iterate_tensors(files)}
    assert found.keys() == STATE.keys()
    assert all(torch.equal(found[key], STATE[key]) for key in STATE)


def test_safetensors_go_before_bin_and_an_index_before_a_single_file(tmp_path):
    expected = {
        "bin": "pytorch_model.bin",
        "sharded_bin": "pytorch_model-00001-of-00003.bin",
        "safetensors": "model.safetensors",
        "sharded_safetensors": "model-00001-of-00003.safetensors",
    }
    for layout, first in expected.items():
        write_weights(STATE, tmp_path, layout)
        assert find_weight_files(tmp_path).files[0].name == first


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of mapped files")
def test_a_zip_archive_is_memory_mapped(tmp_path):
    write_weights(STATE, tmp_path, "bin")
    state = load_bin(tmp_path / "pytorch_model.bin")
    assert str(tmp_path / "pytorch_model.bin") in MAPS.read_text(encoding="utf-8")
    assert len(state) == len(STATE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_told(tmp_path, layout, share):
    write_weights(STATE, tmp_path, layout)
    file = find_weight_files(tmp_path).files[-1]
    cut(file, share)
    with pytest.raises(UserError, match=r"the weight file is truncated or damaged \([\d,]+ bytes\)") as caught:
        list(iterate_tensors(find_weight_files(tmp_path)))
    assert caught.value.where == str(file)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_runs_code_does_not_run(tmp_path, is_zip):
    file, trace = tmp_path / "pytorch_model.bin", tmp_path / "trace"
    torch.save({**STATE, "more": RunsCode(trace)}, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match=r"holds more than plain tensors .* was not loaded, since it could run code"):
        list(iterate_tensors(find_weight_files(tmp_path)))
    assert not trace.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(file, weights_only=False)
    assert trace.exists(), "the pickle of this test runs nothing, so it shows nothing"


def test_a_zip_that_runs_code_is_refused_before_any_tensor_is_read(tmp_path):
    torch.save({"more": RunsCode(tmp_path / "trace")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="could run code"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(2, 2), r"more than plain tensors \(torch.nn.modules.linear.Linear\)"),
        (torch.ones(2), r"no flat mapping of names to tensors \(it holds a Tensor\)"),
        ({"state_dict": STATE}, r"no flat mapping of names to tensors \(under 'state_dict' it holds a dict\)"),
    ],
)
def test_other_pickles_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        find_weight_files(tmp_path)


def test_a_plain_pickle_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(pickle.dumps({"a": Path("b")}))
    with pytest.raises(UserError, match=r"weight file is truncated or damaged|more than plain tensors"):
        list(iterate_tensors(find_weight_files(tmp_path)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_git_lfs_pointer_is_told(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match=r"Git LFS pointer.*git lfs pull"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("name", ["../outside.bin", "/etc/outside.bin", "inner/outside.bin", 7])
def test_an_index_reaches_nothing_outside_its_folder(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(b"")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="the index names a file outside its folder"):
        find_weight_files(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": []}}', '{"a": 1}'])
def test_a_broken_index_is_told(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="this is not an index of weight files"):
        find_weight_files(tmp_path)


def test_missing_shards_are_counted_and_named(tmp_path):
    write_weights(STATE, tmp_path, "sharded_bin")
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(UserError, match=r"1 of 3 weight files are missing: pytorch_model-00002-of-00003\.bin"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "~/no-such-model", "a/b/c"])
def test_a_path_is_never_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match="there is no such folder"):
        resolve_model_folder(name)


def test_a_repository_is_fetched_without_its_code(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model_folder("THUDM/chatglm-6b") == tmp_path
    assert asked == {"THUDM/chatglm-6b": ["*.json", "*.model", "*.bin", "*.safetensors"]}


def test_a_repository_that_cannot_be_fetched_is_told(monkeypatch):
    def snapshot_download(*_args, **_kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"could not be fetched from Hugging Face \(ConnectionError\)"):
        resolve_model_folder("THUDM/chatglm-6b")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_the_whole_tensor_and_can_be_read_again(tmp_path, monkeypatch, layout):
    monkeypatch.setattr("chatglm_tuning.shards._BLOCK_BYTES", 3 * mmap.PAGESIZE)
    tensor = torch.randn(1000, 30, generator=torch.Generator().manual_seed(0)).half()
    (stored, *_) = (
        kept
        for kept in iterate_tensors(find_weight_files(write_weights({**STATE, "large": tensor}, tmp_path, layout)))
        if kept.key == "large"
    )
    for _ in range(2):
        blocks = list(stored.blocks())
        assert len(blocks) > 4
        assert torch.equal(torch.cat([block for _, block in blocks]), tensor)
        assert all(torch.equal(tensor[place], block) for place, block in blocks)


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's account of resident memory")
@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_what_was_read_of_a_mapped_file_leaves_the_memory(tmp_path, layout):
    def resident_of_files() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    tensor = torch.zeros(64 << 20, dtype=torch.int8).view(-1, 1024)
    files = find_weight_files(write_weights({"large": tensor}, tmp_path, layout))
    for stored in iterate_tensors(files):
        before = resident_of_files()
        assert stored.tensor.sum() == 0
        assert resident_of_files() - before > 60 << 20, "a whole read shows: else the next line could not fail"
        stored.release()
        assert all(block.sum() == 0 and resident_of_files() - before < 16 << 20 for _, block in stored.blocks())
