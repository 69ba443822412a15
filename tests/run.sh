#!/usr/bin/env bash
# All tests but the slow ones: `bash tests/run.sh [pytest's arguments]`. Sets up everything they need, see README.md.
set -euo pipefail
here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
# Where this machine has checkouts: lines SLIME_DIR=/path and MEGATRON_DIR=/path. Nothing of the file is executed.
settings=${HOME:-}/.config/tcod/tests.env
if [[ -r $settings ]]; then
  while IFS='=' read -r name value || [[ -n $name ]]; do
    if [[ $name =~ ^(SLIME_DIR|MEGATRON_DIR)$ && -z ${!name+set} ]]; then export "$name=$value"; fi
  done <"$settings"
fi
# shellcheck source=smoke/setup.sh
source "$here/../smoke/setup.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the processes share the cores
exec "$python" -m pytest -n auto --maxprocesses=4 --dist loadgroup "$@"
