"""The environment: what is found, what is installed for it, locks, Docker. Machines are folders with faked tools."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from test_makefile import Project

LOCKS = {file.stem: file for file in (ROOT / "env/locks").glob("*.txt")}
BACKENDS = ["cpu", "cuda", "rocm", "preinstalled"]
ROCM_INDEX = "https://download.pytorch.org/whl/rocm7.2"
AMD_INDEX = "https://stable.repo.amd.com/rocm/whl-next/"
PACKAGES = "install --no-deps -r env/locks/packages.txt"

# Tools that work, by the machine that has them; a tool with a dash in front does not work. = is a file's text.
MACHINES = {
    "AMD": ["dev/kfd", "opt/rocm/bin/amd-smi"],
    "AMD with rocminfo": ["dev/kfd", "-usr/bin/amd-smi", "usr/bin/rocminfo"],
    "AMD without tools": ["dev/kfd", "sys/bus/pci/devices/5/class=0x120000"],
    "graphics of an AMD processor": ["dev/kfd", "sys/bus/pci/devices/5/class=0x030000"],
    "NVIDIA": ["usr/bin/nvidia-smi"],
    "NVIDIA and the graphics of an AMD processor": ["dev/kfd", "usr/bin/nvidia-smi"],
    "both": ["dev/kfd", "opt/rocm/bin/amd-smi", "usr/bin/nvidia-smi"],
    "none": [],
    "tools without a device": ["opt/rocm/bin/amd-smi", "-usr/bin/nvidia-smi"],
}

# A Python whose environments log what pip is told, and have the torch that TORCH names. When it is told AT, it does DO.
PYTHON = """#!/usr/bin/env bash
echo "${0##*/} $*" >> "$LOG"
[[ ! ${AT-} || "$*" != *$AT* ]] || eval "$DO"
case "$*" in
    "-m venv "*)
        mkdir -p "${!#}/bin" "${!#}/lib/python3.12/site-packages"; cp "$0" "${!#}/bin/python"
        printf '#!%s\n' "$(realpath "${!#}")/bin/python" > "${!#}/bin/tool"; chmod +x "${!#}/bin/tool" ;;
    *" install "*) echo "$*" > "${0%/*}/../lib/packages" ;;
    *"{}.{}"*) echo python3.12 ;;
    *"pip check") exit "${CHECK:-0}" ;;
    -) if [[ $0 = */bin/python ]]; then echo "${AFTER:-$TORCH}"; else echo "$TORCH"; fi ;;
