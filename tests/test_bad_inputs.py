"""Every bad input: one message that says what, where and what to do, exit code 2, and nothing read or written.

Each row changes one thing in a place where everything else is right, and runs a real command.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import chatglm_tuning.loading
from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape
from chatglm_tuning.checkpoint import Manifest, save_adapter_files, write_manifest
from chatglm_tuning.cli.main import run_command
from chatglm_tuning.loading import add_prefix, load_base
from tests.model_folder import REPOSITORY, write_rows, write_tiny_model
from tests.weight_layouts import read_released_state, write_weights

COMMANDS = {"chat": "cli_demo.py", "train-lora": "train_lora.py", "train-ptuning": "train_ptuning.py"}
# What a message for users never holds.
INTERNALS = (
    "Traceback",
    "Error:",
    "Error(",
    "<class",
    " object at 0x",
    "None",
    "'lora'",
    "weights_only",
    "state_dict(",
)


@dataclass(frozen=True)
class Place:
    """A folder in which all is right: model, rows, and a LoRA adapter and a prefix that were trained on the model."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def rows(self) -> Path:
        return self.root / "rows.json"

    @property
    def lora(self) -> Path:
        return self.root / "lora"

    @property
    def prefix(self) -> Path:
        return self.root / "prefix"

    @property
    def output(self) -> Path:
        return self.root / "output"

    def arguments(self, command: str) -> list[str]:
        """The flags of a run in which nothing is wrong."""
        shared = ["--model_name_or_path", str(self.model), "--dtype", "float32"]
        if command == "chat":
            return [*shared, "--max_length", "64"]
        method = ["--pre_seq_len", "3"] if command == "train-ptuning" else []
        lengths = ["--max_input_length", "64", "--max_output_length", "64", "--max_steps", "1"]
        return [*shared, "--data_path", str(self.rows), "--output_dir", str(self.output), *lengths, *method]

    def snapshot(self) -> Mapping[str, Any]:
        """Everything below the place: content, permissions and time of change."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            facts = path.lstat()
            content = path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(self.root))] = (content, facts.st_mode, facts.st_mtime_ns)
        return found


Change = Callable[[Place], list[str] | None]


@dataclass(frozen=True)
class Bad:
    """One row of the table.

    says: fragments of the message, {root} being the place.
    change: makes the input bad; returns the flags that belong to it.
    commands: which are run with it.
    reads_weights: whether it can only be found in the weights themselves.
    without: a flag of the right ones (with its value) that is left out.
    """

    name: str
    says: tuple[str, ...]
    change: Change
    commands: tuple[str, ...] = ("chat", "train-lora")
    reads_weights: bool = False
    without: str = field(default="")


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def flags(*words: str) -> Change:
    return lambda place: [word.format(root=place.root) for word in words]


def config(**changes: Any) -> Change:
    def change(place: Place) -> None:
        path = place.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes), encoding="utf-8")

    return change


def text(name: str, content: str | bytes, *words: str) -> Change:
    def change(place: Place) -> list[str]:
        (place.root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return flags(*words)(place)

    return change


def remove(name: str) -> Change:
    return lambda place: (place.root / name).unlink()


def weights(alter: Callable[[dict[str, torch.Tensor]], Any], layout: str = "bin") -> Change:
    def change(place: Place) -> None:
        state = read_released_state(place.model)
        alter(state)
        (place.model / "pytorch_model.bin").unlink()
        write_weights(state, place.model, layout)

    return change


def unlink(name: str) -> Callable[[Place], None]:
    return lambda place: (place.model / name).unlink()


def cut(name: str) -> Callable[[Place], None]:
    def shorten(place: Place) -> None:
        content = (place.model / name).read_bytes()
        (place.model / name).write_bytes(content[: len(content) * 2 // 3])

    return shorten


def in_layout(layout: str, then: Callable[[Place], None]) -> Change:
    def change(place: Place) -> None:
        weights(lambda _: None, layout)(place)
        then(place)

    return change


def pickled(content: Callable[[Place], Any]) -> Change:
    return lambda place: torch.save(content(place), place.model / "pytorch_model.bin")


def index_of(name: str) -> Change:
    def change(place: Place) -> None:
        index = {"weight_map": {"lm_head.weight": name}}
        (place.model / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")

    return change


def flip_a_bit(name: str, *words: str) -> Change:
    def change(place: Place) -> list[str]:
        content = bytearray((place.root / name).read_bytes())
        content[-20] ^= 1
        (place.root / name).write_bytes(content)
        return flags(*words)(place)

    return change


def other_base(*words: str, with_manifest: bool = True) -> Change:
    """Put a base with another hidden size under the adapters."""

    def change(place: Place) -> list[str]:
        shutil.rmtree(place.model)
        write_tiny_model(place.model, hidden_size=64)
        if not with_manifest:
            (place.lora / "chatglm_tuning.json").unlink()
        return flags(*words)(place)

    return change


def quantized_weights(**changes: Any) -> Change:
    """The layout of chatglm-6b-int4, and `changes` in its config.json."""

    def change(place: Place) -> None:
        model = load_base(str(place.model), quantization_bit=4, dtype=torch.float16).model
        torch.save(
            {key: value.detach() for key, value in model.state_dict().items()}, place.model / "pytorch_model.bin"
        )
        config(**changes)(place)

    return change


def checkpoint(source: str, *words: str, is_torn: bool = False) -> Change:
    """Make a checkpoint out of an adapter's folder."""

    def change(place: Place) -> list[str]:
        folder = shutil.copytree(place.root / source, place.root / "run" / "checkpoint-2")
        if is_torn:
            (folder / "chatglm_tuning.json").unlink()
        (folder / "trainer_state.json").write_text("{}", encoding="utf-8")
        return flags(*words)(place)

    return change


