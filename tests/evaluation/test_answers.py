"""Answers in batches: each is what the prompt gets alone, whatever stands beside it."""

import json
from pathlib import Path

import pytest
import torch

from chatglm_tuning.config.arguments import ModelArguments
from chatglm_tuning.config.predict import AdapterArguments, AnswerArguments
from chatglm_tuning.data.encode import EncodingSettings
from chatglm_tuning.data.records import Example, read_records
from chatglm_tuning.errors import UserError
from chatglm_tuning.evaluation.answers import Drawing, answer_all, answer_batch, plan_batches
from chatglm_tuning.evaluation.loss import measure_losses
from chatglm_tuning.evaluation.prompts import digest_prompts, encode_prompt, group_prompts, sample_prompts
from chatglm_tuning.evaluation.task import Models, prepare_task
from chatglm_tuning.loading import load_for_inference
from chatglm_tuning.prompt import process_response
from tests.conftest import shared_folder
from tests.evaluation.places import make_place
from tests.model_folder import EMBEDDED


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="module")
def task(place):
    answers = AnswerArguments((place.rows,), max_input_length=64, max_output_length=12, batch_size=4)
    return prepare_task(ModelArguments(str(place.model), dtype="float32"), answers)


def adapters(place):
    return [None, AdapterArguments(place.lora, "lora"), AdapterArguments(place.prefix, "ptuning")]


def test_every_adapter_answers_in_a_batch_what_it_answers_alone(place, task):
    models = Models(task)
    found = []
    for adapter in adapters(place):
        with models.using(adapter) as model:
            together = answer_all(model, task.tokenizer, task.prompt_ids, task.drawing, 7)
            alone = [answer_batch(model, task.tokenizer, [ids], task.drawing)[0] for ids in task.prompt_ids]
        assert together == alone
        found.append(together)
    assert found[0] != found[1] != found[2] != found[0]


def test_the_base_is_as_before_after_every_adapter(place, task):
    models = Models(task)
    with models.using(None) as model:
        before = answer_all(model, task.tokenizer, task.prompt_ids, task.drawing, 8)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for adapter in (*adapters(place)[1:], *adapters(place)[1:]):
        with models.using(adapter):
            pass
        with models.using(None) as model:
            assert answer_all(model, task.tokenizer, task.prompt_ids, task.drawing, 8) == before
            after = model.state_dict()
        assert after.keys() == state.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def test_answers_are_those_of_generate(task, place):
    model, tokenizer = load_for_inference(str(place.model), lora_checkpoint=place.lora, dtype="float32")
    found = answer_all(model, tokenizer, task.prompt_ids[:3], task.drawing, 2)
    for ids, answer in zip(task.prompt_ids, found, strict=False):
        whole = model.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=11)[0, len(ids) :]
        text = tokenizer.decode(whole, skip_special_tokens=True)
        assert answer.prediction == process_response(text.rstrip("\ufffd"))
        assert answer.finish_reason == ("stop" if tokenizer.eos_token_id in whole else "length")


def test_both_ends_of_an_answer_are_told_apart():
    model, tokenizer = load_for_inference(str(EMBEDDED), dtype="float32")
    ids = [[*tokenizer.encode_text("你好"), tokenizer.gmask_token_id, tokenizer.bos_token_id]]
    whole = answer_batch(model, tokenizer, ids, Drawing(max_output_length=40))[0]
    cut = answer_batch(model, tokenizer, ids, Drawing(max_output_length=4))[0]
    assert whole.finish_reason == "stop"
    assert cut.finish_reason == "length"
    assert whole.prediction.startswith(cut.prediction)
    assert len(cut.prediction) < len(whole.prediction)


