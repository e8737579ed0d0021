#!/usr/bin/env bash
# One command for a machine with a GPU: parity, training speed and memory, decoding; a short table comes last.
#
#     bash benchmarks/gpu.sh [--model DIR] [--data FILE] [--tokenizer DIR] [--dry_run]
#
# --model: a full-size model in the released layout; without it a random one is written to output/full-size (13 GB),
# with the released tokenizer and config.json of --tokenizer. --data: rows of ADGEN.
# --dry_run: the tiny base, few samples, and no GPU needed: only to see that everything runs.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
model="" data=data/AdvertiseGen/sample_train.json tokenizer=../shared/chatglm-6b dry_run=false
while [ $# -gt 0 ]; do
    case $1 in --model | --data | --tokenizer) [ $# -gt 1 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;; esac
    case $1 in
    --model) model=$2; shift 2 ;;
    --data) data=$2; shift 2 ;;
    --tokenizer) tokenizer=$2; shift 2 ;;
    --dry_run) dry_run=true; shift ;;
    *) echo "error: $1 is no flag; see the head of $0" >&2; exit 2 ;;
    esac
done

sizes=(--samples 16)
# The tests marked gpu, and the parity with the released model: golden values are skipped where they are not.
parity=(-m "gpu or not gpu" tests/model tests/quantization)
if $dry_run; then
    model=${model:-embedded/chatglm-tiny}
    sizes=(--samples 4 --steps 1 --pre_seq_len 4 --new_tokens 2 --device cpu)
    parity=(--collect-only "${parity[@]}")
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch sees no GPU here; --dry_run goes without" >&2
    exit 2
fi
if [ -z "$model" ]; then
    model=output/full-size
    if [ ! -f $model/pytorch_model.bin.index.json ]; then
        "$python" benchmarks/make_random_model.py --tokenizer "$tokenizer" --output $model
    fi
fi

"$python" -m pytest -q -p no:cacheprovider "${parity[@]}"
"$python" benchmarks/gpu.py --model "$model" --data "$data" "${sizes[@]}"
