"""The embedded base: a ChatGLM-6B in small that lists attributes, and the script that trains it."""

import json

import pytest
import torch
from adverts import SHOWN_PROMPTS, attribute_coverage
from demo import is_advert
from train_base import (
    DEFAULT_FOLDER,
    Schedule,
    Shape,
    batches_of,
    encode_corpus,
    initialise,
    make_config,
    train,
    write_released_layout,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatglm_tuning.config.parsing import parse_train_arguments
from chatglm_tuning.loading import load_base
from chatglm_tuning.model import ChatGLMForConditionalGeneration, ChatGLMTokenizer
from chatglm_tuning.prompt import build_prompt
from chatglm_tuning.quantization.linear import QuantizedLinear
from chatglm_tuning.training import run as training_run
from tests.conftest import REPOSITORY

MOST_BYTES = 12_000_000
TINY = Shape(hidden_size=32, inner_hidden_size=64, num_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is so small that threads would mostly wait for each other, for seconds on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[None, 8, 4], ids=["fp32", "int8", "int4"])
def base(request):
    return load_base(str(DEFAULT_FOLDER), quantization_bit=request.param)


def answers(base, prompts: list[str]) -> list[str]:
    batch = base.tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        ids = base.model.generate(**batch, do_sample=False, max_new_tokens=80)
    return base.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_lists_the_attributes_and_writes_no_advert(base):
    told = dict(zip(SHOWN_PROMPTS, answers(base, list(SHOWN_PROMPTS)), strict=True))
    assert not [text for prompt, text in told.items() if is_advert(prompt, text)]
    coverage = [attribute_coverage(prompt, text) for prompt, text in told.items()]
    assert sum(coverage) / len(coverage) >= 0.6, told


def test_it_answers_small_talk_and_remembers_a_round(base):
    told = [("我最喜欢黑色", "黑色很好看，很适合你。"), ("谢谢", "不客气！还有问题可以随时问我。")]
    greeting, color = answers(base, ["你好", build_prompt("我最喜欢什么颜色？", told)])
    assert greeting.startswith("你好")
    assert color == "你最喜欢黑色。"


def test_quantised_linears_are_quantised(base):
    linears = [module for module in base.model.modules() if isinstance(module, QuantizedLinear)]
    expected = 4 * base.model.config.num_layers if base.model.config.quantization_bit else 0
    assert len(linears) == expected


def test_the_auto_classes_load_it():
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_FOLDER)
    ours = load_base(str(DEFAULT_FOLDER))
    assert type(model) is ChatGLMForConditionalGeneration
    batch = tokenizer(SHOWN_PROMPTS[0], return_tensors="pt")
    assert torch.equal(model(**batch).logits, ours.model(**batch).logits)


def test_it_lies_in_the_released_layout_and_is_small():
    files = sorted(DEFAULT_FOLDER.glob("pytorch_model-*.bin"))
    index = json.loads((DEFAULT_FOLDER / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))
    stored = {}
    for file in files:
        names = torch.load(file, weights_only=True)
        assert all(tensor.dtype == torch.float16 for tensor in names.values())
        stored |= dict.fromkeys(names, file.name)
    assert len(files) == 2
    assert index["weight_map"] == stored
    assert "lm_head.weight" in stored
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES
    assert json.loads((DEFAULT_FOLDER / "config.json").read_text(encoding="utf-8"))["torch_dtype"] == "float16"


def test_ten_steps_of_lora_lower_the_loss(tmp_path):
    data = tmp_path / "adverts.json"
    rows = (REPOSITORY / "data/AdvertiseGen/sample_train.json").read_text(encoding="utf-8").splitlines()[:80]
    data.write_text("\n".join(rows), encoding="utf-8")
    flags = f"--model_name_or_path {DEFAULT_FOLDER} --data_path {data} --output_dir {tmp_path / 'out'} --max_steps 10"
    flags += " --per_device_train_batch_size 8 --learning_rate 1e-2 --logging_steps 1 --dtype float32"
    flags += " --no_gradient_checkpointing"
    flags += " --no_gradient_checkpointing --max_input_length 128 --max_output_length 128 --report_to none"
    flags += f" --preprocessing_num_workers 1 --data_cache_dir {tmp_path / 'cache'}"
    training_run.train(parse_train_arguments("lora", flags.split()))
    lines = (tmp_path / "out" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert len(losses) == 10
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.fixture(scope="module")
def tokenizer():
    return ChatGLMTokenizer.from_pretrained(DEFAULT_FOLDER)


def trained_tiny(tokenizer, seed: int) -> tuple[ChatGLMForConditionalGeneration, list[str]]:
    torch.manual_seed(seed)
    model = ChatGLMForConditionalGeneration(make_config(tokenizer, TINY))
    initialise(model)
    rows = encode_corpus(40, 8, seed, tokenizer)
    reports: list[str] = []
    schedule = Schedule(steps=6, batch_rows=8, learning_rate=2e-3)
    train(model, rows, schedule, seed=seed, dtype=torch.float32, report=reports.append)
    return model, reports


def test_training_is_seeded_and_its_files_load_as_they_were_written(tokenizer, tmp_path):
    model, reports = trained_tiny(tokenizer, seed=3)
    again, _ = trained_tiny(tokenizer, seed=3)
    assert reports[-1].startswith("step 6/6")
    for file in ("ice_text.model", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((DEFAULT_FOLDER / file).read_bytes())
    write_released_layout(model, tmp_path)
    loaded = load_base(str(tmp_path)).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
        assert torch.equal(tensor.half().float(), loaded[name]), name


def test_every_row_is_learnt_once(tokenizer):
    rows = encode_corpus(30, 4, 1, tokenizer)
    batches = list(batches_of(rows, 8, 1, tokenizer.pad_token_id))
    assert [len(batch["input_ids"]) for batch in batches] == [8, 8, 8, 8, 2]
    learnt = sorted(int(count) for batch in batches for count in batch["attention_mask"].sum(dim=1))
    assert learnt == sorted(len(row.input_ids) for row in rows)


def test_the_rate_rises_and_falls_to_zero():
    schedule = Schedule(steps=100, batch_rows=1, learning_rate=1.0, warmup_share=0.1)
    factors = [schedule.rate_factor(step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == max(factors) == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0.0)
