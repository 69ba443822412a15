"""The soak test in its long form, see tests/support/soak.py.

    python -m tests.soak --episodes 2000
"""

import argparse
import json
import tempfile
from pathlib import Path

import ray

from smoke import hooks


def main() -> None:
    parser = argparse.ArgumentParser(description="Thousands of episodes with faults: prints what became of them.")
    parser.add_argument("--episodes", type=int, default=2000)
    episodes = parser.parse_args().episodes
    hooks.find_slime()
    from tests.support.soak import soak

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(soak(episodes, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
