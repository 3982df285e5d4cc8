#!/usr/bin/env bash
# The GPU benchmark: prints a table and writes JSON into the folder given (benchmarks/results by default) within nine
# minutes. PYTHON names another interpreter than python3. benchmarks/gpu/README.md says what the machine needs.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-/tmp/kontext_train_inductor}" # shared by the sections
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
exec "${PYTHON:-python3}" -m benchmarks.gpu.suite "$@"
