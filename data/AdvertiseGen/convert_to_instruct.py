"""Convert ADGEN's rows in a clone, by the original's command line; needs nothing but Python.

python convert_to_instruct.py --input_file train.json --output_file train.jsonl
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    # By its path, since the package need not be installed.
    package = Path(__file__).resolve().parents[2] / "chatglm_tuning"
    runpy.run_path(str(package / "cli" / "convert_to_instruct.py"), run_name="__main__")
