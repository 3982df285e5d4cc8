#!/usr/bin/env bash
# Installs and tests: lint, types, every test. launch/test.sh [pytest arguments], for example -m "not slow".
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/install.sh dev
export KONTEXT_TRAIN_TEST_ALL=${KONTEXT_TRAIN_TEST_ALL:-1}  # what needs root or Debian packages fails without; 0 skips it
export OMP_NUM_THREADS=1  # numbers must not depend on how many cores there are
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
