"""A base that speaks a little, a LoRA and a prefix that change what it says, and an engine that can be slowed down."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from chatglm_tuning.adapters.lora import add_lora, make_lora_config
from chatglm_tuning.adapters.ptuning import PrefixShape, add_prefix_encoder
from chatglm_tuning.adapters.served import AdapterSet
from chatglm_tuning.checkpoint import save_adapter_files
from chatglm_tuning.inference.engine import BatchEngine
from chatglm_tuning.inference.session import ChatSession
from chatglm_tuning.inference.stream import GenerationSettings
from chatglm_tuning.loading import Base, load_base, load_for_inference
from chatglm_tuning.web.conversation import Chat
from chatglm_tuning.web.shelf import AdapterShelf
from tests.model_folder import EMBEDDED

GREEDY = GenerationSettings(max_length=80, do_sample=False, temperature=1.0, top_p=1.0)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A LoRA and a prefix for the embedded base, both random and strong."""
    root = tmp_path_factory.mktemp("web-adapters")
    torch.manual_seed(0)
    config = make_lora_config(rank=4, alpha=64, dropout=0.0, targets=["query_key_value"])
    model = add_lora(load_base(str(EMBEDDED)).model, config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.15)
    save_adapter_files(model, root / "my-lora", for_original=False)
    model = load_base(str(EMBEDDED)).model
    add_prefix_encoder(model, PrefixShape(5), None, "")
    for key, parameter in model.named_parameters():
        if "prefix_encoder" in key:
            torch.nn.init.normal_(parameter, std=3.0)
    save_adapter_files(model, root / "my_prefix", for_original=False)
    return {"lora": root / "my-lora", "prefix": root / "my_prefix"}


@pytest.fixture(scope="session")
def alone(folders):
    """What the base, or it with one adapter, answers greedily when nothing else is loaded."""
    flags = {
        "base": {},
        "lora": {"lora_checkpoint": folders["lora"]},
        "prefix": {"ptuning_checkpoint": folders["prefix"]},
    }
    models = {name: load_for_inference(str(EMBEDDED), dtype="float32", **given) for name, given in flags.items()}

    def answer(name: str, question: str, history=(), settings=GREEDY) -> str:
        session = ChatSession(*models[name], settings)
        session.history = list(history)
        return "".join(session.reply(question))

    return answer


@dataclass
class Served:
    """An engine on the embedded base in int4 or not. delay: seconds that every step of the model takes longer."""

    base: Base
    engine: BatchEngine
    chat: Chat
    delay: float = 0.0


def start_engine(**limits) -> Served:
    base = load_base(str(EMBEDDED))
    engine = BatchEngine(AdapterSet(base.model), **limits)
    served = Served(base, engine, Chat(engine, base.tokenizer, AdapterShelf(base, engine)))
    base.model.register_forward_pre_hook(lambda *_: time.sleep(served.delay))
    return served
