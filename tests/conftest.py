"""Fixtures shared by all tests: the released model's golden values and a tiny model folder in the released layout."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Paths:
    """How a step is computed: every choice that may change time and memory, and no value."""

    is_padding_free: bool
    checkpointing: str
    workspace: str
    is_compiled: bool
    is_pooled: bool


PATHS = {
    "plain": Paths(False, "off", "matrix", is_compiled=False, is_pooled=False),
    "fast": Paths(True, "off", "matrix", is_compiled=True, is_pooled=True),
    "middle": Paths(True, "mlp", "layer", is_compiled=True, is_pooled=True),
    "padded": Paths(False, "on", "layer", is_compiled=True, is_pooled=True),
    "lean": Paths(True, "on", "chunk", is_compiled=False, is_pooled=False),
}
PATHS_VARIABLE = "CHATGLM_TUNING_TEST_PATHS"


def pytest_collection_modifyitems(items):
    """Put the longest files first, so that of several processes none is left with one at the end (`make test`)."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/training/"))


@pytest.fixture(scope="session", autouse=True)
def chosen_paths():
    """Computes every test as the environment names it, one of `PATHS`; sizes are lowered to those of tiny models."""
    name = os.environ.get(PATHS_VARIABLE)
    if name is None:
        yield
        return
    from chatglm_tuning import allocator, kernels
    from chatglm_tuning.model import ChatGLMForConditionalGeneration
    from chatglm_tuning.quantization import workspace as buffers

    chosen = PATHS[name]
    build = ChatGLMForConditionalGeneration.__init__

    def build_with_paths(model, config):
        build(model, config)
        model.transformer.is_padding_free = chosen.is_padding_free
        model.set_activation_checkpointing(chosen.checkpointing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChatGLMForConditionalGeneration, "__init__", build_with_paths)
        patch.setattr(kernels, "_LEAST_ELEMENTS", 64)
        patch.setattr(allocator, "_LEAST_POOLED_BYTES", 1024)
        patch.setattr(buffers, "_CHUNK_ELEMENTS", 1000)
        kernels.set_compiling(chosen.is_compiled)
        buffers.workspace.set_size(chosen.workspace)
        if chosen.is_pooled:
            allocator.keep_freed_memory()
        else:
            allocator.return_freed_memory()
        yield
        assert kernels.is_compiling() is chosen.is_compiled, "no compiler: the compiled kernels were not tested"


def shared_folder() -> Path:
    """The folder that holds the golden fixtures and the released tokenizer; skips the test where there is none."""
    folder = Path(os.environ.get("CHATGLM_TUNING_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip("the golden fixtures are not on this machine (set CHATGLM_TUNING_SHARED)")
    return folder


@dataclass(frozen=True)
class Golden:
    """Fixtures computed with the released model code."""

    folder: Path

    def json(self, name: str):
        return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))

    def tensors(self, name: str):
        from safetensors.torch import load_file

        return load_file(self.folder / f"{name}.safetensors")


@pytest.fixture(scope="session")
def shared() -> Path:
    return shared_folder()


@pytest.fixture(scope="session")
def golden(shared: Path) -> Golden:
    return Golden(shared / "golden")


def load_golden_model(golden: Golden, *, attention: str = "sdpa", dtype=None, **config_changes):
    """The golden tiny model (3 layers, hidden 64, the real vocabulary), in eval mode."""
    import torch

    from chatglm_tuning.model import ChatGLMConfig, ChatGLMForConditionalGeneration

    config = ChatGLMConfig(**{**golden.json("tiny_config"), "dtype": "float32", **config_changes})
    config._attn_implementation = attention
    model = ChatGLMForConditionalGeneration(config)
    weights = golden.tensors("tiny_weights_fp16")
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    assert not unexpected
    assert all(k == "lm_head.weight" or "prefix_encoder" in k for k in missing)
    model.tie_weights()
    return model.to(dtype or torch.float32).eval()


@pytest.fixture(scope="session")
def golden_model(golden: Golden):
    """The golden tiny model in fp32 with sdpa attention; tests must not change it."""
    return load_golden_model(golden)
