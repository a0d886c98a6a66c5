"""Where the output of the supervisor goes. Whoever hands over a line goes on at once, whether or not it is read.

Knows no processes, only the labels of their lines.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import threading
import time
from collections import deque

_COLOURS = ("36", "32", "35", "33", "34", "96", "92", "95")
_MOST_BYTES = 1 << 20
_PIECE_BYTES = 4096


class Terminal:
    """Log lines on stdout: prefixed, coloured on a terminal, with one status line kept at the bottom there."""

    def __init__(self) -> None:
        self.is_tty = sys.stdout.isatty()
        sys.stdout.flush()
        self._writer = _Writer(sys.stdout.fileno())
        self._status = ""

    def write(self, label: str, line: str, is_status: bool) -> None:
        """A line of the process ``label``."""
        if is_status:
            if self.is_tty:
                self._status = line
                self._redraw()
            return
        self._write_line(f"{self._prefix(label)} {line}")

    def write_plain(self, level: str, message: str, label: str = "supervisor") -> None:
        """A line of the supervisor's own, for which there is room when there is none for others."""
        self._write_line(f"[{level}] {self._prefix(label)}: {message}", most=3 * _MOST_BYTES)

    def end_status(self) -> None:
        """Leave the status line as it is."""
        if self._status:
            self._writer.put("\n")
        self._status = ""

    def wait(self, timeout_s: float) -> bool:
        """Wait for the reader, at most so long beyond the last of what is read. False if there is more to be read."""
        return self._writer.wait(timeout_s)

    def _prefix(self, label: str) -> str:
        if not self.is_tty:
            return f"[{label}]"
        number = label.rpartition("-")[2]
        colour = _COLOURS[int(number) % len(_COLOURS)] if number.isdecimal() else "1"
        return f"\x1b[{colour}m[{label}]\x1b[0m"

    def _write_line(self, line: str, most: int = _MOST_BYTES) -> None:
        if not self._status:
            self._writer.put(f"{line}\n", most)
        else:
            self._writer.put(f"\r\x1b[K{line}\n{self._status_line()}", most)

    def _redraw(self) -> None:
        self._writer.put(self._status_line())

    def _status_line(self) -> str:
        width = shutil.get_terminal_size().columns
        return f"\r\x1b[K{self._status[: width - 1]}"


class _Writer:
    """Writes in a thread of its own, which waits for the reader. What does not fit in meanwhile is dropped and counted,
    whole lines at a time.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._size = self._dropped = self._pieces = 0
        self._is_writing = self._is_broken = False
        # A daemon: a process that ends does not wait for a reader either.
        threading.Thread(target=self._run, name="output", daemon=True).start()

    def put(self, text: str, most: int = _MOST_BYTES) -> None:
        """Have ``text`` written, sooner or later, unless more than ``most`` bytes would be waiting then."""
        data = text.encode(errors="replace")
        with self._changed:
            # Half of it has to be free again, or lines and gaps would take turns.
            limit = most // 2 if self._dropped else most
            if self._size + len(data) > limit:
                self._dropped += 1
                return
            self._tell_dropped()
            self._append(data)

    def wait(self, timeout_s: float) -> bool:
        """Whether all is written, or nobody will read it any more; see :meth:`Terminal.wait`."""
        deadline, pieces = time.monotonic() + timeout_s, -1
        with self._changed:
            while not self._is_broken and (self._waiting or self._dropped or self._is_writing):
                if pieces != self._pieces:
                    pieces, deadline = self._pieces, time.monotonic() + timeout_s
                if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    return False
        return True

    def _append(self, data: bytes) -> None:
        self._waiting.append(data)
        self._size += len(data)
        self._changed.notify_all()

    def _tell_dropped(self) -> None:
        if self._dropped:
            what = f"[WARN] [supervisor]: {self._dropped} lines were dropped here, because nobody read the output\n"
            self._dropped = 0
            self._append(what.encode())

    def _run(self) -> None:
        while not self._is_broken:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._dropped)
                if not self._waiting:
                    self._tell_dropped()
                data = self._waiting.popleft()
                self._is_writing = True
            self._write(data)
            with self._changed:
                self._size -= len(data)

    def _write(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data[:_PIECE_BYTES]) :]
            except BlockingIOError:  # somebody who shares it does not want to wait
                with contextlib.suppress(OSError):
                    select.select([], [self._descriptor], [])
                continue
            except OSError:
                # Nobody reads any more: go on quietly and let the nodes end in order.
                with self._changed:
                    self._is_broken = True
                    self._changed.notify_all()
                return
            with self._changed:
                self._pieces += 1
                self._changed.notify_all()
