"""The recipe's hooks with what slime's plugin contract tests leave out, which call with bare arguments and samples.

Everything else is as in a run: slime's loop, a scripted engine, a scripted teacher.
"""

import atexit
import copy
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from examples.tcod import tcod_rollout
from examples.tcod.episode.record import Episode, EpisodeRecord
from examples.tcod.settings import build
from examples.tcod.training.samples import to_samples
from slime.utils.eval_config import EvalDatasetConfig
from slime.utils.types import Sample
from tests.support.rig import UNTEMPERED, Rig
from tests.support.toys import LocalPool, save_tokenizer

GOAL = {"goal": 2}
_folder = tempfile.TemporaryDirectory()
_checkpoint = save_tokenizer(Path(_folder.name))
_rig = Rig(Path(_folder.name), _checkpoint, AutoTokenizer.from_pretrained(_checkpoint))
_rig.student.__enter__()
_rig.teacher.__enter__()
atexit.register(_folder.cleanup)
build.EnvironmentPool = LocalPool
_common = {"input_key": "prompt", "label_key": "label", "metadata_key": "metadata", "n_samples_per_eval_prompt": 1}
_args = _rig.args(
    [GOAL, GOAL],
    n_samples_per_prompt=2,
    eval_datasets=[
        EvalDatasetConfig(name="eval", path=str(_rig.rows([GOAL])), max_response_len=64, **UNTEMPERED, **_common)
    ],
)


def _drawn(sample):
    """The sample before it is played: theirs are finished already."""
    fresh = Sample(index=sample.index, group_index=sample.group_index, prompt=sample.prompt)
    fresh.metadata = {**GOAL, "tcod": Episode(EpisodeRecord(n=0, k=4))}
    return fresh


class _Drawn:
    def __init__(self, source):
        self.source = source

    def get_samples(self, num_samples):
        return [[_drawn(sample) for sample in group] for group in self.source.get_samples(num_samples)]


async def generate(args, sample, sampling_params):
    params = {**UNTEMPERED, "max_new_tokens": 64, **sampling_params}
    played = await tcod_rollout.generate(_args, _drawn(sample), params)
    played.reward = await tcod_rollout.reward_func(_args, played)
    [made] = to_samples(_args, played, _rig.tokenizer)
    return made


async def reward_func(args, sample, **kwargs):
    played = await tcod_rollout.generate(_args, _drawn(sample), {**UNTEMPERED, "max_new_tokens": 64})
    return await tcod_rollout.reward_func(_args, played, **kwargs)


def generate_rollout(args, rollout_id, data_source, evaluation=False):
    return tcod_rollout.generate_rollout(copy.copy(_args), rollout_id, _Drawn(data_source), evaluation)
