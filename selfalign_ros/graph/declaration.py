"""The graph, declared once: its nodes, parameters, remappings, respawn rules and launch arguments.

``launch/*.launch.py`` (genuine ``ros2 launch``) and the supervisor are both derived from what is written
here, so the two ways to start SelfAlign cannot differ. This module is plain data: it must not know
``rclpy``, ``launch`` or how a process is started.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from selfalign_core.errors import ConfigError
from selfalign_core.records import load_document
from selfalign_ros.graph.parameter_file import ParameterFile
from selfalign_ros.life.parameter_specs import kinds
from selfalign_ros.life.resources import config_folder

PACKAGE = "selfalign"
DISCOVERY_RANGES = ("LOCALHOST", "SUBNET", "SYSTEM_DEFAULT", "OFF")
LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")
COMPOSITION = "composition"
"""Name and executable of the process that several nodes share."""

_DDS_PROFILE = "FASTRTPS_DEFAULT_PROFILES_FILE"
# Where one of these is set, a site has chosen its own DDS settings.
_SITE_DDS = (_DDS_PROFILE, "FASTDDS_DEFAULT_PROFILES_FILE", "FASTDDS_BUILTIN_TRANSPORTS")

ParameterValue = bool | int | float | str


class GraphError(ValueError):
    """A launch argument or a declaration that cannot be used: says which, what was found and what was
    expected.
    """


@dataclass(frozen=True)
class LaunchArgument:
    """One ``name:=value`` argument. ``kind`` is text, flag (true or false), seconds or file.

    A flag whose default is empty may be left empty.
    """

    name: str
    description: str
    default: str = ""
    kind: str = "text"
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("text", "flag", "seconds", "file"):
            raise GraphError(f"argument {self.name}: kind {self.kind!r}; expected text, flag, seconds or file")
        self.parse(self.default)

    def parse(self, text: str) -> ParameterValue:
        """The value of ``text``: bool for a flag, float for seconds, an absolute path for a file, else str; "" for what
        is empty by default.
        """
        if text == self.default == "":
            return ""
        if self.choices and text not in self.choices:
            self._refuse(text, f"one of {', '.join(self.choices)}")
        if self.kind == "flag":
            if text.lower() not in ("true", "false"):
                self._refuse(text, "true or false")
            return text.lower() == "true"
        if self.kind == "seconds":
            try:
                value = float(text)
            except ValueError:
                value = -1.0
            if not math.isfinite(value) or value < 0:
                self._refuse(text, "seconds, 0 or more")
            return value
        if self.kind == "file":
            return str(Path(text).expanduser().absolute()) if text else ""
        return text

    def _refuse(self, text: str, expected: str) -> None:
        raise GraphError(f"argument {self.name}: found {text!r}; expected {expected}")


@dataclass(frozen=True)
class NodeProcess:
    """One node in a process of its own, or, with ``members``, those nodes in one process.

    A node that ``ends_graph`` (a report, a recorder, a replay) stops the whole graph when it ends by itself or dies for
    good, and its exit code becomes the graph's. ``stop_grace_s`` is how long it may take after SIGINT
    before SIGTERM follows.
    """

    name: str
    executable: str  # `ros2 run selfalign <executable>`
    room: str = "nodes"  # the module is selfalign_ros.<room>.<executable>
    parameters: Mapping[str, ParameterValue] = field(default_factory=dict)
    parameter_files: tuple[str, ...] = ()
    remappings: tuple[tuple[str, str], ...] = ()
    namespace: str = "/"
    log_level: str = "info"
    respawn: bool = True
    respawn_delay_s: float = 0.5
    ends_graph: bool = False
    stop_grace_s: float = 10.0
    members: tuple[NodeProcess, ...] = ()

    def __post_init__(self) -> None:
        if not self.namespace.startswith("/"):
            raise GraphError(f"node {self.name}: namespace {self.namespace!r}; expected it to start with /")
        if self.respawn_delay_s < 0 or self.stop_grace_s <= 0:
            raise GraphError(f"node {self.name}: expected respawn_delay_s >= 0 and stop_grace_s > 0")

    @property
    def module(self) -> str:
        """What ``python -m`` starts."""
        return f"selfalign_ros.{self.room}.{self.executable}"

    @property
    def full_name(self) -> str:
        return f"{self.namespace.rstrip('/')}/{self.name}"

    def arguments(self) -> list[str]:
        """The command line between the executable and ``ros_arguments``: the members, each with its own."""
        words = (["--node", member.executable, *member.ros_arguments(), "--"] for member in self.members)
        return [word for of_member in words for word in of_member]

    def ros_arguments(self) -> list[str]:
        """The command line's end, as launch_ros would write it.

        The enclave decides what the process may do where SROS 2 is on (docs/sros2.md); elsewhere it changes nothing.
        """
        if self.members:
            return ["--ros-args", "--log-level", self.log_level, "--enclave", self.full_name]
        arguments = ["--ros-args", "-r", f"__node:={self.name}", "-r", f"__ns:={self.namespace}"]
        arguments += ["--log-level", self.log_level, "--enclave", self.full_name]
        for path in self.parameter_files:
            arguments += ["--params-file", path]
        for name, value in self.parameters.items():
            # JSON is YAML to rcl's parser, and quotes keep a text that looks like a number a text.
            arguments += ["-p", f"{name}:={json.dumps(value)}"]
        for source, target in self.remappings:
            arguments += ["-r", f"{source}:={target}"]
        return arguments


@dataclass(frozen=True)
class Graph:
    """Nodes and the environment they share. ``duration_s`` 0 means until stopped.

    Those named in ``composed`` share one process: they die together, and nothing between them leaves it.
    """

    nodes: tuple[NodeProcess, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    duration_s: float = 0.0
    composed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [node.full_name for node in self.nodes]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise GraphError(f"nodes: found {', '.join(doubled)} more than once; expected unique names")

    @property
    def processes(self) -> tuple[NodeProcess, ...]:
        """What is started: every node, the composed ones as one."""
        members = tuple(node for node in self.nodes if node.name in self.composed)
        if not members:
            return self.nodes
        composition = NodeProcess(
            COMPOSITION,
            COMPOSITION,
            room="tools",
            namespace=members[0].namespace,
            log_level=members[0].log_level,
            respawn=all(node.respawn for node in members),
            ends_graph=any(node.ends_graph for node in members),
            stop_grace_s=max(node.stop_grace_s for node in members),
            members=members,
        )
        return (composition, *(node for node in self.nodes if node.name not in self.composed))

    def node(self, name: str) -> NodeProcess:
        """The node of that name. Raises ``GraphError`` naming those there are."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise GraphError(f"node {name!r}: not in the graph; it has {', '.join(node.name for node in self.nodes)}")


