"""Time to tokenise a data set of ADGEN's size: ours, ours again from the cache, and row by row as the original did.

    python benchmarks/tokenizing.py --data FILE --tokenizer DIR [--rows 114000] [--processes 2]

The rows of `--data` are repeated until there are enough. The original's way (one process; `datasets.map` with one call
of the tokenizer for the prompt and one for the answer of every row) is timed on a share of them and multiplied.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from measures import add_document_flag, markdown_table, publish

from chatglm_tuning.data.dataset import build_dataset
from chatglm_tuning.data.encode import EncodingSettings
from chatglm_tuning.data.records import read_records
from chatglm_tuning.model import ChatGLMTokenizer

_LIMITS = EncodingSettings(max_input_length=1024, max_output_length=1024)


def write_rows(source: Path, target: Path, count: int) -> None:
    """Write `count` rows, those of `source` again and again."""
    examples = read_records([source]).examples
    with target.open("w", encoding="utf-8") as stream:
        for example in itertools.islice(itertools.cycle(examples), count):
            row = {"instruction": example.query, "input": "", "output": example.answer}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def encode_row(row: dict[str, str], tokenizer: ChatGLMTokenizer) -> dict[str, list[int]]:
    """Encode one row as a script of one call a text does."""
    prompt = row["instruction"] + (f"\n{row['input']}" if row["input"] else "")
    question = tokenizer.encode(prompt, add_special_tokens=False)[: _LIMITS.prompt_room]
    answer = tokenizer.encode(row["output"], add_special_tokens=False)[: _LIMITS.answer_room]
    ids = [*question, tokenizer.gmask_token_id, tokenizer.bos_token_id, *answer, tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": [-100] * (len(question) + 1) + ids[len(question) + 1 :]}


def seconds_row_by_row(file: Path, tokenizer: ChatGLMTokenizer, count: int, folder: Path) -> float:
    """Return the seconds of the first `count` rows by `datasets.map`, one row at a time in one process."""
    rows = [json.loads(line) for line in itertools.islice(file.open(encoding="utf-8"), count)]
    dataset = Dataset.from_list(rows)
    encode: Any = encode_row
    start = time.perf_counter()
    dataset.map(
        encode,
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=dataset.column_names,
        cache_file_name=str(folder / "row-by-row.arrow"),
        new_fingerprint="row-by-row",
    )
    return time.perf_counter() - start


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=114_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.05, help="of the rows that the original's way is timed on")
    add_document_flag(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    tokenizer = ChatGLMTokenizer.from_pretrained(arguments.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(arguments.data, folder / "rows.jsonl", arguments.rows)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            built = build_dataset(
                [folder / "rows.jsonl"],
                tokenizer,
                _LIMITS,
                num_proc=arguments.processes,
                cache_dir=folder / "cache",
            )
            seconds.append(time.perf_counter() - start)
        assert built.is_from_cache
        counted = max(1, round(arguments.rows * arguments.share))
        row_by_row = seconds_row_by_row(folder / "rows.jsonl", tokenizer, counted, folder)
    header = [f"{built.lengths.rows} rows, {built.lengths.total_tokens} tokens", "s"]
    lines = [
        [f"{arguments.processes} processes", f"{seconds[0]:.1f}"],
        ["again, from the cache", f"{seconds[1]:.2f}"],
        [
            f"row by row in one process (from {counted} rows in {row_by_row:.1f} s)",
            f"{row_by_row * arguments.rows / counted:.0f}",
        ],
    ]
    publish("tokenizing", markdown_table(header, lines), arguments.document)


if __name__ == "__main__":
    main()
