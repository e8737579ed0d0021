"""Answers of a quantised model are the same with and without the products made for single tokens."""

import pytest
import torch

from chatglm_tuning.inference.stream import GenerationSettings, stream_tokens
from chatglm_tuning.loading import Base, load_base
from chatglm_tuning.quantization import decode, linear
from tests.model_folder import write_tiny_model


@pytest.fixture(scope="module", params=[4, 8])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    if decode._load_kernels() is None:
        pytest.skip("no C compiler")
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load_base(str(folder), quantization_bit=request.param)


def _stream(base: Base) -> list[int]:
    ids = [*range(10, 20), base.config.gmask_token_id, base.config.bos_token_id]
    # Greedy answers of random weights repeat one token.
    settings = GenerationSettings(max_length=len(ids) + 24, do_sample=True, temperature=1.0, top_p=0.9, seed=1)
    return list(stream_tokens(base.model, torch.tensor([ids]), settings=settings))


def test_the_answer_is_the_same_with_every_path_on_and_off(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    def watch(*arguments, **keywords):
        product = decode.few_rows_product(*arguments, **keywords)
        served.append(product is not None)
        return product

    monkeypatch.setattr(linear, "few_rows_product", watch)
    with_kernels = _stream(base)
    monkeypatch.setattr(linear, "few_rows_product", lambda *_arguments, **_keywords: None)
    without = _stream(base)

    assert with_kernels == without
    assert len(set(with_kernels)) > 1
    assert True in served  # the tokens
    assert False in served  # the prompt
