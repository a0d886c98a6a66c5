"""The declaration of all parameters: read from the package alone, and in agreement with the core's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from selfalign_core.alignment import AlignConfig
from selfalign_core.errors import ConfigError
from selfalign_ros.life.parameter_specs import ParameterSpec, load_specs
from selfalign_ros.life.resources import config_folder
from selfalign_ros.nodes.aligner_node import align_config


def test_a_file_of_that_name_in_the_working_directory_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parameters.yaml").write_text("aligner: {ros__parameters: {steps: 3}}\n")
    monkeypatch.chdir(tmp_path)
    load_specs.cache_clear()
    assert "align_frequency" in load_specs("aligner")


def test_the_shipped_file_that_lets_the_aligner_move_the_arm_is_one_that_the_nodes_take() -> None:
    tree = yaml.safe_load((config_folder() / "calibrate.yaml").read_text())
    for kind, node in tree.items():
        specs = load_specs(kind)
        for name, value in node["ros__parameters"].items():
            assert specs[name].problem(value) is None, name
            assert value != specs[name].default, name


def aligner_defaults() -> dict:
    return {name: spec.default for name, spec in load_specs("aligner").items()}


def test_the_aligners_defaults_are_the_cores() -> None:
    assert align_config(aligner_defaults()) == AlignConfig()


def test_in_lock_step_no_stage_has_a_limit_of_time() -> None:
    assert align_config(aligner_defaults() | {"lockstep": True}) == AlignConfig().without_budgets()


def test_every_stages_parameter_reaches_its_setting() -> None:
    """A parameter whose name matches no setting would be declared and change nothing."""
    stages = ("collect_", "identify_", "refine_", "guard_", "watch_", "lambda_", "mode")
    names = [name for name in load_specs("aligner") if name.startswith(stages)]
    assert len(names) >= 20
    for name in names:
        spec = load_specs("aligner")[name]
        others = spec.range or spec.one_of
        value = next(v for v in others if v != spec.default)
        changed = align_config(
            aligner_defaults() | {name: type(spec.default)(value)}
        )  # the ends of a range are allowed
        assert changed != AlignConfig(), name


def another_value(spec: ParameterSpec) -> Any:
    """An allowed value that is not the default, of the parameter's type."""
    if spec.type == "bool":
        return not spec.default
    if spec.one_of:
        return next(value for value in spec.one_of if value != spec.default)
    if spec.range:
        return type(spec.default)(next(bound for bound in spec.range if bound != spec.default))
    return {"int": 7, "double": 0.5, "string": "something: else"}[spec.type]


def load_and_dump(kind: str, path: Path) -> dict[str, Any]:
    """What a node started with the parameter file ``path`` holds, from what `ros2 param describe` and `get` ask for."""
    import rclpy
    from rclpy.context import Context

    from selfalign_ros.life.parameters import Parameters

    context = Context()
    rclpy.init(args=["--ros-args", "--params-file", str(path)], context=context)
    try:
        node = rclpy.create_node(kind, context=context, enable_rosout=False)
        Parameters(node, kind)
        specs = load_specs(kind)
        for descriptor in node.describe_parameters(list(specs)):
            spec = specs[descriptor.name]
            assert spec.description in descriptor.description and spec.unit in descriptor.description
            assert descriptor.read_only == spec.read_only and descriptor.additional_constraints == spec.allowed
            bounds = [(r.from_value, r.to_value) for r in (*descriptor.floating_point_range, *descriptor.integer_range)]
            assert bounds == ([tuple(spec.range)] if spec.range else [])
        return {parameter.name: parameter.value for parameter in node.get_parameters(list(specs))}
    finally:
        rclpy.try_shutdown(context=context)


@pytest.mark.parametrize("kind", ["policy", "buffer", "aligner", "robot_sim"])
def test_a_dumped_file_loads_as_what_it_was_dumped_from(ros_domain: int, tmp_path: Path, kind: str) -> None:
    wanted = {name: another_value(spec) for name, spec in load_specs(kind).items()}
    files = [tmp_path / "given.yaml", tmp_path / "dumped.yaml"]
    files[0].write_text(yaml.safe_dump({f"/{kind}": {"ros__parameters": wanted}}))
    loaded = load_and_dump(kind, files[0])
    assert loaded == wanted
    files[1].write_text(yaml.safe_dump({f"/{kind}": {"ros__parameters": loaded}}))
    assert load_and_dump(kind, files[1]) == wanted


def test_a_sites_settings_of_one_topic_change_that_topic_alone(ros_domain: int) -> None:
    import rclpy
    from rclpy.context import Context
    from rclpy.qos import ReliabilityPolicy
    from sensor_msgs.msg import JointState

    from selfalign_ros.bridge import qos

    context = Context()
    override = "qos_overrides./joint_states.subscription.reliability:=reliable"
    rclpy.init(args=["--ros-args", "-p", override], context=context)
    try:
        node = rclpy.create_node("buffer", context=context, enable_rosout=False)
        for _ in range(2):  # a node is configured as often as one likes
            joints, other = (
                node.create_subscription(JointState, topic, lambda message: None, **qos.overridable(qos.SENSOR))
                for topic in ("joint_states", "other")
            )
            assert joints.qos_profile.reliability == ReliabilityPolicy.RELIABLE
            assert other.qos_profile.reliability == qos.SENSOR.reliability == ReliabilityPolicy.BEST_EFFORT
            assert joints.qos_profile.depth == qos.SENSOR.depth
    finally:
        rclpy.try_shutdown(context=context)


def test_an_empty_list_is_no_value(ros_domain: int) -> None:
    import rclpy
    from rclpy.context import Context

    from selfalign_ros.life.parameters import Parameters

    context = Context()
    rclpy.init(args=["--ros-args", "-p", "enable:=[]"], context=context)
    try:
        node = rclpy.create_node("policy", context=context, enable_rosout=False)
        with pytest.raises(
            ConfigError, match="parameter enable: found an empty list, which is no value; allowed: bool"
        ):
            Parameters(node, "policy")
    finally:
        rclpy.try_shutdown(context=context)
