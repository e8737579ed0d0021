"""The checks that every command makes of a model's folder before it reads weights. Run in a process of its own.

It imports torch: `model_check.py` calls it where torch is known to work.
"""

import json
import os
import sys

from chatglm_tuning.base_folder import load_tokenizer, read_config
from chatglm_tuning.checkpoint import check_certificate
from chatglm_tuning.errors import UserError
from chatglm_tuning.shards import find_weight_files, resolve_model_folder


def main(given: str) -> None:
    """Print one JSON object: {} or the error's code and sentences. What libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
        os.dup2(2, 1)
        try:
            folder = resolve_model_folder(given)
            load_tokenizer(folder, read_config(folder))
            find_weight_files(folder)
            check_certificate(folder)
        except UserError as error:
            place = f"{error.where}: " if error.where else ""
            found = {"code": error.code, "what": f"{place}{error.what}", "remedy": error.remedy}
        else:
            found = {}
        stream.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
