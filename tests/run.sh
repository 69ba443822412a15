#!/usr/bin/env bash
# All tests but the slow one: `bash tests/run.sh [pytest's arguments]`. Sets up everything they need, see README.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=smoke/setup.sh
source "$here/../smoke/setup.sh"
exec "$python" -m pytest "$@"
