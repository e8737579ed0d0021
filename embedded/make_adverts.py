"""Write the sample advert data, ADGEN's format: one `{"content": …, "summary": …}` a line.

    python embedded/make_adverts.py --train 3600 --dev 240 --seed 20231

No content, summary or pair stands in both files.
"""

import argparse
import json
from pathlib import Path

from adverts import generate_adverts

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "data" / "AdvertiseGen"
DEFAULT_SEED = 20231
TRAIN_NAME, DEV_NAME = "sample_train.json", "sample_dev.json"


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write JSON lines, UTF-8, with Chinese characters as they are."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=3600, help="rows of the training file")
    parser.add_argument("--dev", type=int, default=240, help="rows of the dev file")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="where the two files go")
    arguments = parser.parse_args()
    rows = generate_adverts(arguments.train + arguments.dev, arguments.seed)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.folder / TRAIN_NAME, rows[: arguments.train])
    write_rows(arguments.folder / DEV_NAME, rows[arguments.train :])


if __name__ == "__main__":
    main()
