"""Inputs made to harm: refused with one message, or harmless. docs/security.md says what is trusted."""

import io
import json
import logging
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatglm_tuning.adapters.lora import read_lora_config
from chatglm_tuning.base_folder import load_tokenizer, read_config
from chatglm_tuning.checkpoint import LORA_CONFIG_FILE, LORA_FILE, MANIFEST_NAME, read_manifest
from chatglm_tuning.cli.chat import _print_answer
from chatglm_tuning.cli.log import TerminalFormatter
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.data.encode import EncodingSettings, encode_examples
from chatglm_tuning.data.records import Example
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import add_trained_lora, load_base, load_for_inference
from chatglm_tuning.shards import find_weight_files
from chatglm_tuning.training.state_files import check_state_files
from chatglm_tuning.wording import printable
from tests.fuzz.folders import saved, trust_again, write_adapter, write_base
from tests.model_folder import REPOSITORY, TOKENIZER_FILES, write_rows

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


class RunsCommand:
    """Runs a command of the shell when it is unpickled, which makes the file `trace`."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def plain_pickle(state: dict) -> bytes:
    return pickle.dumps(state, protocol=2)


PICKLES: dict[str, Callable[[dict], bytes]] = {
    "zip": saved,
    "the format before zip": lambda state: saved(state, is_zip=False),
    "a plain pickle": plain_pickle,
}


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A base, and a LoRA, a prefix and a checkpoint that were trained on it."""
    root = tmp_path_factory.mktemp("right")
    write_base(root / "model")
    write_adapter(root / "lora", root / "model", "lora")
    write_adapter(root / "prefix", root / "model", "ptuning")
    write_rows(root / "rows.json", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHATGLM_TUNING_CACHE", str(root / "cache"))
        assert run_command("train-lora", train(root, "--max_steps", "1", "--save_steps", "1")) == 0
    return root


def train(root: Path, *flags: str) -> list[str]:
    files = ["--model_name_or_path", str(root / "model"), "--data_path", str(root / "rows.json")]
    files += ["--output_dir", str(root / "run"), "--report_to", "none", "--dtype", "float32", "--tripwires", "warn"]
    return [*files, "--max_input_length", "64", "--max_output_length", "64", *flags]


@pytest.fixture
def place(right, tmp_path, monkeypatch):
    """A copy of the right folders. `trace` is what code that runs would leave."""
    root = Path(shutil.copytree(right, tmp_path / "place"))
    monkeypatch.setenv("CHATGLM_TUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return root


def refused(place: Path, command: str, argv: list[str], capsys) -> str:
    """What the command tells, which must be one refusal."""
    capsys.readouterr()
    assert run_command(command, argv) == 2
    told = capsys.readouterr().err
    assert told.count("error [") == 1, told
    assert not (place / "trace").exists()
    return told


def chat(place: Path, *flags: str) -> list[str]:
    return ["--model_name_or_path", str(place / "model"), "--dtype", "float32", "--max_length", "64", *flags]


# --- Pickles ---


@pytest.mark.parametrize("kind", PICKLES)
def test_the_pickles_of_these_tests_do_run_code(kind, tmp_path):
    """Else the tests below would show nothing."""
    data = PICKLES[kind]({"a": RunsCommand(tmp_path / "trace")})
    if kind == "a plain pickle":
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("where", ["model", "lora", "prefix"])
def test_a_pickle_with_code_in_a_folder_is_refused(kind, where, place, capsys):
    data = PICKLES[kind]({"transformer.prefix_encoder.a": torch.ones(1), "b": RunsCommand(place / "trace")})
    name = "adapter_model.bin" if where == "lora" else "pytorch_model.bin"
    (place / where / MANIFEST_NAME).unlink(missing_ok=True)
    for other in (place / where).glob("*.safetensors"):
        other.unlink()
    (place / where / name).write_bytes(data)
    flags = {"model": [], "lora": ["--lora_checkpoint"], "prefix": ["--ptuning_checkpoint"]}[where]
    told = refused(place, "chat", chat(place, *flags, *([str(place / where)] if flags else [])), capsys)
    assert "it could run code" in told or "truncated or damaged" in told
    assert str(place / where / name) in told


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt"])
def test_a_pickle_with_code_in_a_checkpoint_is_refused_before_the_base_is_loaded(
    kind, name, place, capsys, monkeypatch
):
    monkeypatch.setattr("chatglm_tuning.training.run.load_base", None)
    checkpoint = place / "run" / "checkpoint-1"
    (checkpoint / name).write_bytes(PICKLES[kind]({"state": RunsCommand(place / "trace")}))
    trust_again(checkpoint)
    argv = train(place, "--max_steps", "2", "--resume_from_checkpoint", str(checkpoint))
    assert name in refused(place, "train-lora", argv, capsys)


def test_trainings_arguments_in_a_checkpoint_are_never_read(place):
    checkpoint = place / "run" / "checkpoint-1"
    (checkpoint / "training_args.bin").write_bytes(saved({"a": RunsCommand(place / "trace")}))
    trust_again(checkpoint)
    argv = train(place, "--max_steps", "2", "--resume_from_checkpoint", str(checkpoint), "--overwrite_output_dir")
    assert run_command("train-lora", argv) == 0
    assert not (place / "trace").exists()


# --- Code in a folder ---


def test_code_beside_a_model_is_never_run(place):
    trace = place / "trace"
    for name in ("modeling_chatglm.py", "tokenization_chatglm.py", "configuration_chatglm.py", "__init__.py"):
        (place / "model" / name).write_text(f"open({str(trace)!r}, 'w')\nclass Any: pass\n")
    auto_map = {name: f"{name.lower()}_chatglm.Any" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}
    auto_map |= {"AutoModel": "modeling_chatglm.Any", "AutoTokenizer": ["tokenization_chatglm.Any", None]}
    for name in ("config.json", "tokenizer_config.json"):
        path = place / "model" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    assert run_command("chat", chat(place)) == 0
    assert not trace.exists()


@pytest.mark.parametrize(
    "setting",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "somebody/kernel"},
        {"dtype": "load", "torch_dtype": "hub"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"use_kernels": True, "base_model_tp_plan": {"a": "b"}, "custom_pipelines": {"a": {"impl": "x.y"}}},
    ],
)
def test_config_json_brings_in_nothing_that_a_model_has_no_setting_for(setting, place, monkeypatch):
    """transformers would download a kernel, which is code, by the first of these."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    base = load_base(str(place / "model"))
    assert base.config._attn_implementation == "sdpa"
    assert not any(hasattr(base.config, name) for name in ("quantization_config", "use_kernels", "custom_pipelines"))


def test_a_tokenizer_is_read_from_its_own_folder_alone(place):
    path = place / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_file": "/dev/zero"}))
    tokenizer = load_tokenizer(place / "model", read_config(place / "model"))
    assert tokenizer.vocab_file == str(place / "model" / "ice_text.model")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"layer_replication": [[0, 1]] * 10_000}, "layer_replication"),
        ({"target_modules": "(a+)+$"}, "target_modules"),
        ({"target_modules": "(.*)*query_key_value"}, "target_modules"),
        ({"rank_pattern": {".*" * 20 + "x": 4}}, "rank_pattern"),
        ({"exclude_modules": "((a|a)*)*"}, "exclude_modules"),
        ({"r": 10**9}, "rank 1000000000"),
        ({"rank_pattern": {"query_key_value": 10**9}}, "rank 1000000000"),
    ],
)
def test_an_adapters_configuration_can_neither_import_nor_hang_nor_fill_the_memory(setting, message, place):
    path = place / "lora" / LORA_CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    trust_again(place / "lora")
    base = load_base(str(place / "model"))
    start = time.monotonic()
    with pytest.raises(UserError, match=message):
        add_trained_lora(base, place / "lora")
    assert time.monotonic() - start < 10
    assert "antigravity" not in sys.modules


def test_a_pattern_of_targets_that_peft_writes_is_taken(place):
    path = place / "lora" / LORA_CONFIG_FILE
    targets = r"(transformer\.)?layers\.\d+\.attention\.query_key_value"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": f".*{targets}"}))
    trust_again(place / "lora")
    assert read_lora_config(place / "lora").target_modules == f".*{targets}"
    add_trained_lora(load_base(str(place / "model")), place / "lora")


@pytest.mark.parametrize(
    "sizes",
    [{"num_layers": 10**7}, {"hidden_size": 2**40, "num_attention_heads": 1}, {"vocab_size": 2**60}],
)
def test_sizes_that_no_model_has_are_refused_at_once(sizes, place):
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    start = time.monotonic()
    with pytest.raises(UserError, match="must be a whole number from 1 to"):
        load_base(str(place / "model"))
    assert time.monotonic() - start < 5


# --- Paths ---


@pytest.mark.parametrize("kind", ["pytorch_model.bin.index.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", ".", "a/../../b", "x" * 5000, "a\0b", "\udcff"]
)
def test_an_index_names_only_files_of_its_folder(kind, name, place, capsys):
    (place / "model" / "pytorch_model.bin").unlink()
    (place / "model" / kind).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    told = refused(place, "chat", chat(place), capsys)
    assert "outside its folder" in told or "weight files are missing" in told


def test_a_link_to_a_weight_file_is_followed_as_in_the_hubs_cache(place):
    """Whoever can make links in a folder could copy the file as well: a link tells nothing that is not readable."""
    weights = place / "model" / "pytorch_model.bin"
    weights.rename(place / "blob")
    weights.symlink_to(Path("..") / "blob")
    assert find_weight_files(place / "model").files == (weights,)
    load_base(str(place / "model"))


@pytest.mark.parametrize("name", ["../victim/precious", "/etc/passwd", "..", "", "a//b", "a\\..\\b", "link/precious"])
def test_a_manifest_cannot_have_files_outside_removed(name, place, capsys):
    """--overwrite_output_dir removes what the manifest of the earlier result names."""
    victim = place / "victim"
    victim.mkdir()
    (victim / "precious").write_text("kept")
    (place / "run" / "link").symlink_to(victim)
    path = place / "run" / MANIFEST_NAME
    content = json.loads(path.read_text())
    content.pop("sha256", None)
    path.write_text(json.dumps(content | {"files": {name: {"bytes": 4, "sha256": "0"}}}))
    told = refused(place, "train-lora", train(place, "--max_steps", "1", "--overwrite_output_dir"), capsys)
    assert "its manifest names a file outside its folder" in told
    assert (victim / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    "changes",
    [{"method": "evil"}, {"method": ["lora"]}, {"settings": [1]}, {"settings": None}, {"files": 3}, {"base_model": {}}],
)
def test_a_manifest_of_other_kinds_of_values_is_damaged(changes, place):
    path = place / "lora" / MANIFEST_NAME
    content = json.loads(path.read_text())
    content.pop("sha256", None)
    path.write_text(json.dumps(content | changes))
    with pytest.raises(UserError, match="the adapter is damaged"):
        read_manifest(place / "lora")


# --- Size ---


@pytest.mark.parametrize("depth", [950, 100_000])
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("model/config.json", "chat"),
        ("model/tokenizer_config.json", "chat"),
        ("model/pytorch_model.bin.index.json", "chat"),
        ("lora/adapter_config.json", "chat"),
        ("lora/chatglm_tuning.json", "chat"),
        ("run/checkpoint-1/trainer_state.json", "train-lora"),
        ("run.json", "train-lora"),
    ],
)
def test_deep_nesting_in_a_folder_is_told(depth, name, command, place, capsys):
    nested = "[" * depth + "]" * depth
    (place / name).write_text(f'{{"model_type": "chatglm", "format_version": 1, "a": {nested}}}')
    if name.startswith("lora") and not name.endswith(MANIFEST_NAME):
        (place / "lora" / MANIFEST_NAME).unlink()
    argv = chat(place, "--lora_checkpoint", str(place / "lora"))
    if command == "train-lora":
        trust_again(place / "run" / "checkpoint-1")
        argv = train(place, "--max_steps", "2", "--resume_from_checkpoint", str(place / "run" / "checkpoint-1"))
        argv += ["--train_args_file", str(place / "run.json")] if name == "run.json" else []
    capsys.readouterr()
    code = run_command(command, argv)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert code == 2 or (name.endswith("tokenizer_config.json") and depth == 950)
    assert len(told) < 1000


def test_a_configuration_of_gigabytes_is_not_read(place):
    with (place / "model" / "config.json").open("ab") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(UserError, match="it is larger than 64 MiB"):
        read_config(place / "model")


@pytest.mark.parametrize("size", [2**60, 2**63, 2**64 - 1, 200 << 20])
def test_a_header_of_safetensors_that_lies_is_told(size, place):
    for folder, name in ((place / "model", "model.safetensors"), (place / "lora", LORA_FILE)):
        (folder / name).write_bytes(size.to_bytes(8, "little") + b"{}" + b" " * 100)
    trust_again(place / "lora")
    with pytest.raises(UserError, match="truncated or damaged"):
        load_base(str(place / "model"))
    (place / "model" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="truncated or no safetensors"):
        add_trained_lora(load_base(str(place / "model")), place / "lora")


@pytest.mark.parametrize("data", [b"PK\x05\x06" + b"\0" * 18, b"PK\x06\x07\0\0\0\0" + b"\xff" * 60])
def test_a_zip_that_is_none_is_told(data, tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(data)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    with pytest.raises(UserError, match="truncated or damaged"):
        check_state_files(tmp_path)


def test_a_zip_of_several_disks_is_told(tmp_path):
    """Found by fuzzing: zipfile says of such a one neither that it is an archive nor that it is none."""
    end = b"PK\x05\x06" + b"\0" * 18
    locator = b"PK\x06\x07" + b"\1\0\0\0" + b"\0" * 8 + b"\2\0\0\0"
    (tmp_path / "optimizer.pt").write_bytes(b"\0" * 100 + locator + end)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 1}')
    with pytest.raises(UserError, match="truncated or damaged"):
        check_state_files(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", '{"global_step": "1"}', '{"global_step": 1, "no_such": 2}', "{"])
def test_a_state_that_trainer_cannot_read_is_told_before_the_load(text, place, capsys, monkeypatch):
    monkeypatch.setattr("chatglm_tuning.training.run.load_base", None)
    checkpoint = place / "run" / "checkpoint-1"
    (checkpoint / "trainer_state.json").write_text(text)
    trust_again(checkpoint)
    argv = train(place, "--max_steps", "2", "--resume_from_checkpoint", str(checkpoint))
    assert "this is no state of a training run" in refused(place, "train-lora", argv, capsys)


# --- Text ---


def test_control_tokens_and_templates_in_data_are_words(place, tmp_path):
    tokenizer = load_base(str(place / "model")).tokenizer
    text = "[gMASK]<sop>你好<eop>[MASK]</s><pad><s><unk>\n[Round 1]\n问：x\n答：<|endoftext|>"
    (example,) = encode_examples([Example(text, text)], tokenizer, EncodingSettings(400, 400))
    controls = [i for i in example.input_ids if tokenizer.sp_model.is_control(i)]
    assert controls == [tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_what_a_terminal_would_obey_is_written_out():
    assert printable(f"a{ESCAPE}b\n\tc") == r"a\x1b]0;owned\x07\x1b[2J\x9b31m\u202eb" + "\n\tc"
    assert printable("你好，world ü 👋🏽") == "你好，world ü 👋🏽"


def test_escape_sequences_in_files_reach_no_terminal(place, capsys):
    """In the name of the base that a manifest tells, in the name of a tensor, and in a row."""
    manifest = place / "lora" / MANIFEST_NAME
    content = json.loads(manifest.read_text())
    content.pop("sha256", None)
    content["base_model"] |= {"name_or_path": f"base{ESCAPE}", "hidden_size": 9}
    manifest.write_text(json.dumps(content))
    told = refused(place, "chat", chat(place, "--lora_checkpoint", str(place / "lora")), capsys)
    assert r"base\x1b]0;owned\x07" in told
    state = load_file(place / "lora" / LORA_FILE)
    save_file({**state, f"more{ESCAPE}": torch.ones(2)}, place / "lora" / LORA_FILE)
    manifest.unlink()
    told += refused(place, "chat", chat(place, "--lora_checkpoint", str(place / "lora")), capsys)
    rows = place / "rows.json"
    rows.write_text(json.dumps({f"k{ESCAPE}": 1}) + "\n" + json.dumps({"messages": [{"role": ESCAPE, "content": "a"}]}))
    told += refused(place, "train-lora", train(place, "--max_steps", "1", "--overwrite_output_dir"), capsys)
    assert (
        run_command("data", ["check", *chat(place)[:2], "--data_path", str(rows), "--output_dir", str(place / "check")])
        == 1
    )
    told += capsys.readouterr().out
    assert not set(told) & set("\x1b\x07\x9b\u202e"), repr(told)


def test_escape_sequences_in_the_log_are_written_out():
    record = logging.LogRecord("chatglm_tuning", logging.WARNING, "", 0, "adapter %s", (ESCAPE,), None)
    assert TerminalFormatter("%(message)s").format(record) == f"adapter {printable(ESCAPE)}"


def test_escape_sequences_in_an_answer_are_written_out(capsys):
    session = SimpleNamespace(dropped_rounds=0, reply=lambda _query, stop: (piece for piece in ["a\x1b", "[2J你\n"]))
    _print_answer(session, "q")
    assert capsys.readouterr().out == "a\\x1b[2J你\n\n"


def test_a_model_without_its_own_files_takes_none_of_the_working_directory(place, monkeypatch):
    """A bare name is a folder, or one of Hugging Face's."""
    monkeypatch.chdir(place)
    for name in TOKENIZER_FILES:
        (place / "model" / name).rename(place / name)
    with pytest.raises(UserError, match=r"the folder has no ice_text\.model"):
        load_for_inference("model")
    assert REPOSITORY.is_dir()
