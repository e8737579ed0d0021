"""A tiny base with two LoRA adapters and a prefix, and servers of it on free ports."""

import http.client
import json
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
import torch

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.checkpoint import save_adapter_files
from chatglm_tuning.config.serve import parse_serve_arguments
from chatglm_tuning.listening import listen
from chatglm_tuning.loading import load_base, load_for_inference
from tests.model_folder import EMBEDDED, write_tiny_model

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

KEY = "sesame-1"
MODELS = ("base", "lora_a", "lora_b", "prefix")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The embedded base, two LoRA adapters of different rank and targets, and a prefix, which all talk otherwise."""
    root = tmp_path_factory.mktemp("serving")
    targets = {"lora_a": ["query_key_value"], "lora_b": ["query_key_value", "dense"]}
    for rank, (name, linears) in enumerate(targets.items(), start=2):
        torch.manual_seed(rank)
        config = make_lora_config(rank=rank, alpha=8 * rank, dropout=0.0, targets=linears)
        model = add_lora(load_base(str(EMBEDDED)).model, config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        save_adapter_files(model, root / name, for_original=False)
    torch.manual_seed(7)
    model = load_base(str(EMBEDDED)).model
    add_prefix_encoder(model, PrefixShape(5, prefix_projection=True), None, "")
    save_adapter_files(model, root / "prefix", for_original=False)
    return {"base": EMBEDDED} | {name: root / name for name in MODELS[1:]}


@pytest.fixture(scope="session")
def endless(tmp_path_factory):
    """A small random base with a head of its own, whose greedy answers have text and end only at their limit."""
    folder = write_tiny_model(tmp_path_factory.mktemp("endless"), max_sequence_length=8192)
    path = folder / "pytorch_model.bin"
    state = torch.load(path)
    torch.manual_seed(3)
    state["lm_head.weight"] = torch.randn_like(state["lm_head.weight"])
    state["lm_head.weight"][load_base(str(folder)).config.eos_token_id] = 0  # never the likeliest
    torch.save(state, path)
    return folder


@pytest.fixture(scope="session")
def alone(folders):
    """By model: what the usual loading gives, and the tokenizer."""
    flags = {"lora_a": "lora_checkpoint", "lora_b": "lora_checkpoint", "prefix": "ptuning_checkpoint"}

    def load(name):
        chosen = {flags[name]: folders[name]} if name in flags else {}
        return load_for_inference(str(folders["base"]), dtype="float32", **chosen)

    return {name: load(name) for name in MODELS}


def wait_for(condition, seconds=20):
    """Wait until `condition()` is true; fail where that takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to it"
        time.sleep(0.005)


@dataclass(frozen=True)
class Served:
    """A server that runs in a thread of this process."""

    service: object
    server: object
    port: int

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def openai(self, **options):
        openai = pytest.importorskip("openai")
        options = {"base_url": f"{self.url}/v1", "api_key": KEY, "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(**options)

    @contextmanager
    def stream(self, body):
        """Give the lines of a streamed chat as they come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            yield connection.getresponse()
        finally:
            connection.close()

    def wait_until_idle(self, seconds=20):
        """Wait until nothing is under way."""
        engine = self.service.engine
        wait_for(lambda: not (self.service.active or engine.running or engine.waiting), seconds)


def adapter_flags(folders):
    return ["--adapter", *(f"{name}={folders[name]}" for name in MODELS[1:])]


@contextmanager
def serving(base, *flags, key=KEY):
    """Serve `base` on a free port; at the end the server drains."""
    from chatglm_tuning.serving.server import DrainingServer
    from chatglm_tuning.serving.service import load_service

    argv = ["--model_name_or_path", str(base), "--dtype", "float32", "--port", "0", *flags]
    arguments = parse_serve_arguments([*argv, *(["--api_key", key] if key else [])], {})
    listener = listen(arguments.host, arguments.port)
    service = load_service(arguments)
    is_serving = threading.Event()
    server = DrainingServer(service, is_serving.set)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert is_serving.wait(30)
        yield Served(service, server, listener.getsockname()[1])
    finally:
        for _ in range(2):
            with suppress(RuntimeError):  # it has ended already
                server.begin_drain()
        thread.join(30)
        assert not thread.is_alive()
        service.engine.close()
        listener.close()


@pytest.fixture(scope="package")
def served(folders):
    """The base and its three adapters, behind a key."""
    flags = ("--served_model_name", "base", "--max_length", "256")
    with serving(folders["base"], *flags, *adapter_flags(folders)) as running:
        yield running
