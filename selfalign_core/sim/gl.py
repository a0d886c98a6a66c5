"""Chooses how MuJoCo draws, before MuJoCo is first imported. Knows file names of drivers, nothing of robots.

A set ``MUJOCO_GL`` is always respected. Otherwise: a GPU's EGL where a GPU device is visible, else the OSMesa software
renderer where it is installed, else EGL (Mesa draws in software there too). The window system is never used: simulated
cameras have to work in a container.
"""

from __future__ import annotations

import ctypes.util
import glob
import os


def choose_backend() -> str:
    """Set ``MUJOCO_GL`` when it is unset and return its value. Call before ``import mujoco``."""
    if not os.environ.get("MUJOCO_GL"):
        has_gpu = bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/dri/renderD*"))
        has_osmesa = ctypes.util.find_library("OSMesa") is not None
        os.environ["MUJOCO_GL"] = "osmesa" if has_osmesa and not has_gpu else "egl"
    # Software drawing on one thread: a 224-pixel frame is too small to share, and its workers would take the
    # cores that the policy needs.
    os.environ.setdefault("LP_NUM_THREADS", "0")
    return os.environ["MUJOCO_GL"]
