"""DeepSpeed's ZeRO-2, with the original's ds_config.json, and ZeRO-3 on two processes against one.

Skipped where deepspeed is missing: it is no part of the set-up. On a CPU it needs DS_ACCELERATOR=cpu.
"""

import importlib.util
import shutil

import pytest

from chatglm_tuning.training.callbacks import read_log
from tests.model_folder import REPOSITORY
from tests.training.test_distributed import FILES, SHARDED, Launches, assert_same_gradients

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("deepspeed") is None,
        reason='deepspeed is not installed (pip install "chatglm-tuning[deepspeed]"): ZeRO-2 and ZeRO-3 were not run',
    ),
]
AUTO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
AUTO |= {"gradient_clipping": "auto", "zero_allow_untested_optimizer": True}
STAGES = {2: str(REPOSITORY / "ds_config.json"), 3: {**AUTO, "zero_optimization": {"stage": 3}}}


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    return Launches(tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="module")
def alone(launches):
    """What one process makes of every case, and the weights it starts from."""
    return launches.run(1, SHARDED), launches.run(1, SHARDED, learning_rate=1e-30)


@pytest.mark.parametrize("stage", list(STAGES))
def test_zero_gives_the_gradients_of_one_process_in_the_same_files(launches, alone, stage, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = launches.run(2, SHARDED, deepspeed=STAGES[stage], overwrite_output_dir=True)
    for name, (method, _) in SHARDED.items():
        assert_same_gradients(found[name], alone[0][name], alone[1][name], method)
        assert {path.name for path in found[name].iterdir()} == {path.name for path in alone[0][name].iterdir()}


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_run_under_zero_goes_on_from_its_checkpoint_to_the_same_bytes(launches, stage, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    settings = {"deepspeed": STAGES[stage], "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2, "overwrite_output_dir": True}
    whole = launches.run(2, SHARDED, **settings)
    settings["resume_from_checkpoint"] = "auto"
    for name, output in whole.items():
        continued, _ = launches.flags(name, SHARDED, 2, **settings)
        shutil.rmtree(continued, ignore_errors=True)
        shutil.copytree(output / "checkpoint-2", continued / "checkpoint-2")
    resumed = launches.run(2, SHARDED, **settings)
    for name, (method, _) in SHARDED.items():
        assert read_log(resumed[name])[0]["step"] == 3, "it did not begin anew"
        assert (resumed[name] / FILES[method]).read_bytes() == (whole[name] / FILES[method]).read_bytes()
