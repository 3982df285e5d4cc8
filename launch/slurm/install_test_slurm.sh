#!/usr/bin/env bash
# Installs a Slurm for tests/launch: launch/slurm/install_test_slurm.sh. Debian and Ubuntu, as root; nothing is started.
set -euo pipefail
exec 9>/tmp/install_test_slurm.lock
flock 9  # two tests may ask at once
missing=
for program in slurmctld slurmd sbatch munged ip nsenter; do command -v "$program" >/dev/null || missing=$program; done
[ -n "$missing" ] || exit 0
command -v apt-get >/dev/null || { echo "no apt-get here to install Slurm with" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "$missing is not installed and only root can install it" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
packages=(slurmctld slurmd slurm-client munge iproute2 util-linux)
install() { apt-get install --yes --quiet=2 --no-install-recommends "${packages[@]}"; }
install || { apt-get update --quiet=2 && install; }
