import dataclasses
import json
import logging
from pathlib import Path

import pytest

from chatglm_tuning.config.arguments import (
    ChatArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    PtuningArguments,
    RunOptions,
    settings_of,
)
from chatglm_tuning.config.parsing import parse_chat_arguments, parse_train_arguments
from chatglm_tuning.errors import UserError

NEEDED = ["--data_path", "train.jsonl", "--output_dir", "out"]


@pytest.fixture
def arguments_file(tmp_path):
    def write(content) -> str:
        path = tmp_path / "args.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2), encoding="utf-8")
        return str(path)

    return write


def lora(*argv):
    return parse_train_arguments("lora", [*NEEDED, *argv])


def ptuning(*argv):
    return parse_train_arguments("ptuning", [*NEEDED, *argv])


def test_defaults_are_the_originals():
    run = lora()
    assert run.method == "lora"
    assert run.model == ModelArguments(model_name_or_path="THUDM/chatglm-6b", quantization_bit=None, dtype="auto")
    assert (run.data.max_input_length, run.data.max_output_length, run.data.eval_path) == (1024, 1024, ())
    assert run.lora == LoraArguments(lora_rank=8, lora_alpha=32, lora_dropout=0.05, lora_target=("query_key_value",))
    assert run.options == RunOptions(None, False, False, "auto", None, "tokens", True)
    assert run.trainer.values == {"seed": 42, "output_dir": "out"}
    assert (run.trainer.seed, run.trainer.output_dir) == (42, Path("out"))
    assert run.ptuning is None


def test_arguments_are_frozen():
    run = lora()
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.model.dtype = "float16"


def test_a_prefix_decides_the_method():
    assert ptuning("--pre_seq_len", "128").method == "ptuning"
    assert ptuning("--pre_seq_len", "128").ptuning == PtuningArguments(128, False, None)
    assert ptuning("--ptuning_checkpoint", "old").ptuning == PtuningArguments(None, False, Path("old"))
    full = ptuning()
    assert (full.method, full.lora, full.ptuning) == ("full", None, None)


# For every setting of ours: a value for the file and another that is typed, both unlike what a base command has.
VALUES = {
    "model_name_or_path": ("/models/one", "/models/two"),
    "quantization_bit": ("8", "4"),
    "dtype": ("bfloat16", "float32"),
    "data_path": ("one.jsonl", "two.jsonl"),
    "eval_path": ("one.jsonl", "two.jsonl"),
    "max_input_length": ("128", "64"),
    "max_output_length": ("256", "64"),
    "skip_bad_rows": ("true", "false"),
    "preprocessing_num_workers": ("2", "3"),
    "data_cache_dir": ("one", "two"),
    "lora_rank": ("4", "2"),
    "lora_alpha": ("16", "64"),
    "lora_dropout": ("0.1", "0.2"),
    "lora_target": ("dense", "dense_h_to_4h"),
    "pre_seq_len": ("64", "32"),
    "prefix_projection": ("true", "false"),
    "ptuning_checkpoint": ("one", "two"),
    "resume_from_checkpoint": ("checkpoint-5", "checkpoint-9"),
    "overwrite_output_dir": ("true", "false"),
    "model_parallel": ("true", "false"),
    "activation_checkpointing": ("mlp", "on"),
    "gradient_checkpointing": ("false", "true"),
    "loss_average": ("micro_batches", "tokens"),
    "bucket_by_length": ("false", "true"),
    "max_tokens_per_batch": ("4096", "512"),
    "predict_samples": ("20", "5"),
    "early_stopping_patience": ("3", "2"),
    "tripwires": ("warn", "stop"),
}
COMMON = {"model": ModelArguments, "data": DataArguments, "options": RunOptions}
BY_SCRIPT = {"lora": COMMON | {"lora": LoraArguments}, "ptuning": COMMON | {"ptuning": PtuningArguments}}
CASES = [
    (script, part, setting)
    for script, parts in BY_SCRIPT.items()
    for part, arguments in parts.items()
    for setting in settings_of(arguments)
]


