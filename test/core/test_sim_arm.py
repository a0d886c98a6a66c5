"""The simulated arm: determinism, transmission, limits, payload, cameras, change of body, refusals."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from selfalign_core.errors import InputError
from selfalign_core.sim import CAMERAS, JOINTS, TARGET_NAMES, VIEWS, ArmSim, BodyConfig, CameraBody, JointBody

ROOT = Path(__file__).parents[2]
ALL_REVERSED = BodyConfig(joints=tuple(JointBody(sign=-1, gain=1.25, offset=0.1) for _ in JOINTS))


def settled(body: BodyConfig | None = None, *, seed: int = 0, seconds: float = 1.5) -> ArmSim:
    sim = ArmSim(body, seed=seed)
    sim.step(seconds)
    return sim


def test_same_body_seed_and_commands_give_the_same_states_and_pixels() -> None:
    def record() -> list[bytes]:
        sim = ArmSim(BodyConfig.sample(np.random.default_rng(5)), seed=7)
        rng, out = np.random.default_rng(1), []
        for _ in range(20):
            sim.command(rng.uniform(sim.lower, sim.upper))
            sim.step(0.05)
            state = sim.joint_state()
            out += [state.position.tobytes(), state.velocity.tobytes(), state.effort.tobytes()]
            out += [sim.render(camera, 64, 64).tobytes() for camera in CAMERAS]
        return out

    assert record() == record()


def test_other_seed_other_scene() -> None:
    assert not np.array_equal(ArmSim(seed=1).render("overhead", 64, 64), ArmSim(seed=2).render("overhead", 64, 64))


def test_trajectory_does_not_depend_on_how_time_is_cut_or_on_rendering() -> None:
    whole, parts = ArmSim(seed=3), ArmSim(seed=3)
    for sim in (whole, parts):
        sim.command(np.full(7, 0.6))
    whole.step(0.5)
    for _ in range(30):
        parts.step(0.5 / 30)
        parts.render("wrist", 16, 16)
    assert whole.time == parts.time
    np.testing.assert_array_equal(whole.joint_state().position, parts.joint_state().position)


def test_reversed_joint_reports_the_mirrored_state() -> None:
    body = BodyConfig().replace_joint("shoulder_pan", sign=-1)
    plain, reversed_ = ArmSim(seed=4), ArmSim(body, seed=4)
    for sim, goal in ((plain, 0.5), (reversed_, -0.5)):
        command = sim.joint_state().position
        command[0] = goal
        sim.command(command)
        sim.step(0.3)
    a, b = plain.joint_state(), reversed_.joint_state()
    assert a.position[0] > 0.2
    np.testing.assert_allclose(b.position[0], -a.position[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(b.velocity[0], -a.velocity[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(b.effort[0], -a.effort[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(b.position[1:], a.position[1:], rtol=0, atol=1e-12)
    np.testing.assert_allclose(plain.tip(), reversed_.tip(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("body", [BodyConfig(), ALL_REVERSED], ids=["nominal", "reversed"])
def test_commanding_the_measured_position_holds(body: BodyConfig) -> None:
    sim = settled(body)
    before = sim.joint_state().position
    sim.command(before)
    sim.step(1.0)
    assert np.abs(sim.joint_state().position - before).max() < 0.02


@pytest.mark.parametrize("body", [BodyConfig(), ALL_REVERSED], ids=["nominal", "reversed"])
@pytest.mark.parametrize("end", ["lower", "upper"])
def test_commands_beyond_the_limits_stop_at_them(body: BodyConfig, end: str) -> None:
    sim = ArmSim(body, seed=0)
    limits = getattr(sim, end)
    for i in range(len(JOINTS)):
        sim.reset(0)
        command = sim.joint_state().position
        command[i] = 50.0 * np.sign(limits[i] - command[i])
        sim.command(command)
        for _ in range(15):
            sim.step(0.1)
            position = sim.joint_state().position
            assert (position > sim.lower - 0.05).all()
            assert (position < sim.upper + 0.05).all()
        np.testing.assert_allclose(sim.setpoint()[i], limits[i])


def test_setpoint_keeps_to_the_speed_limit() -> None:
    sim = ArmSim(ALL_REVERSED, seed=0)
    sim.command(sim.upper)
    last = sim.setpoint()
    for _ in range(20):
        sim.step(0.02)
        now = sim.setpoint()
        assert (np.abs(now - last) <= sim.max_velocity * 0.02 + 1e-9).all()
        last = now


def test_payload_makes_the_arm_sag_and_weak_servos_more_so() -> None:
    heavy = BodyConfig(payload=0.4)
    weak = heavy.replace_joint("shoulder_lift", strength=0.4).replace_joint("elbow_flex", strength=0.4)
    light_z, heavy_z, weak_z = (settled(body).tip()[2] for body in (BodyConfig(), heavy, weak))
    assert light_z - heavy_z > 0.003
    assert heavy_z - weak_z > 0.003


def test_longer_forearm_reaches_further() -> None:
    longer = dataclasses.replace(BodyConfig(), links=dataclasses.replace(BodyConfig().links, forearm=1.3))
    assert settled(longer).tip()[0] > settled().tip()[0] + 0.03


@pytest.mark.parametrize("camera", CAMERAS)
def test_mirrored_camera_flips_the_image(camera: str) -> None:
    plain = ArmSim(seed=2).render(camera, 48, 64)
    mirrored = ArmSim(BodyConfig(**{camera: CameraBody(mirror=True)}), seed=2).render(camera, 48, 64)
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    assert not np.array_equal(mirrored, plain)


@pytest.mark.parametrize("change", [{"position": (0.03, 0.0, 0.0)}, {"rotation": (0.0, 0.0, 0.2)}, {"hue": 0.5}])
def test_a_camera_change_alters_its_own_image_only(change: dict) -> None:
    plain, moved = ArmSim(seed=2), ArmSim(BodyConfig(overhead=CameraBody(**change)), seed=2)
    assert not np.array_equal(plain.render("overhead", 64, 64), moved.render("overhead", 64, 64))
    np.testing.assert_array_equal(plain.render("wrist", 64, 64), moved.render("wrist", 64, 64))
    np.testing.assert_array_equal(plain.render("scene", 64, 64), moved.render("scene", 64, 64))


def test_hue_keeps_grey_and_turns_colours() -> None:
    grey_first = ArmSim(seed=2).render("overhead", 64, 64).astype(int)
    turned = ArmSim(BodyConfig(overhead=CameraBody(hue=2 * np.pi / 3)), seed=2).render("overhead", 64, 64).astype(int)
    # A third of a turn sends red to green, green to blue and blue to red.
    np.testing.assert_allclose(turned, np.roll(grey_first, 1, axis=2), atol=1)


def test_targets_stand_out_in_a_64_pixel_overhead_image() -> None:
    channel = {"red cube": 0, "green cube": 1, "blue cube": 2}
    for seed in range(10):
        sim = ArmSim(seed=seed)
        image = sim.render("overhead", 64, 64).astype(int)
        for name in TARGET_NAMES:
            others = [c for c in range(3) if c != channel[name]]
            vivid = image[..., channel[name]] - image[..., others].max(axis=-1) > 60
            assert vivid.sum() >= 6, (seed, name)


def test_render_refuses_what_it_cannot_draw_and_fills_a_given_array() -> None:
    sim = ArmSim()
    out = np.zeros((32, 40, 3), np.uint8)
    assert sim.render("overhead", 32, 40, out=out) is out
    np.testing.assert_array_equal(out, sim.render("overhead", 32, 40))
    assert out.flags.c_contiguous
    with pytest.raises(InputError, match="'ceiling'"):
        sim.render("ceiling", 32, 32)
    with pytest.raises(InputError, match="4x32"):
        sim.render("wrist", 4, 32)
    with pytest.raises(InputError, match=r"\(32, 40, 3\)"):
        sim.render("wrist", 32, 32, out=out)
    sim.close()
    np.testing.assert_array_equal(out, sim.render("overhead", 32, 40))


def test_two_arms_draw_side_by_side() -> None:
    alone = ArmSim(seed=1).render("overhead", 64, 64)
    a, b = ArmSim(seed=1), ArmSim(seed=2)
    for _ in range(2):
        first, other = a.render("overhead", 64, 64), b.render("overhead", 64, 64)
        np.testing.assert_array_equal(first, alone)
        assert not np.array_equal(first, other)
    b.close()
    np.testing.assert_array_equal(a.render("overhead", 64, 64), alone)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ([0, 0, float("nan"), 0, 0, 0, 0], "elbow_flex"),
        ([0, 0, 0, 0, 0, 0, float("inf")], "gripper"),
        ([0, 0, 0], r"shape \(3,\)"),
        (np.zeros((1, 7)), r"shape \(1, 7\)"),
    ],
)
def test_malformed_command_is_named_and_moves_nothing(command: object, named: str) -> None:
    sim, twin = settled(seed=6), settled(seed=6)
    with pytest.raises(InputError, match=named):
        sim.command(command)
    for each in (sim, twin):
        each.step(0.3)
    np.testing.assert_array_equal(sim.joint_state().position, twin.joint_state().position)


@pytest.mark.parametrize("duration", [-0.1, float("nan"), float("inf")])
def test_time_only_goes_forward(duration: float) -> None:
    with pytest.raises(InputError, match="duration"):
        ArmSim().step(duration)


def test_instability_is_an_error_that_names_it_and_reset_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its log where the program runs
    sim = ArmSim()
    sim.data.qvel[1] = 1e12
    with pytest.raises(RuntimeError, match=r"unstable.*BADQ"):
        sim.step(0.05)
    sim.reset(0)
    sim.step(0.05)
    assert np.isfinite(sim.joint_state().position).all()


def test_change_of_body_does_not_make_the_arm_jump() -> None:
    sim, twin = settled(seed=8), settled(seed=8)
    for each in (sim, twin):
        each.command(each.joint_state().position + 0.3)
        each.step(0.1)
    before, tip, places = sim.joint_state(), sim.tip(), [sim.reach_point(n) for n in TARGET_NAMES]
    now, target = sim.time, sim.target
    sim.apply_body(ALL_REVERSED)
    assert (sim.time, sim.target) == (now, target)
    np.testing.assert_allclose(sim.tip(), tip)
    np.testing.assert_allclose([sim.reach_point(n) for n in TARGET_NAMES], places)
    after = sim.joint_state()
    np.testing.assert_allclose(sim.to_kinematic(after.position), before.position)
    np.testing.assert_allclose(after.velocity * -1.25, before.velocity)
    # The motion under way goes on as if nothing had happened, up to the set-points' new speed limit.
    for each in (sim, twin):
        each.step(0.02)
    assert np.linalg.norm(sim.tip() - twin.tip()) < 0.002
    for each in (sim, twin):
        each.step(1.0)
    np.testing.assert_allclose(sim.tip(), twin.tip(), atol=1e-4)


def test_payload_dropped_and_taken_again_in_mid_run() -> None:
    sim = settled(BodyConfig(payload=0.4))
    loaded = sim.tip()[2]
    sim.apply_body(BodyConfig())
    sim.step(1.5)
    assert sim.tip()[2] > loaded + 0.003
    sim.apply_body(BodyConfig(payload=0.4))
    sim.step(1.5)
    np.testing.assert_allclose(sim.tip()[2], loaded, atol=1e-4)


def test_camera_bumped_in_mid_run_is_seen_at_once() -> None:
    sim = settled(seed=1)
    before = sim.render("overhead", 64, 64)
    sim.apply_body(BodyConfig(overhead=CameraBody(rotation=(0.0, 0.0, 0.3))))
    assert not np.array_equal(sim.render("overhead", 64, 64), before)
    sim.apply_body(BodyConfig())
    np.testing.assert_array_equal(sim.render("overhead", 64, 64), before)


def test_targets_move_without_moving_the_arm() -> None:
    sim = settled(seed=1)
    state, places = sim.joint_state().position, [sim.reach_point(n) for n in TARGET_NAMES]
    sim.reset_targets(99)
    np.testing.assert_array_equal(sim.joint_state().position, state)
    assert not np.allclose([sim.reach_point(n) for n in TARGET_NAMES], places)
    sim.set_target("blue cube")
    assert sim.prompt == "reach the blue cube"
    with pytest.raises(InputError, match="'pink cube'"):
        sim.set_target("pink cube")


def test_a_program_that_rendered_exits_quietly() -> None:
    # With a finalizer of its own beforehand, which moves all others to after MuJoCo closes its display.
    code = (
        "import weakref; weakref.finalize(weakref.WeakSet(), int)\n"
        "from selfalign_core.sim import ArmSim; s = ArmSim(); s.render('overhead', 32, 32); t = s"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_real_time_factor_is_reported(record_property: pytest.RecordProperty) -> None:
    """Physics and both cameras at 30 Hz; the figure goes to the report, the machine's speed decides nothing."""
    sim = ArmSim()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(30):
        sim.step(1 / 30)
        for camera in CAMERAS:
            assert sim.render(camera, 224, 224).any()
    record_property("real_time_factor", sim.time / (time.perf_counter() - wall))
    record_property("cpu_share_at_real_time", (time.process_time() - cpu) / sim.time)
    assert set(CAMERAS) < set(VIEWS)
