#!/usr/bin/env bash
# Makes .venv and installs this checkout into it: launch/install.sh [EXTRA]. Done again only when what it installs changed.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
EXTRA=${1:+[$1]}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "kontext_train needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version). Set PYTHON=/path/to/python3.11" >&2
  exit 1
}
STAMP=.venv/installed${1:+-$1}
if [ -e "$STAMP" ] && [ "$STAMP" -nt pyproject.toml ] && [ "$STAMP" -nt constraints.txt ]; then exit 0; fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
# torch first and by itself: the pin decides which build everything after it is resolved against.
.venv/bin/pip install --quiet -c constraints.txt torch numpy
.venv/bin/pip install --quiet -c constraints.txt -e ".$EXTRA"
touch "$STAMP"
