"""On the import path where slime starts SGLang on a CPU: its spawned processes prepare for it, see cpu_only.py."""

import sys

if "--multiprocessing-fork" in sys.orig_argv:
    from smoke import cpu_only

    cpu_only.prepare()
