"""The one episode loop: of all arms that play (all but sft, see imitation.py), and of evaluation.

No slime and no settings in here: training/samples.py makes slime's samples of the episodes, tools/common/play.py and
programs of yours play them without slime.
"""

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from .. import ABORTED, ConfigError, Failure
from ..curriculum import EpisodePlan
from ..environments.pool import BorrowedEnvironment, EnvironmentPool
from ..environments.protocol import Observation, as_listed, is_admissible
from ..model.student import StudentClient, is_untempered
from .demonstration import Demonstration
from .episode import Episode, ReplayedTurn, TurnRecord
from .history import History
from .rows import task_of
from .text_side import TextSide, as_text

logger = logging.getLogger(__name__)

# trace(name) opens a span of slime's timeline; call what it yields with a reply's meta_info, to attach that.
Trace = Callable[[str], AbstractContextManager[Callable[[dict[str, Any]], None]]]


@dataclass(frozen=True)
class Assignment:
    """One episode to play: a row's metadata, who acts when, and how the student samples."""

    metadata: dict[str, Any]
    plan: EpisodePlan
    sampling_params: dict[str, Any]
    max_context_len: int  # tokens of the whole episode, or of what a turn is shown and says
    session: str  # the same for all turns: they should reach the engine whose cache holds the prefix
    demonstration: Demonstration = Demonstration()
    check_wanted: Callable[[], None] = lambda: None  # raises Failure(ABORTED) once nobody needs the episode any more
    trace: Trace = lambda name: contextlib.nullcontext(lambda meta_info: None)


@dataclass(frozen=True)
class EpisodePlayer:
    """Plays episodes. One per environment and event loop; built by settings/build.py."""

    new_text_side: Callable[[dict[str, Any]], TextSide]  # of a task
    pool: EnvironmentPool
    student: StudentClient
    new_history: Callable[[int], History]  # by the tokens of the longest context

    async def play(self, assignment: Assignment, episode: Episode) -> None:
        """Play an episode; its record and sequences are filled in on the way. Raises Failure."""
        record, started = episode.record, time.monotonic()
        record.replayed, record.budget = assignment.plan.replayed, assignment.plan.budget
        record.untempered = is_untempered(assignment.sampling_params)
        history = self.new_history(assignment.max_context_len)
        async with self.pool.borrow() as borrowed:
            assignment.check_wanted()  # while it waited for an environment
            side = self.new_text_side(task_of(assignment.metadata))
            last = await _Turns(self, assignment, episode, history, side, borrowed).play_all()
            with assignment.trace("environment"):
                last = await borrowed.finish(last)
            record.env_s = borrowed.seconds
        record.won, record.reward, record.outcome = last.won, last.reward, last.full_text
        record.best_grade = max(
            (said.reward for said in (*episode.seen, last) if said.reward is not None), default=None
        )
        record.episode_s = time.monotonic() - started
        if not record.turns:
            raise Failure(
                "prompt_too_long", "no room for a response: raise --rollout-max-context-len (MAX_CONTEXT_LEN)"
            )
        episode.sequences = history.sequences


@dataclass(frozen=True)
class _Turns:
    """The turns of one episode."""

    player: EpisodePlayer
    assignment: Assignment
    episode: Episode
    history: History
    side: TextSide
    borrowed: BorrowedEnvironment

    async def play_all(self) -> Observation:
        """The loop: the plan says who acts at which turn. Returns the last observation."""
        plan, demonstration, record = self.assignment.plan, self.assignment.demonstration, self.episode.record
        observation = await self._ask(self.borrowed.reset, self.side.task)
        shown = self.side.show(observation, first=True)
        if not self.history.begin(self.side.rules(), shown):
            return observation
        for turn in range(plan.turns):
            self.assignment.check_wanted()
            text = as_text(shown)
            if turn < plan.replayed:
                action = self._replay(turn, observation, text)
                observation = await self._ask(self.borrowed.step, action)
                demonstration.check_step(turn, observation, observation.over)
            else:
                action = await self._respond(turn, observation, text)
                observation = await self._ask(self.borrowed.step, action)
                record.turns[-1].refused = observation.refused
            if observation.over or turn + 1 == plan.turns:
                break
            shown = self.side.show(observation, first=False)
            if not self.history.add_turn(shown):
                record.context_limited = True
                break
        return observation

    async def _ask(self, call: Callable[[Any], Awaitable[Observation]], argument: Any) -> Observation:
        with self.assignment.trace("environment"):
            observation = await call(argument)
        self.episode.seen.append(observation)
        return observation

    def _replay(self, turn: int, observation: Observation, text: str) -> str:
        """The demonstration's turn: check, append. Returns its action."""
        demonstration = self.assignment.demonstration
        response = demonstration.response(turn, observation, self.side)
        as_sampled = self.history.add_replayed(response, demonstration.sampled_ids(turn, self.history.chat))
        action = demonstration.actions[turn]
        self.episode.record.replayed_turns.append(ReplayedTurn(text, action, response, as_sampled))
        return action

    async def _respond(self, turn: int, observation: Observation, text: str) -> str:
        """The student's turn: sample, append, parse. Returns the action to send."""
        assignment, chat, sampling = self.assignment, self.history.chat, self.assignment.sampling_params
        with assignment.trace("sglang_generate") as attach:
            response = await self.player.student.respond(
                self.history.context,
                sampling,
                min(sampling["max_new_tokens"], self.history.room()),
                assignment.session,
                assignment.check_wanted,
            )
            attach(response.meta_info)
        self.history.add_response(response)
        action, valid = self.side.parse(chat.after_thought(response.ids))
        action = as_listed(action, observation)
        played = TurnRecord(
            turn=turn,
            observation=text,
            action=action,
            valid=valid,
            admissible=is_admissible(action, observation, self.side.environment),
            # SGLang tests the length first: a stop token in the last place completes the turn all the same.
            cut=response.at_limit and response.ids[-1] not in chat.stop_ids,
            weight_version=response.meta_info.get("weight_version"),
        )
        self.episode.record.turns.append(played)
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
        if isinstance(error, Failure | ConfigError):  # the latter of a row that names no environment of the run
            reason, detail = getattr(error, "reason", "env_error"), str(error)
        else:
            logger.exception("episode failed")
            reason, detail = "internal", repr(error)
        try:
            check_wanted()
        except Failure:
            reason = ABORTED
        fail(reason, " ".join(detail.split())[:500])  # Ray tells of a dead worker in ten lines