def test_a_seed_draws_the_same_and_every_batch_something_else(task, place):
    with Models(task).using(None) as model:

        def draw(seed, number=0, **settings):
            drawing = Drawing(
                **{"max_output_length": 12, "do_sample": True, "temperature": 3.0, "seed": seed, **settings}
            )
            return answer_batch(model, task.tokenizer, task.prompt_ids[:4], drawing, number)

        assert draw(1) == draw(1)
        assert draw(1) != draw(2)
        assert draw(1) != draw(1, number=1)
        greedy = answer_batch(model, task.tokenizer, task.prompt_ids[:4], task.drawing)
        assert draw(1) != greedy
        for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
            assert draw(1, **narrow) == greedy


def test_batches_hold_prompts_of_like_length_and_begin_with_the_longest():
    lengths = [5, 9, 1, 9, 7, 2, 2]
    assert plan_batches(lengths, 3) == [[1, 3, 4], [0, 5, 6], [2]]


def test_the_losses_are_those_of_the_model(task, place):
    settings = EncodingSettings(64, 12)
    for adapter in adapters(place):
        with Models(task).using(adapter) as model:
            found = measure_losses(model, task.tokenizer, task.prompts, settings, 5)
            ids = task.prompt_ids[0]
            losses = []
            for reference in task.prompts[0].references:
                answer = task.tokenizer.encode_text(reference)
                learnt = [*answer[:10], *([task.tokenizer.eos_token_id] if len(answer) <= 10 else [])]
                labels = [-100] * (len(ids) - 1) + [ids[-1], *learnt]
                batch = {"input_ids": torch.tensor([ids + learnt]), "labels": torch.tensor([labels])}
                with torch.no_grad():
                    losses.append(model(**batch, num_items_in_batch=1).loss.item())
        assert found.sums[0] == pytest.approx(sum(losses), rel=1e-4)
        assert found.per_token == pytest.approx(found.sums.sum() / found.tokens.sum())


def test_a_prompt_with_several_answers_is_one_prompt():
    examples = [Example("a", "1"), Example("b", "2"), Example("a", "3"), Example("a", "4", (("q", "r"),))]
    prompts = group_prompts(examples)
    assert [(p.query, p.references) for p in prompts] == [("a", ("1", "3")), ("b", ("2",)), ("a", ("4",))]
    assert prompts[2].text == "[Round 0]\n问：q\n答：r\n[Round 1]\n问：a\n答："
    assert digest_prompts(prompts) != digest_prompts(prompts[:2])
    assert digest_prompts(prompts) == digest_prompts(group_prompts(examples))


def test_the_1070_rows_of_the_real_dev_file_are_1000_prompts():
    path = Path(shared_folder()) / "data" / "AdvertiseGen" / "dev.json"
    if not path.is_file():
        pytest.skip("the real dev file is not on this machine")
    prompts = group_prompts(read_records([path]).examples)
    assert len(prompts) == 1000
    assert sum(len(prompt.references) for prompt in prompts) == 1070
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert (prompts[0].query, prompts[0].references[0]) == (first["content"], first["summary"])


def test_long_prompts_lose_rounds_and_then_their_end(task):
    tokenizer = task.tokenizer
    (prompt,) = group_prompts([Example("好" * 20, "a", (("早" * 30, "晚"), ("谢", "我")))])
    short = encode_prompt(prompt, tokenizer, 64)
    assert short[-2:] == [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert "早" not in tokenizer.decode(short)
    assert "谢" in tokenizer.decode(short)
    assert len(encode_prompt(prompt, tokenizer, 10)) == 11


def test_a_sample_is_spread_over_the_prompts():
    prompts = group_prompts([Example(str(index), "a") for index in range(10)])
    assert [prompt.query for prompt in sample_prompts(prompts, 3)] == ["0", "3", "6"]
    assert sample_prompts(prompts, 11) == prompts


def test_nan_is_an_error(task):
    with Models(task).using(None) as model:
        model.transformer.final_layernorm.weight.data.fill_(float("nan"))
        with pytest.raises(UserError, match="NaN"):
            answer_batch(model, task.tokenizer, task.prompt_ids[:2], task.drawing)
