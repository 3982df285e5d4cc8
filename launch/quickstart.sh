#!/usr/bin/env bash
# From nothing but Python to a small Kontext model that edits pictures, in outputs/quickstart.
# It can be interrupted and run again: it goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-outputs/quickstart}
STARTED=$SECONDS
say() { printf '\n[%3d s] %s\n' $((SECONDS - STARTED)) "$*"; }

say "installing into .venv (minutes the first time, nothing after)"
bash launch/install.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
STARTED=$SECONDS

say "drawing scenes into WebDataset shards: $OUT/shards"
[ -e "$OUT/shards/train/index.arrow" ] || {
  rm -rf "$OUT/shards"
  python -m quickstart.make_dataset --out "$OUT/shards/train" --samples 40000 --seed 0 --split train
  python -m quickstart.make_dataset --out "$OUT/shards/validation" --samples 256 --seed 1 --split heldout_scenes
  python -m data_tools.index_shards "$OUT/shards/validation" "$OUT/shards/train"
}

say "training with kontext-train, as the 12B is: $OUT/run"
kontext-train experiment=quickstart run.dir="$OUT/run" \
  data.train="$OUT/shards/train" data.validation="$OUT/shards/validation" "$@"

say "sampling held-out edits and comparing them with rendered truth"
cp "$OUT/run/loss.png" "$OUT/loss.png"
python -m quickstart.evaluate --run "$OUT/run" --out "$OUT"

cat <<EOF

Done in $((SECONDS - STARTED)) s after installation. Look at:
  $OUT/edits.png        context | result | truth, on scenes it never saw
  $OUT/multi_turn.png   six edits in a row, each on its own result
  $OUT/report           index.html opens in a browser: all images, all numbers
  $OUT/loss.png         training and validation loss
  $OUT/summary.json     all the numbers
  $OUT/run              config.yaml, metrics.jsonl, samples/, checkpoints/
Edit a picture yourself:
  .venv/bin/kontext-sample checkpoint=$OUT/run sampler.steps=8 context=$OUT/scene.png prompt="$(cat "$OUT/scene.txt")"
EOF
