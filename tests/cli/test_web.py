"""`chatglm-tuning web`: flags, what it refuses before anything slow, and how it ends."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chatglm_tuning.cli.main import main
from chatglm_tuning.config.adapters import NamedAdapter
from chatglm_tuning.config.arguments import ModelArguments
from chatglm_tuning.config.web import WebArguments, parse_web_arguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.listening import listen
from tests.conftest import REPOSITORY
from tests.model_folder import write_tiny_model

# What runs the tests may ignore Ctrl-C, as a shell's background jobs do, and a new process would go on doing so.
_START = (
    "import signal, runpy; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_path('web_demo.py', run_name='__main__')"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("web") / "base")


def test_flags_become_arguments():
    typed = (
        "--model_name_or_path m --quantization_bit 4 --lora_checkpoint output/mine/ --adapter a=b/c --adapter 名字=~/d "
        "--host ::1 --port 0 --language en --max_length 99 --seed 7"
    )
    arguments = parse_web_arguments(typed.split(" "))
    assert arguments == WebArguments(
        model=ModelArguments("m", 4),
        adapters=(
            NamedAdapter("mine", Path("output/mine"), "lora"),
            NamedAdapter("a", Path("b/c")),
            NamedAdapter("名字", Path.home() / "d"),
        ),
        host="::1",
        port=0,
        language="en",
        max_length=99,
        seed=7,
    )


def test_without_flags_the_page_is_for_this_machine_only():
    arguments = parse_web_arguments([])
    assert (arguments.host, arguments.port, arguments.language, arguments.adapters) == ("127.0.0.1", 7860, "zh", ())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--adapter", "folder"], "NAME=FOLDER"),
        (["--adapter", "=folder"], "NAME=FOLDER"),
        (["--adapter", "a= "], "NAME=FOLDER"),
        (["--adapter", ":base:=folder"], "no adapter may be named :base:"),
        (["--lora_checkpoint", "output/:base:"], "no adapter may be named :base:"),
        (["--adapter", "a\tb=folder"], "printable"),
        (["--adapter", "a=~nobodyxx/a"], "~nobodyxx is nobody's folder"),
        (["--lora_checkpoint", "~nobodyxx/a"], "~nobodyxx is nobody's folder"),
        (["--adapter", "a=b", "a=c"], "two adapters are named a"),
        (["--adapter", "x=b", "--ptuning_checkpoint", "output/x"], "two adapters are named x"),
        (["--port", "65536"], "65535"),
        (["--language", "fr"], "zh or en"),
        (["--pre_seq_len", "128"], "read from the folder"),
        (["--share"], "--host"),
        (["--top_p", "0.7"], "set on the page"),
    ],
)
def test_wrong_flags_are_refused(flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parse_web_arguments(flags)


def test_a_port_in_use_is_told_before_the_model_is_looked_for(capsys):
    with listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert main(["web", "--model_name_or_path", "/nowhere", "--port", port]) == 2
    said = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1 port {port}: another program listens there already" in said


def test_a_wrong_adapter_is_told_before_the_base_is_read(base, tmp_path, capsys):
    prefix = tmp_path / "prefix"
    prefix.mkdir()
    save_file({"embedding.weight": torch.zeros(1)}, prefix / "prefix_encoder.safetensors")
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    wrong = {
        ("--adapter", f"a={tmp_path / 'nowhere'}"): "there is no such folder",
        ("--adapter", f"a={__file__}"): "this is a file, not a folder",
        ("--lora_checkpoint", str(prefix)): "Give it with --ptuning_checkpoint",
        ("--ptuning_checkpoint", str(lora)): "the folder holds a LoRA adapter",
    }
    (base / "pytorch_model.bin").rename(base / "away")
    try:
        for flags, said in wrong.items():
            assert main(["web", "--model_name_or_path", str(base), "--port", "0", *flags]) == 2
            assert said in capsys.readouterr().err
    finally:
        (base / "away").rename(base / "pytorch_model.bin")


def test_without_gradio_the_remedy_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["web", "--port", "0"]) == 2
    assert 'pip install "chatglm-tuning[web]"' in capsys.readouterr().err


def test_a_signal_ends_it_cleanly_with_a_page_open(base):
    """Both ways at once: starting is what takes time."""
    flags = ["--model_name_or_path", str(base), "--port", "0", "--quantization_bit", "4"]
    codes = {signal.SIGTERM: 0, signal.SIGINT: 130}
    processes = {sent: start(flags) for sent in codes}
    try:
        for sent, process in processes.items():
            address = process.stdout.readline().split()[0]
            with urllib.request.urlopen(address) as page:
                assert b"gradio" in page.read()
            # An open page keeps a connection that never ends by itself.
            with urllib.request.urlopen(f"{address}/gradio_api/heartbeat/somebody"):
                process.send_signal(sent)
                _, complaints = process.communicate(timeout=20)
            assert process.returncode == codes[sent]
            assert "Traceback" not in complaints
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def start(flags):
    return subprocess.Popen(
        [sys.executable, "-c", _START, *flags],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
