"""`python -m chatglm_tuning` is `chatglm-tuning`."""

import sys

from chatglm_tuning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
