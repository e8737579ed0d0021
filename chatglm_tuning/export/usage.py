"""How an export is used: lines for a shell, and Python for other programs, for its model card."""

import json
import shlex
from dataclasses import dataclass

from chatglm_tuning.adapters.ptuning import PrefixShape

GGML_NAME = "chatglm-ggml.bin"
ADAPTER_NAME = "adapter"
BASE_NAME = "base"


@dataclass(frozen=True)
class Usage:
    """commands: shell lines that chat with the export. python: how another program reads it, empty for none."""

    commands: tuple[str, ...]
    python: str = ""


def usage_of_ggml(name: str) -> Usage:
    """Return how chatglm.cpp answers from the file in the folder `name`."""
    path = _text(f"{name}/{GGML_NAME}")
    program = (
        f"import chatglm_cpp; print(chatglm_cpp.Pipeline({path}).chat("
        '[chatglm_cpp.ChatMessage(role="user", content="你好")]).content)'
    )
    return Usage(
        (
            'CMAKE_ARGS="-DCMAKE_POLICY_VERSION_MINIMUM=3.5" pip install chatglm-cpp==0.4.2',
            f"python -c {shlex.quote(program)}",
        )
    )


def usage_of_merged(name: str) -> Usage:
    """Return how one chats with the merged model in the folder `name`."""
    return Usage((f"chatglm-tuning chat --model_name_or_path {shlex.quote(name)}",))


def usage_of_adapter(base: str, method: str, adapter: str, bits: int | None) -> Usage:
    """Return how one chats with an adapter. bits: that the base is to be held in, None to load it as it is stored."""
    flag = "--lora_checkpoint" if method == "lora" else "--ptuning_checkpoint"
    held = f" --quantization_bit {bits}" if bits else ""
    command = f"chatglm-tuning chat --model_name_or_path {shlex.quote(base)} {flag} {shlex.quote(adapter)}{held}"
    return Usage((command,))


def usage_of_peft_0_3(base: str, name: str) -> str:
    """Return how peft 0.3 reads a LoRA."""
    return (
        "# peft 0.3, transformers 4.27, as the original: cli_demo.py --lora_checkpoint does the same\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModel\n\n"
        f"model = AutoModel.from_pretrained({_text(base)}, trust_remote_code=True)\n"
        f"model = PeftModel.from_pretrained(model, {_text(name)})"
    )


def usage_of_original_prefix(base: str, name: str, shape: PrefixShape) -> str:
    """Return how the original's scripts read a prefix."""
    flag = " --prefix_projection" if shape.prefix_projection else ""
    command = f"cli_demo.py --ptuning_checkpoint … --pre_seq_len {shape.pre_seq_len}{flag}"
    key = "transformer.prefix_encoder."
    return (
        f"# transformers 4.27, as the original: {command} does the same\n"
        "import torch\n"
        "from transformers import AutoConfig, AutoModel\n\n"
        f"config = AutoConfig.from_pretrained({_text(base)}, trust_remote_code=True)\n"
        f"config.pre_seq_len, config.prefix_projection = {shape.pre_seq_len}, {shape.prefix_projection}\n"
        f"model = AutoModel.from_pretrained({_text(base)}, config=config, trust_remote_code=True)\n"
        f"state = torch.load({_text(name + '/pytorch_model.bin')})\n"
        f'state = {{key.removeprefix("{key}"): value for key, value in state.items()}}\n'
        "model.transformer.prefix_encoder.load_state_dict(state)"
    )


def _text(value: str) -> str:
    """Return a text as Python writes it, with double quotes, so that a shell's single ones can stand around it."""
    return json.dumps(value, ensure_ascii=False)
