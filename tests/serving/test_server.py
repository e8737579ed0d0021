"""A server as a whole: what it tells of itself, how it ends, and that it keeps nothing of what it answered."""

import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.conftest import KEY, serving, wait_for
from tests.serving.test_bad_requests import chat, post

HEALTH, METRICS, MODELS = "/health", "/metrics", "/v1/models"


def get(running, path):
    """Return the status and the text of `path`; health needs no key."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    try:
        connection.request("GET", path, headers={} if path == HEALTH else {"Authorization": f"Bearer {KEY}"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def samples(running):
    """What /metrics says, by name and the values of its labels, in the order of their names."""
    from prometheus_client.parser import text_string_to_metric_families

    status, text = get(running, METRICS)
    assert status == 200
    families = text_string_to_metric_families(text)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_count_what_was_answered(served):
    before = samples(served)
    answers = [post(served, chat()), post(served, chat(model="lora_a", n=2)), post(served, chat(model="nobody"))]
    post(served, chat(), path="/v1/elsewhere")
    assert post(served, chat(stream=True), Authorization="Bearer no")[0] == 401
    after = samples(served)

    def grown(*key):
        return after.get(key, 0) - before.get(key, 0)

    route = "/v1/chat/completions"
    requests = {key[1:]: grown(*key) for key in after if key[0] == "chatglm_requests_total" and grown(*key)}
    assert requests.pop(("", METRICS, "200")) == 1
    assert requests == {
        ("base", route, "200"): 1,
        ("lora_a", route, "200"): 1,
        ("", route, "404"): 1,
        ("", route, "401"): 1,
        ("", "other", "404"): 1,
    }
    for model, answer in (("base", answers[0]), ("lora_a", answers[1])):
        usage = answer[2]["usage"]
        assert grown("chatglm_prompt_tokens_total", model) == usage["prompt_tokens"]
        assert grown("chatglm_completion_tokens_total", model) == usage["completion_tokens"]
        assert grown("chatglm_time_to_first_token_seconds_count", model) == 1
        assert 0 < grown("chatglm_time_to_first_token_seconds_sum", model) < 10
    assert grown("chatglm_request_seconds_count", route) == 4
    assert after[("chatglm_running_answers",)] == after[("chatglm_waiting_answers",)] == 0


def counted(running):
    """The answers that are written and that wait, as /metrics has them."""
    shown = samples(running)
    return shown[("chatglm_running_answers",)], shown[("chatglm_waiting_answers",)]


def test_what_runs_and_what_waits_is_shown(endless):
    flags = ("--served_model_name", "base", "--max_length", "8000", "--max_rows", "1")
    with serving(endless, *flags) as running, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(post, running, chat(max_tokens=2000)) for _ in range(3)]
        wait_for(lambda: counted(running) == (1, 2))
        running.server.begin_drain()
        running.server.begin_drain()
        assert [answer.result()[0] for answer in answers] == [503] * 3


def test_health_and_the_routes_behind_the_key(served):
    assert get(served, HEALTH) == (200, '{"status":"ok"}')
    for path in (METRICS, MODELS, f"{MODELS}/base"):
        assert get(served, path)[0] == 200
        assert post(served, b"", path=path, method="GET", Authorization=None)[0] == 401


def test_a_draining_server_ends_what_runs_and_takes_nothing_new(endless):
    with serving(endless, "--served_model_name", "base", "--max_length", "8000") as running:
        with ThreadPoolExecutor(4) as pool:
            openai = running.openai()
            messages = [{"role": "user", "content": "你好"}]
            stream = openai.chat.completions.create(
                model="base", messages=messages, temperature=0, max_tokens=500, stream=True
            )
            next(stream)
            whole = pool.submit(post, running, chat(max_tokens=500))
            wait_for(lambda: running.service.engine.running == 2)
            running.server.begin_drain()
            wait_for(lambda: running.service.is_draining)
            assert get(running, HEALTH) == (503, '{"status":"draining"}')
            assert get(running, METRICS)[0] == 200
            status, headers, content = post(running, chat())
            assert (status, content["error"]["code"]) == (503, "shutting_down")
            assert headers["retry-after"] == "1"
            assert not whole.done()
            status, _, content = whole.result()
            assert status == 200
            assert content["usage"]["completion_tokens"] == 500
            assert list(stream)[-1].choices[0].finish_reason == "length"
        wait_for(lambda: running.server.should_exit)


def test_patience_ends(endless):
    """What is still under way after drain_seconds is told so, as a stream and whole."""
    flags = ("--served_model_name", "base", "--max_length", "8000", "--drain_seconds", "0.2")
    with serving(endless, *flags) as running, ThreadPoolExecutor(2) as pool:
        openai = pytest.importorskip("openai")
        stream = running.openai().chat.completions.create(
            model="base", messages=[{"role": "user", "content": "你好"}], temperature=0, max_tokens=7000, stream=True
        )
        next(stream)
        whole = pool.submit(post, running, chat(max_tokens=7000))
        wait_for(lambda: running.service.engine.running == 2)
        started = time.monotonic()
        running.server.begin_drain()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert whole.result()[0] == 503
        assert 0.2 <= time.monotonic() - started < 5


def test_an_answer_that_fails_is_an_error_and_no_end(served):
    """A model that computes NaN: the protocol's error, whole and streamed, and the next request is answered."""
    import torch

    healthy = served.service.adapters["prefix"]
    broken = type(healthy)(prefix=torch.full_like(healthy.prefix, float("nan")))
    served.service.adapters["prefix"] = broken
    try:
        for is_streamed in (False, True):
            status, _, content = post(served, chat(model="prefix", stream=is_streamed))
            assert status == 500
            assert content["error"]["code"] == "generation_failed"
            assert "NaN" in content["error"]["message"]
    finally:
        served.service.adapters["prefix"] = healthy
    assert post(served, chat(model="prefix"))[0] == 200
    served.wait_until_idle()


