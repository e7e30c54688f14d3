"""env/build_bitsandbytes.sh: stand-ins for the tools log what they are asked; the probe runs on the real package."""

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "env/build_bitsandbytes.sh"
SYSTEM = "bash cat dirname head mkdir mktemp nproc rm sed sort tail tar timeout touch".split()
# Of a probe the log says whether it was of the package in the trial folder.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-") cat > /dev/null; [ -n "$FACTS" ] || { echo "No module named 'torch'" >&2; exit 1; }; echo "$FACTS" ;;
    "-u -") cat > /dev/null; trial=${PYTHONPATH%%:*}; trial=${trial##*/}; echo "probe $trial" >> "$LOG"
        [ -z "$trial" ] || exit "${TRIAL:-0}"
        [[ $(< "$LOG") = *force-reinstall* ]] || exit "$INSTALLED" ;;
    "-m pip --version") ;;
    "-m pip wheel "*) echo "wheel BNB_SKIP_CMAKE=$BNB_SKIP_CMAKE" >> "$LOG"; mkdir "$6"; touch "$6/bitsandbytes.whl" ;;
    *) echo "${*//$TMPDIR/}" >> "$LOG" ;;
esac
"""
CMAKE = """#!/usr/bin/env bash
[ "$*" != --version ] || { echo "cmake version ${CMAKE_VERSION:-3.31.6}"; exit; }
echo "cmake $*" >> "$LOG"
[ "$1" != -S ] || (cd "$2" && echo "source:" $(printf '%s ' * */*) >> "$LOG")
exit "${CMAKE_STATUS:-0}"
"""
GIT = """#!/usr/bin/env bash
echo "git ${*: -6}" >> "$LOG"
mkdir -p "${*: -1}/bitsandbytes" && echo '__version__ = "0.50.2"' > "${*: -1}/bitsandbytes/__init__.py"
"""
HEADERS = "hipblas/hipblas.h hiprand/hiprand.h hipblaslt/hipblaslt.h hipcub/hipcub.hpp rocblas/rocblas.h".split()


class Machine:
    """A PATH of its own with every tool that a build for ROCm needs, and a ROCm with its headers."""

    def __init__(self, folder: Path):
        self.folder, self.log, self.bin = folder, folder / "log", folder / "bin"
        self.bin.mkdir()
        for tool in SYSTEM:
            (self.bin / tool).symlink_to(shutil.which(tool))
        stand_ins = {"python3": PYTHON, "cmake": CMAKE, "git": GIT}
        for tool in ("python3", "cmake", "git", "make", "c++", "hipcc", "hipconfig"):
            (self.bin / tool).write_text(stand_ins.get(tool, "#!/bin/sh\n"))
            (self.bin / tool).chmod(0o755)
        for header in HEADERS:
            (folder / "rocm/include" / header).parent.mkdir(parents=True, exist_ok=True)
            (folder / "rocm/include" / header).touch()

    def build(self, **environment: str) -> subprocess.CompletedProcess:
        self.log.unlink(missing_ok=True)
        own = {"PATH": str(self.bin), "LOG": str(self.log), "ROCM_PATH": str(self.folder / "rocm"), "TMPDIR": "/tmp"}
        return subprocess.run(
            ["bash", str(SCRIPT)],
            cwd=self.folder,
            env=own | {"FACTS": "hip none", "INSTALLED": "1"} | environment,
            capture_output=True,
            text=True,
        )

    def logged(self, start: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith(start)]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_the_release_built_is_the_one_pinned():
    pinned = re.search(r"^bitsandbytes==(.*)$", (ROOT / "env/requirements.txt").read_text(), re.M)[1]
    script = SCRIPT.read_text()
    assert f"\nrelease={pinned}\n" in script and f"release to build ({pinned})" in script


def test_a_build_compiles_probes_on_trial_and_installs_last(machine):
    result = machine.build()
    assert result.returncode == 0, result.stderr
    lines = [re.sub(r"(?<= )\S*/", "", line) for line in machine.log.read_text().splitlines()]
    steps = [line for line in lines if not line.startswith("source:")]
    assert steps == [
        "probe ",
        "git --depth 1 --branch 0.50.2 bitsandbytes source",
        "cmake -S source -B build -DCOMPUTE_BACKEND=hip -DBNB_ROCM_ARCH=gfx942",
        f"cmake --build build --parallel {len(os.sched_getaffinity(0))}",
        "wheel BNB_SKIP_CMAKE=1",
        "-m pip install --no-deps --target trial bitsandbytes.whl",
        "probe trial",
        "-m pip install --no-deps --force-reinstall bitsandbytes.whl",
        "probe ",
    ]
    assert "Built, installed and probed in" in result.stdout


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ({"FACTS": "hip visible gfx90a"}, "-DCOMPUTE_BACKEND=hip -DBNB_ROCM_ARCH=gfx90a"),
        ({"FACTS": "hip visible gfx90a;gfx942"}, "-DCOMPUTE_BACKEND=hip -DBNB_ROCM_ARCH=gfx90a;gfx942"),
        ({"BNB_ROCM_ARCH": "gfx90a;gfx950"}, "-DCOMPUTE_BACKEND=hip -DBNB_ROCM_ARCH=gfx90a;gfx950"),
        ({"BNB_ROCM_ARCH": "", "COMPUTE_BACKEND": ""}, "-DCOMPUTE_BACKEND=hip -DBNB_ROCM_ARCH=gfx942"),  # as from Make
        ({"FACTS": "cpu none"}, "-DCOMPUTE_BACKEND=cpu"),
        ({"FACTS": "cuda none"}, "-DCOMPUTE_BACKEND=cpu"),
        ({"COMPUTE_BACKEND": "cpu"}, "-DCOMPUTE_BACKEND=cpu"),
    ],
)
def test_what_is_built_follows_torch_and_its_accelerators_unless_told(environment, options, machine):
    assert machine.build(**environment).returncode == 0
    assert machine.logged("cmake -S")[0].split(" ", 5)[5] == options


