#!/usr/bin/env bash
# Installs a Slurm for tests/launch: launch/slurm/install_test_slurm.sh. Debian and Ubuntu, as root; nothing is started.
set -euo pipefail
exec 9>/tmp/install_test_slurm.lock
flock 9  # two tests may ask at once
declare -A package=([slurmctld]=slurmctld [slurmd]=slurmd [sbatch]=slurm-client [munged]=munge
  [ip]=iproute2 [nsenter]=util-linux)
missing=()
for program in "${!package[@]}"; do command -v "$program" >/dev/null || missing+=("$program"); done
[ "${#missing[@]}" != 0 ] || exit 0
packages=()
for program in "${missing[@]}"; do packages+=("${package[$program]}"); done
command -v apt-get >/dev/null || { echo "${missing[*]} are not installed, and there is no apt-get here" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "${missing[*]} are not installed, and only root can install them" >&2; exit 1; }
# Debian starts the services of what it installs, and at each boot, unless this script says no and they are disabled.
POLICY=/usr/sbin/policy-rc.d
if [ ! -e "$POLICY" ]; then
  trap 'rm -f "$POLICY"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$POLICY"
  chmod 755 "$POLICY"
fi
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install --yes --quiet=2 --no-install-recommends "${packages[@]}"; }
install || { apt-get update --quiet=2 && install; }
for service in munge slurmctld slurmd; do
  if [[ " ${packages[*]} " == *" $service "* ]] && command -v systemctl >/dev/null; then
    systemctl disable --quiet "$service" || true
  fi
done