@dataclass(frozen=True)
class GraphDeclaration:
    """A graph that still waits for its launch arguments."""

    description: str
    arguments: tuple[LaunchArgument, ...]
    assemble: Callable[[Mapping[str, ParameterValue]], Graph]

    def __call__(self, given: Mapping[str, str]) -> Graph:
        """The graph for ``name -> text``; what is not given has its default.

        Raises ``GraphError`` naming an unknown argument, one that cannot be read, or the fault of a parameter file.
        """
        known = {argument.name: argument for argument in self.arguments}
        for name in given:
            if name not in known:
                raise GraphError(f"argument {name}: not known; expected one of {', '.join(known)}")
        graph = self.assemble(
            {name: argument.parse(given.get(name, argument.default)) for name, argument in known.items()}
        )
        _check_parameter_files(graph)
        return graph

    def show_arguments(self) -> str:
        """The arguments for people, in the layout of ``ros2 launch --show-args``."""
        lines = ["Arguments (pass arguments as '<name>:=<value>'):"]
        for argument in self.arguments:
            lines += ["", f"    '{argument.name}':"]
            choices = f" Valid choices are: {list(argument.choices)}" if argument.choices else ""
            lines += [f"        {argument.description}{choices}", f"        (default: {argument.default!r})"]
        return "\n".join(lines)


