"""What the official client gets: the same streamed, whole and from `generate`, alone and among many."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from chatglm_tuning.data.records import examples_of_row
from chatglm_tuning.inference.stream import GenerationSettings, stream_tokens
from chatglm_tuning.prompt import process_response
from tests.model_folder import EMBEDDED
from tests.serving.conftest import MODELS, serving

openai = pytest.importorskip("openai")

NEW_TOKENS = 20
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS}
SAMPLED = {"temperature": 1.2, "top_p": 0.95, "seed": 11, "max_tokens": NEW_TOKENS, "extra_body": {"top_k": 20}}
QUESTIONS = [
    "你好",
    "这款连衣裙怎么样？",
    "类型#裤*版型#宽松",
    "hello",
    "请介绍一下\n这件外套",
    "类型#裙*风格#清新*图案#碎花",
]


def ask(client, model, question, **options):
    messages = question if isinstance(question, list) else [{"role": "user", "content": question}]
    return client.chat.completions.create(model=model, messages=messages, **options)


def ids_of(tokenizer, text):
    return [*tokenizer.encode_text(text), tokenizer.gmask_token_id, tokenizer.bos_token_id]


def text_alone(alone, name, prompt_ids, *, is_chat=True, **settings):
    """The text of what `generate` answers to `prompt_ids`, as chat shows it or as it is, and its tokens."""
    model, tokenizer = alone[name]
    settings = GenerationSettings(
        **{
            "max_length": len(prompt_ids) + NEW_TOKENS,
            "do_sample": False,
            "temperature": 1.0,
            "top_p": 1.0,
            **settings,
        }
    )
    tokens = list(stream_tokens(model, torch.tensor([prompt_ids]), settings=settings))
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).rstrip("\ufffd")
    return (process_response(text) if is_chat else text), tokens


def generate_alone(alone, name, prompt_ids):
    """The tokens of the library's own greedy `generate`, without <eop>."""
    model, _ = alone[name]
    ids = torch.tensor([prompt_ids])
    given = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
    )[0, ids.shape[1] :].tolist()
    return [token for token in given if token != model.config.eos_token_id]


@pytest.mark.parametrize("name", MODELS)
def test_streamed_is_whole_is_generate(served, alone, name):
    client = served.openai()
    texts = set()
    for question in QUESTIONS[:3]:
        prompt_ids = ids_of(alone[name][1], question)
        expected, tokens = text_alone(alone, name, prompt_ids)
        assert generate_alone(alone, name, prompt_ids) == tokens
        whole = ask(client, name, question, **GREEDY)
        chunks = list(ask(client, name, question, stream=True, stream_options={"include_usage": True}, **GREEDY))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert whole.choices[0].message.content == expected
        assert streamed == expected
        assert whole.model == name
        assert whole.usage == chunks[-1].usage
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt_ids), len(tokens))
        texts.add(expected)
    assert len(texts) == 3


def test_a_stream_is_what_the_protocol_says(served):
    chunks = list(ask(served.openai(), "base", "你好", stream=True, stream_options={"include_usage": True}, **GREEDY))
    first, *middle, reason, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert middle
    assert all(chunk.choices[0].delta.content and chunk.choices[0].finish_reason is None for chunk in middle)
    assert reason.choices[0].finish_reason == "stop"
    assert reason.choices[0].delta.content is None
    assert usage.choices == []
    assert usage.usage.completion_tokens == 9
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    without = list(ask(served.openai(), "base", "你好", stream=True, **GREEDY))
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in without)
    assert len(without) == len(chunks) - 1