def test_tag_source_and_jobs_can_be_set(machine):
    assert machine.build(BNB_TAG="0.50.1", BNB_SOURCE="https://example.org/fork", JOBS="7").returncode == 0
    assert "--branch 0.50.1 https://example.org/fork" in machine.logged("git")[0]
    assert machine.logged("cmake --build")[0].endswith("--parallel 7")


def test_a_folder_is_copied_without_earlier_builds_and_its_version_is_named(machine):
    (machine.bin / "git").unlink()  # needed for a URL only
    mine = machine.folder / "mine"
    for name in ("CMakeLists.txt", "bitsandbytes/__init__.py", "bitsandbytes/libbitsandbytes_cpu.so", "build/old.py"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text('__version__ = "0.51.0.dev0"\n')
    before = sorted(mine.rglob("*"))
    result = machine.build(BNB_SOURCE="mine")
    assert result.returncode == 0, result.stderr
    assert "note: the source is version 0.51.0.dev0, not 0.50.2" in result.stdout
    assert machine.logged("source:") == ["source: CMakeLists.txt bitsandbytes bitsandbytes/__init__.py"]
    assert str(mine) not in machine.log.read_text() and sorted(mine.rglob("*")) == before


def test_everything_missing_is_named_at_once_with_its_package(machine):
    for tool in ("git", "make", "c++", "hipcc", "hipconfig"):
        (machine.bin / tool).unlink()
    shutil.rmtree(machine.folder / "rocm")
    result = machine.build(FACTS="cpu none", COMPUTE_BACKEND="hip", CMAKE_VERSION="3.25.1")
    assert result.returncode == 1 and not machine.log.exists()
    for said in (
        "torch for hip (found: for cpu): make setup BACKEND=rocm",
        "git: apt install git",
        "cmake 3.31.6 or newer (found: 3.25.1): " + str(machine.bin / "python3") + " -m pip install 'cmake>=3.31.6'",
        "make: apt install make",
        "c++: apt install g++",
        "hipcc: apt install hipcc",
        "hipconfig: apt install hipcc",
        *(f"{machine.folder}/rocm/include/{header}: apt install {header.split('/')[0]}-dev" for header in HEADERS),
    ):
        assert f"  {said}" in result.stderr


@pytest.mark.parametrize("version", ["3.31.5", "3.4.0"])
def test_a_cmake_that_is_too_old_is_refused(version, machine):
    result = machine.build(CMAKE_VERSION=version)
    assert result.returncode == 1 and f"(found: {version})" in result.stderr
    (machine.bin / "cmake").unlink()
    assert "(found: none)" in machine.build().stderr


def test_a_newer_cmake_and_tools_of_rocm_outside_the_path_will_do(machine):
    (machine.folder / "rocm/bin").mkdir()
    for tool in ("hipcc", "hipconfig"):
        (machine.bin / tool).rename(machine.folder / "rocm/bin" / tool)
    assert machine.build(CMAKE_VERSION="4.10.0").returncode == 0


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PYTHON": "./nowhere"}, "there is no ./nowhere"),
        ({"FACTS": ""}, "No module named 'torch'. Type: make setup"),
        ({"COMPUTE_BACKEND": "rocm"}, "COMPUTE_BACKEND=rocm is unknown. Type: COMPUTE_BACKEND=hip bash"),
        ({"BNB_ROCM_ARCH": "gfx90a,gfx942"}, "BNB_ROCM_ARCH=gfx90a,gfx942 is no list"),
        ({"BNB_ROCM_ARCH": "MI300X"}, "BNB_ROCM_ARCH=MI300X is no list"),
        ({"FACTS": "hip visible gfx942", "COMPUTE_BACKEND": "cpu"}, "torch sees an accelerator"),
    ],
)
def test_wrong_settings_are_named(environment, said, machine):
    result = machine.build(**environment)
    assert result.returncode == 1 and said in result.stderr and len(result.stderr.splitlines()) <= 2
    assert not machine.log.exists()


