"""The one episode loop of all arms and of evaluation, and the record that an episode leaves behind.

No slime in here: tcod_rollout.py makes slime's samples of the episodes, tools/play.py plays them without slime.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import ABORTED, Failure
from ..curriculum import EpisodePlan
from ..environments.pool import EnvironmentPool
from ..environments.protocol import Environment, Observation, as_listed, ask, is_admissible, load_environment
from ..model.chat_tokens import ChatTokens
from ..model.student import StudentClient
from ..settings.config import TcodConfig
from .demonstration import Demonstration
from .history import History, new_history
from .rows import task_of

logger = logging.getLogger(__name__)

# Opens a span of slime's timeline by name; the block is given what takes a reply's meta_info.
Trace = Callable[[str], AbstractContextManager[Callable[[dict[str, Any]], None]]]


@dataclass
class TurnRecord:
    """One turn that the student played."""

    turn: int
    """Its index in the episode, 0-based, replayed turns counted."""
    start: int
    """Its sampled tokens are response tokens start..end-1 of the episode, or of its own sample (samples.fan_out)."""
    end: int
    observation: str
    """The user turn that it answers."""
    action: str
    """As it was sent to the environment."""
    valid: bool
    """The response had the answer format."""
    admissible: bool
    """The environment listed the action, or does not list all of them."""
    cut: bool
    """A length limit ended the response before a stop token did."""
    refused: bool = False
    """The engine did not execute the action."""
    weight_version: str | None = None
    """Of the engine that sampled it, as SGLang reports it."""


@dataclass
class ReplayedTurn:
    """One turn of the demonstration, replayed in the prompt."""

    observation: str
    action: str
    response: str = ""
    sampled: bool = False
    """Its tokens are those that it was sampled with when it was recorded; else they are its text's."""
    start: int | None = None
    """Its response is tokens start..end-1 of the episode; None where the history renders it anew at every turn."""
    end: int | None = None


@dataclass
class EpisodeRecord:
    """What is known of an episode beside its tokens; sample.metadata["tcod"] is this record as a dict.

    Times are wall-clock seconds. A sample that was drawn and not played has n and k only. Of a failed one, `failure`
    says why, and the turns before it are kept for reading; an aborted one is as it was drawn.
    """

    n: int | None = None
    """Rollout id when the sample was drawn; None in an evaluation."""
    k: int | None = None
    """Depth at that rollout, in turns."""
    evaluation: bool = False
    replayed: int = 0
    """Turns of the demonstration that were played before the student took over."""
    budget: int = 0
    """Turns that the student may play."""
    replay: list[ReplayedTurn] = field(default_factory=list)
    turns: list[TurnRecord] = field(default_factory=list)
    prompts: list[tuple[int, int]] = field(default_factory=list)
    """The prompt of each sequence, as tokens start..end-1; see `sequences`."""
    outcome: str = ""
    """The environment's answer to the last action."""
    won: bool = False
    reward: float | None = None
    """The environment's own grade of the episode, where it gives one."""
    context_limited: bool = False
    """The context had no room for a further turn."""
    untempered: bool = False
    """Sampled from the policy itself (temperature 1, no top-p, no top-k), so that a KL to the teacher is one."""
    env_s: float = 0.0
    episode_s: float = 0.0
    teacher_s: float = 0.0
    failure: str | None = None
    """Why the episode cannot be used, see FAULTS.md."""
    detail: str = ""
    """The failure in the words of what failed, at most 500 characters."""
    unscored: str | None = None
    """Why an evaluation episode has no teacher log-probs although tcod_eval_kl asks for them."""

    @classmethod
    def of(cls, sample: Any) -> "EpisodeRecord":
        """The record in a sample's metadata."""
        record = cls(**sample.metadata["tcod"])
        record.replay = [ReplayedTurn(**turn) for turn in record.replay]
        record.turns = [TurnRecord(**turn) for turn in record.turns]
        return record

    def store(self, sample: Any) -> None:
        """Put the record into a sample's metadata, as plain data that Ray, JSON and torch.save take."""
        sample.metadata["tcod"] = asdict(self)

    def sequences(self, tokens: int) -> list[tuple[int, int, int]]:
        """(start, end of its prompt, end) of each sequence, of an episode of so many tokens.

        Under tcod_history append there is one, under turns one a student's turn, laid end to end.
        """
        ends = [*(start for start, _ in self.prompts[1:]), tokens]
        return [(*prompt, end) for prompt, end in zip(self.prompts, ends, strict=True)]

    @property
    def truncated(self) -> bool:
        """Whether a length limit ended the episode, rather than success or the plan."""
        return self.context_limited or (bool(self.turns) and self.turns[-1].cut and not self.won)


@dataclass(frozen=True)
class Runtime:
    """What the episodes of one event loop share."""

    config: TcodConfig
    environment: type[Environment]
    chat: ChatTokens
    pool: EnvironmentPool
    student: StudentClient

    @classmethod
    def create(cls, config: TcodConfig, chat: ChatTokens, engine_url: str) -> "Runtime":
        pool = EnvironmentPool(
            config.tcod_environment,
            config.tcod_data_root,
            workers=config.tcod_env_workers,
            engines_per_worker=config.tcod_engines_per_worker,
            timeout_s=config.tcod_env_timeout_s,
            env_args=config.tcod_env_args,
        )
        student = StudentClient(engine_url, config.tcod_engine_timeout_s, chat.vocab_size, chat.stop_ids)
        return cls(config, load_environment(config.tcod_environment), chat, pool, student)

    def render(self, observation: Observation, first: bool) -> str:
        """The user turn. Raises Failure: env_error."""
        return ask(self.environment, "render", observation, first, self.config.tcod_admissible == "turn")