def earlier_result(*words: str) -> Change:
    def change(place: Place) -> list[str]:
        shutil.copytree(place.lora, place.output)
        return flags(*words)(place)

    return change


TRAIN = ("train-lora", "train-ptuning")
DOWNLOAD = "Give the folder of a downloaded ChatGLM-6B"
ONE_DOWNLOAD = "Take the weights and config.json from one download of ChatGLM-6B."
LORA = ("--lora_checkpoint", "{root}/lora")
PREFIX = ("--ptuning_checkpoint", "{root}/prefix")
RESUME = "--resume_from_checkpoint"
LATER = {"multi_query_attention": True, "ffn_hidden_size": 13696, "rmsnorm": True, "kv_channels": 128}
QKV = "transformer.layers.0.attention.query_key_value.weight"

# fmt: off
MODEL_FOLDERS = [
    Bad("ChatGLM2-6B", ("{root}/model: this folder holds ChatGLM2-6B or ChatGLM3-6B", "first ChatGLM-6B"),
        config(**LATER, padded_vocab_size=65024, num_layers=28)),
    Bad("ChatGLM3-6B", ("{root}/model: this folder holds ChatGLM2-6B or ChatGLM3-6B", "first ChatGLM-6B"),
        config(**LATER, padded_vocab_size=65024, num_layers=28, classifier_dropout=None)),
    Bad("glm-4-9b", ("{root}/model: this folder holds glm-4-9b", "first ChatGLM-6B"),
        config(**LATER, padded_vocab_size=151552, num_layers=40)),
    Bad("another model", ("{root}/model: config.json says model_type 'llama'", "only 'chatglm'"),
        config(model_type="llama")),
    Bad("no model_type", ("{root}/model: config.json says no model_type", "only 'chatglm'"),
        text("model/config.json", '{"hidden_size": 32}')),
    Bad("the earlier revision", ("earlier revision of ChatGLM-6B (vocabulary 150528", "Use the final revision"),
        config(vocab_size=150528)),
    Bad("a tokenizer of the earlier revision",
        ("{root}/model: tokenizer and model are of different revisions", "20000 image tokens", "from one download"),
        text("model/tokenizer_config.json", '{"num_image_tokens": 20000}')),
    Bad("special ids of the earlier revision",
        ("different revisions: bos_token_id is", "and 150004 in config.json", "from one download"),
        config(bos_token_id=150004, eos_token_id=150005)),
    Bad("a tokenizer larger than the model",
        ("different revisions: the tokenizer has", "config.json says vocab_size 99"),
        config(vocab_size=99)),
    Bad("weights of the earlier revision",
        ("{root}/model: weights and tokenizer are of different revisions",
         "has 150528 rows, config.json says vocab_size",
         "from one download"),
        weights(lambda state: state.update({"transformer.word_embeddings.weight": torch.zeros(150528, 32).half()})),
        reads_weights=True),
    Bad("a head of the earlier revision", ("lm_head.weight has 150528 rows", "from one download"),
        weights(lambda state: state.update({"lm_head.weight": torch.zeros(150528, 32).half()}), "safetensors"),
        reads_weights=True),
    Bad("a missing shard",
        ("{root}/model: 1 of 3 weight files are missing: pytorch_model-00002-of-00003.bin", "Copy or"),
        in_layout("sharded_bin", unlink("pytorch_model-00002-of-00003.bin"))),
    Bad("a truncated .bin", ("{root}/model/pytorch_model-00003-of-00003.bin: the weight file is truncated", "again"),
        in_layout("sharded_bin", cut("pytorch_model-00003-of-00003.bin"))),
    Bad("a truncated .safetensors",
        ("{root}/model/model-00001-of-00003.safetensors: the weight file is truncated", "again"),
        in_layout("sharded_safetensors", cut("model-00001-of-00003.safetensors"))),
    Bad("a truncated .bin of the older format",
        ("{root}/model/pytorch_model.bin: the weight file is truncated", "again"),
        in_layout("legacy_bin", cut("pytorch_model.bin")), reads_weights=True),
    Bad("a Git LFS pointer", ("{root}/model/pytorch_model.bin: this is a Git LFS pointer", "Run `git lfs pull`"),
        text("model/pytorch_model.bin", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")),
    Bad("a pickle that runs code",
        ("{root}/model/pytorch_model.bin: the file holds more than plain tensors", "it could run code", "safetensors"),
        pickled(lambda place: {"lm_head.weight": RunsCode(place.root / "trace")})),
    Bad("a pickled module", ("more than plain tensors (torch.nn.modules.linear.Linear)", "as safetensors"),
        pickled(lambda _: nn.Linear(2, 2))),
    Bad("a state dict inside a dict",
        ("no flat mapping of names to tensors (under 'module' it holds a dict)", "best as"),
        pickled(lambda _: {"module": {"lm_head.weight": torch.ones(2)}})),
    Bad("an index that leaves its folder",
        ("{root}/model/pytorch_model.bin.index.json: the index names a file outside its folder: '../rows.json'",
         "again"),
        index_of("../rows.json")),
    Bad("a broken index", ("pytorch_model.bin.index.json: this is not an index of weight files", "again"),
        text("model/pytorch_model.bin.index.json", "{")),
    Bad("a missing tensor",
        ("{root}/model: the weights do not fit config.json: 1 of its tensors are missing: " + QKV, ONE_DOWNLOAD),
        weights(lambda state: state.pop(QKV)), reads_weights=True),
    Bad("an unexpected tensor", ("it has a tensor 'more.weight', which ChatGLM-6B has not", ONE_DOWNLOAD),
        weights(lambda state: state.update({"more.weight": torch.ones(2)})), reads_weights=True),
    Bad("a tensor of another shape", (f"{QKV} is (3, 3), config.json asks for (96, 32)", ONE_DOWNLOAD),
        weights(lambda state: state.update({QKV: torch.ones(3, 3)})), reads_weights=True),
    Bad("no weights", ("{root}/model: the folder has no weights", DOWNLOAD), remove("model/pytorch_model.bin")),
    Bad("no tokenizer",
        ("{root}/model: the folder has no ice_text.model", "Copy it from"), remove("model/ice_text.model")),
    Bad("a damaged tokenizer", ("{root}/model/ice_text.model: this is no readable SentencePiece model", "again"),
        text("model/ice_text.model", b"\0\1\2" * 99)),
    Bad("a broken tokenizer_config.json", ("{root}/model: the tokenizer cannot be read", "again"),
        text("model/tokenizer_config.json", '{"num_image')),
    Bad("no config.json", ("{root}/model: the folder has no config.json", DOWNLOAD), remove("model/config.json")),
    Bad("a broken config.json", ("{root}/model/config.json: this is not JSON", "line 1", "again"),
        text("model/config.json", '{"model_type": "chat')),
    Bad("a config.json that is a list", ("{root}/model/config.json: this is not a JSON object", "again"),
        text("model/config.json", "[]")),
    Bad("a size that is no number",
        ("{root}/model/config.json: hidden_size must be a whole number from 1 to 1048576, not 'large'", "again"),
        config(hidden_size="large")),
    Bad("heads that do not divide the hidden size",
        ("{root}/model/config.json: ", "hidden_size 32 cannot be divided by num_attention_heads 5", "again"),
        config(num_attention_heads=5)),
    Bad("int4 weights and 8 bits asked for",
        ("{root}/model: the folder holds int4 weights, and --quantization_bit says 8", "Leave --quantization_bit out"),
        lambda place: [*(quantized_weights(quantization_bit=4)(place) or []), "--quantization_bit", "8"]),
    Bad("int4 weights that config.json does not tell of",
        ("the weights do not fit config.json: ", "quantization_bit", ONE_DOWNLOAD),
        quantized_weights(), reads_weights=True),
    Bad("3 bits", ("config.json says quantization_bit 3; 4 and 8 are supported", "Give a full-precision"),
        config(quantization_bit=3)),
    Bad("quantised embeddings", ("{root}/model: this folder has quantised embeddings", "Use chatglm-6b-int4"),
        config(quantization_bit=4, quantization_embeddings=True)),
    Bad("no model folder", ("{root}/no/such/model: there is no such folder", "--model_name_or_path"),
        flags("--model_name_or_path", "{root}/no/such/model")),
    Bad("a file as the model folder", ("{root}/rows.json: this is a file, not a folder", "--model_name_or_path"),
        flags("--model_name_or_path", "{root}/rows.json")),
]

ADAPTERS = [
    Bad("a prefix as LoRA", ("{root}/prefix: the folder holds a prefix", "Give it with --ptuning_checkpoint"),
        flags("--lora_checkpoint", "{root}/prefix"), ("chat",)),
    Bad("a LoRA adapter as prefix", ("{root}/lora: the folder holds a LoRA adapter", "Give it with --lora_checkpoint"),
        flags("--ptuning_checkpoint", "{root}/lora"), ("chat",)),
    Bad("a LoRA adapter as the first prefix", ("{root}/lora: the folder holds a LoRA adapter", "not a prefix"),
        flags("--ptuning_checkpoint", "{root}/lora"), ("train-ptuning",)),
    Bad("no adapter folder", ("{root}/none: there is no such folder", "Give the folder of a trained adapter"),
        flags("--lora_checkpoint", "{root}/none"), ("chat",)),
    Bad("the base as an adapter", ("{root}/model: there is no prefix in it", "Give the folder of a P-Tuning v2 run"),
        flags("--ptuning_checkpoint", "{root}/model"), ("chat", "train-ptuning")),
    Bad("a prefix of another base",
        ("{root}/prefix: the prefix was trained for another base model", "(3, 128)", "(3, 256)"),
        other_base(*PREFIX), ("chat", "train-ptuning")),
    Bad("a LoRA adapter of another base",
        ("{root}/lora: the adapter was trained on a base of 2 layers and hidden size 32, and this one has 2 and 64",
         "Give the base that it was trained on"),
        other_base(*LORA), ("chat",)),
    Bad("a LoRA adapter of another base, without a manifest",
        ("{root}/lora: the LoRA adapter does not fit this base model", "is needed", "Give the base that"),
        other_base(*LORA, with_manifest=False), ("chat",), reads_weights=True),
    Bad("another pre_seq_len than the prefix has",
        ("{root}/prefix: the checkpoint holds a prefix of pre_seq_len 3", "the flags say pre_seq_len 5",
         "Leave --pre_seq"),
        flags(*PREFIX, "--pre_seq_len", "5"), ("chat", "train-ptuning")),
    Bad("a projection that the prefix has not",
        ("{root}/prefix: the checkpoint holds a prefix of pre_seq_len 3 without", "Leave --pre_seq_len"),
        flags(*PREFIX, "--prefix_projection"), ("chat", "train-ptuning")),
    Bad("a bit of the LoRA adapter flipped",
        ("{root}/lora/adapter_model.safetensors: the adapter is damaged", "earlier"),
        flip_a_bit("lora/adapter_model.safetensors", *LORA), ("chat",)),
    Bad("a bit of the prefix flipped", ("{root}/prefix/prefix_encoder.safetensors: the adapter is damaged", "earlier"),
        flip_a_bit("prefix/prefix_encoder.safetensors", *PREFIX), ("chat", "train-ptuning")),
    Bad("an adapter of another method of peft",
        ("peft's method IA3", "only LoRA can be loaded", "Give the folder of a LoRA"),
        lambda place: [
            *(text("lora/adapter_config.json", '{"peft_type": "IA3", "target_modules": ["dense"]}')(place) or []),
            *((place.lora / "chatglm_tuning.json").unlink() or []),
            *flags(*LORA)(place),
        ],
        ("chat",)),
    Bad("two adapters", ("--lora_checkpoint and --ptuning_checkpoint are both given", "Chat with one adapter"),
        flags(*LORA, *PREFIX), ("chat",)),
]

RUNS = [
    Bad("nothing to resume from", ("{root}/none: there is no such folder", "Give a checkpoint-N folder"),
        flags(RESUME, "{root}/none"), TRAIN),
    Bad("a folder without checkpoints", ("{root}/model: there is neither a whole checkpoint nor an adapter", "Give a"),
        flags(RESUME, "{root}/model"), ("train-lora",)),
    Bad("a torn checkpoint", ("{root}/run/checkpoint-2: the checkpoint is not whole", "Give an earlier checkpoint"),
        checkpoint("lora", RESUME, "{root}/run/checkpoint-2", is_torn=True), ("train-lora",)),
    Bad("only a torn checkpoint", ("{root}/run: there is neither a whole checkpoint", "Give a checkpoint-N folder"),
        checkpoint("lora", RESUME, "{root}/run", is_torn=True), ("train-lora",)),
    Bad("a checkpoint of LoRA for a prefix",
        ("{root}/run/checkpoint-2: the checkpoint is of LoRA, and this run is of P-Tuning v2", "Resume"),
        checkpoint("lora", RESUME, "{root}/run/checkpoint-2"), ("train-ptuning",)),
    Bad("a checkpoint of a prefix for LoRA",
        ("{root}/run/checkpoint-2: the checkpoint is of P-Tuning v2, and this run is of LoRA", "Resume"),
        checkpoint("prefix", RESUME, "{root}/run"), ("train-lora",)),
    Bad("a damaged checkpoint",
        ("{root}/run/checkpoint-2/adapter_model.safetensors: the adapter is damaged", "earlier"),
        lambda place: [
            *(checkpoint("lora")(place) or []),
            *(flip_a_bit("run/checkpoint-2/adapter_model.safetensors", RESUME, "{root}/run/checkpoint-2")(place) or []),
        ],
        ("train-lora",)),
    Bad("a result in output_dir",
        ("{root}/output: output_dir already holds a result (chatglm_tuning.json)", "--overwrite"),
        earlier_result(), TRAIN),
    Bad("a bad file and a result that may be overwritten",
        ("{root}/none.json: there is no such file", "Check the path"),
        earlier_result("--overwrite_output_dir", "--data_path", "{root}/none.json"), TRAIN),
    Bad("a file as output_dir", ("{root}/rows.json: output_dir is a file", "Give a folder"),
        flags("--output_dir", "{root}/rows.json"), TRAIN),
    Bad("an output_dir below a file", ("{root}/rows.json/run: output_dir cannot be written (Not a", "Give a"),
        flags("--output_dir", "{root}/rows.json/run"), TRAIN),
    Bad("no output_dir", ("--output_dir is missing", "Give the folder to write to"), flags(), TRAIN,
        without="--output_dir"),
    Bad("no data_path", ("--data_path is missing", "Give one or more files"), flags(), TRAIN, without="--data_path"),
    Bad("no data file", ("{root}/none.json: there is no such file", "Check the path"),
        flags("--data_path", "{root}/none.json"), TRAIN),
    Bad("no file to evaluate on", ("{root}/none.json: there is no such file", "Check the path"),
        flags("--eval_path", "{root}/none.json"), TRAIN),
    Bad("a folder as data file", ("{root}/model: this is a folder, not a file", "Give the data files"),
        flags("--data_path", "{root}/model"), TRAIN),
    Bad("an empty data file",
        ("{root}/rows.json:1: the file is empty", "Mend the files"), text("rows.json", ""), TRAIN),
    Bad("a row that is not JSON", ("{root}/rows.json:2: not JSON", "1 bad row in all", "--skip_bad_rows"),
        text("rows.json", '{"content": "a", "summary": "b"}\n{"content": "a",\n'), TRAIN),
    Bad("rows of no known shape", ("{root}/rows.json:1: no known shape: its fields are 'q', 'a'", "--skip_bad_rows"),
        text("rows.json", '{"q": "a", "a": "b"}\n'), TRAIN),
    Bad("a row without its answer", ('{root}/rows.json:1: "summary" is missing', "2 bad rows in all"),
        text("rows.json", '{"content": "a"}\n{"content": "a", "summary": ""}\n'), TRAIN),
    Bad("lengths beyond the context",
        ("max_input_length 200 and max_output_length 100 make 300", "256 tokens", "Lower"),
        flags("--max_input_length", "200", "--max_output_length", "100"), TRAIN),
    Bad("a length of nothing", ("--max_input_length must be a whole number of at least", "not '0'"),
        flags("--max_input_length", "0"), TRAIN),
    Bad("a rank of nothing", ("--lora_rank must be a whole number of at least 1, not '0'", "Correct --lora_rank"),
        flags("--lora_rank", "0"), ("train-lora",)),
    Bad("an unknown target", ("--lora_target must be", "not 'query_value'", "If query_key_value was meant"),
        flags("--lora_target", "query_value"), ("train-lora",)),
    Bad("5 bits", ("--quantization_bit must be 4 or 8, not 5.", "Correct --quantization_bit"),
        flags("--quantization_bit", "5"), (*TRAIN, "chat")),
    Bad("a whole model in 4 bits", ("a base in 4 bits cannot be tuned in full", "Give --pre_seq_len"),
        flags("--quantization_bit", "4"), ("train-ptuning",), without="--pre_seq_len"),
    Bad("no arguments file", ("{root}/none.json: the file cannot be read", "Give the path"),
        flags("--train_args_file", "{root}/none.json"), TRAIN),
    Bad("a broken arguments file",
        ("{root}/run.json:2: this is not JSON", "Give the path of a file with one JSON object"),
        text("run.json", '{"seed": 1,\n "max_steps": }', "--train_args_file", "{root}/run.json"), TRAIN),
    Bad("an unknown key", ('{root}/run.json:2: "learning_rat" is no setting of train-', 'If "learning_rate" was meant'),
        text("run.json", '{"seed": 1,\n "learning_rat": 1}', "--train_args_file", "{root}/run.json"), TRAIN),
    Bad("a key of the wrong kind", ('{root}/run.json:1: "learning_rate" must be a number above 0', "Correct"),
        text("run.json", '{"learning_rate": "fast"}', "--train_args_file", "{root}/run.json"), TRAIN),
    Bad("an unknown flag", ("--model_nam is no flag of", "was meant, write that"), flags("--model_nam", "x"),
        (*TRAIN, "chat")),
    Bad("a flag without its value", ("--seed: expected one argument", "--help"), flags("--seed"), (*TRAIN, "chat")),
]

CHATS = [
    Bad("a negative temperature", ("--temperature must be a number above 0, not '-1'", "pass --greedy"),
        flags("--temperature", "-1"), ("chat",)),
    Bad("a top_p above 1",
        ("--top_p must be a number", "not '2'", "Correct --top_p"), flags("--top_p", "2"), ("chat",)),
    Bad("a prefix's length without a prefix",
        ("--pre_seq_len describes a prefix, and none is given", "--ptuning_check"),
        flags("--pre_seq_len", "3"), ("chat",)),
]
# fmt: on

TABLE = [(bad, command) for bad in (*MODEL_FOLDERS, *ADAPTERS, *RUNS, *CHATS) for command in bad.commands]


@pytest.fixture(scope="module")
def right_place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("right"))
    write_tiny_model(place.model)
    write_rows(place.rows, 6)
    for folder, method in ((place.lora, "lora"), (place.prefix, "ptuning")):
        base = load_base(str(place.model))
        model: Any = base.model
        if method == "lora":
            model = add_lora(model, make_lora_config(rank=2, alpha=4, dropout=0.0, targets=["query_key_value"]))
        else:
            add_prefix(base, PrefixShape(3), None)
        write_manifest(folder, Manifest(method, base.identity), save_adapter_files(model, folder, for_original=True))
    return place


@pytest.fixture
def place(right_place, tmp_path, monkeypatch):
    """A copy of the right place, which is also the working directory; the cache is elsewhere."""
    copied = Place(Path(shutil.copytree(right_place.root, tmp_path / "place")))
    monkeypatch.setenv("CHATGLM_TUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.chdir(copied.root)
    return copied


def command_line(bad: Bad, command: str, place: Place) -> list[str]:
    argv = place.arguments(command)
    if bad.without:
        position = argv.index(bad.without)
        del argv[position : position + 2]
    return argv + (bad.change(place) or [])


def check_message(bad: Bad, place: Place, errors: str) -> None:
    assert errors.count("error [") == 1, errors
    whole = re.search(r"error \[(\w+)\]: (.*) \(chatglm-tuning doctor \1 explains\)\n\Z", errors, re.DOTALL)
    assert whole is not None, errors
    message = whole[2]
    for fragment in bad.says:
        assert fragment.replace("{root}", str(place.root)) in message, message
    assert message.endswith(".")
    assert message.count("\n") <= 3, message
    assert len(message.replace(str(place.root), "")) < 450, message
    for internal in INTERNALS:
        assert internal not in message, message


@pytest.mark.parametrize(("bad", "command"), TABLE, ids=[f"{bad.name}-{command}" for bad, command in TABLE])
def test_bad_input(bad, command, place, capsys, monkeypatch):
    argv = command_line(bad, command, place)
    before = place.snapshot()
    read = []
    iterate = chatglm_tuning.loading.iterate_tensors

    def read_and_note(files, **flags):
        read.append(files)
        return iterate(files, **flags)

    monkeypatch.setattr(chatglm_tuning.loading, "iterate_tensors", read_and_note)
    capsys.readouterr()
    assert run_command(command, argv) == 2
    captured = capsys.readouterr()
    check_message(bad, place, captured.err)
    assert captured.out == ""
    assert place.snapshot() == before
    assert bool(read) == bad.reads_weights


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_wrong_in_the_right_place(command, place, capsys):
    """Else the table could be red for another reason than the one that a row gives."""
    assert run_command(command, [*place.arguments(command), "--seed", "1"]) == 0
    assert "error [" not in capsys.readouterr().err


@pytest.mark.parametrize("adapter", [LORA, PREFIX])
def test_nothing_is_wrong_with_the_adapters(adapter, place):
    assert run_command("chat", [*place.arguments("chat"), *flags(*adapter)(place)]) == 0


def test_the_table_is_long_and_its_names_are_all_different():
    names = [bad.name for bad in (*MODEL_FOLDERS, *ADAPTERS, *RUNS, *CHATS)]
    assert len(names) == len(set(names)) >= 80


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("a pickle that runs code", "chat"),
        ("a missing shard", "train-lora"),
        ("a row that is not JSON", "train-ptuning"),
    ],
)
def test_bad_input_in_a_process_of_its_own(name, command, place, tmp_path):
    bad = next(bad for bad, _ in TABLE if bad.name == name)
    argv = command_line(bad, command, place)
    before = place.snapshot()
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / COMMANDS[command]), *argv],
        env={**os.environ, "CHATGLM_TUNING_CACHE": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    check_message(bad, place, done.stderr)
    assert done.stdout == ""
    assert place.snapshot() == before