def test_make_is_the_command_to_type_where_make_called(machine):
    assert "Type: COMPUTE_BACKEND=hip make bitsandbytes" in machine.build(COMPUTE_BACKEND="rocm", MAKELEVEL="1").stderr


def test_a_package_that_passes_the_probe_is_built_anew_only_by_force(machine):
    result = machine.build(INSTALLED="0")
    assert result.returncode == 0 and "nothing to build" in result.stdout
    assert machine.log.read_text() == "probe \n"
    assert machine.build(INSTALLED="0", FORCE="1").returncode == 0
    assert machine.logged("-m pip install --no-deps --force-reinstall")


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"CMAKE_STATUS": "2"}, "error: cmake failed"), ({"TRIAL": "1"}, "did not pass the probe")],
)
def test_a_failed_build_leaves_what_was_installed(environment, said, machine):
    result = machine.build(**environment)
    assert result.returncode == 1 and said in result.stderr and "is still there" in result.stderr
    assert not machine.logged("-m pip install --no-deps --force-reinstall")


def test_a_tag_that_is_not_there_is_named(machine):
    (machine.bin / "git").write_text("#!/bin/sh\nexit 128\n")
    result = machine.build(BNB_TAG="9.9.9")
    assert result.returncode == 1 and "cannot clone tag 9.9.9 of https://github.com" in result.stderr


