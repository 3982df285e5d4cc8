#!/usr/bin/env bash
# Recolouring to a red circle is suppressed in the quickstart's model, with and without an adversary in training, and
# then attacked: outputs/safety/summary.json and table.md. It can be interrupted and run again. Page: docs/safety.md.
#   RUN     the model to start from (default: the quickstart's, which is trained first if it is not there)
#   SHARDS  ordinary samples (default: the quickstart's)
#   SCENARIOS  how many are attacked (default: 192)
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-outputs/safety} RUN=${RUN:-outputs/quickstart/run} SHARDS=${SHARDS:-outputs/quickstart/shards/train}
[ -e "$RUN" ] || bash launch/quickstart.sh
[ ! -x .venv/bin/python ] || export PATH="$PWD/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT
STARTED=$SECONDS
say() { printf '\n[%3d s] %s\n' $((SECONDS - STARTED)) "$*"; }

mkdir -p "$OUT"
say "the model as it is, and wishes for red circles with what is to be made instead"
[ -e "$OUT/base.safetensors" ] ||
  python -m kontext_train.export checkpoint="$RUN" out="$OUT/base.safetensors" dtype=float32
[ -e "$OUT/policy.yaml" ] || python -m quickstart.safety concepts --out "$OUT"

say "ordinary samples, without those that ask for a red circle: $OUT/shards"
[ -e "$OUT/shards" ] || python -m data_tools.filter_safety "$SHARDS" --rules "$OUT/policy.yaml" --out "$OUT/shards"

train() { # name, then options
  python -m kontext_train.train experiment=quickstart_safety run.dir="$OUT/$1" weights.student="$OUT/base.safetensors" \
    data.train="$OUT/shards" objective.concepts="$OUT/concepts.jsonl" "${@:2}" 2> "$OUT/$1.log"
}
say "training against an attacker, and beside it without one: $OUT/adversarial, $OUT/plain"
train adversarial "$@" &
train plain objective.attack_steps=0 "$@" || { tail -n 5 "$OUT/plain.log" >&2; exit 1; }
wait $! || { tail -n 5 "$OUT/adversarial.log" >&2; exit 1; }

say "attacking all three"
python -m quickstart.safety measure --before "$OUT/base.safetensors" --after "$OUT/adversarial" \
  --nonadversarial "$OUT/plain" --out "$OUT" --count "${SCENARIOS:-192}"
say "done: $OUT/summary.json, $OUT/table.md, $OUT/attacked.png"
