"""What must never happen: data that is executed, a model's output in a shell or a path, a port beyond this machine."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.tcod.env_alfworld import AlfworldEnvironment
from smoke.make_games import TASKS, make_game

NUM_GPUS = 0
ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "examples" / "tcod"
# What runs data as code, or starts a program.
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "load_module", "system", "popen", "spawn", "fork"}
FORBIDDEN_MODULES = {
    "pickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "subprocess",
    "pty",
    "ctypes",
    "torch",
}
# Commands, whose files their options name. No other module handles a file but these.
COMMANDS = {
    "collect_demos.py",
    "compare_evals.py",
    "evaluate.py",
    "plot_runs.py",
    "preflight.py",
    "prepare_alfworld.py",
}
COMMANDS |= {"tcod_play.py"}  # what two of them share
ALLOWED = {
    ("environment.py", "load_environment", "import_module"),  # the environment that the settings name
    ("tcod_config.py", "check_yaml", "open"),  # the settings
    ("tcod_log.py", "_append", "open"),  # the run's metrics
}
MARK = "pwned"
HOSTILE = [
    f"$(touch {MARK})",
    f"`touch {MARK}`; touch {MARK} | sh -c 'touch {MARK}'",
    f"../../../{MARK}",
    f"/{MARK}",
    f"{MARK}\x00.tw-pddl",
    f"__import__('os').system('touch {MARK}')",
    "{" + MARK + ".__class__}" + f" #{MARK}# %({MARK})s",
]


@pytest.mark.parametrize("file", sorted(RECIPE.glob("*.py")), ids=lambda file: file.name)
def test_the_recipe_executes_no_data(file):
    tree = ast.parse(file.read_text())
    for function in ast.walk(tree):
        imported = [alias.name for alias in function.names] if isinstance(function, ast.Import) else []
        imported += [function.module or ""] if isinstance(function, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in imported} & FORBIDDEN_MODULES
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            last = name.rpartition(".")[2]
            if name.startswith("yaml."):
                assert name == "yaml.safe_load"
            handles = last in {"open", "import_module", "read_text", "write_text", "unlink", "mkdir"}
            if handles and "opener" not in name and file.name not in COMMANDS:
                assert (file.name, function.name, last) in ALLOWED, f"{function.name} calls {name}"
            assert last not in FORBIDDEN_CALLS or name.startswith("re."), f"{function.name} calls {name}"
            assert not any(keyword.arg == "shell" for keyword in call.keywords)


class Watch:
    """Collects what this process opens, starts or imports whose name has the mark in it, while it is on."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._hook)  # there is no way to take it off again

    def _hook(self, event: str, args: tuple) -> None:
        watched = (
            event == "open" or event == "import" or event.startswith(("os.", "subprocess.", "shutil.", "ctypes."))
        )
        if self.on and watched and MARK in repr(args):
            self.seen.append((event, repr(args)))


@pytest.fixture(scope="module")
def watched():
    return Watch()


@pytest.fixture
def watch(watched, tmp_path, monkeypatch):
    """On for the test, in an empty folder that stays empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    watched.seen.clear()
    watched.on = True
    yield watched
    watched.on = False
    assert watched.seen == [] and list(folder.iterdir()) == []


def test_the_watch_sees(watched, tmp_path):
    watched.on = True
    (tmp_path / MARK).touch()
    subprocess.run(["true", MARK], check=True)
    watched.on = False
    assert {event for event, _ in watched.seen} >= {"open", "subprocess.Popen"}


def test_a_response_reaches_no_shell_and_no_path(rig, watch):
    """Through the whole rollout; the toy environment echoes nothing, so what is watched is the recipe."""
    rig.script = [f"<action>{text}</action>" for text in HOSTILE]
    [sample], metrics = rig.rollout([{"goal": 1}], tcod_horizon=len(HOSTILE))
    assert metrics["rollout/tcod/turns/student"] == len(HOSTILE) and all(text in sample.response for text in HOSTILE)


def test_an_action_reaches_no_shell_and_no_path_in_alfworld(tmp_path, watch):
    watch.on = False
    row = make_game(tmp_path, "train", next(iter(TASKS)), 0, 5)["metadata"]
    environment = AlfworldEnvironment(str(tmp_path))
    watch.on = True
    environment.reset(row)
    for text in HOSTILE:
        assert environment.step(text).text == "Nothing happens."


def test_servers_listen_on_this_machine_only(rig):
    inodes = {os.readlink(link)[8:-1] for link in Path("/proc/self/fd").iterdir() if os.path.islink(link)}
    listening = [
        (address, port)
        for table in ("tcp", "tcp6")
        for _, local, _, state, *_, inode in (line.split()[:10] for line in Path(f"/proc/self/net/{table}").open())
        if state == "0A" and inode in inodes
        for address, port in [local.split(":")]
    ]
    loopback = "0100007F"  # 127.0.0.1
    ours = {f"{server.port:04X}" for server in (rig.student, rig.teacher)}
    assert {address for address, port in listening if port in ours} == {loopback}


def test_servers_are_started_on_this_machine_only():
    """A launcher binds to the loopback address, unless a cluster of several nodes needs the teacher."""
    text = re.sub(r'[",\s]+', " ", (ROOT / "smoke" / "servers.py").read_text())
    assert len(re.findall(r"serve\.py", text)) == len(re.findall(r"--host 127\.0\.0\.1 --port", text)) == 1
    script = (RECIPE / "run_qwen3_8b_tcod.sh").read_text()
    assert script.count("sglang.launch_server") == script.count('--host "$TEACHER_HOST" --port') == 1
    assert "TEACHER_HOST=${TEACHER_HOST:-127.0.0.1}" in script
