"""The recipe's settings: the `tcod_*` keys of slime's --custom-config-path YAML.

slime turns every key of that YAML into an attribute of `args` and accepts typing errors; here an unknown key, a wrong
type or a value out of range stops the run with one sentence that names the file, the key and the fix.
"""

import functools
import os
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic.functional_validators import BeforeValidator
from pydantic_core import ErrorDetails

from .. import ConfigError
from ..curriculum import Curriculum, Variant
from .secrets import without_secrets

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Words = BeforeValidator(lambda value: value.split() if isinstance(value, str) else value)  # of the script's variable

SELF = "self"  # --rm-url, where the student's own engines are the teacher
# What may differ between the environments of a run.
OF_AN_ENVIRONMENT = """
    tcod_environment tcod_data_root tcod_env_args tcod_horizon tcod_admissible tcod_tool_parser tcod_env_workers
    tcod_envs_per_worker tcod_env_timeout_s tcod_teacher_url
""".split()


class TcodConfig(BaseModel):
    """Every field is a key of the YAML. Times are in seconds, depths and horizons in turns."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tcod_variant: Variant = "opd"
    """The arm, see curriculum.py."""
    tcod_horizon: int = Field(ge=1)
    """The largest number of turns of an episode, replayed ones included."""
    tcod_k_start: int = Field(Curriculum.k_start, ge=1)
    """Depth at rollout 0."""
    tcod_eta: int = Field(Curriculum.eta, ge=1)
    """Rollouts per turn of depth; docs/SETTINGS.md says why 5."""
    tcod_reopd_gamma: float = Field(Curriculum.reopd_gamma, gt=0, le=1)
    """reopd: a replay of one turn more is this many times as probable; the paper's value."""
    tcod_b2f_budget: Literal["slack", "horizon"] = Curriculum.b2f_budget
    """The student's turns after b2f's hand-over: "slack" (k + tcod_b2f_slack) or "horizon" (what is left of it)."""
    tcod_b2f_slack: int = Field(Curriculum.b2f_slack, ge=0)
    """Turns beyond k under tcod_b2f_budget: slack."""
    tcod_environment: str = ".env_alfworld.AlfworldEnvironment"
    """Import path of the environment's class; a leading dot means a module of this package."""
    tcod_data_root: str = ""
    """Folder of the environment's data, for its constructor and check_row; environment variables are expanded."""
    tcod_env_args: dict[str, Any] = {}
    """Further keyword arguments of the environment's constructor."""
    tcod_environments: dict[str, dict[str, Any]] = {}
    """Several environments in one run: what each sets in place of the run's own settings (OF_AN_ENVIRONMENT), by the
    name that its rows have in `metadata.environment`."""
    tcod_teacher_url: str = ""
    """In an entry of tcod_environments: that environment's own teacher, http://HOST:PORT; others use --rm-url's."""
    tcod_history: Literal["append", "turns"] = "append"
    """What the student sees at a turn, see history.py: one growing context, or what its template renders then."""
    tcod_window: int | None = Field(None, ge=1)
    """tcod_history turns: the last turns that are shown after the rules and the first observation; absent: all."""
    tcod_thoughts: Literal["none", "keep"] = "none"
    """Whether the student thinks before it acts. "none": the chat template closes the thought; "keep": thoughts are
    sampled and trained, and stay in the history (append), or as far as the template shows them (turns)."""
    tcod_reward_coef: float = Field(0.0, ge=0, allow_inf_nan=False)
    """How much of an episode's reward, normalised within its group, is trained on beside the KL."""
    tcod_reward: Literal["won", "grade"] = "won"
    """The reward: 1 if the task was solved and else 0, or the environment's own grade at the end."""
    tcod_admissible: Literal["turn", "never"] = "turn"
    """List the admissible actions in each user turn, or never."""
    tcod_tool_parser: str | None = None
    """Of an environment with tools: SGLang's parser of the model's calls, by its name (qwen, llama3, ..)."""
    tcod_env_workers: int = Field(16, ge=1)
    """Ray actors that host environments."""
    tcod_envs_per_worker: int = Field(8, ge=1)
    """Environments in each actor; workers x environments bounds the episodes that play at once."""
    tcod_env_timeout_s: Seconds = 120.0
    """Longest reset or step, waiting for other calls of the worker not counted; then the worker is replaced."""
    tcod_engine_timeout_s: Seconds = 1800.0
    """Longest request for one response, waiting in the engine's queue included; it is not repeated."""
    tcod_teacher_timeout_s: Seconds = 300.0
    """Longest scoring request, waiting in the teacher's queue included; it is not repeated."""
    tcod_teacher_concurrency: int = Field(64, ge=1)
    """Scoring requests in flight at once."""
    tcod_teacher_sees: Annotated[list[Literal["demo", "hindsight"]], Words] = []
    """What the teacher is shown beside the conversation, see note.py: the row's demonstration, the student's episode
    to its end, or nothing, which is the paper."""
    tcod_note_len: int = Field(4096, ge=1)
    """Tokens of that note: the oldest observations are left out of a longer one."""
    tcod_sees_from: int = Field(0, ge=0)
    """The first rollout whose episodes are scored with a note."""
    tcod_save_plain_scores: bool = False
    """Score saved episodes without their note, too: the page of episodes shows what the note changed."""
    tcod_max_replacements: int = Field(4, ge=1)
    """Stop the run when failed groups, or those without a signal, were replaced more than this many whole batches
    within one rollout."""
    tcod_max_staleness: int = Field(2, ge=0)
    """Fully asynchronous mode: how many rollouts old an episode may be; a rollout waits for the oldest."""
    tcod_eval_kl: bool = False
    """Score evaluation episodes too (those sampled at temperature 1), to measure the full-horizon KL."""
    tcod_save_episodes: Annotated[int, Field(ge=0)] | Literal["all"] = 8
    """Episodes to save for reading: so many of a rollout, and twice as many of each evaluation data set; 0 saves none,
    "all" every one."""
    _name: str = PrivateAttr("")
    _entries: dict[str, "TcodConfig"] = PrivateAttr(default_factory=dict)

    @field_validator("tcod_data_root")
    @classmethod
    def _expand(cls, root: str) -> str:
        expanded = os.path.expanduser(os.path.expandvars(root))
        if "$" in expanded or (root and not expanded):
            raise ValueError(f"tcod_data_root is {root}, but that variable is not set: export it or write the path")
        if root and not os.path.isdir(expanded):
            raise ValueError(f"tcod_data_root {expanded} is not a folder: set it to the game data's root")
        return os.path.abspath(expanded) if root else root  # workers have other current folders

    @model_validator(mode="after")
    def _combine(self) -> "TcodConfig":
        if self.curriculum.deepens and self.tcod_k_start > self.tcod_horizon:
            raise ValueError(f"tcod_k_start {self.tcod_k_start} is above tcod_horizon {self.tcod_horizon}: lower it")
        if self.tcod_window and self.tcod_history == "append":
            raise ValueError("tcod_window is for tcod_history turns, an appended context keeps all turns: remove it")
        if not self.tcod_teacher_sees and (self.tcod_sees_from or self.tcod_save_plain_scores):
            raise ValueError("tcod_sees_from and tcod_save_plain_scores are of tcod_teacher_sees: set it too")
        self._entries |= {name: self._overlaid(name, entry) for name, entry in self.tcod_environments.items()}
        return self

    def _overlaid(self, name: str, entry: dict[str, Any]) -> "TcodConfig":
        source = f"tcod_environments.{name}"
        if foreign := [key for key in entry if key not in OF_AN_ENVIRONMENT]:
            raise ValueError(f"{source} sets {foreign[0]}: it may set {', '.join(OF_AN_ENVIRONMENT)}")
        try:
            config = TcodConfig(**{**self.model_dump(exclude={"tcod_environments"}, exclude_unset=True), **entry})
        except ValidationError as error:
            raise ValueError(_sentence(error.errors(), source)) from error
        config._name = name
        return config

    @property
    def name(self) -> str:
        """The environment's name in tcod_environments; "" for the settings of a run."""
        return self._name

    @property
    def per_environment(self) -> list["TcodConfig"]:
        """The settings of every environment: these ones, where there is one."""
        return list(self._entries.values()) or [self]

    def for_row(self, metadata: Any) -> "TcodConfig":
        """The settings of a row's environment. Raises ConfigError, where the row names none."""
        if not self._entries:
            return self
        name = metadata.get("environment") if isinstance(metadata, dict) else None
        if not isinstance(name, str) or name not in self._entries:
            known = ", ".join(self._entries)
            raise ConfigError(f"its metadata.environment is {name!r:.80}: name one of tcod_environments, {known}")
        return self._entries[name]

    def scored_len(self, tokens: int, flag: str = "") -> tuple[int, str]:
        """(tokens, flags) of the longest sequence that the teacher scores: `tokens` of the student's, and the note."""
        return (tokens + self.tcod_note_len, f"{flag} + tcod_note_len") if self.tcod_teacher_sees else (tokens, flag)

    @functools.cached_property
    def curriculum(self) -> Curriculum:
        """The curriculum of these settings."""
        return Curriculum(**{field.name: getattr(self, f"tcod_{field.name}") for field in fields(Curriculum)})

    @property
    def template_kwargs(self) -> dict[str, bool]:
        """Of the chat template, where a tool is given none: Qwen3's switch, which templates without it ignore."""
        return {"enable_thinking": self.tcod_thoughts == "keep"}

    @classmethod
    def read(cls, path: Path) -> "TcodConfig":
        """The settings in a YAML file. Raises ConfigError."""
        return cls.from_mapping(read_yaml(path), str(path))

    @classmethod
    def from_args(cls, args: Namespace) -> "TcodConfig":
        """The `tcod_*` attributes of slime's args. Raises ConfigError."""
        given = {key: value for key, value in vars(args).items() if key.startswith("tcod_")}
        return cls.from_mapping(given, getattr(args, "custom_config_path", None) or "--custom-config-path")

    @classmethod
    def from_mapping(cls, given: dict[str, Any], source: str) -> "TcodConfig":
        """Settings by key; `source` names where they come from, for the message. Raises ConfigError."""
        try:
            return cls(**given)
        except ValidationError as error:
            raise ConfigError(_sentence(error.errors(), source)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, in UTF-8. Raises ConfigError, also where a key is not tcod_*, or stands twice."""
    try:
        values = yaml.load(path.read_bytes(), _UniqueKeys) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)  # YAML's own words quote the line, and a key may be in it
        reason = f"line {mark.line + 1}: {error.problem}" if mark else " ".join(str(error).split())
        raise ConfigError(f"{path} cannot be read ({reason}): name a YAML file of tcod_* settings") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is no mapping: write one `tcod_key: value` a line")
    if foreign := [str(key) for key in values if not str(key).startswith("tcod_")]:
        raise ConfigError(
            f"{path} sets {', '.join(foreign)}: slime reads this file too late for its own arguments, "
            "so pass those on the command line and keep tcod_* keys only"
        )
    return values


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(key.value) for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"{repeated[0]} is set twice")
        return super().construct_mapping(node, deep)


def _sentence(errors: list[ErrorDetails], source: str) -> str:
    """The first of pydantic's errors; before all others a key that is no setting, which may explain them."""
    error = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"unknown setting {key} in {source}: the settings are {', '.join(TcodConfig.model_fields)}"
    if error["type"] == "missing":
        return f"{key} is missing in {source}: add it, as in the recipe's configs/alfworld.yaml"
    if error["type"] == "value_error":
        return f"{source}: {error['ctx']['error']}"
    choices = [other["msg"] for other in errors if other["loc"][0] == error["loc"][0]]  # more than one of a union
    given = without_secrets(error["input"])
    wanted = " or ".join(choice.removeprefix("Input should be ") for choice in choices)
    return f"{error['loc'][0] if choices[1:] else key} in {source} should be {wanted}, not {given!r:.80}"
