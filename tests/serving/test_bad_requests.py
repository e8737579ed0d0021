"""Requests that are none, ask for too much, or whose client misbehaves: what they are answered, and what comes next."""

import gzip
import http.client
import json
import socket
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.conftest import KEY, serving, wait_for

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "你好"}]
AUTHORISED = {"Authorization": f"Bearer {KEY}"}


def post(running, body, *, path=CHAT, method="POST", **headers):
    """Send `body` (bytes as they are, else as JSON) and return the status, the headers and the parsed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        given = {"Content-Type": "application/json", **AUTHORISED, **headers}
        connection.request(method, path, content, {name: value for name, value in given.items() if value is not None})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), json.loads(answer.read() or b"null")
    finally:
        connection.close()


def chat(**changes):
    return {"model": "base", "messages": USER, "max_tokens": 4, "temperature": 0, **changes}


def completion(**changes):
    return {"model": "base", "prompt": "你好", "max_tokens": 4, "temperature": 0, **changes}


def turns(*roles, content="你好"):
    return [{"role": role, "content": content} for role in roles]


JARGON = ("Input should", "dictionary", "instance", "should have", "after validation", "sys.", "item", "turn 1")
DEEP = b'{"model":"base","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
# Name: what is sent, where to, with which headers; status, code and parameter of the answer.
BAD = {
    "malformed JSON": (b'{"model": "base", "messages": [', CHAT, {}, 400, "invalid_json", None),
    "no body": (b"", CHAT, {}, 400, "invalid_json", None),
    "not UTF-8": (b'{"model": "\xff\xfe"}', CHAT, {}, 400, "invalid_json", None),
    "UTF-16": (json.dumps(chat()).encode("utf-16"), CHAT, {}, 400, "invalid_json", None),
    "deep JSON": (DEEP, CHAT, {}, 400, "invalid_json", None),
    "a list": ([chat()], CHAT, {}, 400, "invalid_json", None),
    "NaN": (b'{"model":"base","temperature":NaN}', CHAT, {}, 400, "invalid_json", None),
    "endless number": (b'{"model":"base","n":' + b"9" * 5000 + b"}", CHAT, {}, 400, "invalid_json", None),
    "infinite temperature": (
        json.dumps(chat(temperature="X")).replace('"X"', "1e999").encode(),
        CHAT,
        {},
        400,
        "invalid_value",
        "temperature",
    ),
    "half a surrogate pair": (
        b'{"model":"base","messages":[{"role":"user","content":"\\ud800"}]}',
        CHAT,
        {},
        400,
        "invalid_value",
        "messages[0].content",
    ),
    "NUL in a text": (
        chat(messages=turns("user", content="a\0b")),
        CHAT,
        {},
        400,
        "invalid_value",
        "messages[0].content",
    ),
    "NUL in a prompt": (completion(prompt="a\0b"), COMPLETIONS, {}, 400, "invalid_value", "prompt"),
    "a question of no tokens": (
        chat(messages=turns("user", content="\u200b")),
        CHAT,
        {},
        400,
        "invalid_value",
        "messages[0].content",
    ),
    "an answer of no tokens": (
        chat(messages=[*USER, {"role": "assistant", "content": "\ufffd"}, *USER]),
        CHAT,
        {},
        400,
        "invalid_value",
        "messages[1].content",
    ),
    "a prompt of no tokens": (completion(prompt="\u200b"), COMPLETIONS, {}, 400, "invalid_value", "prompt"),
    "a second prompt of no tokens": (
        completion(prompt=["a", "\ufffd"]),
        COMPLETIONS,
        {},
        400,
        "invalid_value",
        "prompt",
    ),
    "half a surrogate pair in a stop string": (
        b'{"model":"base","stop":"\\ud800","messages":[{"role":"user","content":"a"}]}',
        CHAT,
        {},
        400,
        "invalid_value",
        "stop",
    ),
    "unknown model": (chat(model="other"), CHAT, {}, 404, "model_not_found", "model"),
    "a path as model": (chat(model="../../etc/passwd"), COMPLETIONS, {}, 400, "unknown_parameter", "messages"),
    "no model": ({"messages": USER}, CHAT, {}, 400, "missing_required_parameter", "model"),
    "no messages": ({"model": "base"}, CHAT, {}, 400, "missing_required_parameter", "messages"),
    "empty messages": (chat(messages=[]), CHAT, {}, 400, "invalid_value", "messages"),
    "messages as text": (chat(messages="你好"), CHAT, {}, 400, "invalid_value", "messages"),
    "empty question": (
        chat(messages=turns("user", content=" ")),
        CHAT,
        {},
        400,
        "invalid_value",
        "messages[0].content",
    ),
    "empty answer": (
        chat(messages=[*USER, {"role": "assistant", "content": []}, *USER]),
        CHAT,
        {},
        400,
        "invalid_value",
        "messages[1].content",
    ),
    "answer of null": (
        chat(messages=[*USER, {"role": "assistant", "content": None}, *USER]),
        CHAT,
        {},
        400,
        "invalid_value",
        "messages[1].content",
    ),
    "a message as text": (chat(messages=["hi"]), CHAT, {}, 400, "invalid_value", "messages[0]"),
    "a name that is no text": (
        chat(messages=[{"role": "user", "content": "a", "name": 5}]),
        CHAT,
        {},
        400,
        "invalid_value",
        "messages[0].name",
    ),
    "stream options as text": (
        chat(stream=True, stream_options="include_usage"),
        CHAT,
        {},
        400,
        "invalid_value",
        "stream_options",
    ),
    "unknown stream option": (
        chat(stream=True, stream_options={"foo": 1}),
        CHAT,
        {},
        400,
        "unknown_parameter",
        "stream_options.foo",
    ),
    "unknown name in a message": (
        chat(messages=[{"role": "user", "content": "a", "foo-bar": None}]),
        CHAT,
        {},
        400,
        "unknown_parameter",
        "messages[0].foo-bar",
    ),
    "unknown name in a part": (
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "hi", "image": "{x}"}]}]),
        CHAT,
        {},
        400,
        "unknown_parameter",
        "messages[0].content[0].image",
    ),
    "a name twice": (b'{"model":"base","model":"lora_a"}', CHAT, {}, 400, "invalid_json", None),
    "a name twice inside": (
        b'{"model":"base","messages":[{"role":"user","role":"user","content":"a"}]}',
        CHAT,
        {},
        400,
        "invalid_json",
        None,
    ),
    "last message of the assistant": (
        chat(messages=turns("user", "assistant")),
        CHAT,
        {},
        400,
        "invalid_value",
        "messages[1].role",
    ),
    "only a system text": (chat(messages=turns("system")), CHAT, {}, 400, "invalid_value", "messages[0].role"),
    "two questions": (chat(messages=turns("user", "user")), CHAT, {}, 400, "invalid_value", "messages[1].role"),
    "an answer first": (
        chat(messages=turns("system", "assistant", "user")),
        CHAT,
        {},
        400,
        "invalid_value",
        "messages[1].role",
    ),
    "system text in the middle": (
        chat(messages=turns("user", "assistant", "system", "user")),
        CHAT,
        {},
        400,
        "invalid_value",
        "messages[2].role",
    ),
    "unknown role": (chat(messages=turns("tool", "user")), CHAT, {}, 400, "invalid_value", "messages[0].role"),
    "an image": (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]),
        CHAT,
        {},
        400,
        "invalid_value",
        "messages[0].content[0]",
    ),
    "a tool call in a message": (
        chat(messages=[{"role": "user", "content": "a", "tool_calls": [{}]}]),
        CHAT,
        {},
        400,
        "unsupported_parameter",
        "messages[0].tool_calls",
    ),
    "negative temperature": (chat(temperature=-0.1), CHAT, {}, 400, "invalid_value", "temperature"),
    "high temperature": (chat(temperature=2.1), CHAT, {}, 400, "invalid_value", "temperature"),
    "temperature as text": (chat(temperature="0.5"), CHAT, {}, 400, "invalid_value", "temperature"),
    "true as a number": (chat(max_tokens=True), CHAT, {}, 400, "invalid_value", "max_tokens"),
    "true as temperature": (chat(temperature=True), CHAT, {}, 400, "invalid_value", "temperature"),
    "true as penalty": (chat(presence_penalty=False), CHAT, {}, 400, "unsupported_parameter", "presence_penalty"),
    "top_p above 1": (chat(top_p=1.01), CHAT, {}, 400, "invalid_value", "top_p"),
    "negative top_k": (chat(top_k=-1), CHAT, {}, 400, "invalid_value", "top_k"),
    "no tokens": (chat(max_tokens=0), CHAT, {}, 400, "invalid_value", "max_tokens"),
    "huge max_tokens": (chat(max_tokens=10**9), CHAT, {}, 400, "context_length_exceeded", "max_tokens"),
    "two limits": (chat(max_completion_tokens=5), CHAT, {}, 400, "invalid_value", "max_completion_tokens"),
    "huge max_completion_tokens": (
        {"model": "base", "messages": USER, "max_completion_tokens": 10**9},
        CHAT,
        {},
        400,
        "context_length_exceeded",
        "max_completion_tokens",
    ),
    "huge seed": (chat(seed=2**63), CHAT, {}, 400, "invalid_value", "seed"),
    "too many answers": (chat(n=9), CHAT, {}, 400, "invalid_value", "n"),
    "100 stop strings": (chat(stop=[str(n) for n in range(100)]), CHAT, {}, 400, "invalid_value", "stop"),
    "empty stop string": (chat(stop=""), CHAT, {}, 400, "invalid_value", "stop"),
    "second stop string empty": (chat(stop=["a", ""]), CHAT, {}, 400, "invalid_value", "stop[1]"),
    "long stop string": (chat(stop="a" * 1000), CHAT, {}, 400, "invalid_value", "stop"),
    "stream options without a stream": (
        chat(stream_options={"include_usage": True}),
        CHAT,
        {},
        400,
        "invalid_value",
        "stream_options",
    ),
    "penalty": (chat(frequency_penalty=0.5), CHAT, {}, 400, "unsupported_parameter", "frequency_penalty"),
    "tools": (chat(tools=[{"type": "function"}]), CHAT, {}, 400, "unsupported_parameter", "tools"),
    "JSON mode": (
        chat(response_format={"type": "json_object"}),
        CHAT,
        {},
        400,
        "unsupported_parameter",
        "response_format",
    ),
    "log-probabilities": (chat(logprobs=True), CHAT, {}, 400, "unsupported_parameter", "logprobs"),
    "misspelt parameter": (chat(temprature=1), CHAT, {}, 400, "unknown_parameter", "temprature"),
    "long question": (
        chat(messages=turns("user", content="长" * 3000)),
        CHAT,
        {},
        400,
        "context_length_exceeded",
        "messages",
    ),
    "long conversation": (
        chat(messages=turns(*["user", "assistant"] * 60, "user")),
        CHAT,
        {},
        400,
        "context_length_exceeded",
        "messages",
    ),
    "10000 messages": (
        chat(messages=turns(*["user", "assistant"] * 5000, "user")),
        CHAT,
        {},
        400,
        "context_length_exceeded",
        "messages",
    ),
    "empty prompt": (completion(prompt=""), COMPLETIONS, {}, 400, "invalid_value", "prompt"),
    "no prompts": (completion(prompt=[]), COMPLETIONS, {}, 400, "invalid_value", "prompt"),
    "id of no token": (completion(prompt=[5, 10**9]), COMPLETIONS, {}, 400, "invalid_value", "prompt"),
    "id of a control token": (completion(prompt=[2052, 5]), COMPLETIONS, {}, 400, "invalid_value", "prompt"),
    "ids and texts": (completion(prompt=[5, "a"]), COMPLETIONS, {}, 400, "invalid_value", "prompt[0]"),
    "81 prompts": (completion(prompt=["a"] * 81), COMPLETIONS, {}, 400, "invalid_value", "prompt"),
    "long prompt": (completion(prompt="长" * 3000), COMPLETIONS, {}, 400, "context_length_exceeded", "prompt"),
    "echo": (completion(echo=True), COMPLETIONS, {}, 400, "unsupported_parameter", "echo"),
    "suffix": (completion(suffix="。"), COMPLETIONS, {}, 400, "unsupported_parameter", "suffix"),
    "best_of": (completion(best_of=2), COMPLETIONS, {}, 400, "unsupported_parameter", "best_of"),
    "wrong key": (chat(), CHAT, {"Authorization": "Bearer sesame-2"}, 401, "invalid_api_key", None),
    "beginning of the key": (chat(), CHAT, {"Authorization": f"Bearer {KEY[:-1]}"}, 401, "invalid_api_key", None),
    "key that is no ASCII": (chat(), CHAT, {"Authorization": "Bearer \xe9"}, 401, "invalid_api_key", None),
    "key without Bearer": (chat(), CHAT, {"Authorization": KEY}, 401, "invalid_api_key", None),
    "no key": (chat(), CHAT, {"Authorization": None}, 401, "invalid_api_key", None),
    "a body that is too large": (b" " * (2**20 + 1), CHAT, {}, 413, "request_too_large", None),
    "a compressed body": (
        gzip.compress(json.dumps(chat()).encode()),
        CHAT,
        {"Content-Encoding": "gzip"},
        415,
        "unsupported_content_encoding",
        None,
    ),
    "a body in GBK": (
        json.dumps(chat(), ensure_ascii=False).encode("gbk"),
        CHAT,
        {"Content-Type": "application/json; charset=gbk"},
        415,
        "unsupported_charset",
        None,
    ),
    "a charset that is no ASCII": (
        chat(),
        CHAT,
        {"Content-Type": b"application/json; charset=\xff\xfe"},
        415,
        "unsupported_charset",
        None,
    ),
    "a form": (b"model=base", CHAT, {"Content-Type": "text/plain"}, 415, "unsupported_content_type", None),
    "unknown route": (chat(), "/v1/embeddings", {}, 404, "not_found", None),
    "slash at the end": (chat(), f"{CHAT}/", {}, 404, "not_found", None),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_the_protocols_error(served, name):
    body, path, headers, status, code, param = BAD[name]
    found, answered, content = post(served, body, path=path, **headers)
    assert found == status, content
    assert answered["content-type"] == "application/json"
    assert set(content) == {"error"}
    error = content["error"]
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert error["message"]
    assert len(error["message"]) < 400
    jargon = [word for word in JARGON if word in error["message"]]
    assert not jargon, error["message"]
    if code in ("invalid_value", "unknown_parameter") and param is not None:
        assert repr(param) in error["message"] or path == COMPLETIONS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a message as text", "Invalid 'messages[0]': must be an object"),
        ("empty messages", "Invalid 'messages': must not be empty"),
        ("no tokens", "Invalid 'max_tokens': must be at least 1"),
        ("unknown role", "Invalid 'messages[0].role': must be 'system', 'developer', 'user' or 'assistant'"),
        ("answer of null", "must be a text, not null"),
        ("endless number", "a number has 5000 digits"),
        ("a name twice inside", "'role' stands in it twice"),
        ("unknown model", "There is no model 'other'; this server has base, lora_a, lora_b, prefix"),
        ("a compressed body", "'gzip'"),
        ("a body in GBK", "'gbk'"),
        ("half a surrogate pair in a stop string", "Invalid 'stop': half of a surrogate pair is no character"),
        ("a question of no tokens", "Invalid 'messages[0].content': must not be empty"),
        ("81 prompts", "This server takes at most 80 answers in one request, not 81"),
    ],
)
def test_what_was_given_and_what_is_allowed_is_said(served, name, words):
    body, path, headers, *_ = BAD[name]
    assert words in post(served, body, path=path, **headers)[2]["error"]["message"]


def test_after_all_of_them_the_server_answers(served):
    status, _, content = post(served, chat())
    assert status == 200
    assert content["choices"][0]["message"]["content"].startswith("你好")
    served.wait_until_idle()


@pytest.mark.parametrize(("method", "path"), [("GET", CHAT), ("PUT", COMPLETIONS), ("POST", "/v1/models")])
def test_a_wrong_method_is_told_the_right_one(served, method, path):
    status, headers, content = post(served, chat(), path=path, method=method)
    assert status == 405
    assert headers["allow"] == ("GET" if path == "/v1/models" else "POST")
    assert content["error"]["code"] == "method_not_allowed"
    assert content["error"]["message"] == f"This route takes {headers['allow']}, not {method}"


def test_what_asks_for_nothing_is_let_through(served):
    harmless = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "someone",
        "metadata": {"a": "b"},
        "seed": None,
        "stop": None,
        "stream": None,
    }
    plain, decorated = (post(served, chat(**options))[2] for options in ({}, harmless))
    assert decorated["choices"] == plain["choices"]
    messages = [{"role": "user", "content": "你好", "tool_calls": None, "name": "li"}]
    assert post(served, chat(messages=messages))[2]["choices"] == plain["choices"]
    assert post(served, b"\xef\xbb\xbf" + json.dumps(chat()).encode())[2]["choices"] == plain["choices"]
    for headers in ({"Content-Encoding": "identity"}, {"Content-Type": "application/json; charset=UTF-8"}):
        assert post(served, chat(), **headers)[2]["choices"] == plain["choices"]
    answer = post(served, completion(echo=False, suffix=None, best_of=1, logprobs=None), path=COMPLETIONS)
    assert answer[0] == 200


def test_a_body_in_chunks_is_measured_too(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n"
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        block = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        for _ in range(40):
            client.sendall(block)
        client.sendall(b"0\r\n\r\n")
        assert b"413" in client.recv(65536).splitlines()[0]


NO_HTTP = {
    "no HTTP": b"\x16\x03\x01\x02\x00 no http at all\r\n\r\n",
    "no host": f"GET {CHAT} HTTP/1.1\r\n\r\n".encode(),
    "bad length": f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: five\r\n\r\n".encode(),
    "long header": f"GET {CHAT} HTTP/1.1\r\nHost: a\r\nX: {'a' * 20_000}".encode(),
    "long header in one piece": f"GET /health HTTP/1.1\r\nHost: a\r\nX: {'a' * 16_400}\r\n\r\n".encode(),
    "long address in one piece": f"GET /{'a' * 16_400} HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
    "long trailer in one piece": (
        f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\n\r\n0\r\nX: {'a' * 16_400}\r\n\r\n"
    ).encode(),
    "two lengths": (
        f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
        "2\r\n{}\r\n0\r\n\r\n"
    ).encode(),
    "bad chunks": f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n".encode(),
}


@pytest.mark.parametrize("name", NO_HTTP)
def test_bytes_that_are_no_http(served, name):
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as client:
        client.sendall(NO_HTTP[name])
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status == 400
        error = json.loads(answer.read())["error"]
    assert (error["code"], error["type"], error["param"]) == ("invalid_http", "invalid_request_error", None)
    assert post(served, chat())[0] == 200


def test_the_end_of_a_prompt_alone_is_empty_too(served):
    tokenizer = served.service.tokenizer
    ids = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
    assert post(served, completion(prompt=ids), path=COMPLETIONS)[0] == 400
    assert post(served, completion(prompt=[*tokenizer.encode_text("好"), *ids]), path=COMPLETIONS)[0] == 200


@pytest.mark.parametrize(("size", "status"), [(15_000, 200), (16_400, 400)])
def test_long_headers_are_let_through_up_to_the_limit_and_a_head_gets_no_body(served, size, status):
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as client:
        client.sendall(f"HEAD /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX: {'a' * size}\r\n\r\n".encode())
        head, _, body = b"".join(iter(lambda: client.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status}".encode())
    assert body == b""


def test_clients_that_leave_end_their_answers(endless):
    with serving(endless, "--served_model_name", "base", "--max_length", "8000", "--max_rows", "2") as running:
        long = json.dumps(chat(max_tokens=7900, stream=True)).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Length: "
        )
        whole = json.dumps(chat(max_tokens=7900)).encode()
        for body in (long, whole):
            # The third one still waits for its turn when it leaves.
            clients = [socket.create_connection(("127.0.0.1", running.port), timeout=30) for _ in range(3)]
            for client in clients:
                client.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
            if body is long:
                with clients[0].makefile("rb") as lines:
                    assert any(line.startswith(b"data: ") for line in lines)
            wait_for(lambda: running.service.engine.waiting + running.service.engine.running == 3)
            for client in clients:  # a reset, as from a program that was killed
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
            running.wait_until_idle()
        assert running.service.engine.drawn_tokens < 6 * 7900 // 2
        assert post(running, chat())[0] == 200
        text = running.service.metrics.text().decode()
        assert f'chatglm_requests_total{{model="base",route="{CHAT}",status="499"}} 6.0' in text


def test_a_full_queue_asks_to_come_again(endless):
    flags = ("--served_model_name", "base", "--max_length", "8000", "--max_rows", "1", "--max_waiting", "2")
    with serving(endless, *flags) as running, ThreadPoolExecutor(4) as pool:
        with running.service.engine.paused():  # all that comes finds the engine as it was when it was idle
            busy = [pool.submit(post, running, chat(n=2))]
            wait_for(lambda: running.service.engine.waiting == 2)
            status, _, content = post(running, chat(n=2))
            assert (status, content["error"]["code"]) == (503, "queue_full")
            busy.append(pool.submit(post, running, chat()))
            wait_for(lambda: running.service.engine.waiting == 3)
            for body in (chat(), chat(stream=True), chat(n=3)):
                status, headers, content = post(running, body)
                assert status == 503
                assert headers["retry-after"] == "1"
                assert content["error"] == {
                    "message": "The server has as many requests as it can take",
                    "type": "server_error",
                    "param": None,
                    "code": "queue_full",
                }
        assert [answer.result()[0] for answer in busy] == [200] * 2
        assert post(running, chat(n=3))[0] == 200
        error = post(running, chat(n=4))[2]["error"]
        assert (error["code"], error["param"]) == ("invalid_value", "n")
        assert error["message"] == "This server takes at most 3 answers in one request, not 4"


def test_time_runs_out(endless):
    """While the answer is written, streamed or not; while the request comes; and while nobody reads the answer."""
    flags = ("--served_model_name", "base", "--max_length", "8000", "--request_timeout", "1")
    with serving(endless, *flags) as running:
        status, headers, content = post(running, chat(max_tokens=7900))
        assert status == 503
        assert headers["x-should-retry"] == "false"
        assert content["error"]["code"] == "timeout"
        assert content["error"]["message"] == "No answer was ready within 1 s"
        running.wait_until_idle(5)

        body = json.dumps(chat(max_tokens=7900, stream=True)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
            client.sendall(request + body)
            answer = b""
            while block := client.recv(65536):
                answer += block
                if answer.endswith(b"0\r\n\r\n"):
                    break
        events = [line for line in answer.decode("utf-8", errors="replace").splitlines() if line.startswith("data: ")]
        error = json.loads(events[-1][6:])["error"]
        assert (error["code"], error["message"]) == ("timeout", "The answer did not end within 1 s")
        assert json.loads(events[1][6:])["choices"]
        running.wait_until_idle(5)

        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as client:
            client.sendall(request + body[:10])
            answer = b"".join(iter(lambda: client.recv(65536), b""))
            assert b"HTTP/1.1 408" in answer
            assert b'"code":"timeout"' in answer

        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.settimeout(30)
            client.connect(("127.0.0.1", running.port))
            client.sendall(request + body)
            running.wait_until_idle(10)
        assert post(running, chat(max_tokens=2))[0] == 200


def test_a_server_without_a_key_asks_for_none(endless):
    with serving(endless, "--served_model_name", "base", key=None) as running:
        assert post(running, chat(), Authorization=None)[0] == 200
        assert post(running, chat(), Authorization="Bearer anything")[0] == 200