esac
"""


def machine(folder: Path, name: str) -> Path:
    for entry in MACHINES[name]:
        name, _, text = entry.lstrip("-").partition("=")
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text or f"#!/bin/sh\nexit {int(entry.startswith('-'))}\n")
        file.chmod(0o755)
    return folder


DEFAULTS = {
    "BACKEND": "auto",
    "PYTHON": sys.executable,
    "VENV": ".venv-none",
    "TORCH_INDEX": "",
    "TORCH_VERSION": "",
}


def setup(*args, cwd=ROOT, **variables) -> subprocess.CompletedProcess:
    command = ["bash", "env/setup.sh", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=os.environ | DEFAULTS | variables, capture_output=True, text=True)


def pip_commands(output: str) -> list[str]:
    return [line.split("-m pip ")[1] for line in output.splitlines() if line.startswith("+") and "-m pip" in line]


@pytest.mark.parametrize(
    ("name", "found", "backend"),
    [
        ("AMD", "an AMD accelerator, by /dev/kfd and amd-smi", "rocm"),
        ("AMD with rocminfo", "an AMD accelerator, by /dev/kfd and rocminfo", "rocm"),
        ("AMD without tools", "an AMD accelerator, by /dev/kfd and the PCI bus", "rocm"),
        ("graphics of an AMD processor", "no accelerator", "cpu"),
        ("NVIDIA", "an NVIDIA accelerator, by nvidia-smi", "cuda"),
        ("NVIDIA and the graphics of an AMD processor", "an NVIDIA accelerator, by nvidia-smi", "cuda"),
        ("both", "an AMD accelerator, by /dev/kfd and amd-smi; an NVIDIA accelerator, by nvidia-smi", "rocm"),
        ("none", "no accelerator", "cpu"),
        ("tools without a device", "no accelerator", "cpu"),
    ],
)
def test_the_hardware_decides_what_is_installed(name, found, backend, tmp_path):
    result = setup("--dry-run", "--root", machine(tmp_path, name))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith(f"Found: {found}")
    assert f"for {backend}, pinned in env/locks/{backend}.txt, and the packages of" in result.stdout.splitlines()[1]
    assert f"+ echo {backend} > .venv-none/backend" in result.stdout
    assert f"-r env/locks/{backend}.txt" in pip_commands(result.stdout)[0]


@pytest.mark.parametrize(
    ("variables", "torch"),
    [
        ({"BACKEND": "cpu"}, "--no-deps --extra-index-url https://download.pytorch.org/whl/cpu -r env/locks/cpu.txt"),
        ({"BACKEND": "cuda"}, "--no-deps -r env/locks/cuda.txt"),
        ({"BACKEND": "rocm"}, f"--no-deps --index-url {ROCM_INDEX} -r env/locks/rocm.txt"),
        ({"BACKEND": "rocm", "TORCH_VERSION": "2.13.0"}, f"--no-deps --index-url {ROCM_INDEX} -r env/locks/rocm.txt"),
        ({"BACKEND": "rocm", "TORCH_VERSION": "2.12.1"}, f"--index-url {ROCM_INDEX} torch==2.12.1"),
        (
            {"BACKEND": "rocm", "TORCH_INDEX": "rocm7.1"},
            "--index-url https://download.pytorch.org/whl/rocm7.1 torch==2.13.0",
        ),
        (
            {"BACKEND": "rocm", "TORCH_INDEX": "https://host/x/", "TORCH_VERSION": "torch[device-gfx942]==2.12.0"},
            r"--index-url https://host/x/ torch\[device-gfx942\]==2.12.0",
        ),
        (
            {"BACKEND": "rocm", "TORCH_INDEX": "amd"},
            rf"--index-url {AMD_INDEX} torch\[device-gfx942\]==2.14.0+rocm10.1.0",
        ),
        (
            {"BACKEND": "rocm", "TORCH_INDEX": "amd", "TORCH_VERSION": "2.13.0+rocm10.0.0"},
            rf"--index-url {AMD_INDEX} torch\[device-gfx942\]==2.13.0+rocm10.0.0",
        ),
        (
            {"BACKEND": "rocm", "TORCH_INDEX": "amd", "TORCH_VERSION": "torch[device-all]"},
            rf"--index-url {AMD_INDEX} torch\[device-all\]",
        ),
    ],
)
def test_a_dry_run_prints_the_commands_and_does_nothing(variables, torch, tmp_path):
    result = setup("--dry-run", "--root", tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    assert pip_commands(result.stdout) == [f"install {torch}", PACKAGES, "check"]
    assert not (ROOT / ".venv-none").exists()


@pytest.mark.parametrize(
    ("versions", "arch"),
    [
        (["0", "90402"], "gfx942"),
        (["0", "0", "90010", "110000"], "gfx90a"),
        (["0", "110501"], "gfx1151"),
        (["120001"], "gfx1201"),
        (["0"], "gfx942"),
    ],
)
def test_amds_index_gives_the_kernels_of_the_device_that_is_there(versions, arch, tmp_path):
    for number, version in enumerate(versions):
        node = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{number}/properties"
        node.parent.mkdir(parents=True)
        node.write_text(f"simd_count 304\ngfx_target_version {version}\nvendor_id 4098\n")
    result = setup("--dry-run", "--root", tmp_path, BACKEND="rocm", TORCH_INDEX="amd")
    assert result.returncode == 0, result.stderr
    expected = rf"install --index-url {AMD_INDEX} torch\[device-{arch}\]==2.14.0+rocm10.1.0"
    assert pip_commands(result.stdout)[0] == expected
    assert "TORCH_INDEX=amd TORCH_VERSION= >" in result.stdout.replace("\\ ", " ")  # what was asked for, as it was


@pytest.mark.parametrize("backend", ["auto", "cpu", "cuda", "preinstalled"])
def test_amds_index_is_for_rocm(backend, tmp_path):
    result = setup("--dry-run", "--root", tmp_path, BACKEND=backend, TORCH_INDEX="amd")
    assert result.returncode == 1 and "Type: make setup BACKEND=rocm TORCH_INDEX=amd" in result.stderr


@pytest.mark.parametrize(
    ("name", "backend", "mend"),
    [
        ("AMD", "cuda", "rocm"),
        ("NVIDIA", "rocm", "cuda"),
        ("both", "cuda", None),
        ("both", "rocm", None),
        ("none", "rocm", None),
        ("none", "cuda", None),
        ("AMD", "cpu", None),
        ("NVIDIA", "cpu", None),
    ],
)
def test_torch_for_other_hardware_is_refused_before_anything_is_done(name, backend, mend, tmp_path):
    result = setup("--dry-run", "--root", machine(tmp_path, name), BACKEND=backend)
    if mend:
        assert result.returncode != 0 and "+" not in result.stdout
        assert f"BACKEND={backend} is for" in result.stderr and f"Type: make setup BACKEND={mend}" in result.stderr
    else:
        assert result.returncode == 0, result.stderr


def stand_in(python: Path) -> Path:
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    return python


def stub_setup(tmp_path: Path, torch: str, name: str, **variables) -> subprocess.CompletedProcess:
    """A whole setup with a stand-in for Python whose environments have a torch: its kind, version and folder."""
    python = stand_in(tmp_path / "python")
    root = machine(tmp_path / "root", name)
    places = {"LOG": str(tmp_path / "log"), "PYTHON": str(python), "VENV": str(tmp_path / "venv")}
    return setup("--root", root, TORCH=torch, **places, **variables)


@pytest.mark.parametrize(
    ("name", "backend", "torch", "said"),
    [
        ("AMD", "auto", "rocm 2.13.0+rocm7.2 /t/torch", None),
        ("AMD", "auto", "cuda 2.13.0 /t/torch", "pip took torch 2.13.0 for cuda, not for rocm"),
        ("none", "rocm", "cpu 2.13.0+cpu /t/torch", "pip took torch 2.13.0+cpu for cpu, not for rocm"),
        ("NVIDIA", "auto", "cpu 2.13.0+cpu /t/torch", "pip took torch 2.13.0+cpu for cpu, not for cuda"),
        ("AMD", "cpu", "cpu 2.13.0+cpu /t/torch", None),
        ("AMD", "preinstalled", "rocm 2.10.0 /t/torch", None),
        ("AMD", "preinstalled", "cpu 2.10.0 /t/torch", None),
        ("AMD", "preinstalled", "cuda 2.10.0 /t/torch", "is for CUDA, and the accelerator here is AMD's"),
        ("NVIDIA", "preinstalled", "rocm 2.10.0 /t/torch", "Type: make setup BACKEND=cuda"),
        ("AMD", "preinstalled", "", "has no torch. Type: make setup BACKEND=rocm"),
    ],
)  # fmt: skip
def test_torch_of_the_wrong_kind_is_refused(name, backend, torch, said, tmp_path):
    result = stub_setup(tmp_path, torch, name, BACKEND=backend)
    assert (tmp_path / "venv/installed").exists() is (said is None)
    if said:
        assert result.returncode != 0 and said in result.stderr and len(result.stderr.splitlines()) == 1
    else:
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "venv/backend").read_text() == torch.split()[0] + "\n"


def test_the_cuda_build_gets_its_libraries_where_the_cpu_index_gave_none(tmp_path):
    result = stub_setup(tmp_path, "cuda 2.13.0 /t/torch", "none")
    assert pip_commands(result.stdout)[-2:] == ["install --no-deps -r env/locks/cuda.txt", "check"]
    assert (tmp_path / "venv/backend").read_text() == "cpu\n"


def test_preinstalled_refuses_a_torch_of_another_index(tmp_path):
    result = stub_setup(tmp_path, "rocm 2.10.0 /t/torch", "AMD", BACKEND="preinstalled", TORCH_INDEX="rocm7.1")
    assert result.returncode != 0 and "Leave out TORCH_INDEX and TORCH_VERSION" in result.stderr


def wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", "")
        file.writestr(f"{name}/version.py", "__version__, hip, cuda = '9', '9', None\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


def preinstall(tmp_path: Path) -> tuple[Path, Path]:
    """A Python with torch, and the folder of that: as in AMD's images it is the Python of an environment."""
    base = tmp_path / "base"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base], check=True)
    torch = next(base.glob("lib/python*/site-packages")) / "torch"
    torch.mkdir()
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text("__version__, hip, cuda = '2.10.0', '7.2', None\n")
    return base, torch


