"""The environment: what is found, what is installed for it, locks, Docker. Machines are folders with faked tools."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from test_makefile import Project

LOCKS = {file.stem: file for file in (ROOT / "env/locks").glob("*.txt")}
BACKENDS = ["cpu", "cuda", "rocm", "preinstalled"]
ROCM_INDEX = "https://download.pytorch.org/whl/rocm7.2"
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

# A Python whose environments log what pip is told, and have the torch that TORCH names.
PYTHON = """#!/usr/bin/env bash
echo "${0##*/} $*" >> "$LOG"
case "$*" in
    "-m venv "*) mkdir -p "${!#}/bin" "${!#}/lib/python3.12/site-packages"; cp "$0" "${!#}/bin/python" ;;
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


def setup(*args, cwd=ROOT, **variables) -> subprocess.CompletedProcess:
    defaults = {
        "BACKEND": "auto",
        "PYTHON": sys.executable,
        "VENV": ".venv-none",
        "TORCH_INDEX": "",
        "TORCH_VERSION": "",
    }
    command = ["bash", "env/setup.sh", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=os.environ | defaults | variables, capture_output=True, text=True)


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
    ],
)
def test_a_dry_run_prints_the_commands_and_does_nothing(variables, torch, tmp_path):
    result = setup("--dry-run", "--root", tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    assert pip_commands(result.stdout) == [f"install {torch}", PACKAGES, "check"]
    assert not (ROOT / ".venv-none").exists()


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


def stub_setup(tmp_path: Path, torch: str, name: str, **variables) -> subprocess.CompletedProcess:
    """A whole setup with a stand-in for Python whose environments have a torch: its kind, version and folder."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
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
    result = project.make(
        "setup", "BACKEND=preinstalled", f"PYTHON={base}/bin/python", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path)
    )
    assert result.returncode == 2 and "DO NOT MATCH THE HASHES" in result.stderr, result.stderr
    assert not (project.folder / ".venv/installed").exists()


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
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin/python3"
    python.write_text(PYTHON)
    python.chmod(0o755)
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
    (tmp_path / ".venv.settings").write_text("PYTHON=python3 BACKEND=cuda TORCH_INDEX=cu126 TORCH_VERSION=\n")
    (tmp_path / ".venv/installed").touch()
    assert project.make("setup").stdout == ".venv is up to date\n"
    assert "--index-url https://download.pytorch.org/whl/cu126" in project.make("-n", "setup").stdout
    assert "pip install --no-deps -r env/locks/cuda.txt" in project.make("-n", "setup", "TORCH_INDEX=").stdout
    assert project.make("setup", "BACKEND=nonsense").returncode == 2
    assert project.make("setup").stdout == ".venv is up to date\n"  # what was refused is forgotten


@pytest.mark.parametrize(("variables", "ends"), [({}, True), ({"TORCH_VERSION": "2.12.1"}, False)])
def test_pins_that_do_not_fit_together_end_the_setup(variables, ends, tmp_path):
    result = stub_setup(tmp_path, "rocm 2.12.1 /t/torch", "AMD", CHECK="1", **variables)
    assert (tmp_path / "venv/installed").exists() is not ends
    assert ("error: the pinned packages do not fit together" if ends else "warning: this torch") in result.stderr


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
    assert set(LOCKS) == {"packages", "test", *BACKENDS} - {"preinstalled"}
    for name, file in LOCKS.items():
        assert "make lock" in file.read_text().splitlines()[0] and "://" not in file.read_text(), name


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
