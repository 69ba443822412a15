"""The recipe's text: no data that is executed, no file but those of its options, no port beyond this machine."""

import ast
import re

import pytest

from smoke.hooks import ROOT

NUM_GPUS = 0
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
# Start SGLang and slime, or ask git for a commit: lists of arguments, no shell.
STARTERS = {"launch_settings.py", "launch_machine.py", "processes.py", "about.py"}
# The tools are commands, whose files their options name. No other module handles a file but these.
ALLOWED = {
    ("protocol.py", "load_environment", "import_module"),  # the environment that the settings name
    ("config.py", "read_yaml", "read_text"),  # the settings
    ("chat.py", "engine_eos_ids", "read_text"),  # the checkpoint
    ("rows.py", "read_rows", "read_text"),  # the data set
    ("run_dir.py", "write", "mkdir"),  # what a run leaves in its directory
    ("run_dir.py", "_append", "open"),
    ("run_dir.py", "_replace", "open"),
    ("run_dir.py", "_replace", "unlink"),
    ("about.py", "_write_about", "read_text"),
}


@pytest.mark.parametrize("file", sorted(RECIPE.rglob("*.py")), ids=lambda file: file.name)
def test_the_recipe_executes_no_data(file):
    tree = ast.parse(file.read_text())
    forbidden = FORBIDDEN_MODULES - ({"ctypes", "subprocess"} if file.name in STARTERS else set())
    forbidden -= {"torch"} if file.name == "loss.py" else set()  # computes with what slime hands it, and loads nothing
    for function in ast.walk(tree):
        imported = [alias.name for alias in function.names] if isinstance(function, ast.Import) else []
        imported += [function.module or ""] if isinstance(function, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in imported} & forbidden
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for function in functions:
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            last = name.rpartition(".")[2]
            if name.startswith("yaml."):
                assert name in {"yaml.safe_load", "yaml.safe_dump"}
            handles = last in {"open", "import_module", "read_text", "write_text", "unlink", "mkdir"}
            if handles and "opener" not in name and file.parent.name != "tools":
                assert (file.name, function.name, last) in ALLOWED, f"{function.name} calls {name}"
            mended = (file.name, last) == ("textworld_speedup.py", "eval")  # as TextWorld's own function does
            assert last not in FORBIDDEN_CALLS or name.startswith("re.") or mended, f"{function.name} calls {name}"
            assert not any(keyword.arg == "shell" for keyword in call.keywords)


def test_servers_are_started_on_this_machine_only():
    """A launcher binds to the loopback address, unless a cluster of several nodes needs the teacher."""
    text = re.sub(r'[",\s]+', " ", (ROOT / "smoke" / "servers.py").read_text())
    assert len(re.findall(r"smoke\.serve", text)) == len(re.findall(r"--host 127\.0\.0\.1 --port", text)) == 1
    script = (RECIPE / "run_qwen3_8b_tcod.sh").read_text()
    assert script.count("sglang.launch_server") == script.count('--host "$TEACHER_HOST" --port') == 1
    assert "TEACHER_HOST=${TEACHER_HOST:-127.0.0.1}" in script
