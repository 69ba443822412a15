"""The one episode loop of all arms and of evaluation.

No slime and no settings in here: tcod_rollout.py makes slime's samples of the episodes, tools/common/play.py and
programs of yours play them without slime.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from .. import ABORTED, Failure
from ..curriculum import EpisodePlan
from ..environments.pool import BorrowedEnvironment, EnvironmentPool
from ..environments.protocol import Observation, as_listed, is_admissible
from ..model.chat_template import Turn
from ..model.chat_tokens import ChatTokens
from ..model.student import StudentClient
from .demonstration import Demonstration
from .history import History
from .record import Episode, ReplayedTurn, TurnRecord
from .rows import task_of
from .text_side import TextSide

logger = logging.getLogger(__name__)

# Opens a span of slime's timeline by name; the block is given what takes a reply's meta_info.
Trace = Callable[[str], AbstractContextManager[Callable[[dict[str, Any]], None]]]


@dataclass(frozen=True)
class Assignment:
    """One episode to play: a row's metadata, who acts when, and how the student samples."""

    metadata: dict[str, Any]
    plan: EpisodePlan
    demonstration: Demonstration
    sampling_params: dict[str, Any]
    max_context_len: int  # tokens of the whole episode, or of what a turn is shown and says
    session: str  # the same for all turns: they should reach the engine whose cache holds the prefix
    check_wanted: Callable[[], None] = lambda: None  # raises Failure(ABORTED) once nobody needs the episode any more
    trace: Trace = lambda name: contextlib.nullcontext(lambda meta_info: None)


@dataclass(frozen=True)
class _Shown:
    """What a turn answers: an observation, and what the chat shows of it."""

    turn: int
    observation: Observation
    shown: Turn
    side: TextSide

    @property
    def text(self) -> str:
        return self.shown if isinstance(self.shown, str) else "\n\n".join(self.shown)


@dataclass(frozen=True)
class EpisodePlayer:
    """Plays episodes; what those of one event loop share. settings/build.py makes one of settings."""

    text_side: Callable[[dict[str, Any]], TextSide]  # of a task
    pool: EnvironmentPool
    chat: ChatTokens
    student: StudentClient
    new_history: Callable[[int], History]  # by the tokens of the longest context

    async def play(self, assignment: Assignment, episode: Episode) -> None:
        """Play an episode; its record and sequences are filled in on the way. Raises Failure."""
        record, started = episode.record, time.monotonic()
        record.replayed, record.budget = assignment.plan.replayed, assignment.plan.budget
        record.untempered = is_untempered(assignment.sampling_params)
        history = self.new_history(assignment.max_context_len)
        async with self.pool.borrow() as engine:
            assignment.check_wanted()  # while it waited for an engine
            last = await self._play_turns(assignment, engine, history, episode)
            with assignment.trace("environment"):
                last = await engine.finish(last)
            record.env_s = engine.seconds
        record.won, record.reward, record.outcome = last.won, last.reward, last.text
        record.score = max((one.reward for one in (*episode.seen, last) if one.reward is not None), default=None)
        record.episode_s = time.monotonic() - started
        if not record.turns:
            raise Failure("prompt_too_long", "no room for a response: raise --rollout-max-context-len")
        episode.sequences = history.sequences

    async def _play_turns(
        self, assignment: Assignment, engine: BorrowedEnvironment, history: History, episode: Episode
    ) -> Observation:
        """The loop: the plan says who acts at which turn. Returns the last observation."""
        plan, task = assignment.plan, task_of(assignment.metadata)
        side = self.text_side(task)
        with assignment.trace("environment"):
            observation = await engine.reset(task)
        episode.seen.append(observation)
        shown = side.turn(observation, first=True)
        if not history.begin(side.rules(), shown):
            return observation
        for turn in range(plan.turns):
            assignment.check_wanted()
            replayed, now = turn < plan.replayed, _Shown(turn, observation, shown, side)
            if replayed:
                action = self._replay(assignment, episode, history, now)
            else:
                action = await self._respond(assignment, episode, history, now)
            with assignment.trace("environment"):
                observation = await engine.step(action)
            episode.seen.append(observation)
            over = observation.won or observation.done
            if replayed:
                assignment.demonstration.check_step(turn, observation, over)
            else:
                episode.record.turns[-1].refused = observation.refused
            if over or turn + 1 == plan.turns:
                break
            shown = side.turn(observation, first=False)
            if not history.observe(shown):
                episode.record.context_limited = True
                break
        return observation

    def _replay(self, assignment: Assignment, episode: Episode, history: History, now: _Shown) -> str:
        """The demonstration's turn: check, append. Returns its action."""
        demonstration = assignment.demonstration
        response = demonstration.response(now.turn, now.observation, now.side)
        as_sampled = history.show_replayed(response, demonstration.sampled_ids(now.turn, self.chat))
        action = demonstration.actions[now.turn]
        episode.record.demonstration.append(ReplayedTurn(now.text, action, response, as_sampled))
        return action

    async def _respond(self, assignment: Assignment, episode: Episode, history: History, now: _Shown) -> str:
        """The student's turn: sample, append, parse. Returns the action to send."""
        max_new_tokens = min(assignment.sampling_params["max_new_tokens"], history.room())
        with assignment.trace("sglang_generate") as note:
            response = await self.student.respond(
                history.context,
                assignment.sampling_params,
                max_new_tokens,
                assignment.session,
                assignment.check_wanted,
            )
            note(response.meta_info)
        history.respond(response)
        action, valid = now.side.parse(self.chat.after_thought(response.ids))
        action = as_listed(action, now.observation)
        played = TurnRecord(
            turn=now.turn,
            observation=now.text,
            action=action,
            valid=bool(valid),
            admissible=is_admissible(action, now.observation, now.side.environment),
            # SGLang tests the length first: a stop token in the last place completes the turn all the same.
            cut=response.at_limit and response.ids[-1] not in self.chat.stop_ids,
            weight_version=response.meta_info.get("weight_version"),
        )
        episode.record.turns.append(played)
        return action


@contextlib.contextmanager
def failures_go_to(
    fail: Callable[[str, str], object], check_wanted: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Whatever is raised in the block is handed over as (reason, detail); nothing is raised, it would end slime's run.

    A surplus episode's failure costs nothing: it is aborted, whatever it failed of.
    """
    try:
        yield
    except Exception as error:
        reason, detail = getattr(error, "reason", "internal"), str(error)
        if not isinstance(error, Failure):
            logger.exception("episode failed")
            reason, detail = "internal", repr(error)
        try:
            check_wanted()
        except Failure:
            reason = ABORTED
        fail(reason, " ".join(detail.split())[:500])  # Ray tells of a dead worker in ten lines


def is_untempered(sampling: dict[str, Any]) -> bool:
    """Whether sampling parameters leave the policy as it is: the teacher's log-probs are always so."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "min_new_tokens": 0}
    given = {name: sampling.get(name) for name in neutral}
    return all(value is None or value == neutral[name] for name, value in given.items())
