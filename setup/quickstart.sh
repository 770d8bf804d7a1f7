#!/usr/bin/env bash
# The whole way once: environment, sample text, training, validation, a continuation, a picture, a summary.
#
#   bash setup/quickstart.sh                                 # into dumps/debug
#   bash setup/quickstart.sh dump_dir=/tmp/try steps=100     # keys of the training config
#
# What is there already is not made again: stop it at any time and start it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

dump_dir=dumps/debug
for argument in "$@"; do
  case $argument in
    dump_dir=*) dump_dir=${argument#dump_dir=} ;;
    config=* | checkpoint.path=*) echo "quickstart: leave $argument out; train with it by hand" >&2; exit 1 ;;
  esac
done
stage() { printf '\n[%s/6] %s\n' "$1" "$2"; }

stage 1 "environment: .venv (a minute or several the first time)"
bash setup/create_env.sh
python=.venv/bin/python

stage 2 "sample text: data/sample (about 10 s)"
if [ -f data/sample/stdlib/stdlib.val.jsonl ]; then
  echo "sample data: is there"
else
  "$python" setup/make_sample_data.py
fi

stage 3 "training: $dump_dir (about 2 minutes on two CPU cores; every line tells the time left)"
"$python" -m apps.main.train config=apps/main/configs/debug.yaml "$@"

checkpoint=$(ls -d "$dump_dir"/checkpoints/[0-9]* | tail -n 1)
results=$dump_dir/evals/$(basename "$checkpoint")
stage 4 "validation on text that was not trained on (about 30 s)"
if [ -f "$results/validation.json" ]; then
  echo "validation: is there"
else
  "$python" -m apps.main.eval ckpt_dir="$checkpoint" dump_dir="$results" metric_log_dir="$dump_dir" \
    global_step="$((10#$(basename "$checkpoint")))" generator.dtype=fp32
fi

stage 5 "what the model makes of a prompt (about 10 s)"
if [ -f "$results/continuation.jsonl" ]; then
  cat "$results/continuation.jsonl"
else
  # Within what the model can see, whatever data.seq_len was given.
  length=$("$python" -c 'import json, sys; print(min(220, json.load(open(sys.argv[1]))["data"]["seq_len"] // 2))' \
    "$checkpoint/params.json")
  "$python" -m apps.main.generate ckpt="$checkpoint" prompt="The function returns" max_gen_len="$length" \
    temperature=0.7 top_p=0.9 dtype=fp32 out="$results/continuation.jsonl"
fi

stage 6 "a picture of the run (a few seconds)"
picture=$dump_dir/plots/run.png
if [ "$picture" -nt "$dump_dir/metrics.jsonl" ] && [ "$picture" -nt "$dump_dir/metrics.validation.jsonl" ]; then
  echo "picture: is there"
else
  "$python" -m apps.plots.run dump_dir="$dump_dir"
fi

echo
"$python" setup/summarize_run.py "$dump_dir" "$results"
