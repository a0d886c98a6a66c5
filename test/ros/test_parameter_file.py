"""What a parameter file says is heard by the node it was written for, or refused before anything is started."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from graph_fixtures import GraphRun

from selfalign_core.errors import ConfigError
from selfalign_ros.graph.declaration import BRINGUP, RECORD, REPLAY, GraphDeclaration, GraphError
from selfalign_ros.graph.parameter_file import ParameterFile, matches, value_of

STARTS = {
    "bringup": (BRINGUP, {}),
    "composed": (BRINGUP, {"composed": "true"}),
    "record": (RECORD, {"output": "/nowhere/bag"}),
    "replay": (REPLAY, {"bag": "/nowhere/bag"}),
    "replay_composed": (REPLAY, {"bag": "/nowhere/bag", "composed": "true"}),
}


def given_by_ros(text: str, path: Path, node: str = "/policy", arguments: tuple[str, ...] = ()) -> dict[str, Any]:
    """The parameters that genuine rclpy has for a node started with a file of that text."""
    import rclpy
    from rclpy.context import Context

    path.write_text(text)
    namespace, _, name = node.rpartition("/")
    words = ["--ros-args", "-r", f"__node:={name}", "-r", f"__ns:={namespace or '/'}", "--params-file", str(path)]
    context = Context()
    rclpy.init(args=[*words, *arguments], context=context)
    try:
        made = rclpy.create_node("any", context=context, enable_rosout=False, start_parameter_services=False)
        return {name: parameter.value for name, parameter in made._parameter_overrides.items()}
    finally:
        rclpy.try_shutdown(context=context)


KEYS = (
    *(
        "policy",
        "/policy",
        "left/policy",
        "/left/policy",
        "/**",
        "**",
        "/**/policy",
        "**/policy",
        "/*/policy",
        "*/policy",
    ),
    *("/left/*", "/left/**", "left", "/left", "/*", "*", "/**/left/policy", "/left/**/policy", "Policy", "/polic"),
)


@pytest.mark.parametrize("node", ["/policy", "/left/policy", "/a/left/policy"])
def test_keys_are_matched_as_ros_matches_them(ros_domain: int, tmp_path: Path, node: str) -> None:
    for key in KEYS:
        heard = given_by_ros(f"'{key}': {{ros__parameters: {{a: 1}}}}", tmp_path / "p.yaml", node)
        assert matches(f"/{key.removeprefix('/')}", node) == (heard == {"a": 1}), key


SCALARS = """
y n Y N yes no on off On OFF true TRUE False tRue ~ null 1 -1 +1 0 00 017 -017 08 0x1F 0X1f 0x 0o17 0b11
1.0 1e-3 1e5 .5 5. 1.e3 1e 1e999 1_000 1_0.5 .inf -.inf +.inf inf infinity nan .NaN 1:30 2001-01-01 . + truex 1,000
9223372036854775807 9223372036854775808 -9223372036854775808 'y' "1" !!str=y !!bool=y
"""


def test_values_are_read_as_ros_reads_them(ros_domain: int, tmp_path: Path) -> None:
    scalars = [text.replace("=", " ") for text in SCALARS.split()]
    text = "policy:\n  ros__parameters:\n" + "".join(f"    p{i}: {one}\n" for i, one in enumerate(scalars))
    heard = given_by_ros(text, tmp_path / "p.yaml")
    read = {setting.name: setting.value for setting in ParameterFile.read(tmp_path / "p.yaml").settings}
    assert heard.keys() == read.keys() and len(read) == len(scalars)
    for index, written in enumerate(scalars):
        ours, theirs = read[f"p{index}"], heard[f"p{index}"]
        same = ours == theirs or (math.isnan(ours) and math.isnan(theirs))
        assert same and type(ours) is type(theirs), f"{written}: {ours!r} {theirs!r}"


def test_names_in_parts_and_several_documents_are_read_as_ros_reads_them(ros_domain: int, tmp_path: Path) -> None:
    text = (
        "left:\n  policy:\n    ros__parameters: {qos_overrides: {/joints: {subscription: {depth: 3}}}, prompt: a}\n"
        "---\n/**:\n  ros__parameters: {seed: 4}\n"
    )
    heard = given_by_ros(text, tmp_path / "p.yaml", "/left/policy")
    found = ParameterFile.read(tmp_path / "p.yaml")
    assert heard == {setting.name: setting.value for setting in found.settings}
    assert found.keys == ("/left/policy", "/**")
    given = (BRINGUP({"namespace": "left", "params_file": str(found.path)}).node("policy")).parameter_files
    assert given == (str(found.path),)


def refusal(declaration: GraphDeclaration, given: dict[str, str], path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(GraphError) as refused:
        declaration(given | {"params_file": str(path)})
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("name", STARTS)
def test_a_key_that_names_no_node_is_refused_whatever_is_started(tmp_path: Path, name: str) -> None:
    declaration, given = STARTS[name]
    path = tmp_path / "p.yaml"
    for key, namespace in (
        ("polcy", ""),
        ("policy", "left"),
        ("/policy", "left"),
        ("/right/policy", "left"),
        ("left/policy", ""),
        ("/*/policy", ""),
    ):
        said = refusal(
            declaration, given | {"namespace": namespace}, path, f"{key}: {{ros__parameters: {{enable: false}}}}"
        )
        robot = f"/{namespace}" if namespace else ""
        assert f"/{key.lstrip('/')}: found no node" in said and f"expected one of {robot}/policy, " in said
    for key in ("left/policy", "/left/policy", "/**", "/**/policy", "/*/policy", "/left/*", "/**/robot_sim"):
        path.write_text(f"{key}: {{ros__parameters: {{seed: 3}}}}")
        declaration(given | {"namespace": "left", "params_file": str(path)})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("enabel: false", "enabel: found a parameter that policy has not"),
        ("capacity: 30", "capacity: found a parameter that policy has not"),
        ("enable: []", "enable: found [], an empty list, which to ROS is no value; expected bool"),
        ("enable: [false]", "enable: found [false]; expected bool"),
        ("enable: 'n'", "enable: found 'n', which ROS reads as a text; expected bool"),
        ("enable: 0", "enable: found 0, which ROS reads as an integer; expected bool"),
        ("enable: nope", "enable: found nope, which ROS reads as a text; expected bool"),
        ("enable: , seed: 3", "enable: found nothing, which ROS reads as a text; expected bool"),
        ("prompt: y", "prompt: found y, which ROS reads as a bool, true; expected string"),
        ("prompt: off", "prompt: found off, which ROS reads as a bool, false; expected string"),
        ("prompt: 0x10", "prompt: found 0x10, which ROS reads as an integer, 16; expected string"),
        ("seed: 1_000", "seed: found 1_000, which ROS reads as a text; expected int from 0 to 2147483647"),
        ("seed: 0o17", "seed: found 0o17, which ROS reads as a text; expected int"),
        ("seed: 08", "seed: found 08, which ROS reads as a double, 8.0; expected int"),
        ("seed: 1e3", "seed: found 1e3, which ROS reads as a double, 1000.0; expected int"),
        ("calibrate_duration: 1_0.5", "calibrate_duration: found 1_0.5, which ROS reads as a text; expected double"),
        ("calibrate_duration: .nan", "calibrate_duration: found .nan, which ROS reads as a double, nan"),
        (
            "calibrate_duration: 4",
            "calibrate_duration: found 4, which ROS reads as an integer; expected double from 5.0",
        ),
        (
            "calibrate_around: there",
            "calibrate_around: found there, which ROS reads as a text; expected one of here, home",
        ),
        ("enable: false, enable: true", "enable: found twice"),
        ("enable: &a false, fast: *a", "found an alias"),
    ],
)
def test_what_the_policy_would_not_take_is_refused_with_what_ros_reads(tmp_path: Path, values: str, said: str) -> None:
    found = refusal(BRINGUP, {}, tmp_path / "p.yaml", f"policy:\n  ros__parameters: {{{values}}}\n")
    assert said in found, found


@pytest.mark.parametrize("word", ["y", "n", "on", "Off", "yes", "No", "true", "FALSE"])
def test_words_that_ros_reads_as_true_or_false_are(tmp_path: Path, word: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f"policy: {{ros__parameters: {{enable: {word}}}}}")
    BRINGUP({"params_file": str(path)})
    assert value_of(word) is (word.lower() in ("y", "on", "yes", "true"))


def test_what_a_pattern_holds_for_other_nodes_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("/**: {ros__parameters: {capacity: 50, of_another_package: 3, use_sim_time: false}}\n")
    BRINGUP({"params_file": str(path)})


@pytest.mark.parametrize(
    "content",
    [
        b"policy: [ros__parameters",
        b"policy",
        b"policy:",
        b"policy: {enable: false}",
        b"policy: {ros__parameters: 3}",
        b"policy: {ros__parameters: }",
        b"ros__parameters: {enable: false}",
        b"policy: {ros_parameters: {enable: false}}",
        b"policy: {ros__parameters: {a: {}}}",
        b"? [a]\n: b",
        b"\xff\xfe\x00",
        b"\x00",
        b"{" * 5000,
        b"a: &a [*a]",
        b"#" * ((1 << 20) + 1),
    ],
)
def test_a_file_that_ros_could_not_read_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(content)
    with pytest.raises(GraphError, match="parameter file"):
        BRINGUP({"params_file": str(path)})


def test_no_file_a_folder_and_a_pipe_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("nothing", "found no such file"), ("", "expected a file"), ("pipe", "expected a file")):
        with pytest.raises(GraphError, match=said):
            BRINGUP({"params_file": str(tmp_path / name)})


def test_what_is_given_by_name_is_in_force_or_the_two_are_refused(ros_domain: int, tmp_path: Path) -> None:
    """A name of its own below ``/**`` is stronger than ``-p`` to ROS."""
    path = tmp_path / "p.yaml"
    blocks = {key: f"{key}: {{ros__parameters: {{enable: true}}}}\n" for key in ("/**", "/policy", "/**/policy")}
    for text in (
        blocks["/**"],
        blocks["/policy"],
        blocks["/policy"] + "/**: {ros__parameters: {seed: 3}}\n",
        blocks["/**"] + blocks["/policy"],
        blocks["/**"] + blocks["/**/policy"],
        "/**: {ros__parameters: {seed: 3}}\n" + blocks["/policy"],
        blocks["/policy"] + blocks["/**"],
        blocks["/policy"] + blocks["/**/policy"],
    ):
        path.write_text(text)
        arguments = ("-p", "enable:=false")
        under_launch = tmp_path / "given.yaml"  # what launch_ros writes of a node's parameters
        under_launch.write_text("/policy: {ros__parameters: {enable: false}}")
        heard = [
            given_by_ros(text, path, arguments=given)["enable"]
            for given in (arguments, ("--params-file", str(under_launch)))
        ]
        given = {"params_file": str(path), "enable": "false"}
        if any(heard):
            with pytest.raises(GraphError, match=r"enable: found true, and False given by name"):
                BRINGUP(given)
        else:
            assert BRINGUP(given).node("policy").parameters["enable"] is False
        BRINGUP(given | {"enable": "true"})  # the two say the same


