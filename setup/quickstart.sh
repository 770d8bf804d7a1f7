#!/usr/bin/env bash
# The whole way once: environment, sample text, training, validation, a continuation, a picture, a summary.
#
#   bash setup/quickstart.sh                                 # into dumps/debug
#   bash setup/quickstart.sh dump_dir=/tmp/try steps=100     # keys of the training config
#   bash setup/quickstart.sh compare                         # then the dense model of the same FLOPs, and both in a picture
#
# What is there already is not made again: stop it at any time and start it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The dense model that debug.yaml's memory model is compared with: FLOPs per token within 0.2 %. The config's learning
# rate is among its best ones, too (apps/capacity/LOG.md).
twin=(model.productkey_args.is_enabled=false model.multiple_of=8 model.ffn_dim_multiplier=1.08)

stages=6
if [ "${1:-}" = compare ]; then
  stages=8
  shift
fi
dump_dir=dumps/debug
for argument in "$@"; do
  case $argument in
    dump_dir=*) dump_dir=${argument#dump_dir=} ;;
    config=* | checkpoint.path=*) echo "quickstart: leave $argument out; train with it by hand" >&2; exit 1 ;;
  esac
done
dump_dir=${dump_dir%/}
dump_dir=${dump_dir/#\~\//$HOME/} # as the config has it expanded; some shells leave it
stage() { printf '\n[%s/%s] %s\n' "$1" "$stages" "$2"; }

# The newest checkpoint of a run. Damaged ones end in ".damaged".
newest() { find "$1/checkpoints" -maxdepth 1 -name '[0-9]*' ! -name '*.*' | sort | tail -n 1; }

validate() { # a run's newest checkpoint, unless that was done
  local checkpoint results
  checkpoint=$(newest "$1")
  results=$1/evals/$(basename "$checkpoint")
  if [ -f "$results/validation.json" ]; then
    echo "validation: is there"
  else
    "$python" -m apps.main.eval ckpt_dir="$checkpoint" dump_dir="$results" metric_log_dir="$1" \
      global_step="$((10#$(basename "$checkpoint")))" generator.dtype=fp32
  fi
}

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

stage 4 "validation on text that was not trained on (about 30 s)"
validate "$dump_dir"
checkpoint=$(newest "$dump_dir")
results=$dump_dir/evals/$(basename "$checkpoint")

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

summaries=("$dump_dir" "$results")
if [ "$stages" = 8 ]; then
  dense=${dump_dir}_dense
  stage 7 "the dense model of the same FLOPs: $dense (about 2 minutes on two CPU cores, and 30 s of validation)"
  "$python" -m apps.main.train config=apps/main/configs/debug.yaml "${twin[@]}" "$@" dump_dir="$dense" name=dense
  validate "$dense"
  summaries+=("$dense" "$dense/evals/$(basename "$(newest "$dense")")")

  stage 8 "a picture of both (a few seconds)"
  "$python" -m apps.plots.run "$dump_dir" "$dense" out="$dump_dir/plots/compare.png"
fi

echo
"$python" setup/summarize_run.py "${summaries[@]}"
