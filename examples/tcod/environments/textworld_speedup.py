"""TextWorld on every Python, and ten times as fast and word for word the same, for env_alfworld.py."""

import copy
import functools
import importlib.metadata
import inspect
import warnings
from typing import Any

PATCHED_TEXTWORLD = "1.7.0"
KEPT_GAMES = 256  # per process, about 0.2 MB each: an evaluation's games are played again and again


@functools.cache
def mend_textworld() -> None:
    """Let TextWorld's grammar find its variables on Python 3.13 and newer; on older ones nothing changes.

    It adds them to locals(), which are a mere copy since then (PEP 667), and evaluates the grammar's expressions.
    """
    from textworld.envs.pddl import textgen

    def derive(self: Any, context: Any = None) -> list[Any]:
        variables = (context or self.context)["variables"]
        return [textgen.TerminalSymbol(eval(self.expression, {}, variables))]

    if "locals().update" in inspect.getsource(textgen.EvalSymbol.derive):  # a later TextWorld may do without
        textgen.EvalSymbol.derive = derive


@functools.cache
def speed_up_textworld() -> None:
    """Make TextWorld parse each text once and translate each game once per process; what it says stays the same.

    Unpatched, every step parses rules and queries of the grammar anew, and deep-copies what nobody writes to.
    """
    version = importlib.metadata.version("textworld")
    if version != PATCHED_TEXTWORLD:
        warnings.warn(
            f"textworld {version} runs unpatched: each environment step takes more than ten times as long as with "
            f"textworld {PATCHED_TEXTWORLD}, each reset two to three times",
            stacklevel=2,
        )
        return
    import fast_downward
    from textworld.envs.pddl import logic, textgen
    from textworld.logic import Rule

    def clone(value: Any) -> Any:
        # Deep enough for textgen: it writes to lists, to dicts and to the context of symbols, nothing else.
        if isinstance(value, list):
            return [clone(item) for item in value]
        if isinstance(value, dict):
            return dict(value)
        twin = copy.copy(value)
        if isinstance(twin, textgen.ListSymbol):
            twin.symbol = clone(twin.symbol)
        return twin

    parse = textgen._parse_and_convert
    parse_once = functools.lru_cache(maxsize=4096)(lambda text, rule_name: parse(text, rule_name=rule_name))
    textgen._parse_and_convert = lambda text, rule_name, trace=False: clone(parse_once(text, rule_name))
    textgen.deepcopy = clone
    Rule.parse_conjunctive_query = staticmethod(functools.lru_cache(maxsize=4096)(Rule.parse_conjunctive_query))
    logic._parse_and_convert = functools.lru_cache(KEPT_GAMES)(logic._parse_and_convert)
    # load() and reset() of one episode share a translation; the most recent games keep theirs. TextWorld asks for a
    # second one to plan with, which takes as long. Nothing here plans: it gets the same.
    translate = functools.lru_cache(KEPT_GAMES)(fast_downward.pddl2sas)
    fast_downward.pddl2sas = lambda domain, problem, verbose=False, optimize=False: translate(domain, problem)