def test_a_mistake_of_the_server_is_told_without_its_details(served, monkeypatch):
    before = samples(served)

    def fail(*_):
        raise RuntimeError("details")

    with monkeypatch.context() as patch:
        patch.setattr(served.service.engine, "submit_all", fail)
        status, _, content = post(served, chat())
    assert status == 500
    assert content["error"] == {
        "message": "The server failed",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    key = ("chatglm_requests_total", "base", "/v1/chat/completions", "500")
    assert samples(served)[key] == before.get(key, 0) + 1
    assert post(served, chat())[0] == 200


def resident_bytes():
    """The memory of this process, the server's included."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux tells the memory of a process there")
def test_memory_stays_flat_over_500_requests(served):
    """Good ones, bad ones and streams over all models; the first 100 fill what is filled once."""
    names = list(served.service.adapters)
    bad = ({"temperature": -1}, {"model": "nobody"}, {"messages": []}, {"stop": ["a"] * 5})

    def ask(number):
        if number % 5 == 4:
            return post(served, chat(**bad[number // 5 % len(bad)]))[0] in (400, 404)
        if number % 5 == 3:
            body = chat(model=names[number % 4], stream=True, max_tokens=2)
            with served.stream(body) as lines:
                return sum(1 for _ in lines) > 3
        return post(served, chat(model=names[number % 4], max_tokens=1))[0] == 200

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(100)))
        served.wait_until_idle()
        threads, before = threading.active_count(), resident_bytes()
        assert all(pool.map(ask, range(100, 600)))
        served.wait_until_idle()
        after = resident_bytes()
    assert threading.active_count() <= threads
    assert after - before < 8 * 2**20
    print(f"resident memory: {before / 2**20:.1f} MiB, 500 requests later {after / 2**20:.1f} MiB")
