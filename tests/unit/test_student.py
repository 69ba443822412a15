"""What in an engine's reply can be trained on, as far as a reply shows it; whole rollouts are in tests/episode."""

import pytest

from examples.tcod import Failure
from examples.tcod.model.student import checked_response
from tests.support.fake_sglang import generated

NUM_GPUS = 0


def test_ids_and_their_log_probs_are_taken_as_they_are():
    response = checked_response(generated([5, 6], [-0.5, -0.25]), 10, {6})
    assert (response.ids, response.log_probs, response.at_limit) == ([5, 6], [-0.5, -0.25], False)


@pytest.mark.parametrize("output_ids", [[5, 7], [5], [6, 5]])
def test_log_probs_of_other_ids_are_refused(output_ids):
    reply = generated([5, 6], [-0.5, -0.25]) | {"output_ids": output_ids}
    with pytest.raises(Failure, match="the log-probs belong to other ids") as caught:
        checked_response(reply, 10, {6})
    assert caught.value.reason == "engine_invalid"