def _check_parameter_files(graph: Graph) -> None:
    """One file serves every graph and every machine: it may speak of all nodes there are, whichever of them start."""
    namespaces = dict.fromkeys(node.namespace.rstrip("/") for node in graph.nodes)
    nodes = {f"{namespace}/{kind}": kind for namespace in namespaces for kind in kinds()}
    given = {node.full_name: node.parameters for node in graph.nodes}
    try:
        for path in dict.fromkeys(path for node in graph.nodes for path in node.parameter_files):
            ParameterFile.read(path).check(nodes, given)
    except ConfigError as error:
        raise GraphError(f"parameter file {error}") from None


# --- arguments that several graphs share ---

_DECLARED = load_document(config_folder() / "parameters.yaml", "the parameters of each kind of node")["policy"]

CONTRACT = LaunchArgument(
    "contract",
    "Robot contract, absolute or relative to the working directory or to the package's config folder. Empty: as in the "
    f"parameters, {_DECLARED['contract']['default']} by default.",
)
PARAMS_FILE = LaunchArgument(
    "params_file",
    "ROS parameter file handed to every node; a key in it that names none of them is refused. Empty: the defaults.",
    kind="file",
)
CHECKPOINT = LaunchArgument(
    "checkpoint",
    "Checkpoint folder, absolute or relative to the working directory or to the package's folder; tiny: the untrained "
    f"model, which fits every contract. Empty: as in the parameters, {_DECLARED['checkpoint']['default'] or 'tiny'} by "
    "default.",
)
NAMESPACE = LaunchArgument("namespace", "Namespace of all nodes, for several robots in one domain.")
NO_TOKENS_KEPT = "none"
"""The value of ``token_folder`` for the parameter's empty text: an empty argument leaves the parameters in force."""
TOKEN_FOLDER = LaunchArgument(
    "token_folder",
    "Folder where accepted E-Tokens and a stop survive a restart; a new one starts from the checkpoint's own token. "
    f"{NO_TOKENS_KEPT}: keeps and loads nothing. Empty: as in the parameters, "
    f"{_DECLARED['token_folder']['default']} by default.",
)
DEVICE = LaunchArgument("device", "Torch device of policy and aligner. Empty: as in the parameters.")
LOG_LEVEL = LaunchArgument("log_level", "Lowest severity that is logged.", "info", choices=LOG_LEVELS)
REPORT = LaunchArgument("report", "JSON file for the run report; a PNG is written beside it.", kind="file")
NODES = LaunchArgument(
    "nodes",
    "Nodes to start here, such as policy,buffer or aligner, when the others run on another machine (discovery_range is "
    "SUBNET on both then). Empty: all.",
)
DISCOVERY_RANGE = LaunchArgument(
    "discovery_range",
    "Where nodes look for each other (ROS_AUTOMATIC_DISCOVERY_RANGE); LOCALHOST keeps them on this machine.",
    "LOCALHOST",
    choices=DISCOVERY_RANGES,
)
STATIC_PEERS = LaunchArgument(
    "static_peers",
    "Other machines with nodes of this graph, name or address, separated by ; (ROS_STATIC_PEERS), where the network "
    "carries no multicast. Empty: as in the environment.",
)
COMPOSED = LaunchArgument(
    "composed",
    "Policy, buffer and aligner in one process: less copying between them, but if one crashes all of them start anew.",
    "false",
    "flag",
)
DURATION = LaunchArgument("duration", "Seconds after which everything stops by itself. 0: never.", "0", "seconds")

_CORE = ("policy", "buffer", "aligner")  # the nodes that can share a process
_BRINGUP_ARGUMENTS = (
    CONTRACT,
    PARAMS_FILE,
    CHECKPOINT,
    LaunchArgument("body", "Body file of the simulated arm, found like the contract. Empty: as in the parameters."),
    NAMESPACE,
    TOKEN_FOLDER,
    LaunchArgument("use_sim", "Start the simulated robot. False: a real one is there.", "true", "flag"),
    LaunchArgument("use_sim_time", "Use /clock; the simulated robot publishes it.", "false", "flag"),
    LaunchArgument(
        "enable",
        "Let the policy move the robot. False: it holds until ~/enable is called or the parameter is set. Empty: "
        "as in the parameters, true by default.",
        "",
        "flag",
    ),
    DEVICE,
    LOG_LEVEL,
    LaunchArgument("respawn", "Start a node again that died.", "true", "flag"),
    COMPOSED,
    DURATION,
    REPORT,
    NODES,
    DISCOVERY_RANGE,
    STATIC_PEERS,
)


