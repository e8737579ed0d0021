import pytest

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
def prefix(base_folder):
    return write_prefix(base_folder.parent / "prefix", base_folder)
