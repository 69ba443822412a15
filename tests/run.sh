#!/usr/bin/env bash
# All tests but the slow ones: `bash tests/run.sh [pytest's arguments]`. Sets up everything they need, see README.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=smoke/setup.sh
source "$here/../smoke/setup.sh"
# The page of episodes is tried in a real browser where there is one, or root can install it; elsewhere not. Asked once.
if ! command -v chromium >/dev/null && [[ $(id -u) == 0 && ! -e $_venv/.no-chromium ]] && command -v apt-get >/dev/null; then
  { apt-get update -q && apt-get install -q -y --no-install-recommends chromium; } >"$_venv/chromium.log" 2>&1 ||
    echo "no Chromium can be installed, see $_venv/chromium.log: tests of the page are skipped" | tee "$_venv/.no-chromium"
fi
exec "$python" -m pytest "$@"
