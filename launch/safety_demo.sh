#!/usr/bin/env bash
# Red circles are suppressed in the quickstart's model, with and without an adversary in training, and the models are
# attacked: outputs/safety/summary.json and table.md. It can be interrupted and run again. Page: docs/safety.md.
#   RUN     the model to start from (default: the quickstart's, which is trained first if it is not there)
#   SHARDS  ordinary samples (default: the quickstart's)
#   SCENARIOS  how many of each sort are attacked (default: 96)
#   PYTHON  with kontext_train installed (default: the project's own, which the quickstart installs; else python)
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-outputs/safety} RUN=${RUN:-outputs/quickstart/run} SHARDS=${SHARDS:-outputs/quickstart/shards/train}
[ -e "$RUN" ] || bash launch/quickstart.sh
[ -n "${PYTHON:-}" ] || { PYTHON=.venv/bin/python && [ -x "$PYTHON" ]; } || PYTHON=python
SCENARIOS=${SCENARIOS:-96}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
STARTED=$SECONDS
LANES=()  # process groups of what runs side by side; they end with this script, however that ends
trap '[ ${#LANES[@]} = 0 ] || { kill -- "${LANES[@]/#/-}"; wait "${LANES[@]}"; } 2> /dev/null || true' EXIT
say() { printf '\n[%3d s] %s\n' $((SECONDS - STARTED)) "$*"; }

mkdir -p "$OUT"
say "the model as it is, wishes for red circles with what is to be made instead, and what is near to them"
[ -e "$OUT/base.safetensors" ] ||
  "$PYTHON" -m kontext_train.export checkpoint="$RUN" out="$OUT/base.safetensors" dtype=float32
[ -e "$OUT/neighbours/index.arrow" ] ||
  { "$PYTHON" -m quickstart.safety data --out "$OUT" && "$PYTHON" -m data_tools.index_shards "$OUT/neighbours"; }

say "ordinary samples, and neighbours, without those that ask for a red circle: $OUT/ordinary, $OUT/beside"
filter() { [ -e "$2" ] || "$PYTHON" -m data_tools.filter_safety "$1" --rules "$OUT/policy.yaml" --out "$2"; }
filter "$SHARDS" "$OUT/ordinary"
filter "$OUT/neighbours" "$OUT/beside"

train() { # name, then options
  "$PYTHON" -m kontext_train.train experiment=quickstart_safety run.dir="$OUT/$1" \
    weights.student="$OUT/base.safetensors" +data.sources.ordinary.path="$OUT/ordinary" \
    +data.sources.beside.path="$OUT/beside" objective.concepts="$OUT/concepts.jsonl" "${@:2}" \
    2> "$OUT/$1.log" || { tail -n 5 "$OUT/$1.log" >&2; return 1; }
}
measured() { # name, model: is there, of so many scenarios, and no weights are newer
  local file="$OUT/measured/$1.json"
  [ -e "$file" ] && [ -e "$2" ] && [ "$(attacked "$file")" = "$SCENARIOS" ] &&
    [ -z "$(find "$2" \( -name COMPLETE -o -name "*.safetensors" \) -newer "$file")" ]
}
attacked() { # measurement: of how many scenarios, which is the length of its first list of 0 and 1
  sed 's/].*//; s/.*\[//' "$1" | tr -cd 01 | wc -c
}
measure() { # name, model
  measured "$1" "$2" || "$PYTHON" -m quickstart.safety measure --name "$1" --model "$2" --out "$OUT" \
    --count "$SCENARIOS" 2> "$OUT/measure_$1.log" || { tail -n 5 "$OUT/measure_$1.log" >&2; return 1; }
  say "$1 is measured"
}
say "training against an attacker; beside it without one. Each is attacked when it is trained"
set -m   # a group of its own for each
{ train plain "$@" objective.attack_steps=0 && measure before "$OUT/base.safetensors" &&
  measure nonadversarial "$OUT/plain"; } &
LANES+=($!)
{ train adversarial "$@" && measure after "$OUT/adversarial"; } &
LANES+=($!)
set +m
wait -n "${LANES[@]}"   # the first to end: if it failed, this script and with it the other one ends
for lane in "${LANES[@]}"; do wait "$lane"; done
LANES=()

"$PYTHON" -m quickstart.safety report --out "$OUT"
say "done: $OUT/summary.json, $OUT/table.md, and pictures in $OUT/measured"