def test_the_preinstalled_torch_stays(tmp_path):
    project = Project(tmp_path / "project")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "torch", "9")
    wheel(wheels, "needs_torch", "1", "Requires-Dist: torch>=9\n")
    (project.folder / "env/locks/packages.txt").write_text("needs_torch==1\n")
    base, torch = preinstall(tmp_path)
    result = project.make(
        "setup", "BACKEND=preinstalled", f"PYTHON={base}/bin/python", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels)
    )
    assert result.returncode == 0, result.stderr
    code = "import torch, needs_torch; print(torch.__file__)"
    run = subprocess.run([project.folder / ".venv/bin/python", "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == f"{torch}/__init__.py", run.stderr
    assert (project.folder / ".venv/backend").read_text() == "rocm\n"


def test_a_file_with_another_hash_is_not_installed(tmp_path):
    project = Project(tmp_path / "project")
    wheel(tmp_path, "stranger", "1")
    (project.folder / "env/locks/packages.txt").write_text(f"stranger==1 --hash=sha256:{'0' * 64}\n")
    base, _ = preinstall(tmp_path)
    before = Environment(project.folder).contents()
    result = project.make(
        "setup", "BACKEND=preinstalled", f"PYTHON={base}/bin/python", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)
    )
    assert result.returncode == 2 and "DO NOT MATCH THE HASHES" in result.stderr, result.stderr
    assert Environment(project.folder).contents() == before


def test_a_lock_that_would_replace_the_preinstalled_torch_is_refused(tmp_path):
    torch, after = "rocm 2.10.0 /image/torch", "cuda 2.13.0 /venv/torch"
    result = stub_setup(tmp_path, torch, "AMD", BACKEND="preinstalled", AFTER=after)
    assert result.returncode != 0 and "torch came from /image/torch and comes from /venv/torch now" in result.stderr
    assert not (tmp_path / "venv/installed").exists()


def test_make_in_a_dry_run_prints_the_commands_whatever_is_there(tmp_path):
    project = Project(tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for flags in (["-n"], ["-kn", "-j2"], ["--dry-run", "--no-print-directory"]):
        result = project.make(*flags, "setup", "BACKEND=rocm", f"PYTHON={sys.executable}")
        assert f"install --no-deps --index-url {ROCM_INDEX} -r env/locks/rocm.txt" in result.stdout, flags
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == files


@pytest.mark.parametrize("change", ["env/locks/cpu.txt", "env/setup.sh", "TORCH_VERSION=2.12.1", "BACKEND=cpu"])
def test_setup_runs_again_when_something_of_it_changed(change, tmp_path):
    project = Project(tmp_path)
    stand_in(tmp_path / "bin/python3")
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TORCH": "cpu 2.13.0+cpu /t/torch"}
    assert project.make("setup", **environment).returncode == 0 and not project.commands()
    arguments = [change] if "=" in change else []
    if not arguments:
        later = (tmp_path / ".venv/installed").stat().st_mtime + 1
        os.utime(tmp_path / change, (later, later))
    assert project.make("setup", *arguments, **environment).returncode == 0
    assert any("pip install" in command for command in project.commands())


def test_what_was_asked_for_holds_until_something_else_is(tmp_path):
    project = Project(tmp_path)
    (tmp_path / ".venv/installed").write_text("PYTHON=python3 BACKEND=cuda TORCH_INDEX=cu126 TORCH_VERSION=\n")
    assert project.make("setup").stdout == ".venv is up to date\n"
    dry = project.make("-n", "setup", "TORCH_VERSION=2.12.1").stdout
    assert "pip install --index-url https://download.pytorch.org/whl/cu126 torch==2.12.1" in dry
    assert "pip install --no-deps -r env/locks/cuda.txt" in project.make("-n", "setup", "TORCH_INDEX=").stdout
    assert project.make("setup", "BACKEND=nonsense").returncode == 2
    assert project.make("setup").stdout == ".venv is up to date\n"  # what was refused is forgotten


@pytest.mark.parametrize(("variables", "ends"), [({}, True), ({"TORCH_VERSION": "2.12.1"}, False)])
def test_pins_that_do_not_fit_together_end_the_setup(variables, ends, tmp_path):
    result = stub_setup(tmp_path, "rocm 2.12.1 /t/torch", "AMD", CHECK="1", **variables)
    assert (tmp_path / "venv/installed").exists() is not ends
    assert ("error: the pinned packages do not fit together" if ends else "warning: this torch") in result.stderr


# What was there before ------------------------------------------------------------------------------------------------


class Environment:
    """A checkout, without its Makefile, and an environment that is made from it with a stand-in for Python."""

    def __init__(self, folder: Path, venv: str = ".venv"):
        self.folder, self.name, self.venv = folder, venv, folder / venv
        self.old, self.log = Path(f"{self.venv}.old"), folder / "log"

    def variables(self, **variables: str) -> dict[str, str]:
        torch = {"BACKEND": "cpu", "TORCH": "cpu 2.13.0+cpu /t/torch", "LOG": str(self.log)}
        return os.environ | DEFAULTS | torch | {"PYTHON": "./python", "VENV": self.name} | variables

    def setup(self, *args: str, **variables: str) -> subprocess.CompletedProcess:
        command = ["bash", "env/setup.sh", "--root", "root", *args]
        environment = self.variables(**variables)
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)

    def fail(self, **variables: str) -> None:
        """A setup for something else than what is there, without an index."""
        variables = {"TORCH_VERSION": "2.12.1", "AT": "pip install", "DO": "exit 1"} | variables
        assert self.setup(**variables).returncode == 1

    def start(self, *command: str, pass_fds: tuple = (), **variables: str) -> subprocess.Popen:
        """Starts a setup that stays in pip, in a session of its own, and waits until it is there."""
        reached = self.folder / "reached"
        stay = {"AT": "pip install", "DO": "echo $$ > reached.part; mv reached.part reached; exec sleep 60"}
        environment = self.variables(**stay | variables)
        process = subprocess.Popen(
            command or ["bash", "env/setup.sh", "--root", "root"], cwd=self.folder, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, pass_fds=pass_fds,
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
        )  # fmt: skip
        while not reached.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        self.pip, self.session = int(reached.read_text()), process.pid
        reached.unlink()
        return process

    def unlocked(self) -> None:
        """Waits for the end of what a killed setup has left running."""
        with Path(f"{self.venv}.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)

    def contents(self) -> dict:
        files = {file.relative_to(self.venv): file for file in self.venv.rglob("*") if file.is_file()}
        return {name: (file.stat().st_mode, file.stat().st_mtime_ns, file.read_bytes()) for name, file in files.items()}

    def check(self, before: dict | None = None) -> None:
        """It is there alone, whole, the same as before if that is given, and its scripts run."""
        assert not self.old.exists()
        assert (self.venv / "installed").exists() and (before is None or self.contents() == before)
        subprocess.run([self.venv / "bin/tool", "runs"], env=self.variables(), check=True)
        assert self.log.read_text().endswith(f"python {self.venv}/bin/tool runs\n")


def checkout(folder: Path) -> Path:
    shutil.copytree(ROOT / "env", folder / "env")
    stand_in(folder / "python")
    return folder


@pytest.fixture
def made(tmp_path) -> Environment:
    environment = Environment(checkout(tmp_path / "checkout"))
    assert environment.setup().returncode == 0
    environment.check()
    return environment


def session(number: int) -> list[int]:
    """The processes of a session that run."""
    processes = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status, _, _, of = stat.read_text().rsplit(") ", 1)[1].split()[:4]
            if int(of) == number and status != "Z":
                processes.append(int(stat.parent.name))
    return processes


def ended(number: int) -> bool:
    """Whether nothing of a session runs; the last may take a moment to end."""
    end = time.monotonic() + 5
    while session(number) and time.monotonic() < end:
        time.sleep(0.05)
    return not session(number)


@pytest.mark.parametrize(
    ("told", "does"),
    [
        ("-m venv", "exit 1"),
        ("pip install --no-deps --extra-index-url", "exit 1"),
        ("packages.txt", "rm -r .venv/lib; exit 1"),
        ("packages.txt", "kill -KILL $$"),
        ("pip check", "exit 1"),
        ("pip check", "ln -s /dev/full .venv/settings"),
        ("-m venv", "mkdir -p .venv; ln -s /dev/full .venv/bin; exit 1"),
    ],
)
def test_a_setup_that_fails_leaves_the_environment_that_was_there(told, does, made):
    before = made.contents()
    result = made.setup(AT=told, DO=does)
    assert result.returncode != 0 and ".venv is again what it was before" in result.stderr
    made.check(before)
    assert made.setup(TORCH="rocm 2.13.0 /t/torch", BACKEND="cuda").returncode != 0
    made.check(before)
    assert made.setup(BACKEND="nonsense").returncode != 0 and made.setup(PYTHON="no-python").returncode != 0
    made.check(before)
    assert made.setup().returncode == 0
    made.check()
    assert made.contents() != before


# Read by bash before the script: kills it before its command KILL, of those it runs while there are two environments.
KILLER = """
if [ "${0##*/}" = setup.sh ] && [ "${KILL-}" ]; then
    moment=0
    set -o functrace
    trap '[ ! -e "$VENV.old" ] || ((++moment != KILL)) || kill -KILL $$' DEBUG
fi
"""


def test_a_setup_that_is_killed_at_any_moment_leaves_an_environment_or_the_next_call_brings_it_back(made):
    (made.folder / "killer").write_text(KILLER)
    kill, old, new = 0, 0, 0
    while True:
        before, kill = made.contents(), kill + 2
        killed = made.setup(BASH_ENV="killer", KILL=str(kill))
        made.unlocked()
        made.fail()
        made.check()
        if made.contents() == before:
            old += 1
        else:
            new += 1
            assert set(made.contents()) == set(before)
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL
    assert old > 20 and new > 2


def test_what_brings_an_environment_back_may_be_killed_too(made):
    (made.folder / "killer").write_text(KILLER)
    before, kill, killed = made.contents(), 0, None
    while killed is None or killed.returncode == -signal.SIGKILL:
        kill += 3
        made.setup(AT="packages.txt", DO="kill -KILL $PPID")
        made.unlocked()
        killed = made.setup(BASH_ENV="killer", KILL=str(kill), TORCH_VERSION="2.12.1", AT="pip install", DO="exit 1")
        made.unlocked()
        made.fail()
        made.check(before)
    assert killed.returncode == 1 and kill > 40


# Kills who calls it when it has removed the first thing, or all but the last, or of one folder the files.
RM = """#!/usr/bin/env bash
[ -e "${!#}" ] || exit 0
[ $# = 2 ] || { /bin/rm "${@:1:${FIRST:-$#-1}}"; kill -KILL $PPID; }
/bin/rm "$2"/*
kill -KILL $PPID
"""


@pytest.mark.parametrize("first", ["", "2"])
def test_a_removal_may_be_killed_too(first, made):
    rm = made.folder / "bin/rm"
    rm.parent.mkdir()
    rm.write_text(RM)
    rm.chmod(0o755)
    path = f"{rm.parent}:{os.environ['PATH']}"
    for _ in range(2):
        before = made.contents()
        assert made.setup(PATH=path, FIRST=first).returncode == -signal.SIGKILL  # in the removal of the old one
        after = made.contents()
        assert after != before and made.old.exists()
        killed = made.setup(TORCH_VERSION="2.12.1", AT="pip install", DO="exit 1", PATH=path, FIRST=first)
        assert killed.returncode == -signal.SIGKILL
        made.fail()
        made.check(after)
    made.setup(PATH=path, FIRST=first)
    shutil.rmtree(made.venv)
    made.fail()
    assert not made.venv.exists() and not made.old.exists()  # half of an old one is not brought back


def test_a_new_environment_that_cannot_be_removed_does_not_cost_the_old_one(made):
    rm = made.folder / "bin/rm"
    stand_in(rm).write_text('#!/bin/sh\ncase "$*" in *.venv) exit 1 ;; esac\nexec /bin/rm "$@"\n')
    before = made.contents()
    for _ in range(2):
        made.fail(PATH=f"{rm.parent}:{os.environ['PATH']}")
        assert made.old.exists() and not (made.venv / "installed").exists()
    made.fail()
    made.check(before)


def test_an_interrupted_setup_brings_back_what_was_there_and_goes_no_further_if_that_is_asked_for(made):
    before = made.contents()
    made.setup(TORCH_VERSION="2.12.1", AT="packages.txt", DO="kill -KILL $PPID")
    assert made.old.exists() and not (made.venv / "installed").exists()
    made.log.unlink()
    result = made.setup()
    assert result.returncode == 0 and "is again what it was before" in result.stderr and not made.log.exists()
    made.check(before)
    made.setup(AT="packages.txt", DO="kill -KILL $PPID")
    later = (made.old / "installed").stat().st_mtime + 1
    os.utime(made.folder / "env/locks/cpu.txt", (later, later))
    assert made.setup().returncode == 0
    made.check()
    assert made.contents() != before


@pytest.mark.parametrize(
    ("number", "does"),
    [
        (signal.SIGTERM, "exec sleep 60"),
        (signal.SIGHUP, "exec sleep 60"),
        (signal.SIGINT, "exec sleep 60"),
        (signal.SIGTERM, "(trap '' INT; exec sleep 60)"),  # what pip began, which is deaf
    ],
)
def test_a_signal_ends_the_setup_soon_and_what_was_there_comes_back(number, does, made):
    before = made.contents()
    process = made.start(DO=f"echo $$ > reached.part; mv reached.part reached; {does}")
    process.send_signal(number)
    _, said = process.communicate(timeout=40)
    assert process.returncode == 130 and "is again what it was before" in said.splitlines()[-1]
    assert ended(process.pid)
    made.check(before)


@pytest.fixture
def project(tmp_path) -> Project:
    project = Project(tmp_path)
    stand_in(tmp_path / "python")
    project.environment = Environment(tmp_path)
    project.before = project.environment.contents()
    return project


MAKE = ["make", "setup", "BACKEND=cpu", "PYTHON=./python", "TORCH_VERSION=2.12.1"]
CLEAN = {"MAKEFLAGS": "", "MAKELEVEL": "", "BACKEND": "", "PYTHON": ""}


def press_ctrl_c(environment: Environment, **variables: str) -> int:
    """Status of a setup through Make in a terminal of its own, in which Ctrl-C is pressed when it stays somewhere."""
    terminal, end = os.openpty()
    code = f"import fcntl, os; fcntl.ioctl({end}, {termios.TIOCSCTTY}, 0); [os.dup2({end}, n) for n in range(3)];"
    command = [sys.executable, "-c", f"{code} os.execvp('make', {MAKE})"]
    make = environment.start(*command, pass_fds=(end,), **CLEAN, **variables)
    os.write(terminal, b"\x03")
    status = make.wait(timeout=10)
    os.close(terminal), os.close(end)
    return status


@pytest.mark.parametrize("way", ["Ctrl-C", "SIGTERM"])
def test_a_signal_to_make_ends_the_setup_and_what_was_there_comes_back(way, project):
    if way == "Ctrl-C":
        assert press_ctrl_c(project.environment) == -signal.SIGINT
    else:
        make = project.environment.start(*MAKE, **CLEAN)
        make.terminate()
        assert make.communicate(timeout=10) and make.returncode in (2, -signal.SIGTERM)
    assert ended(project.environment.session)
    assert project.environment.contents() == project.before and not project.environment.old.exists()
    assert project.make("setup").stdout == ".venv is up to date\n"  # what was asked for is forgotten


def test_ctrl_c_during_the_removal_of_the_old_environment_leaves_the_new_one(project):
    rm = project.folder / "bin/rm"
    stand_in(rm).write_text(
        """#!/usr/bin/env bash
        [ ! -e "${!#}" ] || { echo $$ > reached.part; mv reached.part reached; sleep 0.3; }
        exec /bin/rm "$@"
        """
    )
    press_ctrl_c(project.environment, PATH=f"{rm.parent}:{os.environ['PATH']}", AT="no such thing")
    project.environment.check()
    assert project.make("setup").stdout == ".venv is up to date\n"
    assert "TORCH_VERSION=2.12.1" in (project.folder / ".venv/installed").read_text()


def test_make_brings_back_what_was_there_after_a_kill(project):
    def kill() -> None:
        make = project.environment.start(*MAKE, **CLEAN)
        for group in (make.pid, project.environment.pip):
            os.killpg(group, signal.SIGKILL)
        make.communicate()
        project.environment.unlocked()
        assert project.environment.old.exists() and not (project.folder / ".venv/installed").exists()

    (project.folder / ".venv/installed").write_text("PYTHON=python3 BACKEND=cpu TORCH_INDEX=cpu TORCH_VERSION=\n")
    before = project.environment.contents()
    kill()
    result = project.make("setup")
    assert result.returncode == 0 and "pip" not in result.stdout and result.stdout.endswith(".venv is up to date\n")
    assert project.environment.contents() == before
    kill()
    assert project.make(*MAKE[1:], AT="pip install", DO="exit 1").returncode == 2
    assert project.environment.contents() == before
    assert project.make("setup").stdout == ".venv is up to date\n"
    kill()
    assert project.make("distclean").returncode == 0
    assert not list(project.folder.glob(".venv*"))


def test_only_one_setup_runs_and_one_that_was_killed_ends_with_its_pip(made):
    before = made.contents()
    process = made.start()
    for end in (lambda: None, process.kill):
        end()
        result = made.setup()
        assert result.returncode == 1 and result.stderr.startswith("error: another process is making .venv. Wait")
        assert made.old.exists() and not (made.venv / "installed").exists()
    process.communicate(os.kill(made.pip, signal.SIGTERM))
    made.unlocked()
    made.fail()
    made.check(before)


def test_a_dry_run_changes_nothing_after_an_interrupted_setup(made):
    def state():
        return {file: file.lstat().st_mtime_ns for file in made.folder.rglob("*") if file != made.log}

    made.setup(AT="packages.txt", DO="kill -KILL $PPID")
    before = state()
    result = made.setup("--dry-run")
    assert result.returncode == 0 and "+ mkdir -p .venv\n" in result.stdout
    assert state() == before
    made.setup()
    assert "+ mv .venv .venv.old\n" in made.setup("--dry-run").stdout


# Checkouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_environment_that_another_checkout_made_is_refused(interrupted, tmp_path):
    one, other = (Environment(checkout(tmp_path / name), str(tmp_path / "venv")) for name in ("one", "other"))
    assert one.setup().returncode == 0
    before = one.contents()
    if interrupted:
        one.setup(AT="packages.txt", DO="kill -KILL $PPID")
    state = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("venv*/*")}
    for args in ([], ["--dry-run"], ["--remove"]):
        result = other.setup(*args)
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
        assert f"venv was made from {one.folder}, and this is {other.folder}. Name another: make VENV=" in result.stderr
        assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("venv*/*")} == state
    one.fail()
    one.check(before)
    assert one.setup("--remove").returncode == 0
    assert not list(tmp_path.glob("venv*"))
    assert other.setup().returncode == 0
    other.check()


