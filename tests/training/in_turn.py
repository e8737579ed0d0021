"""Trains several runs, one after the other, in each process of a launch: the libraries are imported once.

sys.argv[1]: a JSON file with a list of runs, each [method, flag, ...].
"""

import json
import os
import sys
from pathlib import Path

from chatglm_tuning.config.parsing import parse_train_arguments
from chatglm_tuning.training.run import train

if __name__ == "__main__":
    for method, *flags in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        train(parse_train_arguments(method, flags))
    os._exit(0)  # see cli/training.py