def test_the_installed_wheel_passes_and_is_left_alone(tmp_path):
    import bitsandbytes

    shutil.copy(SCRIPT, tmp_path)  # it runs alone
    (tmp_path / "bitsandbytes").mkdir()  # a folder of this name where it is called is not what is probed
    (tmp_path / "bitsandbytes/__init__.py").write_text("raise SystemExit(1)")
    clean = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    result = subprocess.run(["bash", SCRIPT.name], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    library = Path(bitsandbytes.__file__).parent / "libbitsandbytes_cpu.so"
    assert f"native library: {library}, on the CPU" in result.stdout
    assert "nothing to build" in result.stdout


def probe_text() -> str:
    return re.search(r"<<'PROBE'\n(.*?)\nPROBE\n", SCRIPT.read_text(), re.S)[1]


@pytest.fixture
def probe(monkeypatch):
    """Runs the probe in this process: None, or what it ended with."""
    from bitsandbytes import cextension

    monkeypatch.setenv("COMPUTE_BACKEND", "cpu")
    monkeypatch.setattr(cextension.lib, "_lib", cextension.lib._lib)  # which the probe exchanges

    def run():
        cextension.BNBNativeLibrary.__getattr__.cache_clear()  # else names asked for before would not be seen
        try:
            exec(compile(probe_text(), "probe", "exec"), {})
        except SystemExit as stop:
            return stop.code
        finally:
            logging.disable(logging.NOTSET)

    return run


def broken(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * float("nan")


def test_the_probe_passes_and_names_the_native_functions(probe, capsys):
    assert probe() is None
    printed = capsys.readouterr().out
    assert "cquantize_blockwise_cpu_fp32" in printed and "cdequantize_blockwise_cpu_nf4_fp32" in printed
    errors = [float(error) for error in re.findall(r"error (\S+)", printed)]
    assert len(errors) == 3 and 0.14 < errors[0] < 0.1521 and 0 < errors[1] < 0.02 and 0 <= errors[2] < 1e-5


def test_the_probe_finds_each_fault(probe, monkeypatch):
    import bitsandbytes as bnb
    from bitsandbytes import cextension

    with monkeypatch.context() as patch:
        patch.setattr(bnb.functional, "dequantize_4bit", broken(bnb.functional.dequantize_4bit))
        assert "nf4 quantize and dequantize" in probe() and "nan" in probe()
    with monkeypatch.context() as patch:
        patch.setattr(bnb.nn.Linear4bit, "forward", broken(bnb.nn.Linear4bit.forward))
        assert "4-bit decode of one token" in probe()
    with monkeypatch.context() as patch:
        patch.setattr(bnb.optim.PagedAdamW32bit, "step", lambda self: None)
        assert "step of paged AdamW" in probe()
    with monkeypatch.context() as patch:
        patch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("XPU/CPU can run without it."))
        assert "no native library was loaded: XPU/CPU can run without it." in probe()


def test_weights_may_decay_after_the_step_as_on_an_accelerator(probe, monkeypatch, capsys):
    import bitsandbytes as bnb

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            update = 0.01 * parameter.grad / (parameter.grad.abs() + 1e-8)
            parameter.data = (parameter.data - update) * (1 - 0.01 * 0.01)

    monkeypatch.setattr(bnb.optim.PagedAdamW32bit, "step", step)
    assert probe() is None
    assert 5e-7 < float(re.search(r"learning rate 0.01: error (\S+)", capsys.readouterr().out)[1]) < 2e-6


def test_without_a_visible_accelerator_the_library_for_rocm_must_load(probe, monkeypatch, tmp_path, capsys):
    import torch
    from bitsandbytes import cextension, cuda_specs

    library = tmp_path / "libbitsandbytes_rocm72.so"
    with monkeypatch.context() as patch:
        patch.setenv("COMPUTE_BACKEND", "hip")
        patch.setattr(torch.version, "hip", "7.2.53211")
        patch.setattr(cextension, "PACKAGE_DIR", tmp_path)
        cuda_specs.get_cuda_version_tuple.cache_clear()
        assert f"{library}: cannot open shared object file" in probe()
        shutil.copy(cextension.lib._lib._name, library)
        assert probe() is None
    cuda_specs.get_cuda_version_tuple.cache_clear()
    assert f"{library} loads. No accelerator is visible: nothing was computed" in capsys.readouterr().out


def test_a_library_that_is_loaded_but_not_used_does_not_pass(tmp_path):
    import bitsandbytes

    ignored = shutil.ignore_patterns("*_cuda*.so", "*_rocm*.so", "*_xpu*.so", "__pycache__")
    shutil.copytree(Path(bitsandbytes.__file__).parent, tmp_path / "bitsandbytes", ignore=ignored)
    ops = tmp_path / "bitsandbytes/backends/cpu/ops.py"
    condition = "if not isinstance(lib, ErrorHandlerMockBNBNativeLibrary):"
    assert condition in ops.read_text()
    ops.write_text(ops.read_text().replace(condition, "if False:"))  # plain PyTorch takes over
    result = subprocess.run(
        [sys.executable, "-c", probe_text()],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COMPUTE_BACKEND": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "native library: " in result.stdout and "did not use the native library" in result.stderr


@pytest.mark.skipif(not os.environ.get("BNB_SOURCE"), reason="builds for minutes; set BNB_SOURCE to try")
def test_a_real_build_from_source(tmp_path):
    """In an environment that sees the packages of this one, and gets cmake and the built package."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("*/site-packages"))
    (site / "packages.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    subprocess.run([python, "-m", "pip", "install", "cmake>=3.31.6"], check=True)
    settings = {"PYTHON": str(python), "COMPUTE_BACKEND": "cpu", "FORCE": "1"}
    result = subprocess.run(["bash", SCRIPT], env=os.environ | settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"native library: {site}/bitsandbytes/libbitsandbytes_cpu.so, on the CPU" in result.stdout
    assert [file.name for file in (site / "bitsandbytes").glob("*.so")] == ["libbitsandbytes_cpu.so"]