def test_a_checkout_that_was_moved_makes_its_environment_anew(made):
    moved = Environment(made.folder.rename(made.folder.parent / "moved"))
    before = moved.contents()
    moved.fail()
    assert moved.contents() == before
    assert moved.setup().returncode == 0
    moved.check()
    # Neither a copy, nor what is outside.
    copy = Environment(Path(shutil.copytree(moved.folder, moved.folder.parent / "copy")))
    assert f"was made from {moved.folder}, and this is {copy.folder}" in copy.setup().stderr
    moved.name = str(moved.folder.parent / "outside")
    assert moved.setup().returncode == 0
    gone = moved.folder.rename(moved.folder.parent / "again")
    again = Environment(gone, moved.name)
    assert f"outside was made from {moved.folder}, and this is {gone}" in again.setup().stderr


def test_an_environment_from_before_checkouts_were_recorded_is_ours_inside_the_checkout(made, tmp_path):
    (made.venv / "checkout").unlink()
    outside = made.venv.rename(tmp_path / "outside")
    result = made.setup(VENV=str(outside))
    assert f"outside was made from another checkout, and this is {made.folder}" in result.stderr
    (made.folder / ".venv").symlink_to(outside)
    assert "was made from another checkout" in made.setup().stderr
    (made.folder / ".venv").unlink()
    outside.rename(made.venv)
    assert made.setup().returncode == 0
    made.check()


