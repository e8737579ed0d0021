"""Chat in the terminal from a clone, by the original's command line; `--help` lists the flags."""

import sys

from chatglm_tuning.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("chat", sys.argv[1:]))
