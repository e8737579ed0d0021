"""`train-lora`: tune a LoRA adapter."""

from collections.abc import Sequence

from chatglm_tuning.cli.training import run_training


def run(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_training("lora", argv)
