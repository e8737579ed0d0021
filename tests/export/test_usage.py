"""What a card says about using an export is what a shell and Python read."""

import shlex
import sys
from types import SimpleNamespace

import pytest
import torch

from chatglm_tuning.adapters.ptuning import PrefixShape
from chatglm_tuning.checkpoint import read_prefix
from chatglm_tuning.config.export import ExportArguments
from chatglm_tuning.export import usage
from chatglm_tuning.export.run import export
from chatglm_tuning.loading import add_prefix, load_base
from tests.export.adapters import write_prefix

NAME = "my ex 中 'a' \"b\" $c"


def test_every_line_is_quoted():
    (line,) = usage.usage_of_adapter("a base", "ptuning", NAME, 4).commands
    expected = ["chatglm-tuning", "chat", "--model_name_or_path", "a base", "--ptuning_checkpoint", NAME]
    assert shlex.split(line) == [*expected, "--quantization_bit", "4"]
    _, line = usage.usage_of_ggml(NAME).commands
    python, flag, program = shlex.split(line)
    assert (python, flag) == ("python", "-c")
    assert repr(f"{NAME}/chatglm-ggml.bin") in repr([*compile(program, "card", "exec").co_consts])


def test_peft_0_3_is_told_as_python():
    compile(usage.usage_of_peft_0_3("a base", NAME), "card", "exec")


@pytest.mark.parametrize("prefix_projection", [False, True])
def test_what_the_card_says_loads_the_original_s_prefix(base_folder, tmp_path, monkeypatch, prefix_projection):
    adapter = write_prefix(tmp_path / "prefix", base_folder, prefix_projection=prefix_projection)
    export(ExportArguments("ptuning", adapter, tmp_path / "output", str(base_folder), format="original"))
    card = (tmp_path / "output" / "README.md").read_text(encoding="utf-8")
    program = card.split("```python\n")[1].split("```")[0]
    config, base = SimpleNamespace(), load_base(str(base_folder))
    add_prefix(base, PrefixShape(3, prefix_projection), None)
    auto = [SimpleNamespace(from_pretrained=lambda *_, value=value, **__: value) for value in (config, base.model)]
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoConfig=auto[0], AutoModel=auto[1]))
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert (config.pre_seq_len, config.prefix_projection) == (3, prefix_projection)
    for key, value in read_prefix(adapter)[1].items():
        assert torch.equal(base.model.get_parameter(f"transformer.prefix_encoder.{key}").data, value)
