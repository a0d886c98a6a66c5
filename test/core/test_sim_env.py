"""The reaching task, the expert and play."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from selfalign_core.errors import ConfigError, InputError
from selfalign_core.sim import JOINTS, TARGET_NAMES, BodyConfig, PlayPolicy, ReachEnv, ReachExpert

REACHING = {
    "three": ("shoulder_pan", "shoulder_lift", "elbow_flex"),
    "four": ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex"),
    "six": JOINTS[:6],
}


def reach(env: ReachEnv, expert: ReachExpert, *, target: str | None = None) -> dict:
    """Run the expert to the end of the episode, eight actions of each chunk of sixteen; the last info."""
    while True:
        for action in expert.chunk(16, target=target)[:8]:
            _, _, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                return info


def test_gymnasium_accepts_the_environment() -> None:
    env = ReachEnv(image_size=(32, 32), render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # absolute positions are no [-1, 1] box, on purpose
        check_env(env)
    env.close()


def test_observation_is_what_the_docstring_says() -> None:
    env = ReachEnv(image_size=(40, 48), seed=1)
    observation, info = env.reset()
    assert {k: (v.shape, v.dtype) for k, v in observation["images"].items()} == {
        "overhead": ((40, 48, 3), np.uint8),
        "wrist": ((40, 48, 3), np.uint8),
    }
    assert (observation["state"].shape, observation["state"].dtype) == ((7,), np.float32)
    assert observation["prompt"] == f"reach the {info['target']}"
    assert set(info["targets"]) == set(TARGET_NAMES)
    assert observation in env.observation_space
    _, reward, *_, info = env.step(observation["state"])
    assert reward == -info["distance_to_target"]


def test_episodes_repeat_bit_for_bit() -> None:
    def episode() -> list[bytes]:
        env = ReachEnv(BodyConfig.sample(np.random.default_rng(0)), image_size=(32, 32))
        env.reset(seed=11)
        env.reset()  # the second episode of a seed is as determined as the first
        play, out = PlayPolicy(env.sim, 0), []
        for action in play.chunk(10):
            observation, reward, *_ = env.step(action)
            out += [observation["state"].tobytes(), np.float64(reward).tobytes()]
            out += [image.tobytes() for image in observation["images"].values()]
        return out

    assert episode() == episode()


def test_seed_of_the_constructor_and_target_option() -> None:
    observation, _ = ReachEnv(cameras=(), seed=5).reset()
    again, _ = ReachEnv(cameras=()).reset(seed=5)
    np.testing.assert_array_equal(observation["state"], again["state"])
    env = ReachEnv(cameras=())
    for name in TARGET_NAMES:
        _, info = env.reset(seed=5, options={"target": name})
        assert info["target"] == name
    with pytest.raises(InputError, match="'sofa'"):
        env.reset(options={"target": "sofa"})
    with pytest.raises(ConfigError, match="'colour'"):
        env.reset(options={"colour": "red"})


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="'ceiling'"):
        ReachEnv(cameras=("ceiling",))
    with pytest.raises(ConfigError, match="control_hz"):
        ReachEnv(control_hz=0)
    env = ReachEnv(cameras=(), seed=0)
    env.reset()
    with pytest.raises(InputError, match="shoulder_pan"):
        env.step(np.full(7, np.nan, np.float32))
    with pytest.raises(ConfigError, match="'knee'"):
        ReachExpert(env.sim, active_joints=("knee",))
    with pytest.raises(InputError, match="horizon"):
        ReachExpert(env.sim).chunk(0)


def test_an_arm_that_holds_does_not_succeed_and_the_episode_ends() -> None:
    env = ReachEnv(cameras=(), max_steps=15)
    observation, _ = env.reset(seed=0)
    outcomes = [env.step(observation["state"])[2:4] for _ in range(15)]
    assert outcomes == [(False, False)] * 14 + [(False, True)]


@pytest.mark.parametrize("joints", REACHING.values(), ids=REACHING.keys())
def test_expert_reaches_on_random_bodies(joints: tuple[str, ...]) -> None:
    successes = 0
    for seed in range(40):
        body = BodyConfig.sample(np.random.default_rng(1000 + seed), active_joints=joints)
        env = ReachEnv(body, cameras=())
        env.reset(seed=seed)
        successes += reach(env, ReachExpert(env.sim, active_joints=joints))["success"]
    assert successes >= 38


def test_the_expert_of_another_target_does_not_succeed() -> None:
    for seed in range(5):
        env = ReachEnv(cameras=(), max_steps=60)
        _, info = env.reset(seed=seed)
        other = next(name for name in TARGET_NAMES if name != info["target"])
        info = reach(env, ReachExpert(env.sim), target=other)
        assert not info["success"]
        assert env.sim.distance(other) < 0.01


def test_expert_follows_a_change_of_body() -> None:
    env = ReachEnv(cameras=())
    env.reset(seed=2)
    expert = ReachExpert(env.sim)
    for action in expert.chunk(5):
        env.step(action)
    env.apply_body(BodyConfig.sample(np.random.default_rng(3)))
    assert reach(env, expert)["success"]


def test_expert_keeps_its_speed_holds_the_rest_and_stays_in_bounds() -> None:
    body = BodyConfig.sample(np.random.default_rng(4))
    env = ReachEnv(body, cameras=())
    env.reset(seed=4)
    chunk = ReachExpert(env.sim, active_joints=REACHING["three"], max_velocity=0.5).chunk(50, dt=0.05)
    assert (chunk.shape, chunk.dtype) == ((50, 7), np.float32)
    assert all(action in env.action_space for action in chunk)
    kinematic_speed = np.abs(np.diff(env.sim.to_kinematic(chunk), axis=0)) / 0.05
    assert kinematic_speed.max() < 0.5 * 1.2  # the share that carries the arm's weight comes on top
    np.testing.assert_allclose(chunk[:, 3:], np.broadcast_to(env.sim.setpoint()[3:], (50, 4)), atol=1e-6)


def test_play_moves_every_joint_smoothly_within_its_box_and_off_the_table() -> None:
    for seed in range(5):
        env = ReachEnv(BodyConfig.sample(np.random.default_rng(seed)), cameras=())
        env.reset(seed=seed)
        centre = env.sim.to_kinematic(env.sim.setpoint())
        play = PlayPolicy(env.sim, seed, amplitude=0.4, max_velocity=1.0)
        actions = np.concatenate([play.chunk(16) for _ in range(13)])
        assert all(action in env.action_space for action in actions)
        kinematic = env.sim.to_kinematic(actions)
        assert np.abs(kinematic - centre).max() <= 0.4 + 1e-5
        assert np.abs(np.diff(kinematic, axis=0)).max() <= 1.0 * 0.05 * 1.01
        measured, heights = [], []
        for action in actions:
            measured.append(env.step(action)[0]["state"])
            heights.append(env.sim.tip()[2])
        assert env.sim.to_kinematic(np.array(measured)).std(axis=0).min() > 0.05
        assert min(heights) > 0.0


def test_play_holds_joints_that_are_not_active() -> None:
    env = ReachEnv(cameras=())
    env.reset(seed=0)
    actions = PlayPolicy(env.sim, 0, active_joints=("elbow_flex",)).chunk(60)
    spread = np.ptp(actions, axis=0)
    assert spread[2] > 0.1
    assert np.delete(spread, 2).max() == 0.0