@pytest.mark.parametrize(
    ("script", "part", "setting"), CASES, ids=[f"{script}-{setting.name}" for script, _, setting in CASES]
)
def test_default_then_file_then_flag(script, part, setting, arguments_file):
    in_file, typed = VALUES[setting.name]
    base = {"data_path": "base.jsonl", "eval_path": "dev.jsonl", "eval_strategy": "epoch", "output_dir": "out"}
    base |= {"pre_seq_len": 9} if script == "ptuning" else {}
    with_setting = arguments_file(base | {setting.name: in_file})

    def value(*argv):
        run = parse_train_arguments(script, ["--train_args_file", with_setting, *argv])
        return getattr(getattr(run, part), setting.name)

    assert value() == setting.value.convert(in_file, name="file")
    assert value() != setting.default
    assert value(f"--{setting.name}", typed) == setting.value.convert(typed, name="flag")
    assert value(f"--{setting.name}", typed) != value()


def test_the_files_seed_is_not_beaten_by_the_flags_default(arguments_file):
    path = arguments_file({"seed": 7})
    assert lora("--train_args_file", path).trainer.seed == 7
    assert lora("--train_args_file", path, "--seed", "9").trainer.seed == 9


def test_trainer_keys_by_file_and_flag(arguments_file):
    path = arguments_file({"learning_rate": 1e-3, "logging_first_step": True, "max_steps": 30, "report_to": "none"})
    values = lora("--train_args_file", path, "--learning_rate", "2e-2").trainer.values
    assert values == {
        "seed": 42,
        "output_dir": "out",
        "learning_rate": 2e-2,
        "logging_first_step": True,
        "max_steps": 30,
        "report_to": ["none"],
    }


def test_a_whole_number_of_steps_stays_an_int():
    steps = lora("--logging_steps", "1", "--save_steps", "0.1").trainer.values
    assert isinstance(steps["logging_steps"], int)
    assert steps["save_steps"] == 0.1


def test_null_in_the_file_is_not_given(arguments_file):
    path = arguments_file({"lora_rank": None, "max_steps": None})
    run = lora("--train_args_file", path)
    assert run.lora.lora_rank == 8
    assert "max_steps" not in run.trainer.values


def test_typed_epochs_beat_the_files_max_steps(arguments_file, caplog):
    path = arguments_file({"max_steps": 3000, "num_train_epochs": 1})
    values = lora("--train_args_file", path, "--num_train_epochs", "2").trainer.values
    assert values["num_train_epochs"] == 2
    assert "max_steps" not in values
    assert "max_steps 3000 of the file has no effect: --num_train_epochs was typed" in caplog.text
    both = lora("--train_args_file", path, "--num_train_epochs", "2", "--max_steps", "5").trainer.values
    assert both["max_steps"] == 5


def test_a_typed_half_precision_beats_the_files_other(arguments_file):
    values = lora("--train_args_file", arguments_file({"fp16": True}), "--bf16").trainer.values
    assert values["bf16"] is True
    assert "fp16" not in values


def test_several_files_and_targets():
    run = lora("--data_path", "b.jsonl", "c.jsonl", "--lora_target", "dense", "query_key_value")
    assert run.data.data_path == (Path("train.jsonl"), Path("b.jsonl"), Path("c.jsonl"))
    assert run.lora.lora_target == ("dense", "query_key_value")
    everything = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    assert lora("--lora_target", "all").lora.lora_target == everything
    assert lora("--lora_target", "dense,dense_4h_to_h").lora.lora_target == ("dense", "dense_4h_to_h")


def test_lists_in_the_file(arguments_file):
    path = arguments_file({"eval_path": ["a.json", "b.json"], "lora_target": ["dense"]})
    run = lora("--train_args_file", path)
    assert run.data.eval_path == (Path("a.json"), Path("b.json"))
    assert run.lora.lora_target == ("dense",)


