#!/usr/bin/env bash
# Your own data, from a look ahead to the adapter. Usage: examples/own_data.sh [DATA] [HOURS] [RUN]
#
# DATA is a JSONL file: one row a line, {"question": ..., "answer": ...} or {"prompt": ..., "completion": ...}.
set -euo pipefail

data=${1:-train.jsonl}
hours=${2:-0.5}
run=${3:-runs/own-data}

budgetsearch doctor --gpu auto --data "$data"                            # is everything here that a run needs?
budgetsearch run --gpu auto --data "$data" --hours "$hours" --out "$run" # Ctrl-C stops cleanly; `resume` goes on
budgetsearch status "$run"
ls "$run/adapter"                                                        # peft.PeftModel.from_pretrained loads it