def _parameters(values: Mapping[str, ParameterValue], *names: str) -> dict[str, ParameterValue]:
    """Those of the arguments that were given: an empty one leaves the parameter files and defaults in
    force.
    """
    return {name: values[name] for name in names if values[name] != ""}


def _namespace(values: Mapping[str, ParameterValue]) -> str:
    return "/" + str(values["namespace"]).strip("/")


def _environment(discovery_range: str, static_peers: str = "") -> dict[str, str]:
    environment = {"ROS_AUTOMATIC_DISCOVERY_RANGE": discovery_range}
    if static_peers:
        environment["ROS_STATIC_PEERS"] = static_peers
    if not any(os.environ.get(name) for name in _SITE_DDS):
        environment[_DDS_PROFILE] = str(config_folder() / "dds" / "fastdds.xml")
    return environment


def _stop_at(duration_s: float) -> float:
    # Monotonic time is the same in every process of a machine, so a restarted node still ends when it should.
    return time.monotonic() + duration_s if duration_s > 0 else 0.0


def _chosen(nodes: list[NodeProcess], names: str) -> list[NodeProcess]:
    """Those of ``nodes`` that the argument ``nodes`` names."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [node.name for node in nodes]
    if unknown := sorted(set(wanted) - set(known)):
        raise GraphError(f"argument nodes: found {', '.join(unknown)}; expected some of {', '.join(known)}")
    return [node for node in nodes if not wanted or node.name in wanted]


class _Common(TypedDict):
    """What nodes of a graph have in common, as :class:`NodeProcess` takes it."""

    parameter_files: tuple[str, ...]
    namespace: str
    log_level: str
    respawn: bool
    ends_graph: bool


def _common(values: Mapping[str, ParameterValue], *, respawn: bool, ends_graph: bool = False) -> _Common:
    return {
        "parameter_files": (str(values["params_file"]),) if values["params_file"] else (),
        "namespace": _namespace(values),
        "log_level": str(values["log_level"]),
        "respawn": respawn,
        "ends_graph": ends_graph,
    }


def _assemble_bringup(values: Mapping[str, ParameterValue]) -> Graph:
    respawn = bool(values["respawn"])
    common = _common(values, respawn=respawn)
    clock = {"use_sim_time": values["use_sim_time"]}
    kept = _parameters(values, "token_folder")
    if values["token_folder"] == NO_TOKENS_KEPT:
        kept = {"token_folder": ""}
    # In one process an aligner that gave way to others would do so with the interpreter lock in its hands.
    niceness = {"niceness": 0} if values["composed"] else {}
    nodes = [
        NodeProcess(
            "policy",
            "policy_node",
            parameters=_parameters(values, "contract", "checkpoint", "device", "enable") | kept | clock,
            **common,
        ),
        NodeProcess(
            "buffer", "buffer_node", parameters=_parameters(values, "contract", "checkpoint") | clock, **common
        ),
        NodeProcess(
            "aligner",
            "aligner_node",
            parameters=_parameters(values, "contract", "checkpoint", "device") | kept | clock | niceness,
            **common,
        ),
    ]
    if values["use_sim"]:
        # The robot is the source of time: it publishes /clock and does not follow it.
        publish_clock = {"publish_clock": True} if values["use_sim_time"] else {}
        nodes.append(
            NodeProcess(
                "robot_sim",
                "robot_sim_node",
                parameters=_parameters(values, "contract", "body") | publish_clock,
                **common,
            )
        )
    nodes = _chosen(nodes, str(values["nodes"]))
    if values["report"] or values["duration"]:
        stop = {"stop_at": _stop_at(float(values["duration"]))}
        nodes.append(
            NodeProcess(
                "run_report",
                "run_report",
                room="tools",
                parameters=_parameters(values, "contract", "report") | clock | stop,
                stop_grace_s=30.0,
                **_common(values, respawn=respawn, ends_graph=True),
            )
        )
    return Graph(
        tuple(nodes),
        environment=_environment(str(values["discovery_range"]), str(values["static_peers"])),
        duration_s=float(values["duration"]),
        composed=_CORE if values["composed"] else (),
    )


BRINGUP = GraphDeclaration(
    "Policy, buffer and aligner, with a simulated robot unless told otherwise.",
    _BRINGUP_ARGUMENTS,
    _assemble_bringup,
)


def _assemble_record(values: Mapping[str, ParameterValue]) -> Graph:
    if not values["output"]:
        raise GraphError("argument output: found nothing; expected the folder of the bag to write")
    if Path(str(values["output"])).exists():  # found here, before a robot moves for a recording that cannot be made
        raise GraphError(f"argument output: found something at {values['output']} already; expected a new folder")
    graph = _assemble_bringup(values)
    parameters = _parameters(values, "contract", "output")
    parameters |= {"use_sim_time": values["use_sim_time"], "stop_at": _stop_at(float(values["duration"]))}
    recorder = NodeProcess(
        "recorder",
        "recorder_node",
        room="tools",
        parameters=parameters,
        stop_grace_s=30.0,
        # Not again: a second recorder would have to overwrite the bag of the first.
        **_common(values, respawn=False, ends_graph=True),
    )
    # Without a report the recorder alone decides when the run is over.
    nodes = graph.nodes if values["report"] else tuple(n for n in graph.nodes if n.name != "run_report")
    return dataclasses.replace(graph, nodes=(*nodes, recorder))


RECORD = GraphDeclaration(
    "The bringup graph and a recorder that writes an MCAP bag of it.",
    (LaunchArgument("output", "Folder of the bag to write; must not exist.", kind="file"), *_BRINGUP_ARGUMENTS),
    _assemble_record,
)


def _assemble_replay(values: Mapping[str, ParameterValue]) -> Graph:
    if not values["bag"]:
        raise GraphError("argument bag: found nothing; expected the folder of a recorded bag")
    # A node that lost its state cannot take part in a replay that is to be exact: the replay ends with it.
    common = _common(values, respawn=False, ends_graph=True)
    lockstep = {"use_sim_time": True, "lockstep": True}
    model = _parameters(values, "contract", "checkpoint", "device") | lockstep
    buffer = _parameters(values, "contract", "checkpoint") | lockstep
    domain = {"ROS_DOMAIN_ID": str(values["domain"])} if values["domain"] else {}
    player = _parameters(values, "bag", "contract", "report", "compare")
    return Graph(
        (
            NodeProcess("policy", "policy_node", parameters=model, **common),
            NodeProcess("buffer", "buffer_node", parameters=buffer, **common),
            # The others wait for it: giving way to other programs would only make the replay slower.
            NodeProcess("aligner", "aligner_node", parameters=model | {"niceness": 0}, **common),
            NodeProcess("replay", "replay_node", "tools", parameters=player, **common),
        ),
        environment=_environment("LOCALHOST") | domain,
        composed=(*_CORE, "replay") if values["composed"] else (),
    )


REPLAY = GraphDeclaration(
    "Policy, buffer and aligner in lock-step with the messages of a bag.",
    (
        LaunchArgument("bag", "Folder of the bag to play.", kind="file"),
        LaunchArgument("report", "JSON file for every chunk and E-Token of the replay.", kind="file"),
        LaunchArgument("compare", "Earlier replay JSON that this one has to equal bit for bit.", kind="file"),
        COMPOSED,
        LaunchArgument("domain", "ROS domain of the replay, so that no robot hears it. Empty: ROS_DOMAIN_ID."),
        CONTRACT,
        PARAMS_FILE,
        CHECKPOINT,
        NAMESPACE,
        DEVICE,
        LOG_LEVEL,
    ),
    _assemble_replay,
)