@pytest.mark.parametrize("flag", ["--int8", "--load_in_8bit"])
def test_eight_bits(flag, arguments_file):
    assert lora(flag).model.quantization_bit == 8
    assert ptuning("--pre_seq_len", "8", flag, "--quantization_bit", "8").model.quantization_bit == 8
    assert parse_chat_arguments([flag]).model.quantization_bit == 8
    assert lora("--train_args_file", arguments_file({"quantization_bit": 4}), flag).model.quantization_bit == 8
    in_file = arguments_file({flag.lstrip("-"): True})
    assert lora("--train_args_file", in_file).model.quantization_bit == 8
    assert lora("--train_args_file", in_file, "--quantization_bit", "4").model.quantization_bit == 4
    assert lora("--train_args_file", arguments_file({flag.lstrip("-"): False})).model.quantization_bit is None


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--no_gradient_checkpointing", "gradient_checkpointing"),
        ("--no_bucket_by_length", "bucket_by_length"),
        ("--no-bucket_by_length", "bucket_by_length"),
    ],
)
def test_what_is_on_can_be_turned_off(flag, name, arguments_file):
    assert getattr(lora(flag).options, name) is False
    assert getattr(lora(flag, f"--{name}").options, name) is True
    in_file = arguments_file({f"no_{name}": True})
    assert getattr(lora("--train_args_file", in_file).options, name) is False
    assert getattr(lora("--train_args_file", in_file, f"--{name}").options, name) is True


def test_chat_defaults_are_the_originals():
    assert parse_chat_arguments([]) == ChatArguments(
        model=ModelArguments(),
        ptuning=PtuningArguments(),
        lora_checkpoint=None,
        max_length=2048,
        top_p=0.7,
        temperature=0.95,
        greedy=False,
        seed=None,
        history=True,
    )


def test_chat_flags():
    flags = (
        "--model_name_or_path m --ptuning_checkpoint p --pre_seq_len 128 --prefix_projection --quantization_bit 4 "
        "--dtype float32 --max_length 64 --top_p 1 --temperature 0.5 --greedy --seed 3 --no_history"
    )
    assert parse_chat_arguments(flags.split()) == ChatArguments(
        model=ModelArguments("m", 4, "float32"),
        ptuning=PtuningArguments(128, True, Path("p")),
        max_length=64,
        top_p=1,
        temperature=0.5,
        greedy=True,
        seed=3,
        history=False,
    )
    assert parse_chat_arguments(["--lora_checkpoint", "l"]).lora_checkpoint == Path("l")


