"""`train-ptuning`: tune a prefix (P-Tuning v2), or without --pre_seq_len the whole model."""

from collections.abc import Sequence

from chatglm_tuning.cli.training import run_training


def run(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    return run_training("ptuning", argv)
