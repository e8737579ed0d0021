"""Chat in a browser from a clone; `--help` lists the flags."""

import sys

from chatglm_tuning.cli.main import run_command

if __name__ == "__main__":
    sys.exit(run_command("web", sys.argv[1:]))