REFUSED_FLAGS = [
    ("lora", "--lora_rnk 4", "--lora_rnk is no flag of chatglm-tuning train-lora. If --lora_rank was meant"),
    ("lora", "--lora_ran 4", "If --lora_rank was meant"),
    ("lora", "--data-path x", "If --data_path was meant"),
    ("lora", "--zzz", "--zzz is no flag of chatglm-tuning train-lora. See chatglm-tuning train-lora --help."),
    ("lora", "--pre_seq_len 8", "--pre_seq_len is no flag of chatglm-tuning train-lora. It belongs to train-ptuning"),
    ("ptuning", "--lora_rank=8", "It belongs to train-lora: leave it out here"),
    ("lora", "--logging_first_step", "Put it into the JSON file of --train_args_file"),
    ("lora", "--seed 1 2", "'2' follows a flag that takes no value more"),
    ("lora", "--seed", "--seed: expected one argument"),
    ("lora", "--seed one", "--seed must be a whole number of at least 0 and below 4294967296, not 'one'"),
    ("lora", "--seed 1.5", "--seed must be a whole number"),
    ("lora", "--lora_rank 0", "--lora_rank must be a whole number of at least 1, not '0'"),
    ("lora", "--lora_dropout 1", "--lora_dropout must be a number of at least 0 and below 1, not '1'"),
    ("lora", "--learning_rate nan", "--learning_rate must be a number above 0, not 'nan'"),
    ("lora", "--learning_rate inf", "--learning_rate must be a number above 0, not 'inf'"),
    ("lora", "--max_input_length 3", "--max_input_length must be a whole number of at least 4, not '3'"),
    ("lora", "--quantization_bit 2", "--quantization_bit must be 4 or 8, not 2"),
    ("lora", "--lora_target qkv", "--lora_target must be query_key_value, dense,"),
    ("lora", "--lr_scheduler_type cosin", "If cosine was meant, write that"),
    ("lora", "--fp16 maybe", "--fp16 must be true or false, not 'maybe'"),
    ("lora", "--int8=no", "--int8: ignored explicit argument 'no'"),
    ("lora", "--int8 --quantization_bit 4", "--int8 asks for 8 bits and --quantization_bit for 4. Keep one"),
    ("lora", "--fp16 --bf16", "fp16 and bf16 exclude each other"),
    ("lora", "--max_tokens_per_batch 99 --no_bucket_by_length", "or train_sampling_strategy forbids it. Keep one"),
    ("lora", "--max_steps 0", "max_steps 0 trains nothing"),
    ("lora", "--warmup_steps 1.5", "warmup_steps 1.5 is neither a whole number nor below 1"),
    ("lora", "--warmup_ratio 1", "--warmup_ratio must be a number of at least 0 and below 1, not '1'"),
    ("lora", "--eval_strategy epoch", "eval_strategy epoch has nothing to evaluate. Give --eval_path"),
    ("lora", "--deepspeed nowhere.json", "nowhere.json: the file cannot be read (No such file or directory)"),
    ("lora", "--train_args_file nowhere.json", "nowhere.json: the file cannot be read (No such file or directory)"),
    ("ptuning", "--pre_seq_len 0", "--pre_seq_len must be a whole number of at least 1, not '0'"),
    ("ptuning", "--prefix_projection", "--prefix_projection needs --pre_seq_len"),
    ("ptuning", "--quantization_bit 4", "a base in 4 bits cannot be tuned in full. Give --pre_seq_len"),
    ("ptuning", "--int8", "a base in 8 bits cannot be tuned in full"),
    ("chat", "--top_p 0", "--top_p must be a number above 0 and of at most 1"),
    ("chat", "--temperature 0", "To always take the likeliest token, pass --greedy"),
    ("chat", "--lora_checkpoint a --ptuning_checkpoint b", "are both given. Chat with one adapter"),
    ("chat", "--pre_seq_len 128", "--pre_seq_len describes a prefix, and none is given"),
    ("chat", "--prefix_projection", "--prefix_projection describes a prefix, and none is given"),
    ("chat", "--max_len 5", "If --max_length was meant"),
]


@pytest.mark.parametrize(("command", "flags", "message"), REFUSED_FLAGS, ids=[case[1] for case in REFUSED_FLAGS])
def test_refused_flags(command, flags, message):
    parse = {"lora": lora, "ptuning": ptuning, "chat": lambda *argv: parse_chat_arguments(argv)}[command]
    with pytest.raises(UserError) as caught:
        parse(*flags.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("missing", "given"), [("data_path", NEEDED[2:]), ("output_dir", NEEDED[:2])])
def test_what_has_to_be_given(missing, given, arguments_file):
    with pytest.raises(UserError, match=f"--{missing} is missing"):
        parse_train_arguments("lora", given)
    parse_train_arguments("lora", [*given, "--train_args_file", arguments_file({missing: "here"})])


def test_an_empty_shell_variable_is_refused():
    with pytest.raises(UserError, match="--model_name_or_path must be text, not ''"):
        lora("--model_name_or_path", "")


