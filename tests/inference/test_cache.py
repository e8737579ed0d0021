import torch
from transformers.cache_utils import DynamicCache

from chatglm_tuning.inference import cache as cache_module
from chatglm_tuning.inference.cache import make_cache


def _random_states(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, tokens, 4), torch.randn(batch, 2, tokens, 4)


def test_it_returns_what_the_cache_of_transformers_returns(monkeypatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(cache_module, "_TOKENS_OF_ROOM", 3)  # outgrown several times
    ours, theirs = make_cache(), DynamicCache()
    for tokens in (5, 1, 1, 1, 1, 4, 1):
        for layer in range(2):
            states = _random_states(1, tokens)
            torch.testing.assert_close(ours.update(*states, layer), theirs.update(*states, layer), rtol=0, atol=0)
    assert ours.get_seq_length() == theirs.get_seq_length() == 14


def test_a_token_is_appended_without_moving_those_before_it() -> None:
    cache = make_cache()
    keys, values = cache.update(*_random_states(1, 5), 0)
    more_keys, more_values = cache.update(*_random_states(1, 1), 0)
    assert (more_keys.data_ptr(), more_values.data_ptr()) == (keys.data_ptr(), values.data_ptr())


def test_it_goes_on_after_being_cropped_and_reordered() -> None:
    torch.manual_seed(0)
    ours, theirs = make_cache(), DynamicCache()
    for cache in (ours, theirs):
        torch.manual_seed(1)
        cache.update(*_random_states(2, 5), 0)
        cache.crop(-2)
        cache.update(*_random_states(2, 1), 0)
        cache.reorder_cache(torch.LongTensor([1, 0]))
        cache.update(*_random_states(2, 1), 0)
    states = _random_states(2, 1)
    torch.testing.assert_close(ours.update(*states, 0), theirs.update(*states, 0), rtol=0, atol=0)
