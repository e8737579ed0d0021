"""The layers that run are counted while a part goes on, and not afterwards."""

import logging

import pytest
from torch import nn, zeros

from chatglm_tuning.export.progress import layers_progress


@pytest.mark.parametrize("show", [True, False])
def test_layers_are_counted_as_they_run(caplog, show):
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]

    def run():
        for layer in layers:
            layer(zeros(1, 2))

    run()
    with caplog.at_level(logging.INFO), layers_progress("asking", layers, 3, show=show):
        run()
        run()
    assert ("asking: 4 layers in " in caplog.text) == show
    assert not any(layer._forward_hooks for layer in layers)