@pytest.mark.parametrize("name", [".venv", ".venv.old"])
def test_a_folder_that_the_makefile_did_not_make_is_refused(name, tmp_path):
    environment = Environment(checkout(tmp_path / "checkout"))
    (environment.folder / name).mkdir()
    (environment.folder / name / "mine").touch()
    for args in ([], ["--remove"]):
        result = environment.setup(*args)
        assert result.returncode == 1 and f"{name} is there and was not made by this Makefile" in result.stderr
    assert (environment.folder / name / "mine").exists()
    (environment.folder / name / "mine").unlink()
    (environment.folder / name).rename(tmp_path / "disk")  # an empty folder is nobody's, a link to it is somebody's
    (environment.folder / name).symlink_to(tmp_path / "disk")
    assert f"{name} is there and was not made by this Makefile" in environment.setup().stderr


@pytest.mark.parametrize("name", ["/", ""])
def test_the_root_is_no_environment(name, tmp_path):
    assert "VENV names no folder" in setup("--dry-run", "--root", tmp_path, VENV=name).stderr


def test_a_slash_at_the_end_of_the_name_changes_nothing(made):
    before = made.contents()
    made.fail(VENV=".venv/")
    made.check(before)


# Locks ----------------------------------------------------------------------------------------------------------------


def locked(*names: str, **system: str) -> dict[str, str]:
    """Versions by package that some locks hold for a system."""
    pins = {}
    for name in names:
        for line in LOCKS[name].read_text().replace(" \\\n    --hash", " --hash").splitlines():
            line, *hashes = line.split(" --hash=sha256:")
            if not line.startswith("#"):
                assert bool(hashes) is (name not in ("cpu", "rocm")), line
                pin = Requirement(line)
                assert re.fullmatch(r"==[\w.+]+", str(pin.specifier)), line
                if not pin.marker or pin.marker.evaluate(system):
                    assert pins.setdefault(pin.name, str(pin.specifier)) == str(pin.specifier), line
    return pins


