"""Inputs made to harm: refused with one message, or harmless. docs/security.md says what is trusted."""

import gzip
import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import chatglm_tuning.data.rows as rows_module
from chatglm_tuning.adapters.lora import read_lora_config
from chatglm_tuning.checkpoint import LORA_CONFIG_FILE, LORA_FILE, MANIFEST_NAME, read_manifest
from chatglm_tuning.cli.chat import _print_answer
from chatglm_tuning.cli.log import TerminalFormatter
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.data.encode import EncodingSettings, encode_examples
from chatglm_tuning.data.records import Example, read_records
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import add_trained_lora, load_base, load_for_inference, load_tokenizer, read_config
from chatglm_tuning.shards import find_weight_files, iterate_tensors, load_bin
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


PEAK = """
import sys
from pathlib import Path
from chatglm_tuning.data.records import iterate_examples
from chatglm_tuning.data.rows import BadRows
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) >> 10
before, bad, count = peak(), BadRows(), 0
for example in iterate_examples([Path(sys.argv[1])], bad):
    count += 1
print(count, bad.count, peak() - before)
print(*bad.shown, sep="\\n")
"""
MIB = 1 << 20


def read_in_a_process(file: Path) -> tuple[int, int, int, str]:
    """Read a data file; returns examples, bad rows, MiB of memory that this took, and what is told."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's account of resident memory")
    done = subprocess.run([sys.executable, "-c", PEAK, str(file)], capture_output=True, text=True, check=True)
    numbers, told = done.stdout.split("\n", 1)
    count, bad, megabytes = map(int, numbers.split())
    return count, bad, megabytes, told


@pytest.mark.parametrize(
    "start", ['{"content": "a", "summary": "', "", " \n [ {"], ids=["a row", "nothing", "an array"]
)
def test_a_gigabyte_without_a_newline_takes_little_memory(start, tmp_path):
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"content": "q", "summary": "a"}\n' if "[" not in start else b"")
        stream.write(start.encode())
        stream.truncate(1 << 30)  # a hole of zeros takes no room on the disk
        stream.seek(0, os.SEEK_END)
        stream.write(b'"}\n{"content": "q", "summary": "a"}\n')
    count, bad, megabytes, told = read_in_a_process(file)
    assert (count, bad) == ((0, 1) if "[" in start else (2, 1))
    assert megabytes < 200, told
    assert f"{file}:2: the row is longer than 16 MiB, which is the most; make" in told


def test_a_row_of_the_most_bytes_is_read_and_one_more_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "MOST_ROW_BYTES", 1000)
    frame = len('{"content": "q", "summary": ""}') + 1  # and its newline
    rows = ['{"content": "q", "summary": "%s"}' % ("a" * (1000 - frame + more)) for more in (0, 1)]
    lines, array = tmp_path / "lines", tmp_path / "array"
    lines.write_text("\n".join([*rows, rows[0]]) + "\n")
    with pytest.raises(UserError, match=r"lines:2: the row is longer than[^\n]*\n1 bad row in all") as caught:
        read_records([lines], skip_bad_rows=False)
    assert "\n" in caught.value.what
    assert len(read_records([lines], skip_bad_rows=True).examples) == 2
    array.write_text(f"[{rows[0]},\n{rows[0]},\n{rows[1]}{' ' * 3}]")
    assert len(read_records([array]).examples) == 3  # a row of an array has no newline of its own
    array.write_text(f'[{rows[0]},\n{rows[1][:-2]}aa"}}]')
    with pytest.raises(UserError, match="array:2: the row is longer than"):
        read_records([array])


def test_a_bomb_of_gzip_is_refused_while_it_is_unpacked(tmp_path):
    """600 MiB in less than 6: rows, and blank lines."""
    for name, unit in {
        "rows": b'{"content": "q", "summary": "' + b"a" * MIB + b'"}\n',
        "blank": b" " * MIB + b"\n",
    }.items():
        file = tmp_path / name
        with gzip.open(file, "wb", compresslevel=1) as stream:
            for _ in range(600):
                stream.write(unit)
        assert file.stat().st_size < 6 * MIB
        _, _, megabytes, told = read_in_a_process(file)
        assert megabytes < 200
        assert "the gzip data unpacks to more than" in told


def test_a_file_that_compresses_well_is_read(tmp_path):
    file = tmp_path / "rows.json.gz"
    data = b'{"content": "q", "summary": "the same answer"}\n' * 20_000
    file.write_bytes(gzip.compress(data))
    assert file.stat().st_size * 200 < len(data), "it does not compress well, so this shows nothing"
    assert len(read_records([file]).examples) == 20_000


def test_a_conversation_whose_prompts_would_fill_the_memory_is_a_bad_row(tmp_path):
    file = tmp_path / "rows.json"
    turns = [{"role": role, "content": "x" * 30} for _ in range(6000) for role in ("user", "assistant")]
    file.write_text(json.dumps({"messages": turns}))
    with pytest.raises(UserError, match=r'rows\.json:1: "messages" turn \d+: the conversation is too long'):
        read_records([file])
    file.write_text(json.dumps({"messages": turns[:1000]}))
    assert len(read_records([file]).examples) == 500


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "text", [DEEP, '{"content": ' * 50_000, f'[{{"content": {DEEP}', '{"messages": [{"role": ' + DEEP]
)
def test_deep_nesting_in_data_is_a_bad_row(text, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"rows\.json:1: not JSON: nested too deeply"):
        read_records([file])


@pytest.mark.parametrize("depth", [200, 900, 960, 990])
def test_nesting_that_json_just_takes_is_told_in_few_words(depth, tmp_path):
    file = tmp_path / "rows.json"
    nested = "[" * depth + "]" * depth
    rows = [
        f'{{"messages": [{{"role": {nested}, "content": "a"}}]}}',
        f'{{"content": {nested}, "summary": "a"}}',
        nested,
    ]
    file.write_text("\n".join([*rows, f'{{"prompt": "q", "response": {nested}}}']))
    with pytest.raises(UserError) as caught:
        read_records([file], needs_answers=False)
    assert max(map(len, str(caught.value).splitlines())) < 400


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


def zip_of(content: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return stream.getvalue()


def test_a_bomb_of_zip_is_refused_before_it_is_unpacked(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(zip_of({"archive/data.pkl": b"\0" * (64 * MIB), "archive/version": b"3\n"}))
    assert file.stat().st_size < MIB
    with pytest.raises(UserError, match="the archive is compressed"):
        find_weight_files(tmp_path)


def test_a_zip_whose_entries_lie_in_the_same_bytes_is_refused(tmp_path):
    """Each of these is whole, and together they are larger than the file."""
    whole = zip_of({"a": b"x" * 1000}, zipfile.ZIP_STORED)
    start = whole.rindex(b"PK\x01\x02")
    end = whole.rindex(b"PK\x05\x06")
    entry, ending = whole[start:end], bytearray(whole[end:])
    ending[8:12] = (100).to_bytes(2, "little") * 2
    ending[12:16] = (100 * len(entry)).to_bytes(4, "little")
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(whole[:start] + entry * 100 + bytes(ending))
    assert len(zipfile.ZipFile(file).infolist()) == 100
    with pytest.raises(UserError, match="says that it holds more than its own size"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    "state",
    [
        {"a": torch.zeros(1).expand(1 << 40)},
        {str(number): view for view in [torch.zeros(1 << 16)] for number in range(50)},
        {"a": torch.empty(1 << 40, device="meta")},
        {"a": torch.eye(3).to_sparse()},
        {3: torch.ones(2)},
    ],
    ids=["no strides", "many of one storage", "meta", "sparse", "a number as name"],
)
def test_tensors_that_are_larger_than_their_file_or_none_are_refused(state, is_zip, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match="no flat mapping of names to tensors"):
        load_bin(file)


def test_tied_tensors_are_no_lie(tmp_path):
    weight = torch.ones(1000, 10)
    torch.save({"a": weight, "b": weight, "c": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    assert len(list(iterate_tensors(find_weight_files(tmp_path)))) == 3


@pytest.mark.parametrize("size", [2**60, 2**63, 2**64 - 1, 200 * MIB])
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