def test_enable_reaches_the_policy_and_nobody_else() -> None:
    for text, value in (("false", False), ("True", True)):
        for more in ({}, {"composed": "true"}):
            graph = BRINGUP({"enable": text} | more)
            assert graph.node("policy").parameters["enable"] is value
            assert all("enable" not in node.parameters for node in graph.nodes if node.name != "policy")
    assert "enable" not in BRINGUP({}).node("policy").parameters
    with pytest.raises(GraphError, match="argument enable: found 'n'; expected true or false"):
        BRINGUP({"enable": "n"})


def test_a_shipped_file_is_one_that_every_graph_takes() -> None:
    for path in (Path(__file__).parents[2] / "config").glob("*.yaml"):
        if path.name != "parameters.yaml":
            ParameterFile.read(path)
            for declaration, given in STARTS.values():
                declaration(given | {"params_file": str(path)})
    with pytest.raises(ConfigError):
        ParameterFile.read("/nowhere.yaml")


def test_a_file_for_the_robot_of_another_name_starts_nothing(ros_domain: int, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("policy: {ros__parameters: {enable: false}}")
    run = GraphRun.module("selfalign_ros.tools.bringup", "namespace:=left", "--params", "mine.yaml", cwd=tmp_path)
    try:
        assert run.wait() == 2
    finally:
        run.close()
    assert "mine.yaml: /policy: found no node of that name in this graph; expected one of /left/policy" in run.output
    assert not run.pids and "Traceback" not in run.output


def test_a_disabled_robot_does_not_move_until_it_is_enabled(probe: Any, tmp_path: Path) -> None:
    from graph_assertions import write_quick_parameters
    from node_testing import wait_for
    from std_srvs.srv import SetBool
    from trajectory_msgs.msg import JointTrajectory

    from selfalign_ros.bridge import qos

    parameters = write_quick_parameters(tmp_path)
    topic = "/left/joint_trajectory_controller/joint_trajectory"
    probe.listen(JointTrajectory, topic, qos.COMMAND)
    arguments = ("namespace:=left", "enable:=false", "--params", str(parameters), "token_folder:=none")
    run = GraphRun.module("selfalign_ros.tools.bringup", *arguments, cwd=tmp_path)
    try:
        probe.wait_for_status("left/policy: chunks", "holding: disabled")
        probe.wait_for_diagnostics("left/policy: chunks", 3)
        commands = probe.messages[topic]
        assert all(len({tuple(point.positions) for point in command.points}) == 1 for command in list(commands))
        before = len(commands)
        probe.call(SetBool, "/left/policy/enable", SetBool.Request(data=True))
        wait_for(lambda: len(commands) > before + 2, "commands once it is enabled")
        assert run.stop() == 0, run.output
    finally:
        run.close()