def system(python: str) -> dict[str, str]:
    return {"python_version": python, "python_full_version": f"{python}.4", "sys_platform": "linux",
            "platform_machine": "x86_64", "platform_system": "Linux"}  # fmt: skip


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_locks_hold_what_is_required(python):
    for backend in BACKENDS:
        pins = locked("packages", *{backend} - {"preinstalled"}, **system(python))
        for line in (ROOT / "env/requirements.txt").read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                wanted = Requirement(line)
                if not wanted.marker or wanted.marker.evaluate(system(python)):
                    assert pins[wanted.name] == str(wanted.specifier), f"{backend}: {line}. Type: make lock"
        wanted = Requirement((ROOT / "env/requirements-torch.txt").read_text().splitlines()[-1])
        if backend == "preinstalled":
            assert not {"torch", "torchvision", "triton", "triton-rocm"} & set(pins)
        else:
            assert pins["torch"].split("+")[0] == str(wanted.specifier), f"{backend}. Type: make lock"
        assert any(re.match("nvidia-|cuda-|triton$", name) for name in pins) is (backend == "cuda")
        assert backend != "rocm" or (pins["torch"].endswith("+rocm7.2") and "triton-rocm" in pins)
    pins = locked("packages", "test", **system(python))
    for line in (ROOT / "env/requirements-test.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert pins[Requirement(line).name] == str(Requirement(line).specifier), f"{line}. Type: make lock"


def test_the_locks_name_no_index_and_say_how_they_were_made():
    engines = {"serve-cpu", "serve-cuda", "export", "runtime", "benchmark"}
    assert set(LOCKS) == {"packages", "test", *BACKENDS} - {"preinstalled"} | engines
    for name, file in LOCKS.items():
        assert "make lock" in file.read_text().splitlines()[0] and "://" not in file.read_text(), name


# Engines --------------------------------------------------------------------------------------------------------------
ENGINE_PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$LOG"
case "$*" in
    "-m venv "*) mkdir -p "${!#}/bin" "${!#}/site"; cp "$0" "${!#}/bin/python" ;;
    *purelib*) echo "$(dirname "$(dirname "$0")")/site" ;;
    *find_spec*) [ "${HAS_VLLM-}" ] && echo /image/packages/vllm ;;
    *"pip download"*) tar -czf .venv-export/llama_cpp_python-1.tar.gz llama_cpp_python-1 ;;
    *" install "*) [ ! "${BROKEN-}" ] ;;