REFUSED_FILES = [
    ('{"lora_rnk": 4}', ':1: "lora_rnk" is no setting of train-lora. If "lora_rank" was meant'),
    ('{\n"pre_seq_len": 8}', ':2: "pre_seq_len" is no setting of train-lora. It belongs to train-ptuning'),
    ('{"xyzzy": 8}', ':1: "xyzzy" is no setting of train-lora. Remove it.'),
    ('{"seed": 1,\n "learning_rate": "abc"}', ":2: \"learning_rate\" must be a number above 0, not 'abc'"),
    ('{"max_steps": 1.5}', ':1: "max_steps" must be a whole number of at least -1, not 1.5'),
    ('{"max_steps": true}', ':1: "max_steps" must be a whole number of at least -1, not True'),
    ('{"fp16": "maybe"}', ":1: \"fp16\" must be true or false, not 'maybe'"),
    ('{"learning_rate": NaN}', ':1: "learning_rate" must be a number above 0, not nan'),
    ('{"output_dir": 5}', ':1: "output_dir" must be text, not 5'),
    ('{"data_path": []}', ':1: "data_path" must be one path or several, not []'),
    ('{"per_gpu_train_batch_size": 0}', ':1: "per_gpu_train_batch_size" must be a whole number of at least 1, not 0'),
    ('{"int8": true,\n"quantization_bit": 4}', ':1: "int8" asks for 8 bits and "quantization_bit" for 4'),
    ('{"no_bucket_by_length": true, "bucket_by_length": true}', '"bucket_by_length" are both given'),
    ('{"max_tokens_per_batch": 3}', '"max_tokens_per_batch" must be a whole number of at least 8, not 3'),
    ('{"seed": 1,\n\n"seed": 2}', ':3: "seed" is given twice'),
    ('{"seed": 1,\n"max_steps": 5,}', ":2: this is not JSON: "),
    ("", ":1: this is not JSON: "),
    ("[1]", ":1: the file does not hold a JSON object"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED_FILES, ids=[case[0] for case in REFUSED_FILES])
def test_refused_files(content, message, arguments_file):
    path = arguments_file(content)
    with pytest.raises(UserError) as caught:
        lora("--train_args_file", path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(path)


def test_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "args.json"
    path.write_bytes('{"output_dir": "输出"}'.encode("gb18030"))
    with pytest.raises(UserError, match="the file is not UTF-8 text"):
        lora("--train_args_file", str(path))


def test_numbers_may_be_text_and_a_byte_order_mark_may_lead(arguments_file):
    path = arguments_file('\ufeff{"learning_rate": "1e-3", "max_steps": "30", "fp16": "false", "warmup_steps": 5.0}')
    values = lora("--train_args_file", path).trainer.values
    assert (values["learning_rate"], values["max_steps"], values["fp16"]) == (1e-3, 30, False)


def test_replacements_are_logged_by_the_first_process_only(arguments_file, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    path = arguments_file({"logging_dir": "logs", "no_cuda": True})
    monkeypatch.setenv("RANK", "1")
    lora("--train_args_file", path)
    assert caplog.messages == []
    monkeypatch.setenv("RANK", "0")
    lora("--train_args_file", path)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert caplog.messages[1] == f'{path}:3: "no_cuda" is read as use_cpu: there are more devices than CUDA'


@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        ([], "auto"),
        (["--activation_checkpointing", "mlp"], "mlp"),
        (["--gradient_checkpointing"], "on"),
        (["--no_gradient_checkpointing"], "off"),
    ],
)
def test_both_names_of_checkpointing_say_what_is_recomputed(flags, mode):
    assert lora(*flags).options.checkpointing == mode


def test_a_typed_name_of_checkpointing_beats_the_other_in_the_file(arguments_file):
    old = ["--train_args_file", arguments_file({"gradient_checkpointing": True})]
    assert lora(*old, "--activation_checkpointing", "mlp").options.checkpointing == "mlp"
    new = ["--train_args_file", arguments_file({"activation_checkpointing": "mlp"})]
    assert lora(*new, "--no_gradient_checkpointing").options.checkpointing == "off"
    with pytest.raises(UserError, match="both given"):
        lora("--gradient_checkpointing", "--activation_checkpointing", "on")
