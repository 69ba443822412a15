#!/usr/bin/env bash
# One benchmark: `bash benchmarks/run.sh NAME [its options]`. Sets up what it needs, see benchmarks/README.md.
set -euo pipefail
here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
# shellcheck source=smoke/setup.sh
source "$here/../smoke/setup.sh"
[[ -f $here/${1:-}.py ]] || _fail "no such benchmark: ${1:-}; benchmarks/README.md lists them"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 OMP_NUM_THREADS=1
exec "$python" -m "benchmarks.$1" "${@:2}"