esac
"""


@pytest.fixture
def engine(tmp_path):
    """Runs setup_engine.sh beside a .venv of a backend, whose Python logs; gives the process and what was logged."""
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(ENGINE_PYTHON)
    python.chmod(0o755)
    (tmp_path / ".venv/pyvenv.cfg").write_text("include-system-site-packages = false\n")
    (tmp_path / "llama_cpp_python-1/vendor/llama.cpp").mkdir(parents=True)

    def make(name: str, backend: str = "cpu", **environment):
        (tmp_path / ".venv/backend").write_text(f"{backend}\n")
        (tmp_path / "log").write_text("")
        known = {"VENV": ".venv", "PYTHON": ".venv/bin/python", "LOG": str(tmp_path / "log")}
        command = ["bash", str(ROOT / "env/setup_engine.sh"), name]
        result = subprocess.run(
            command, cwd=tmp_path, env=os.environ | known | environment, capture_output=True, text=True
        )
        return result, (tmp_path / "log").read_text()

    make.folder = tmp_path
    return make


@pytest.mark.parametrize(
    ("backend", "locks"), [("cpu", ["cpu", "serve-cpu"]), ("cuda", ["serve-cuda"]), ("rocm", []), ("preinstalled", [])]
)
def test_vllm_is_that_of_the_hardware_and_on_rocm_that_of_the_image(backend, locks, engine):
    result, log = engine("serve", backend, HAS_VLLM="yes")
    assert result.returncode == 0, result.stderr
    assert re.findall(r"-r env/locks/(.*)\.txt", log) == locks
    assert (engine.folder / ".venv-serve/installed").read_text() == f"{backend}\n"
    below = engine.folder / ".venv-serve/site/below.pth"
    assert below.read_text() == "/image/packages\n" if not locks else not below.exists()


def test_without_vllm_rocm_is_told_of_the_image(engine):
    result, _ = engine("serve", "rocm")
    assert result.returncode == 1 and "image rocm/vllm" in result.stderr and "BACKEND=preinstalled" in result.stderr
    assert not (engine.folder / ".venv-serve/installed").exists()


def test_the_other_engines_stand_on_the_packages_that_are_there(engine):
    for name in ("export", "benchmark"):
        result, log = engine(name)
        assert result.returncode == 0, result.stderr
        assert f"install --disable-pip-version-check --no-deps -r env/locks/{name}.txt" in log
        assert (engine.folder / f".venv-{name}/site/below.pth").read_text() == ".venv/site\n"
        assert "system-site-packages" not in log
    assert (engine.folder / ".venv-export/llama.cpp").is_dir() and "--no-binary :all:" in engine("export")[1]
    assert not list(engine.folder.glob(".venv-export/*.tar.gz"))
    (engine.folder / ".venv/pyvenv.cfg").write_text("include-system-site-packages = true\n")
    assert "-m venv --system-site-packages .venv-benchmark" in engine("benchmark")[1]
    result, log = engine("runtime")
    assert result.returncode == 0 and "--no-build-isolation .venv-export/sources" in log and "venv " not in log
    assert (engine.folder / ".venv-export/runtime").exists()


def test_an_engine_that_could_not_be_made_is_not_taken_for_made(engine):
    assert engine("benchmark")[0].returncode == 0
    result, _ = engine("benchmark", BROKEN="yes")
    assert result.returncode != 0 and not (engine.folder / ".venv-benchmark/installed").exists()
    (engine.folder / ".venv-export").mkdir()
    with (engine.folder / ".venv-export.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result, _ = engine("export")
        assert result.returncode == 1 and "another process is making .venv-export" in result.stderr


# Docker ---------------------------------------------------------------------------------------------------------------


def test_the_image_is_pinned_keeps_its_torch_and_is_not_run_as_root():
    lines = (ROOT / "env/Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert steps[0][0] == "FROM" and re.fullmatch(
        r"rocm/pytorch:rocm[\d.]+_\w+[\d.]+_py[\d.]+_pytorch_\w+[\d.]+", steps[0][1]
    )
    names = [name for name, _ in steps]
    user, install = names.index("USER"), next(i for i, step in enumerate(steps) if "make setup" in step[1])
    assert names.count("USER") == 1 and user < install and not re.match("0|root", steps[user][1])
    assert any(name == "ENV" and "BACKEND=preinstalled" in value for name, value in steps[:install])
    assert not re.search("TOKEN|dotenv|\\.env ", "".join(value for _, value in steps))
    assert "ADD" not in names and "ARG" not in names


def test_only_what_runs_gets_into_the_image():
    first, *rest = (ROOT / ".dockerignore").read_text().splitlines()
    assert first == "*"
    named = {line[1:] for line in rest if line.startswith("!")}
    assert named == {"Makefile", "bench", "data", "env", "scripts"}


@pytest.mark.parametrize("dotenv", [True, False])
def test_docker_run_gives_devices_groups_memory_and_folders(dotenv, tmp_path):
    project = Project(tmp_path / "project")
    if dotenv:
        (project.folder / ".env").write_text("HF_TOKEN=hf_secret\n")
    getent = tmp_path / "getent"
    getent.write_text("#!/bin/sh\necho video:x:44:me\necho render:x:109:\nexit 2\n")
    getent.chmod(0o755)
    result = project.make("docker-run", PATH=f"{tmp_path}:{os.environ['PATH']}", HF_HOME="/my cache")
    assert result.returncode == 0, result.stderr
    build, folders, run = result.stdout.replace("\\\n", " ").splitlines()
    assert build == "docker build --file env/Dockerfile --tag single-accelerator ."
    assert folders == f'mkdir -p "{project.folder}/outputs" "/my cache"'
    for option in (
        "--device /dev/kfd",
        "--device /dev/dri",
        "--group-add 44 --group-add 109",
        "--shm-size",
        f"--user {os.getuid()}:{os.getgid()}",
        f'--volume "{project.folder}/outputs:/app/outputs"',
        '--volume "/my cache:/cache"',
    ):
        assert f" {option} " in run, option
    assert (f'--volume "{project.folder}/.env:/app/.env:ro"' in run) is dotenv
    assert "hf_secret" not in result.stdout
    assert subprocess.run(["bash", "-n"], input=result.stdout, text=True).returncode == 0
