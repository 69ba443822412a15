#!/usr/bin/env bash
# TCOD on a laptop: `bash smoke/run.sh [--quick] [--seed N]`. Sets up everything it needs, see README.md.
set -euo pipefail
here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
# shellcheck source=smoke/setup.sh
source "$here/setup.sh"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
exec "$python" -m smoke.run "$@"