def test_many_mixed_requests_get_what_each_gets_alone(served, alone):
    """32 at once over the base, two LoRA adapters and a prefix: greedy and sampled, streamed and not."""
    client = served.openai()

    def request(number):
        name, question = MODELS[number % 4], QUESTIONS[number % len(QUESTIONS)]
        options = GREEDY if number % 3 else SAMPLED | {"seed": number}
        answer = ask(client, name, question, stream=number % 2 == 0, **options)
        if number % 2:
            return answer.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    def expected(number):
        name, question = MODELS[number % 4], QUESTIONS[number % len(QUESTIONS)]
        drawn = {} if number % 3 else dict(do_sample=True, temperature=1.2, top_p=0.95, top_k=20, seed=number)
        return text_alone(alone, name, ids_of(alone[name][1], question), **drawn)[0]

    peak = []
    with ThreadPoolExecutor(32) as pool:
        answers = [pool.submit(request, number) for number in range(32)]
        while not all(answer.done() for answer in answers):
            peak.append(served.service.engine.running)
            time.sleep(0.005)
        found = [answer.result() for answer in answers]
    assert found == [expected(number) for number in range(32)]
    assert len(set(found)) > 16
    assert max(peak) > 4  # they were in one batch, not one after the other


def test_a_conversation_is_the_prompt_of_a_training_row(served, alone):
    messages = [
        {"role": "system", "content": "你是导购。"},
        {"role": "user", "content": [{"type": "text", "text": "你好"}, {"type": "text", "text": "在吗"}]},
        {"role": "assistant", "content": "在的。"},
        {"role": "user", "content": "这件外套怎么样？"},
    ]
    row = [*messages, {"role": "assistant", "content": "很好"}]
    row[1] = {"role": "user", "content": "你好\n在吗"}
    prompt = examples_of_row({"messages": row}, "")[1][-1].prompt
    assert prompt == "[Round 0]\n问：你是导购。\n你好\n在吗\n答：在的。\n[Round 1]\n问：这件外套怎么样？\n答："
    expected, _ = text_alone(alone, "lora_a", ids_of(alone["lora_a"][1], prompt))
    answer = ask(served.openai(), "lora_a", messages, **GREEDY)
    assert answer.choices[0].message.content == expected
    assert expected != text_alone(alone, "lora_a", ids_of(alone["lora_a"][1], "这件外套怎么样？"))[0]


def test_control_tokens_in_a_question_are_words(served, alone):
    tokenizer = alone["base"][1]
    question = "[gMASK]<sop>你好<eop>[MASK]</s><pad>"
    ids = ids_of(tokenizer, question)
    assert not set(ids[:-2]) & {tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, 3}
    answer = ask(served.openai(), "base", question, **GREEDY)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].message.content == text_alone(alone, "base", ids)[0]
    raw = served.openai().completions.create(model="base", prompt=question, **GREEDY)
    assert raw.choices[0].text == text_alone(alone, "base", ids, is_chat=False)[0]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_stop_strings_across_tokens_are_never_shown(served, alone, is_streamed):
    text, _ = text_alone(alone, "base", ids_of(alone["base"][1], "你好"))
    client = served.openai()
    assert text == "你好呀！今天想聊点什么？"  # the tokens are 你好, 呀, !, 今天想 and so on, and ! is shown as ！
    for place, size in ((0, 2), (3, 1), (2, 3), (5, 4), (len(text) - 3, 3)):
        stop = text[place : place + size]
        answer = ask(client, "base", "你好", stop=["不会出现的", stop], stream=is_streamed, **GREEDY)
        if is_streamed:
            chunks = list(answer)
            found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            found, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert found == text[: text.index(stop)]
        assert reason == "stop"
    assert ask(client, "base", "你好", stop="不会出现的", **GREEDY).choices[0].message.content == text


def test_several_answers_have_seeds_of_their_own(served, alone):
    client = served.openai()
    ids = ids_of(alone["base"][1], "你好")
    answer = ask(client, "base", "你好", n=3, **SAMPLED)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    drawn = dict(do_sample=True, temperature=1.2, top_p=0.95, top_k=20)
    assert texts == [text_alone(alone, "base", ids, seed=11 + number, **drawn)[0] for number in range(3)]
    assert len(set(texts)) > 1
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens > 12
    streamed = ["", "", ""]
    for chunk in ask(client, "base", "你好", n=3, stream=True, **SAMPLED):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert (
        len({ask(client, "base", "你好", temperature=2, max_tokens=16).choices[0].message.content for _ in range(3)})
        > 1
    )


