"""Sharing out the weights on CPUs: what is asked for is what the engine gets."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from chatglm_tuning.training.sharded import shard_on_cpu


@pytest.mark.parametrize(("precision", "dtype"), [("no", None), ("bf16", torch.bfloat16)])
def test_the_precision_that_is_asked_for_is_computed_in(precision, dtype):
    kind = DistributedType.MULTI_CPU
    accelerator: Any = SimpleNamespace(distributed_type=kind, mixed_precision=precision, state=SimpleNamespace())
    assert shard_on_cpu(accelerator, {"fsdp_version": 2})
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    assert (None if policy is None else policy.param_dtype) == dtype
