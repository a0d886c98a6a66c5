"""The declaration of the graphs: arguments, what reaches which node, and that it agrees with the parameters."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import yaml
from graph_assertions import from_xml

from selfalign_ros.graph.declaration import BRINGUP, RECORD, REPLAY, Graph, GraphDeclaration, GraphError, NodeProcess
from selfalign_ros.graph.supervisor import default_command
from selfalign_ros.life.resources import config_file
from selfalign_ros.tools.bringup import given_arguments, graph_parser
from selfalign_ros.tools.security_policy import NodeInterface, to_xml

ROOT = Path(__file__).parents[2]
# Enough to assemble each graph with everything in it.
FULL = {
    "bringup": (
        BRINGUP,
        {
            "contract": "c.yaml",
            "checkpoint": "x",
            "body": "b.yaml",
            "token_folder": "t",
            "device": "cpu",
            "enable": "false",
            "report": "r.json",
        },
    ),
    "record": (RECORD, {"output": "bag", "contract": "c.yaml", "use_sim_time": "true", "report": "r.json"}),
    "replay": (REPLAY, {"bag": "bag", "contract": "c.yaml", "report": "r.json", "compare": "e.json", "device": "cpu"}),
}


@pytest.mark.parametrize("name", FULL)
def test_every_parameter_that_is_passed_exists(name: str) -> None:
    declaration, given = FULL[name]
    known = yaml.safe_load(config_file("parameters.yaml").read_text())
    for node in declaration(given).nodes:
        kind = node.executable.removesuffix("_node")
        unknown = set(node.parameters) - set(known[kind]) - {"use_sim_time"}
        assert not unknown, f"{node.name} gets {unknown}"
        # Every module with a main function becomes an executable for `ros2 run`.
        assert "\ndef main(" in (ROOT / f"{node.module.replace('.', '/')}.py").read_text()


def test_default_graph_is_the_three_nodes_and_the_simulated_robot() -> None:
    graph = BRINGUP({})
    assert [node.full_name for node in graph.nodes] == ["/policy", "/buffer", "/aligner", "/robot_sim"]
    assert all(node.respawn for node in graph.nodes)
    assert graph.environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "LOCALHOST"
    assert Path(graph.environment["FASTRTPS_DEFAULT_PROFILES_FILE"]).is_file()


def test_arguments_that_are_not_given_leave_parameter_files_in_force(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("/**: {ros__parameters: {seed: 3}}")
    graph = BRINGUP({"params_file": str(tmp_path / "mine.yaml")})
    for node in graph.nodes:
        assert node.parameter_files == (str(tmp_path / "mine.yaml"),)
        assert set(node.parameters) <= {"use_sim_time"}, node.name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FASTRTPS_DEFAULT_PROFILES_FILE", "/etc/site.xml"),
        ("FASTDDS_DEFAULT_PROFILES_FILE", "/etc/site.xml"),
        ("FASTDDS_BUILTIN_TRANSPORTS", "LARGE_DATA"),
    ],
)
def test_a_site_may_bring_its_own_dds_settings(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert "FASTRTPS_DEFAULT_PROFILES_FILE" not in BRINGUP({}).environment


def test_simulated_time_is_published_by_the_simulated_robot_and_followed_by_the_others() -> None:
    graph = BRINGUP({"use_sim_time": "true"})
    assert graph.node("robot_sim").parameters["publish_clock"] is True
    assert "use_sim_time" not in graph.node("robot_sim").parameters
    assert all(graph.node(name).parameters["use_sim_time"] for name in ("policy", "buffer", "aligner"))


@pytest.mark.parametrize(("given", "passed"), [("run1/tokens", "run1/tokens"), ("none", "")])
def test_where_tokens_survive_a_restart_reaches_those_that_keep_them(given: str, passed: str) -> None:
    graph = BRINGUP({"token_folder": given})
    kept = {node.name: node.parameters["token_folder"] for node in graph.nodes if "token_folder" in node.parameters}
    assert kept == {"policy": passed, "aligner": passed}


def test_a_real_robot_needs_no_simulated_one() -> None:
    with pytest.raises(GraphError, match=r"node 'robot_sim': not in the graph; it has policy, buffer, aligner"):
        BRINGUP({"use_sim": "false"}).node("robot_sim")


def test_nodes_of_one_robot_may_run_on_two_machines() -> None:
    robot = BRINGUP({"nodes": "policy, buffer", "discovery_range": "SUBNET"})
    workstation = BRINGUP({"nodes": "aligner", "discovery_range": "SUBNET", "static_peers": "10.0.0.1;robot"})
    assert [node.name for node in robot.nodes] == ["policy", "buffer"]
    assert [node.name for node in workstation.nodes] == ["aligner"]
    assert workstation.environment["ROS_AUTOMATIC_DISCOVERY_RANGE"] == "SUBNET"
    assert workstation.environment["ROS_STATIC_PEERS"] == "10.0.0.1;robot"
    assert "ROS_STATIC_PEERS" not in robot.environment  # the environment's own stand


@pytest.mark.parametrize("given", [{"duration": "5"}, {"report": "out.json"}])
def test_a_report_listens_when_asked_for_and_ends_the_run(given: dict[str, str]) -> None:
    report = BRINGUP(given).node("run_report")
    assert report.ends_graph
    assert (report.parameters["stop_at"] > 0) == ("duration" in given)


def test_namespace_reaches_every_node() -> None:
    assert {node.full_name for node in BRINGUP({"namespace": "left"}).nodes} >= {"/left/policy", "/left/aligner"}
    assert BRINGUP({"namespace": "/left/"}).nodes[0].namespace == "/left"


def test_security_policy_has_an_enclave_for_each_process_with_what_its_nodes_use() -> None:
    interfaces = {
        "/left/policy": NodeInterface(("/left/action_chunk",), ("/left/e_token",), ("/left/policy/calibrate",), ()),
        "/left/aligner": NodeInterface(("/left/e_token",), (), (), ("/left/policy/calibrate",)),
    }
    for composed, paths in (("false", ["/left/policy", "/left/aligner"]), ("true", ["/left/composition"])):
        graph = BRINGUP({"nodes": "policy,aligner", "namespace": "left", "composed": composed})
        text = to_xml(interfaces, graph.processes)
        assert from_xml(text) == interfaces
        assert [enclave.get("path") for enclave in ElementTree.fromstring(text).iter("enclave")] == paths
        for process, path in zip(graph.processes, paths, strict=True):
            arguments = process.ros_arguments()
            assert arguments[arguments.index("--enclave") + 1] == path


def test_replay_is_in_lock_step_and_moves_nothing() -> None:
    graph = REPLAY({"bag": "b", "domain": "42"})
    assert graph.environment["ROS_DOMAIN_ID"] == "42"
    assert [node.name for node in graph.nodes] == ["policy", "buffer", "aligner", "replay"]
    for name in ("policy", "buffer", "aligner"):
        parameters = graph.node(name).parameters
        assert parameters["lockstep"] is True and parameters["use_sim_time"] is True


@pytest.mark.parametrize(
    ("declaration", "given", "message"),
    [
        (BRINGUP, {"checkpont": "x"}, r"argument checkpont: not known; expected one of contract, params_file"),
        (BRINGUP, {"duration": "soon"}, r"argument duration: found 'soon'; expected seconds, 0 or more"),
        (BRINGUP, {"duration": "-1"}, r"argument duration: found '-1'"),
        (BRINGUP, {"duration": "inf"}, r"argument duration: found 'inf'"),
        (BRINGUP, {"use_sim": "maybe"}, r"argument use_sim: found 'maybe'; expected true or false"),
        (BRINGUP, {"log_level": "loud"}, r"argument log_level: found 'loud'; expected one of debug, info"),
        (BRINGUP, {"discovery_range": "WORLD"}, r"argument discovery_range: found 'WORLD'; expected one of LOCALHOST"),
        (BRINGUP, {"nodes": "aligner,polcy"}, r"argument nodes: found polcy; expected some of policy, buffer, aligner"),
        (BRINGUP, {"nodes": "robot_sim", "use_sim": "false"}, r"argument nodes: found robot_sim; expected some of"),
        (RECORD, {}, r"argument output: found nothing"),
        (REPLAY, {}, r"argument bag: found nothing"),
    ],
)
def test_bad_arguments_are_named(declaration: GraphDeclaration, given: dict[str, str], message: str) -> None:
    with pytest.raises(GraphError, match=message):
        declaration(given)


def test_values_keep_their_type_on_the_command_line() -> None:
    node = NodeProcess(
        "policy",
        "policy_node",
        parameters={"checkpoint": "12", "lockstep": True, "stop_at": 1.5, "seed": 3},
        remappings=(("joint_states", "arm/joint_states"),),
        parameter_files=("/p.yaml",),
        namespace="/left",
    )
    arguments = node.ros_arguments()
    assert arguments[0] == "--ros-args"
    assert [arguments[i + 1] for i, word in enumerate(arguments) if word == "-p"] == [
        'checkpoint:="12"',  # a text that looks like a number stays a text
        "lockstep:=true",
        "stop_at:=1.5",
        "seed:=3",
    ]
    assert arguments[arguments.index("--params-file") :][:2] == ["--params-file", "/p.yaml"]
    assert arguments.index("--params-file") < arguments.index("-p")  # what is given by name wins over files
    for rule in ("__node:=policy", "__ns:=/left", "joint_states:=arm/joint_states"):
        assert rule in arguments


def test_two_nodes_of_one_name_are_refused() -> None:
    with pytest.raises(GraphError, match=r"found /policy more than once"):
        Graph((NodeProcess("policy", "policy_node"), NodeProcess("policy", "policy_node")))


def test_arguments_are_taken_in_both_forms() -> None:
    options = graph_parser(BRINGUP, "x").parse_intermixed_args(
        ["use_sim:=false", "--duration", "30", "--params", "p.yaml", "log_level:=warn"]
    )
    given = given_arguments(options, BRINGUP)
    assert given == {"use_sim": "false", "duration": "30", "params_file": "p.yaml", "log_level": "warn"}


@pytest.mark.parametrize("module", ["bringup", "record", "replay"])
def test_commands_document_their_arguments_and_refuse_others(module: str) -> None:
    declaration = {"bringup": BRINGUP, "record": RECORD, "replay": REPLAY}[module]
    command = [sys.executable, "-m", f"selfalign_ros.tools.{module}"]
    shown = subprocess.run([*command, "--show-args"], capture_output=True, text=True, check=True).stdout
    for argument in declaration.arguments:
        assert f"'{argument.name}'" in shown and argument.description in shown
    refused = subprocess.run([*command, "nonsense:=1"], capture_output=True, text=True)
    assert refused.returncode == 2 and "argument nonsense: not known" in refused.stderr


# --- composition ---


@pytest.mark.parametrize(
    ("declaration", "given", "members", "others"),
    [
        (BRINGUP, {}, ["policy", "buffer", "aligner"], ["robot_sim"]),
        (BRINGUP, {"nodes": "policy,robot_sim"}, ["policy"], ["robot_sim"]),
        (RECORD, {"output": "bag"}, ["policy", "buffer", "aligner"], ["robot_sim", "recorder"]),
        (REPLAY, {"bag": "bag"}, ["policy", "buffer", "aligner", "replay"], []),
    ],
)
def test_composed_nodes_share_one_process_with_the_arguments_each_would_have_alone(
    declaration: GraphDeclaration, given: dict[str, str], members: list[str], others: list[str]
) -> None:
    from selfalign_ros.tools.composition import split

    apart = declaration(given)
    assert apart.processes == apart.nodes
    graph = declaration(given | {"composed": "true"})
    assert [node.full_name for node in graph.nodes] == [node.full_name for node in apart.nodes]  # still claimed by name
    composition, *rest = graph.processes
    assert (composition.name, [node.name for node in rest]) == ("composition", others)
    command = default_command(composition)
    assert command[1:3] == ["-m", "selfalign_ros.tools.composition"]
    found, of_process = split(command[3:])
    assert [(member.executable, list(member.arguments)) for member in found] == [
        (graph.node(name).executable, graph.node(name).ros_arguments()) for name in members
    ]
    assert of_process == ["--ros-args", "--log-level", "info", "--enclave", "/composition"]
    ends = "replay" in members
    assert (composition.respawn, composition.ends_graph) == (not ends, ends)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found none; expected --node EXECUTABLE"),
        (["--ros-args"], "found --ros-args; expected --node EXECUTABLE"),
        (["--node", "robot_sim_node", "--"], "found 'robot_sim_node'; expected one of policy_node, "),
        (["--node"], "found ''; expected one of"),
    ],
)
def test_a_composition_of_what_cannot_be_composed_is_refused(words: list[str], message: str) -> None:
    from selfalign_core.errors import ConfigError
    from selfalign_ros.tools.composition import split

    with pytest.raises(ConfigError, match=message):
        split(words)
