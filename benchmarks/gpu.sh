#!/usr/bin/env bash
# What a GPU shows: tuning and ranking speed of a Llama of 7B size (random weights), as ratios against the plain forward
# pass. Prints a table, writes JSON under $OUT (default: the current folder), ends within a few minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 benchmarks/ranking_speed.py --hidden_size 4096 --num_layers 32 --batch_size 8 --repeats 5 \
    --output "${OUT:-.}/ranking_speed.json"
