"""Numbers of config.json that no model has: refused when the file is read, as sizes are."""

import json
import shutil

import pytest

from chatglm_tuning.base_folder import read_config
from chatglm_tuning.errors import UserError
from tests.model_folder import EMBEDDED


def folder_with(place, **changes):
    shutil.copy(EMBEDDED / "config.json", place)
    content = json.loads((place / "config.json").read_text(encoding="utf-8")) | changes
    (place / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return place


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-5, 0.0, 1e5, True, None, "1e-5"])
@pytest.mark.parametrize("name", ["layernorm_epsilon", "residual_scale"])
def test_a_number_that_no_model_has_is_refused(tmp_path, name, value):
    with pytest.raises(UserError) as raised:
        read_config(folder_with(tmp_path, **{name: value}))
    assert raised.value.code == "M104"
    assert raised.value.where == str(tmp_path / "config.json")


@pytest.mark.parametrize("value", [1e-12, 1e-5, 1e-3])
def test_usual_numbers_are_taken(tmp_path, value):
    assert read_config(folder_with(tmp_path, layernorm_epsilon=value)).layernorm_epsilon == value
