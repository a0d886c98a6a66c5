"""The aligner's E-Token and the policy's: which of the two is ahead, and that both end up with that one."""

from __future__ import annotations

import pytest
from node_testing import wait_for

pytestmark = pytest.mark.ros


def test_an_aligner_that_hears_late_of_a_newer_token_in_use_publishes_that_in_place_of_its_own(probe, graph) -> None:
    """The policy refuses what is behind its own token, and holds until it is told otherwise."""
    from selfalign.msg import EToken
    from selfalign_ros.bridge import qos

    probe.listen(EToken, "e_token", qos.LATCHED)
    graph.start("aligner", contract=graph.contract("sim_arm_forward.yaml"), token_folder="")
    own = wait_for(lambda: probe.messages["e_token"], "the aligner's own token, there being no policy")[-1]
    assert own.version == 0
    in_use = EToken(
        embodiment=own.embodiment, version=7, shape=own.shape, data=[0.5] * len(own.data), model_digest=own.model_digest
    )
    probe.publisher(EToken, "policy/e_token_in_use", qos.LATCHED).publish(in_use)
    found = wait_for(lambda: [t for t in probe.messages["e_token"] if t.version == 7], "the token in use")[-1]
    assert found.data == in_use.data
