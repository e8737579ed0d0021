"""Tune a P-Tuning v2 prefix, or the whole model, from a clone; `--help` lists the flags."""

import sys

from chatglm_tuning.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("train-ptuning", sys.argv[1:]))
