"""The recipe's text: no data that is executed, no shell, no port beyond this machine."""

import ast
import re

import pytest

from smoke.hooks import ROOT

NUM_GPUS = 0
RECIPE = ROOT / "examples" / "tcod"
# What runs data as code, or hands text to a shell.
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load", "torch.load"}
# TextWorld's own evaluation of its grammar's expressions, as it is, in a way that Python 3.13 takes.
ALLOWED = {("textworld_speedup.py", "eval")}


@pytest.mark.parametrize("file", sorted(RECIPE.rglob("*.py")), ids=lambda file: file.name)
def test_the_recipe_executes_no_data(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in imported} & FORBIDDEN_MODULES
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in FORBIDDEN_CALLS or (file.name, name) in ALLOWED
            assert not any(keyword.arg == "shell" for keyword in node.keywords)


def test_yaml_is_read_by_the_safe_loader_alone():
    import yaml

    from examples.tcod.settings import config

    assert issubclass(config._UniqueKeys, yaml.SafeLoader)
    loads = {
        call for file in RECIPE.rglob("*.py") for call in re.findall(r"yaml\.load\(.*\)", file.read_text("utf-8"))
    }
    assert all("_UniqueKeys" in call for call in loads)


def test_servers_are_started_on_this_machine_only():
    """A launcher binds to the loopback address, unless a cluster of several nodes needs the teacher."""
    text = re.sub(r'[",\s]+', " ", (ROOT / "smoke" / "servers.py").read_text("utf-8"))
    assert len(re.findall(r"smoke\.serve", text)) == len(re.findall(r"--host 127\.0\.0\.1 --port", text)) == 1
    script = (RECIPE / "run_qwen3_8b_tcod.sh").read_text("utf-8")
    assert script.count("sglang.launch_server") == script.count('--host "$TEACHER_HOST" --port') == 1
    assert "TEACHER_HOST=${TEACHER_HOST:-127.0.0.1}" in script
