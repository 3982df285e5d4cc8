#!/usr/bin/env bash
# Installs Debian's Chromium for tests of pages: tests/evaluation/install_test_chromium.sh. As root; nothing is started.
set -euo pipefail
exec 9>/tmp/install_test_chromium.lock
flock 9  # two tests may ask at once
command -v chromium >/dev/null && exit 0
command -v apt-get >/dev/null || { echo "no apt-get here to install Chromium with" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "Chromium is not installed and only root can install it" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install --yes --quiet=2 --no-install-recommends chromium fonts-dejavu-core; }
install || { apt-get update --quiet=2 && install; }
