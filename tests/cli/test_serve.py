"""The serve command: its flags, what it finds wrong before it loads anything, and whole programs with signals."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.checkpoint import save_adapter_files
from chatglm_tuning.cli import serve
from chatglm_tuning.cli.main import main
from chatglm_tuning.config.adapters import NamedAdapter
from chatglm_tuning.config.serve import API_KEY_VARIABLE, parse_serve_arguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import load_base
from tests.conftest import REPOSITORY
from tests.model_folder import EMBEDDED, write_tiny_model

pytest.importorskip("uvicorn")


def test_defaults_and_flags(tmp_path):
    arguments = parse_serve_arguments([], {})
    assert arguments.host == "127.0.0.1"
    assert arguments.api_key is None
    assert arguments.model_names == ["chatglm-6b"]
    flags = [
        *("--model_name_or_path", str(tmp_path / "base"), "--adapter", "a=one", "--adapter", "b=~/two", "c=th=ree"),
        *("--lora_checkpoint", "out/lora", "--ptuning_checkpoint", "out/prefix/", "--max_rows", "3"),
        *("--request_timeout", "2.5", "--max_output_tokens", "7", "--drain_seconds", "0"),
    ]
    arguments = parse_serve_arguments(flags, {API_KEY_VARIABLE: "of-the-environment"})
    assert arguments.model_names == ["base", "lora", "prefix", "a", "b", "c"]
    assert arguments.adapters[1] == NamedAdapter("prefix", Path("out/prefix"), "ptuning")
    assert arguments.adapters[3] == NamedAdapter("b", Path("~/two").expanduser())
    assert str(arguments.adapters[4].folder) == "th=ree"
    assert (arguments.max_rows, arguments.request_timeout, arguments.max_output_tokens) == (3, 2.5, 7)
    assert arguments.api_key == "of-the-environment"
    assert "of-the-environment" not in repr(arguments)
    assert parse_serve_arguments(["--api_key", "typed"], {API_KEY_VARIABLE: "other"}).api_key == "typed"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "folder"], "--adapter must be NAME=FOLDER, not 'folder'"),
        (["--adapter", "=folder"], "Write it as in --adapter mine=output/my-lora"),
        (["--adapter", "name="], "--adapter must be NAME=FOLDER"),
        (["--adapter", "a=x", "a=y"], "two adapters are named a"),
        (["--adapter", "chatglm-6b=x"], "no adapter may be named chatglm-6b"),
        (["--adapter", "given=x", "--served_model_name", "given"], "no adapter may be named given"),
        (["--lora_checkpoint", "a/same", "--ptuning_checkpoint", "b/same"], "two adapters are named same"),
        (["--served_model_name", "a\nb"], "cannot be the name of a model"),
        (["--served_model_name", ""], "--served_model_name must not be empty"),
        (["--api_key", ""], "must not be empty"),
        (["--port", "70000"], "--port must be"),
        (["--max_rows", "0"], "--max_rows must be"),
        (["--request_timeout", "0"], "--request_timeout must be"),
        (["--request_timeout", "nan"], "--request_timeout must be"),
        (["--pre_seq_len", "5"], "--pre_seq_len is no flag"),
    ],
)
def test_wrong_flags(flags, message, capsys):
    assert main(["serve", *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("key", ["", "se same", "schlüssel", "a\n"])
def test_a_key_that_no_header_carries_is_refused_and_not_shown(key):
    with pytest.raises(UserError, match="api_key") as caught:
        parse_serve_arguments([], {API_KEY_VARIABLE: key})
    assert "schl" not in str(caught.value)
    assert "same" not in str(caught.value)


def test_a_port_in_use_is_one_clear_error(capsys, monkeypatch):
    monkeypatch.setattr("chatglm_tuning.loading.load_base", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--model_name_or_path", str(EMBEDDED), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error [S102]: --host 127.0.0.1 --port {port}: ")
    assert "another program listens there already. Give another --port" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1"])
def test_an_address_of_another_machine(host, capsys):
    assert main(["serve", "--model_name_or_path", str(EMBEDDED), "--host", host, "--port", "0"]) == 2
    assert f"error [S103]: --host {host}" in capsys.readouterr().err


def test_a_wrong_adapter_is_found_before_the_base_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("chatglm_tuning.loading.load_base", None)
    for folder, message in ((tmp_path / "missing", "there is no such folder"), (tmp_path, "there is no LoRA")):
        flags = ["--model_name_or_path", str(EMBEDDED), "--port", "0", "--adapter", f"mine={folder}"]
        assert main(["serve", *flags]) == 2
        error = capsys.readouterr().err
        assert f"{folder}: {message}" in error
    assert main(["serve", "--model_name_or_path", str(tmp_path), "--port", "0"]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_an_adapter_of_the_wrong_kind_is_found_before_the_base_is_loaded(tmp_path, capsys, monkeypatch):
    """A prefix under the flag for a LoRA and the other way round, as chat has it; and DoRA, which no row can have."""
    model = load_base(str(EMBEDDED)).model
    add_prefix_encoder(model, PrefixShape(3), None, "")
    save_adapter_files(model, tmp_path / "prefix", for_original=False)
    for name, is_dora in (("lora", False), ("dora", True)):
        config = make_lora_config(rank=2, alpha=4, dropout=0.0, targets=["dense"])
        config.use_dora = is_dora
        save_adapter_files(add_lora(load_base(str(EMBEDDED)).model, config), tmp_path / name, for_original=False)
    monkeypatch.setattr("chatglm_tuning.loading.load_base", None)
    for flag, name, message in (
        (
            "--lora_checkpoint",
            "prefix",
            "the folder holds a prefix of P-Tuning v2, not a LoRA adapter",
        ),
        (
            "--ptuning_checkpoint",
            "lora",
            "the folder holds a LoRA adapter, not a prefix of P-Tuning v2",
        ),
        ("--lora_checkpoint", "dora", "this is a DoRA adapter"),
        ("--adapter", "dora", "this is a DoRA adapter"),
    ):
        given = f"mine={tmp_path / name}" if flag == "--adapter" else str(tmp_path / name)
        assert main(["serve", "--model_name_or_path", str(EMBEDDED), "--port", "0", flag, given]) == 2
        assert f"{tmp_path / name}: {message}" in capsys.readouterr().err


def test_a_missing_library_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model_name_or_path", str(EMBEDDED), "--port", "0"]) == 2
    assert 'pip install "chatglm-tuning[serve]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "key", "is_warned"),
    [
        ("127.0.0.1", None, False),
        ("localhost", None, False),
        ("::1", None, False),
        ("127.8.8.8", None, False),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("192.168.1.5", None, True),
        ("0.0.0.0", "key", False),
    ],
)
def test_strangers_are_warned_of(host, key, is_warned, capsys):
    serve._warn_of_strangers(parse_serve_arguments(["--host", host, *(["--api_key", key] if key else [])], {}))
    assert (f"warning: --host {host} lets other machines ask" in capsys.readouterr().err) is is_warned


@contextmanager
def program(folder, *flags, **environment):
    """Run the command; gives the process and the port, once it says where it is."""
    command = [sys.executable, "-m", "chatglm_tuning", "serve", "--model_name_or_path", str(folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--dtype", "float32", *flags],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        announced = process.stdout.readline()
        assert announced, process.stderr.read()
        yield process, announced, int(re.search(r":(\d+)/v1", announced)[1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def ask(port, max_tokens, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"model": "base", "messages": [{"role": "user", "content": "你好"}], "max_tokens": max_tokens}
    headers = {"Content-Type": "application/json", **headers}
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"temperature": 0}), headers)
    return connection


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("program"), max_sequence_length=8192)


def test_sigterm_lets_the_answer_under_way_end(base):
    with program(base, "--served_model_name", "base", "--max_length", "8000") as (process, _, port):
        connection = ask(port, 500)
        deadline = time.monotonic() + 30
        while not _is_running(port):
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        content = json.loads(connection.getresponse().read())
        connection.close()
        assert process.wait(20) == 0
        assert content["usage"]["completion_tokens"] == 500
        assert "Traceback" not in process.stderr.read()


def _is_running(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return "chatglm_running_answers 1.0" in text


def test_what_it_says_at_the_start_works(base):
    """The curl line it prints is run as it stands; the log has the request and neither its words nor the key.

    Ctrl-C ends it as SIGTERM does.
    """
    environment = {API_KEY_VARIABLE: "open-sesame"}
    flags = ("--served_model_name", "it's", "--max_output_tokens", "20")
    with program(base, *flags, **environment) as (process, announced, port):
        assert announced == f"serving it's at http://127.0.0.1:{port}/v1\n"
        line = process.stdout.readline()
        assert line.startswith("try: curl ")
        assert "open-sesame" not in line
        shell = line.removeprefix("try: curl ")
        answered = subprocess.run(
            ["sh", "-c", f"curl -sS --max-time 60 {shell}"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert json.loads(answered)["choices"][0]["message"]["role"] == "assistant"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        log = process.stderr.read()
        assert "/v1/chat/completions 200 it's" in log
        assert "你好" not in log
        assert "open-sesame" not in log