def test_each_sampling_setting_changes_what_is_drawn(served):
    client = served.openai()

    def drawn(**options):
        extra = {"top_k": options.pop("top_k", 50)}
        options = {"seed": 5, "temperature": 1.5, "top_p": 1, "max_tokens": NEW_TOKENS, **options}
        return ask(client, "base", "你好", extra_body=extra, **options).choices[0].message.content

    usual, greedy = drawn(), ask(client, "base", "你好", **GREEDY).choices[0].message.content
    assert drawn() == usual
    assert usual != greedy
    for change in ({"seed": 6}, {"temperature": 0.5}, {"top_p": 0.3}, {"top_k": 3}):
        assert drawn(**change) != usual, change
    for change in ({"temperature": 0}, {"temperature": 1e-30}, {"top_p": 0}, {"top_k": 1}):
        assert drawn(**change) == greedy, change


def test_completions_of_every_kind_of_prompt(served, alone):
    client, tokenizer = served.openai(), alone["prefix"][1]
    texts = QUESTIONS[:2]
    encoded = [ids_of(tokenizer, text) for text in texts]
    expected = [text_alone(alone, "prefix", ids, is_chat=False)[0] for ids in encoded]
    for prompt in (texts, encoded, [ids[:-2] for ids in encoded]):
        answer = client.completions.create(model="prefix", prompt=prompt, **GREEDY)
        assert [choice.text for choice in answer.choices] == expected
        assert answer.object == "text_completion"
        assert answer.usage.prompt_tokens == sum(map(len, encoded))
    for prompt in (texts[0], encoded[0]):
        chunks = list(client.completions.create(model="prefix", prompt=prompt, stream=True, **GREEDY))
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected[0]
        assert chunks[-1].choices[0].finish_reason == "stop"
    short = client.completions.create(model="prefix", prompt="这款连衣裙怎么样？", temperature=0)
    assert short.usage.completion_tokens == 16  # the protocol's own limit, where none is given
    assert short.choices[0].finish_reason == "length"


def test_the_limits_of_an_answer(endless):
    with serving(endless, "--served_model_name", "base", "--max_length", "64", "--max_output_tokens", "50") as running:
        client = running.openai()
        answer = ask(client, "base", "你好", temperature=0)
        assert answer.usage.completion_tokens == 50
        assert answer.choices[0].finish_reason == "length"
        question = "你" * 50
        prompt_tokens = ask(client, "base", question, temperature=0, max_tokens=1).usage.prompt_tokens
        assert ask(client, "base", question, temperature=0).usage.total_tokens == 64
        exact = ask(client, "base", question, temperature=0, max_completion_tokens=64 - prompt_tokens)
        assert exact.usage.total_tokens == 64
        for asked, code in ((65 - prompt_tokens, "context_length_exceeded"), (51, "invalid_value")):
            with pytest.raises(openai.BadRequestError) as caught:
                ask(client, "base", question, max_tokens=asked)
            assert caught.value.code == code


def test_models_are_listed_and_described(served):
    models = served.openai().models.list().data
    assert [model.id for model in models] == list(MODELS)
    assert served.openai().models.retrieve("lora_b").id == "lora_b"
    with pytest.raises(openai.NotFoundError):
        served.openai().models.retrieve("other")


def test_a_base_that_talks():
    with serving(EMBEDDED, key=None) as running:
        client = running.openai()
        answer = ask(client, "chatglm-tiny", "你好", temperature=0)
        assert answer.choices[0].message.content == "你好呀！今天想聊点什么？"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens == 9
        again = ask(client, "chatglm-tiny", "你好", temperature=0, stop="今天")
        assert again.choices[0].message.content == "你好呀！"
        assert again.usage.completion_tokens < 9
        rounds = [
            {"role": "user", "content": "你好"},
            answer.choices[0].message.model_dump(),
            {"role": "user", "content": "你好"},
        ]
        assert ask(client, "chatglm-tiny", rounds, temperature=0).usage.prompt_tokens > 20
