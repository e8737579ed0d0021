"""The prefix as an adapter: its shape, its tensors, and the model with and without it."""

import pytest
import torch

from chatglm_tuning.adapters.ptuning import (
    PREFIX_KEY,
    PrefixShape,
    add_prefix_encoder,
    check_prefix_fits,
    prefix_state_dict,
    prefix_tensors,
    shape_of_prefix,
)
from chatglm_tuning.errors import UserError
from chatglm_tuning.loading import load_base
from chatglm_tuning.model import ChatGLMConfig
from tests.model_folder import write_tiny_model

CONFIG = ChatGLMConfig(num_layers=2, hidden_size=8, num_attention_heads=2)


@pytest.fixture
def model(tmp_path):
    return load_base(str(write_tiny_model(tmp_path / "model")), dtype=torch.bfloat16).model


def tensors_of(shape: PrefixShape) -> dict[str, torch.Tensor]:
    if not shape.prefix_projection:
        return {"embedding.weight": torch.randn(shape.pre_seq_len, 32)}
    linears = {"trans.0.weight": (8, 8), "trans.0.bias": (8,), "trans.2.weight": (32, 8), "trans.2.bias": (32,)}
    return {"embedding.weight": torch.randn(shape.pre_seq_len, 8)} | {k: torch.randn(v) for k, v in linears.items()}


@pytest.mark.parametrize("shape", [PrefixShape(5), PrefixShape(5, prefix_projection=True)])
def test_the_shape_is_read_from_the_tensors(shape):
    assert shape_of_prefix(tensors_of(shape), "x") == shape
    check_prefix_fits(CONFIG, shape, tensors_of(shape), "x")
    assert CONFIG.pre_seq_len is None


def test_full_model_keys_are_left_out():
    state = {f"{PREFIX_KEY}embedding.weight": torch.ones(2, 3), "transformer.word_embeddings.weight": torch.ones(1)}
    assert list(prefix_tensors(state)) == ["embedding.weight"]


@pytest.mark.parametrize("tensors", [{}, {"embedding.weight": torch.ones(3)}, {"embedding.weight": torch.ones(0, 3)}])
def test_no_prefix_is_told(tensors):
    with pytest.raises(UserError, match="folder: there is no prefix in it"):
        shape_of_prefix(tensors, "folder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"embedding.weight": torch.ones(5, 9)}),
            r"embedding.weight is \(5, 9\), this model's is \(5,",
        ),
        (lambda t: t.pop("trans.2.bias"), r"trans.2.bias is missing, this model's is \(32,\)"),
        (lambda t: t.update({"trans.4.bias": torch.ones(1)}), r"trans.4.bias is \(1,\), this model's is missing"),
    ],
)
def test_a_prefix_of_another_model_is_refused(change, message):
    shape = PrefixShape(5, prefix_projection=True)
    tensors = tensors_of(shape)
    change(tensors)
    with pytest.raises(UserError, match=message):
        check_prefix_fits(CONFIG, shape, tensors, "x")


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_changes_the_output_and_taking_it_out_restores_it(model, projection):
    ids = torch.arange(20, 32)[None]
    ids[0, 6:8] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        torch.manual_seed(1)
        add_prefix_encoder(model, PrefixShape(3, projection), None, "x")
        model.eval()
        after = model(input_ids=ids).logits
        state = prefix_state_dict(model)
        model.transformer.prefix_encoder = None
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.allclose(after, before)
    assert all(key.startswith(PREFIX_KEY) and value.dtype == torch.float32 for key, value in state.items())
    assert (model.config.pre_seq_len, model.config.prefix_projection) == (3, projection)
    add_prefix_encoder(model, PrefixShape(3, projection), prefix_tensors(state), "x")
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, after)
