"""Which weights a LoRA is merged onto, and that what is said of them is so."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest

from chatglm_tuning.checkpoint import BaseModel, Manifest
from chatglm_tuning.config.export import ExportArguments
from chatglm_tuning.errors import UserError
from chatglm_tuning.export.base_bits import held_bits_of

MANIFEST = Manifest("lora", BaseModel("the base", "", 2, 32, 10, None))
TRAINED = "what it was trained on"


def ask(tmp_path, *, stored=None, trained=None, has_manifest=True, **flags):
    arguments = ExportArguments("lora", tmp_path / "lora", tmp_path / "output", **flags)
    manifest = replace(MANIFEST, base_model=replace(MANIFEST.base_model, quantization_bit=trained))
    config = SimpleNamespace(quantization_bit=stored)
    return held_bits_of(arguments, config, manifest if has_manifest else None, tmp_path)


CASES = {
    "full on full": ({}, None, f"full-precision weights of the base: {TRAINED}"),
    "int4 on what it was trained on": ({"trained": 4}, 4, f"int4 weights of the base, dequantised: {TRAINED}"),
    "int4 as stored": ({"trained": 4, "stored": 4, "quantization_bit": 4}, 4, f"dequantised: {TRAINED}"),
    "full on stored int8": ({"stored": 8}, 8, "was trained on full-precision weights and is merged onto the int8"),
    "the same, said": ({"stored": 8, "quantization_bit": 8}, 8, "Give the base in full precision"),
    "int4 on stored int8": ({"stored": 8, "trained": 4}, 8, "was trained on int4 weights and is merged onto the int8"),
    "no manifest": ({"has_manifest": False}, None, "full-precision weights of the base; what it was trained on is not"),
    "no manifest, said": ({"has_manifest": False, "quantization_bit": 4}, 4, "int4 weights of the base, dequantised; "),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_merged_onto_is_said_and_so(name, tmp_path, caplog):
    given, bits, said = CASES[name]
    with caplog.at_level(logging.INFO):
        assert ask(tmp_path, **given) == bits
    assert said in caplog.text
    assert caplog.text.count(f": {TRAINED}\n") == said.endswith(TRAINED)


@pytest.mark.parametrize("trained", [None, 8])
def test_bits_that_it_was_not_trained_on_are_refused(tmp_path, trained):
    with pytest.raises(UserError, match=r"says 4.*--output_quantization_bit 4"):
        ask(tmp_path, trained=trained, quantization_bit=4)
