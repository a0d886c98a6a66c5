"""Several nodes in one process, each with a single-threaded executor in a thread of its own, as by itself.

    python -m selfalign_ros.tools.composition --node policy_node --ros-args ARGUMENTS -- --node buffer_node ... --

Each node gets the ROS arguments that it would get in a process of its own; what follows the last ``--`` is for the
process. The nodes share one DDS participant and one interpreter. When one ends, all of them are told to. What torch
keeps per process is kept apart by ``selfalign_core.model.torch_state``.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from selfalign_core.errors import ConfigError, SelfAlignError
from selfalign_ros.life import node, tool_node
from selfalign_ros.life.exit_codes import CONFIGURATION
from selfalign_ros.life.process import say_fatal, start_ros
from selfalign_ros.nodes.aligner_node import AlignerNode
from selfalign_ros.nodes.buffer_node import BufferNode
from selfalign_ros.nodes.policy_node import PolicyNode
from selfalign_ros.tools.replay_node import Replay

_NODES = {"policy_node": PolicyNode, "buffer_node": BufferNode, "aligner_node": AlignerNode}
_TOOLS = {"replay_node": Replay}


@dataclass(frozen=True)
class Member:
    """One node of the process: its executable and its ROS arguments."""

    executable: str
    arguments: tuple[str, ...]

    def live(self, is_stopped: Callable[[], bool]) -> int:
        """The node's life in this thread. Returns its exit code."""
        if self.executable in _TOOLS:
            return tool_node.live(lambda: _TOOLS[self.executable](list(self.arguments)), is_stopped)
        return node.live(lambda: _NODES[self.executable](list(self.arguments)), is_stopped)


def split(words: Sequence[str]) -> tuple[list[Member], list[str]]:
    """The members of a command line, and what is for the process.

    Raises:
        ConfigError: no member, or one that cannot share a process.
    """
    members, rest = [], list(words)
    while rest[:1] == ["--node"]:
        end = rest.index("--") if "--" in rest else len(rest)
        executable, *arguments = rest[1:end] or [""]
        if executable not in (known := {**_NODES, **_TOOLS}):
            raise ConfigError(f"--node: found {executable!r}; expected one of {', '.join(known)}")
        members.append(Member(executable, tuple(arguments)))
        rest = rest[end + 1 :]
    if not members:
        raise ConfigError(f"arguments: found {' '.join(words) or 'none'}; expected --node EXECUTABLE ROS-ARGUMENTS --")
    return members, rest


def main(args: list[str] | None = None) -> NoReturn:
    """Run the nodes; ends the process with the worst of their exit codes."""
    try:
        members, rest = split(sys.argv[1:] if args is None else args)
        is_signalled = start_ros(rest)
    except SelfAlignError as error:
        say_fatal(str(error))
        node.end_process(CONFIGURATION)
    node.end_process(_live_together(members, is_signalled))


def _live_together(members: Sequence[Member], is_signalled: Callable[[], bool]) -> int:
    ended = threading.Event()
    codes = [1] * len(members)

    def live(index: int) -> None:
        try:
            codes[index] = members[index].live(lambda: is_signalled() or ended.is_set())
        finally:
            ended.set()

    threads = [threading.Thread(target=live, args=(i,), name=member.executable) for i, member in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(codes)


if __name__ == "__main__":
    main()