@dataclass(frozen=True)
class Assignment:
    """One episode to play: a row's metadata, who acts when, and how the student samples."""

    metadata: dict[str, Any]
    plan: EpisodePlan
    demo: Demonstration
    sampling_params: dict[str, Any]
    max_context_len: int  # tokens of the whole episode, or of what a turn is shown and says
    session: str  # the same for all turns: they should reach the engine whose cache holds the prefix
    is_unwanted: Callable[[], bool] = lambda: False  # whether nobody needs the episode any more
    trace: Trace = lambda name: contextlib.nullcontext(lambda meta_info: None)


async def play_episode(runtime: Runtime, assignment: Assignment, record: EpisodeRecord) -> History:
    """Play one episode and return its tokens; `record` is filled in on the way.

    Raises:
        Failure: the episode cannot be used; nothing else, because another exception would end slime's run.
    """
    try:
        return await _play(runtime, assignment, record)
    except Failure:
        raise
    except Exception as error:
        logger.exception("episode failed")
        raise Failure("internal", repr(error)) from error


async def _play(runtime: Runtime, assignment: Assignment, record: EpisodeRecord) -> History:
    """The loop: the plan says who acts at which turn."""
    plan, demo, metadata = assignment.plan, assignment.demo, task_of(assignment.metadata)
    record.replayed, record.budget = plan.replayed, plan.budget
    record.untempered = is_untempered(assignment.sampling_params)
    history = new_history(runtime.config, runtime.chat, assignment.max_context_len)
    started = time.monotonic()
    async with runtime.pool.borrow() as environment:
        _stop_if_unwanted(assignment)  # while it waited for an engine
        with assignment.trace("environment"):
            observation = await environment.reset(metadata)
        shown = runtime.render(observation, True)
        has_room = history.begin(ask(runtime.environment, "system_prompt", metadata), shown)
        for turn in range(plan.turns if has_room else 0):
            _stop_if_unwanted(assignment)
            if turn < plan.replayed:
                record.replay.append(_replay(runtime, demo, history, turn, observation, shown))
                action = demo.actions[turn]
            else:
                played = await _respond(runtime, assignment, history, turn, observation, shown)
                record.turns.append(played)
                action = played.action
            with assignment.trace("environment"):
                observation = await environment.step(action)
            over = observation.won or observation.done
            if turn < plan.replayed:
                demo.check_step(turn, observation, over)
            else:
                played.refused = observation.refused
            if over or turn + 1 == plan.turns:
                break
            shown = runtime.render(observation, False)
            if not history.observe(shown):
                record.context_limited = True
                break
        with assignment.trace("environment"):
            observation = await environment.finish(observation)
        record.won, record.reward, record.outcome = observation.won, observation.reward, observation.text
        record.env_s = environment.seconds
    record.episode_s = time.monotonic() - started
    record.prompts = history.prompts
    if not record.turns:
        raise Failure("prompt_too_long", "no room for a response: raise --rollout-max-context-len")
    return history


def _replay(
    runtime: Runtime, demo: Demonstration, history: History, turn: int, observation: Observation, shown: str
) -> ReplayedTurn:
    """The demonstration's turn: check, append."""
    response = demo.response(turn, observation, runtime.environment)
    ids = demo.sampled_ids(turn, runtime.chat)
    start, end = history.replay(response, ids) or (None, None)
    return ReplayedTurn(shown, demo.actions[turn], response, bool(ids and end), start, end)


async def _respond(
    runtime: Runtime,
    assignment: Assignment,
    history: History,
    turn: int,
    observation: Observation,
    shown: str,
) -> TurnRecord:
    """The student's turn: sample, append, parse; the record's action is the one to send."""
    max_new_tokens = min(assignment.sampling_params["max_new_tokens"], history.room())
    with assignment.trace("sglang_generate") as note:
        response = await runtime.student.respond(
            history.context, assignment.sampling_params, max_new_tokens, assignment.session, assignment.is_unwanted
        )
        note(response.meta_info)
    start, end = history.respond(response)
    action, valid = ask(runtime.environment, "parse_action", runtime.chat.answer(response.ids))
    action = as_listed(action, observation)
    return TurnRecord(
        turn=turn,
        start=start,
        end=end,
        observation=shown,
        action=action,
        valid=bool(valid),
        admissible=is_admissible(action, observation, runtime.environment),
        # SGLang tests the length first: a stop token in the last place completes the turn all the same.
        cut=response.at_limit and response.ids[-1] not in runtime.chat.stop_ids,
        weight_version=response.meta_info.get("weight_version"),
    )


def _stop_if_unwanted(assignment: Assignment) -> None:
    if assignment.is_unwanted():
        raise Failure(ABORTED, "the rollout has all the episodes it needs")


def is_untempered(sampling: dict[str, Any]) -> bool:
    """Whether sampling parameters leave the policy as it is: the teacher's log-probs are always so."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "min_new_tokens": 0}
    given = {name: sampling.get(name) for name in neutral}
    return all(value is None or value == neutral[name] for name, value in given.items())
