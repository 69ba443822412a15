"""Import paths of the tests: the recipe and the smoke run are folders of flat modules, as slime's examples are."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [str(ROOT / name) for name in ("examples/tcod", "smoke", "benchmarks", "tests")]
sys.path[:0] = FOLDERS
# Ray's workers and other child processes find the modules the same way.
os.environ["PYTHONPATH"] = os.pathsep.join([*FOLDERS, os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# slime's GPU tests are programs, and their names no module names.
collect_ignore_glob = ["test_qwen*"]
