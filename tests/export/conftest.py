import pytest
import torch

from tests.export.adapters import write_lora, write_prefix
from tests.model_folder import write_tiny_model


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("export") / "model")


@pytest.fixture(scope="session")
def lora(base_folder):
    return write_lora(base_folder.parent / "lora", base_folder)


@pytest.fixture(scope="session")
def lora_int4(base_folder):
    return write_lora(base_folder.parent / "lora-int4", base_folder, bits=4)


@pytest.fixture(scope="session")
def another_base(tmp_path_factory):
    """A model of the same size whose LayerNorms are others."""
    folder = write_tiny_model(tmp_path_factory.mktemp("another") / "another")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state["transformer.final_layernorm.bias"] += 1
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="session")
def prefix(base_folder):
    return write_prefix(base_folder.parent / "prefix", base_folder)
