"""00_check_gpu.py on machines that are not here (fake_machine.py), and with each fault seeded in turn."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
import torch
from conftest import ROOT, load, run
from fake_machine import GIB, H100, MI300X, RADEON, SITE, STRIX_HALO, Machine, torch_for

SCRIPT = ROOT / "scripts/00_check_gpu.py"
SCHEMA = json.loads((ROOT / "env/check-report.schema.json").read_text())
# Root may read whatever it likes, unless it gives that right away.
PLAIN_USER = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all"] if os.geteuid() == 0 else []


# What these machines import before the check begins, so that each of its probes is a fork: seconds less for each. What
# looks at no hardware is left out. The tests of the token and of an empty environment start real probes.
QUICK = """
import gc, runpy, subprocess, types
torch.compile = lambda function, **options: function
import bitsandbytes, torch._dynamo
gc.freeze()

for name in ("transformers", "datasets", "peft", "trl", "scipy", "accelerate", "tensorboard"):
    sys.modules[name] = types.ModuleType(name)
start = subprocess.Popen

class Fork:
    running = 0

    def __init__(self, command):
        end, beginning = os.pipe()
        Fork.running += 1
        busy = os.environ.get("FAKE_EXCLUSIVE") and Fork.running > 1  # the second process gets no accelerator
        self.number = os.fork()
        if not self.number:
            try:
                assert not busy
                os.dup2(beginning, 1)
                subprocess.Popen, sys.argv = start, list(map(str, command[1:]))
                runpy.run_path(command[1], run_name="__main__")
            finally:
                os._exit(1)
        os.close(beginning)
        self.printed = os.fdopen(end)

    def communicate(self, timeout):
        printed = self.printed.read()
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        Fork.running -= 1
        return printed, ""

def start_or_fork(command, **pipes):
    forked = "--probe" in command and command[-1] not in os.environ.get("REAL_PROBES", "")
    return Fork(command) if forked else start(command, **pipes)

subprocess.Popen = start_or_fork
"""


def make_quick(machine: Machine) -> Machine:
    machine.write("site/hardware.py", f"import sys\n{SITE}{QUICK}")
    machine.write("site/sitecustomize.py", 'import sys\nif "--probe" not in sys.orig_argv:\n    import hardware\n')
    return machine


def without_permission(machine: Machine) -> Machine:
    (machine.root / "dev/kfd").chmod(0)
    return machine


# name: machine, exit status, and the cause and the command of each finding, in order
MACHINES = {
    "MI300X": (lambda root: Machine(root, torch_for("7.2", gpus=[MI300X])).add_amd(), 0, []),
    "MI300X with CUDA torch": (
        lambda root: Machine(root, torch_for(cuda="13.0")).add_amd(),
        1,
        [("is built for CUDA 13.0, this is an AMD machine", "make setup BACKEND=rocm")],
    ),
    "no permission": (
        lambda root: without_permission(Machine(root, torch_for("7.2")).add_amd()),
        1,
        [("no permission to read and write /dev/kfd", "sudo usermod -a -G video,render $USER")],
    ),
    "four GPUs": (
        lambda root: Machine(root, torch_for("7.2", gpus=[{**MI300X, "free": 9 * GIB}, *[MI300X] * 3])).add_amd(4),
        2,
        [
            ("4 accelerators are visible", "export HIP_VISIBLE_DEVICES=1"),
            ("183 of 192 GiB of the accelerator's memory are taken", "amd-smi process"),
        ],
    ),
    "ROCm 10 without rocm-smi": (
        lambda root: Machine(root, torch_for("7.2", gpus=[MI300X])).add_amd(rocm="10.0.0", tools=("amd-smi",)),
        2,
        [("built for ROCm 7.2, the system has 10.0.0", "make setup BACKEND=rocm TORCH_INDEX=amd")],
    ),
    "ROCm 10 and its torch": (
        lambda root: Machine(root, torch_for("10.1", gpus=[MI300X])).add_amd(rocm="10.1.0", tools=("amd-smi",)),
        1,
        [("no native library of bitsandbytes for ROCm 10.1 could be loaded", "make bitsandbytes")],
    ),
    "Radeon RX 7900 XTX": (lambda root: Machine(root, torch_for("7.2", gpus=[RADEON])).add_amd(gpu=RADEON), 0, []),
    "Strix Halo": (
        lambda root: (
            Machine(root, torch_for("7.2", gpus=[STRIX_HALO]))
            .add_amd(gpu=STRIX_HALO)
            .add_memory(110, 125, vram_total=0.5, vram_used=0.25, gtt_total=62, gtt_used=2)
        ),
        2,
        [
            ("may take 62 of 125 GiB of the memory it shares", "pipx install amd-debug-tools; amd-ttm --set 109"),
            ("attention keeps all its scores", "export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1"),
        ],
    ),
    "wrong arithmetic": (
        lambda root: Machine(root, torch_for("7.2", gpus=[MI300X]), FAKE_BROKEN="1").add_amd(),
        1,
        [
            (f"{probe} on the accelerator", "amd-smi")
            for probe in ("matmul_fp32", "matmul_bf16", "attention", "attention_bf16")
        ]
        + [(probe, "make bitsandbytes") for probe in ("optimizer", "quantize", "decode_4bit")],
    ),
    "H100": (lambda root: Machine(root, torch_for(cuda="13.0", gpus=[H100])).add_nvidia(), 0, []),
    "H100 for one process, driver 610": (
        lambda root: Machine(root, torch_for(cuda="13.0", gpus=[H100]), FAKE_EXCLUSIVE="1").add_nvidia(
            "610.43.02", "Exclusive_Process"
        ),
        0,
        [],
    ),
    "H100 with TF32": (
        lambda root: Machine(root, torch_for(cuda="13.0", gpus=[H100]), NVIDIA_TF32_OVERRIDE="1").add_nvidia(),
        2,
        [("in TF32, 10 of 23 bits: NVIDIA_TF32_OVERRIDE is 1", "unset NVIDIA_TF32_OVERRIDE")],
    ),
    "CPU": (lambda root: Machine(root, torch_for()), 0, []),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the check printed and reported of each machine."""

    def examine(name):
        root = tmp_path_factory.mktemp("machine")
        machine = make_quick(MACHINES[name][0](root))
        environment = {key: value for key, value in os.environ.items() if "VISIBLE_DEVICES" not in key}
        environment |= {**machine.environment, "HF_HOME": str(root / "hub"), "HF_TOKEN": ""}
        prefix = PLAIN_USER if name == "no permission" else []
        command = [*prefix, sys.executable, SCRIPT, "--root", root, "--output", root / "report.json"]
        result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
        return result, json.loads((root / "report.json").read_text())

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(MACHINES, pool.map(examine, MACHINES), strict=True))


@pytest.mark.parametrize("name", MACHINES)
def test_verdict_cause_and_command_of_each_machine(name, results):
    _, status, expected = MACHINES[name]
    result, report = results[name]
    # The disk of the machine under test is what it is.
    findings = [finding for finding in report["findings"] if "of disk are free" not in finding["cause"]]
    status = status or 2 * (len(findings) < len(report["findings"]))
    assert len(findings) == len(expected), result.stdout + result.stderr
    for finding, (cause, command) in zip(findings, expected, strict=True):
        assert cause in finding["cause"] and finding["command"].startswith(command)
        assert f"{finding['level']}: {finding['cause']}\n    type: {finding['command']}\n" in result.stdout
    assert result.returncode == status
    assert report["verdict"] == {0: "ready", 1: "not ready", 2: "ready, with warnings"}[status]
    jsonschema.validate(report, SCHEMA)


def test_the_tutorials_lines_and_what_the_system_says(results):
    printed = results["four GPUs"][0].stdout
    assert "Is a ROCm-GPU detected?  True\nHow many ROCm-GPUs are detected?  4\n" in printed
    assert "  cuda:3  AMD Instinct MI300X  gfx942  191 of 192 GiB free\n" in printed
    assert "MARKET_NAME: AMD Instinct MI300X" in printed
    system = results["ROCm 10 without rocm-smi"][1]["system"]
    assert system["tool"] == "amd-smi" and system["amd"]["rocm"] == "10.0.0" and system["amd"]["driver"] == "6.16.6"
    assert system["amd"]["gpus"] == [{"arch": "gfx942", "memory_bytes": 192 * GIB}]
    assert results["MI300X"][1]["probes"]["bitsandbytes"]["facts"]["built_for"] == "rocm72"
    nvidia = {"gpus": [H100["name"]], "driver": "580.95.05", "cuda": "13.0", "exclusive": False}
    assert results["H100"][1]["system"]["nvidia"] == nvidia
    nvidia |= {"driver": "610.43.02", "exclusive": True}
    assert results["H100 for one process, driver 610"][1]["system"]["nvidia"] == nvidia
    assert "Is a GPU detected?  False" in results["CPU"][0].stdout
    printed = results["Radeon RX 7900 XTX"][0].stdout
    assert "  cuda:0  AMD Radeon RX 7900 XTX  gfx1100  23 of 24 GiB free\n" in printed
    assert "AMD: driver 6.16.6, ROCm 7.2.0, gfx1100\n" in printed
    # VRAM and GTT, and not the carve-out alone
    assert "  cuda:0  AMD Radeon 8060S  gfx1151  60 of 62 GiB free\n" in results["Strix Halo"][0].stdout


def test_what_the_recipes_compute_is_probed(results):
    for name, keeps in (("MI300X", False), ("Strix Halo", True), ("CPU", None)):
        result, report = results[name]
        facts = report["probes"]["attention_bf16"]["facts"]
        assert facts["keeps_scores"] is keeps and 0 < facts["difference"] < facts["bound"]
        speed = report["probes"]["optimizer"]["facts"]["gb_per_second"]
        shown = re.search(rf"optimizer +passed .*, {speed:.1f} GB/s\n", result.stdout)
        assert speed > 0 and bool(shown) == (name != "CPU")  # where nothing is paged
    facts = results["H100 with TF32"][1]["probes"]["matmul_fp32"]["facts"]
    assert 1e-3 < facts["difference"] < facts["bound"]  # more than fp32 may be off


@pytest.mark.parametrize(
    ("masked", "shared", "wrong"),
    [(True, False, "output"), (False, True, "output"), (True, True, "gradient"), (False, False, "gradient")],
)
def test_attention_is_probed_with_a_mask_and_without_and_with_shared_key_heads(masked, shared, wrong, monkeypatch):
    script, attend = load("00_check_gpu.py"), torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")

    def attend_wrongly(query, key, value, **options):
        result = attend(query, key, value, **options)
        here = (options["attn_mask"] is not None, options["enable_gqa"]) == (masked, shared)
        if here and query.shape[2] % 128 == 64:
            assert query.mean() * key.mean() * 64 / 8 < -100  # very negative scores
            result = result * 2 if wrong == "output" else result + (query - query.detach())
        return result

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend_wrongly)
    with pytest.raises(ArithmeticError, match="the result is wrong"):
        script.PROBES["attention_bf16"]()


@pytest.mark.parametrize(
    ("tools", "asked"),
    [
        ({"amd-smi": 0, "rocm-smi": 0}, "amd-smi"),
        ({"amd-smi": 1, "rocm-smi": 0}, "rocm-smi"),
        ({"nvidia-smi": 0}, "nvidia-smi"),
        ({"nvidia-smi": 9}, None),
    ],
)
def test_product_names_come_from_the_first_tool_that_works(tools, asked, tmp_path):
    machine = Machine(tmp_path, torch_for())
    for name, status in tools.items():
        machine.add_tool(name, f"echo '{name} sees it'; exit {status}")
    system = load("00_check_gpu.py").look_at_system(tmp_path)
    assert (system["tool"], system["products"]) == (asked, [f"{asked} sees it"] if asked else [])


def test_a_radeon_is_seen_by_its_architecture_and_on_the_bus(tmp_path):
    machine = Machine(tmp_path, torch_for()).add_amd(gpu=RADEON)
    machine.write("sys/bus/pci/devices/0000:09:00.0/vendor", "0x1002\n")
    machine.write("sys/bus/pci/devices/0000:09:00.0/class", "0x038000\n")
    machine.write("sys/bus/pci/devices/0000:09:00.1/vendor", "0x1002\n")
    machine.write("sys/bus/pci/devices/0000:09:00.1/class", "0x040300\n")  # the sound of its display port
    amd = load("00_check_gpu.py").look_at_system(tmp_path)["amd"]
    assert amd["gpus"] == [{"arch": "gfx1100", "memory_bytes": 24 * GIB}]
    assert (amd["on_pci_bus"], amd["graphics_on_pci_bus"]) == (0, 2)


LOOK = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("check", sys.argv[1])
sys.modules["check"] = check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)
print(check.look_at_system(pathlib.Path(sys.argv[2]))["amd"]["no_permission"])
"""
HEALTHY = {
    "platform": "", "container": False, "tool": None, "products": [], "variables": {},
    "amd": {"kfd": True, "gpus": [], "on_pci_bus": 1, "graphics_on_pci_bus": 0, "driver": None, "rocm": "7.2.0",
            "no_permission": []},
    "nvidia": {"gpus": [], "driver": None, "cuda": None, "exclusive": False},
}  # fmt: skip
NO_AMD = {"amd": {**HEALTHY["amd"], "kfd": False, "on_pci_bus": 0, "rocm": None}}
NVIDIA = {**NO_AMD, "nvidia": {"gpus": ["H100"], "driver": "550.1", "cuda": "12.4", "exclusive": False}}
RADEON_ALONE = {"amd": {**NO_AMD["amd"], "graphics_on_pci_bus": 1}}
GPU = {"name": "MI300X", "memory_bytes": 192 * GIB, "free_bytes": 191 * GIB, "arch": "gfx942"}
ROCM = {
    "version": "2.13.0+rocm7.2",
    "hip": "7.2",
    "cuda": None,
    "available": True,
    "gpus": [GPU],
    "arch_list": ["gfx942"],
    "preinstalled": False,
}
H100_CUDA = {**ROCM, "hip": None, "cuda": "13.0", "gpus": [{**GPU, "arch": ""}]}
BLIND = {**ROCM, "available": False, "gpus": []}
CUDA = {**BLIND, "version": "2.13.0", "hip": None, "cuda": "13.0"}
CPU = {**BLIND, "version": "2.13.0+cpu", "hip": None}


@pytest.mark.parametrize(
    ("system", "torch", "require", "level", "cause", "command"),
    [
        ({"amd": {**HEALTHY["amd"], "kfd": False}}, BLIND, "auto", "error", "amdgpu is not loaded", "sudo modprobe"),
        ({"amd": {**HEALTHY["amd"], "kfd": False}, "container": True}, BLIND, "auto", "error",
         "the container was not given it", "docker run --device /dev/kfd"),
        ({"amd": {**HEALTHY["amd"], "no_permission": ["/dev/kfd"]}, "container": True}, BLIND, "gpu", "error",
         "no permission to read and write /dev/kfd", "docker run --group-add video"),
        ({}, CPU, "auto", "error", "built for the CPU alone, this is an AMD machine", "make setup BACKEND=rocm"),
        ({}, CPU, "cpu", "warning", "built for the CPU alone, this is an AMD machine", "make setup BACKEND=rocm"),
        ({}, BLIND, "gpu", "error", "finds no accelerator on this AMD machine", "amd-smi list"),
        ({"variables": {"HIP_VISIBLE_DEVICES": "7"}}, BLIND, "auto", "error", "HIP_VISIBLE_DEVICES='7' is set",
         "unset HIP_VISIBLE_DEVICES"),
        ({"variables": {"HSA_OVERRIDE_GFX_VERSION": "11.0.0"}}, ROCM, "auto", "warning",
         "HSA_OVERRIDE_GFX_VERSION=11.0.0", "unset HSA_OVERRIDE_GFX_VERSION"),
        ({"amd": {**HEALTHY["amd"], "gpus": [{"arch": "gfx1103"}]}, "variables": {"HSA_OVERRIDE_GFX_VERSION": "9.4.2"}},
         ROCM, "auto", "warning", "makes gfx1103 pass for another",
         "make setup BACKEND=rocm TORCH_INDEX=amd; unset HSA_OVERRIDE_GFX_VERSION"),
        ({"amd": {**HEALTHY["amd"], "gpus": [{"arch": "gfx942"}]}, "variables": {"HSA_OVERRIDE_GFX_VERSION": "9.4.2"}},
         ROCM, "auto", "warning", "makes gfx942 pass for another", "unset HSA_OVERRIDE_GFX_VERSION"),
        (RADEON_ALONE, BLIND, "gpu", "error", "1 AMD accelerator(s) on the PCI bus, but no /dev/kfd", "sudo modprobe"),
        ({"amd": {**RADEON_ALONE["amd"], "kfd": True}}, CPU, "gpu", "error",
         "built for the CPU alone, this is an AMD machine", "make setup BACKEND=rocm"),
        (NVIDIA | RADEON_ALONE, CPU, "gpu", "error", "built for the CPU alone, this is an NVIDIA machine",
         "make setup BACKEND=cuda"),
        (RADEON_ALONE, CUDA, "gpu", "error", "there is no accelerator here", "make setup BACKEND=cpu"),
        ({}, {**ROCM, "arch_list": ["gfx1100"]}, "auto", "error", "has kernels for gfx1100, not for gfx942",
         "make setup BACKEND=rocm TORCH_INDEX=amd"),
        ({"amd": {**HEALTHY["amd"], "rocm": "6.4"}}, ROCM, "auto", "warning", "for ROCm 7.2, the system has 6.4",
         "update ROCm, https://rocm.docs.amd.com"),
        ({"variables": {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}}, ROCM, "auto", "warning",
         "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is 1", "unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
        ({"variables": {"HIP_VISIBLE_DEVICES": "4,5"}}, {**ROCM, "gpus": [{**GPU, "free_bytes": 190 * GIB}, GPU]},
         "auto", "error", "2 accelerators are visible; the trainer takes one alone", "export HIP_VISIBLE_DEVICES=5"),
        ({**NVIDIA, "variables": {"CUDA_VISIBLE_DEVICES": "0"}}, CUDA, "auto", "error",
         "driver 550.1 is for CUDA 12.4, PyTorch needs 13.0", "update the driver"),
        (NVIDIA, BLIND, "auto", "error", "built for ROCm 7.2, this is an NVIDIA machine",
         "make setup BACKEND=cuda"),
        (NVIDIA, CUDA, "auto", "error", "driver 550.1 is for CUDA 12.4, PyTorch needs 13.0",
         "update the driver, https://www.nvidia.com/drivers   (or: make setup BACKEND=cuda TORCH_INDEX=cu126)"),
        (NO_AMD, CPU, "gpu", "error", "there is no accelerator here", "make setup BACKEND=cpu"),
    ],
)  # fmt: skip
def test_each_fault_of_the_system_is_found(system, torch, require, level, cause, command):
    script = load("00_check_gpu.py")
    assert not list(script.judge_system(HEALTHY, ROCM, "auto"))
    (finding,) = script.judge_system(HEALTHY | system, torch, require)
    assert finding.level == level and cause in finding.cause and finding.command.startswith(command)


@pytest.mark.parametrize(
    ("system", "torch", "require"),
    [
        ({"nvidia": NVIDIA["nvidia"], "amd": {**HEALTHY["amd"], "on_pci_bus": 0}}, H100_CUDA, "gpu"),
        ({"amd": {**HEALTHY["amd"], "on_pci_bus": 0, "gpus": [{"arch": "gfx1103"}]}}, CPU, "auto"),
        ({"nvidia": NVIDIA["nvidia"]}, H100_CUDA, "gpu"),
        (NO_AMD, CPU, "auto"),
        ({"variables": {"HIP_VISIBLE_DEVICES": "3"}}, ROCM, "gpu"),
        (RADEON_ALONE, CPU, "auto"),
        (NVIDIA | RADEON_ALONE, H100_CUDA, "gpu"),
        ({"variables": {"NVIDIA_TF32_OVERRIDE": "0"}}, ROCM, "gpu"),
    ],
    ids=["NVIDIA beside AMD graphics", "AMD graphics without ROCm", "NVIDIA beside AMD", "CPU", "one device chosen",
         "AMD graphics without driver", "NVIDIA beside AMD graphics without driver", "TF32 switched off"],
)  # fmt: skip
def test_a_system_without_fault_is_found_to_have_none(system, torch, require):
    assert not list(load("00_check_gpu.py").judge_system(HEALTHY | system, torch, require))


def test_render_nodes_of_other_graphics_are_nobodys_business(tmp_path):
    machine = Machine(tmp_path, torch_for()).add_amd()
    machine.write("dev/dri/renderD200").chmod(0)
    machine.write("sys/class/drm/renderD200/device/vendor", "0x8086\n")
    command = [*PLAIN_USER, sys.executable, "-c", LOOK, str(SCRIPT), str(tmp_path)]
    look = subprocess.run(command, capture_output=True, text=True)
    assert look.stdout == "[]\n", look.stderr
    (tmp_path / "dev/dri/renderD128").chmod(0)
    assert subprocess.run(command, capture_output=True, text=True).stdout == "['/dev/dri/renderD128']\n"


def test_usage_errors_are_no_warnings(tmp_path):
    result = run("00_check_gpu.py", "--require", "nonsense", cwd=tmp_path)
    assert result.returncode == 1 and "invalid choice" in result.stderr and len(result.stderr.splitlines()) == 1


def passed(**facts) -> dict:
    return {"status": "passed", "seconds": 1, "facts": facts}


def failed(error: str) -> dict:
    return {"status": "failed", "seconds": 1, "error": error}


@pytest.mark.parametrize(
    ("probes", "variables", "level", "cause", "command"),
    [
        ({"packages": passed(versions={}, missing={"trl": "ModuleNotFoundError"})}, {}, "error",
         "missing or broken: trl (ModuleNotFoundError)", f"make setup   (or: {sys.executable} -m pip install trl=="),
        ({"packages": passed(versions={"peft": "0.1", "torch": "2.1"}, missing={})}, {}, "warning",
         "peft 0.1 instead of 0.21.2", f"make setup   (or: {sys.executable} -m pip install peft==0.21.2)"),
        ({"packages": failed("status 1")}, {}, "error", "importing the packages: status 1", "make setup"),
        ({"torch": failed("signal 11")}, {}, "error", "PyTorch does not work: signal 11", "make setup"),
        ({"attention": failed("no end")}, {}, "error", "attention on the accelerator: no end", "amd-smi"),
        ({"bitsandbytes": failed("no native library")}, {"BNB_ROCM_VERSION": "60"}, "error",
         "BNB_ROCM_VERSION=60 is set", "unset BNB_ROCM_VERSION"),
        ({"bitsandbytes": passed(library="lib_rocm71.so", built_for="rocm71", torch_for="rocm72")}, {}, "warning",
         "took its library for rocm71, PyTorch is built for rocm72", "make bitsandbytes FORCE=1"),
        ({"decode_4bit": failed("off by nan")}, {}, "error", "decode_4bit with lib_rocm72.so: off by nan", "make bits"),
        ({"attention_bf16": failed("off by nan")}, {}, "error", "attention_bf16 on the accelerator: off by", "amd-smi"),
        ({"attention_bf16": passed(keeps_scores=True)}, {}, "warning", "attention keeps all its scores",
         "make train-lora ARGS='--attn_implementation flex_attention'"),
        ({"hub": failed("no access to meta/Llama: GatedRepoError")}, {}, "error", "no access to meta/Llama",
         "ask for access at https://huggingface.co/meta/Llama, then HF_TOKEN= in .env"),
    ],
)  # fmt: skip
def test_each_fault_that_a_probe_shows_is_found(probes, variables, level, cause, command):
    script = load("00_check_gpu.py")
    healthy = {name: passed() for name in script.PROBES}
    healthy["packages"] = passed(versions=script.PINS, missing={})
    healthy["bitsandbytes"] = passed(library="lib_rocm72.so", built_for="rocm72", torch_for="rocm72")
    assert not list(script.judge_probes(healthy, ROCM, {}))
    (finding,) = script.judge_probes(healthy | probes, ROCM, variables)
    assert finding.level == level and cause in finding.cause and finding.command.startswith(command)


@pytest.mark.parametrize(
    ("arch", "variables", "mend"),
    [
        ("gfx1100", {}, "export TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1"),
        ("gfx1201", {"TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "0"}, "export TORCH_ROCM_"),
        ("gfx908", {}, "export TORCH_ROCM_"),
        ("gfx942", {}, "make train-lora ARGS='--attn_implementation"),
        ("gfx1201", {"TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL": "1"}, "make train-lora ARGS='--attn_implementation"),
    ],
)
def test_where_scores_are_kept_the_command_is_what_gives_that_device_other_kernels(arch, variables, mend):
    script = load("00_check_gpu.py")
    probes = {name: passed() for name in script.PROBES} | {"attention_bf16": passed(keeps_scores=True)}
    probes["packages"] = passed(versions=script.PINS, missing={})
    (finding,) = script.judge_probes(probes, ROCM | {"gpus": [{**GPU, "arch": arch}]}, variables)
    assert finding.level == "warning" and finding.command.startswith(mend)


@pytest.mark.parametrize(
    ("memory", "torch", "expected"),
    [
        ((100, 125, dict(vram_total=0.5, vram_used=0.5, gtt_total=110, gtt_used=3)), ROCM, (100, 110)),
        ((120, 125, dict(vram_total=0.5, vram_used=0.25, gtt_total=110, gtt_used=30)), ROCM, (80, 110)),
        ((28, 30, dict(vram_total=96, vram_used=6, gtt_total=15, gtt_used=1)), ROCM, (90, 96)),  # GTT is not taken then
        ((120, 125, dict(vram_total=0.5, vram_used=0.5, gtt_total=128, gtt_used=3)), ROCM, (120, 125)),
        ((120, 125, dict(vram_total=1, vram_used=0, gtt_total=120, gtt_used=2, limit=62)), ROCM, (60, 62)),
        ((50, 125, {}), ROCM, (50, 62)),  # as in a container without /sys
        ((90, 119, {}), H100_CUDA, (62, 62)),
        ((50, 119, {}), H100_CUDA, (50, 62)),
    ],
)
def test_memory_that_is_shared_is_counted_once_and_as_it_is(memory, torch, expected, tmp_path):
    script, predict = load("00_check_gpu.py"), load("chain/predict_memory.py")
    machine = Machine(tmp_path, torch_for()).add_memory(*memory[:2], **memory[2])
    if memory[2].get("vram_total") == 0.5:  # a Radeon beside it
        for kind, size in {"vram_total": 24, "vram_used": 1, "gtt_total": 62, "gtt_used": 0}.items():
            machine.write(f"sys/class/drm/renderD130/device/mem_info_{kind}", f"{size * GIB}\n")
    if "limit" in memory[2]:
        machine.write("sys/module/ttm/parameters/pages_limit", f"{memory[2]['limit'] * 2**18}\n")
    machine.write("sys/class/drm/renderD129/device/vendor", "0x8086\n")
    gpu = {"name": "shares", "memory_bytes": 62 * GIB, "free_bytes": 120 * GIB, "arch": "", "integrated": True}
    facts = torch | {"gpus": [gpu, {**GPU, "integrated": False}, {**GPU, "integrated": True}]}
    assert predict.find_memory(json.loads(json.dumps(facts)), tmp_path) == ("gpu", "shares", expected[0] * GIB)
    shares, *others = script.share_memory(facts, tmp_path)["gpus"]
    assert (shares["free_bytes"] / GIB, shares["memory_bytes"] / GIB) == expected
    assert [(gpu["free_bytes"], gpu["memory_bytes"]) for gpu in others] == [(191 * GIB, 192 * GIB)] * 2


@pytest.mark.parametrize(
    ("free", "memory", "ram", "warned"), [(10, 62, 125, True), (10, 110, 125, False), (3, 8, 15, False)]
)
def test_shared_memory_that_others_use_is_not_taken_and_half_of_a_large_one_is_little(free, memory, ram, warned):
    gpu = {**GPU, "free_bytes": free * GIB, "memory_bytes": memory * GIB, "ram_bytes": ram * GIB}
    findings = [*load("00_check_gpu.py").judge_system(HEALTHY, ROCM | {"gpus": [gpu]}, "auto")]
    assert ["amd-ttm --set 109" in finding.command for finding in findings] == [True] * warned


def test_the_torch_of_an_image_may_be_another_and_that_of_amds_index():
    script = load("00_check_gpu.py")
    probes = {name: passed() for name in script.PROBES}
    probes["packages"] = passed(versions=script.PINS | {"torch": "2.10.0+rocm7.2.4"}, missing={})
    probes["bitsandbytes"] = passed(library="lib_rocm72.so", built_for="rocm72", torch_for="rocm72")
    assert not list(script.judge_probes(probes, ROCM | {"preinstalled": True}, {}))
    (finding,) = script.judge_probes(probes, ROCM, {})
    assert "torch 2.10.0+rocm7.2.4 instead of" in finding.cause and finding.command == "make setup"
    probes["packages"]["facts"]["versions"]["torch"] = script.AMD_TORCH
    assert not list(script.judge_probes(probes, ROCM | {"version": script.AMD_TORCH}, {}))
    assert script.AMD_TORCH in (ROOT / "env/setup.sh").read_text()


def test_a_probe_that_crashes_or_hangs_is_a_finding_and_not_the_end(tmp_path):
    text = SCRIPT.read_text()
    for name, fault in (("matmul_fp32", "os.abort()"), ("attention", "time.sleep(600)")):
        start = re.search(rf"def probe_{name}\(dtype.*\n", text)[0]
        text = text.replace(start, f"{start}    dtype == 'float32' and {fault}\n")
    (tmp_path / "check.py").write_text(text)
    quick = make_quick(Machine(tmp_path, torch_for(), REAL_PROBES="matmul_fp32 attention")).environment
    result = run(tmp_path / "check.py", "--timeout", "5", "--output", "report.json", cwd=tmp_path, **quick)
    probes = json.loads((tmp_path / "report.json").read_text())["probes"]
    assert result.returncode == 1
    assert (probes["matmul_fp32"]["status"], probes["attention"]["status"]) == ("crashed", "timed out")
    assert "error: matmul_fp32 on the CPU: it ended with signal 6" in result.stdout
    assert "error: attention on the CPU: it did not end within 5 s" in result.stdout
    assert probes["packages"]["status"] == probes["optimizer"]["status"] == "passed"


def test_where_nothing_is_installed_that_is_the_finding(tmp_path):
    venv.create(tmp_path / "empty", symlinks=True)
    shutil.copy(SCRIPT, tmp_path)
    command = [tmp_path / "empty/bin/python", "00_check_gpu.py", "--output", "report.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert result.returncode == 1 and result.stderr == ""
    assert "error: missing or broken: torch (ModuleNotFoundError" in result.stdout
    assert "-m pip install transformers==" in result.stdout and "install torch" not in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    jsonschema.validate(report, SCHEMA)
    assert report["torch"] is None and set(report["missing"]) == set(load("00_check_gpu.py").PINS)


def test_the_real_probes_pass_here_and_the_token_is_said_to_be_there_and_never_shown(tmp_path):
    (tmp_path / ".env").write_text("HF_TOKEN=hf_planted_token\n")
    result = run("00_check_gpu.py", "--output", "report.json", cwd=tmp_path, HF_HOME=str(tmp_path / "hub"))
    report = (tmp_path / "report.json").read_text()
    assert json.loads(report)["token"] is True and "Hugging Face token: there" in result.stdout
    assert all(probe["status"] == "passed" for probe in json.loads(report)["probes"].values()), result.stdout
    assert "planted" not in report + result.stdout + result.stderr


def test_pins_are_those_of_the_environment():
    stated = {}
    for file in ("requirements.txt", "requirements-torch.txt"):
        for line in (ROOT / "env" / file).read_text().splitlines():
            requirement, _, marker = line.partition("; ")
            older = sys.version_info < (3, 11)
            if "==" in requirement and (not marker or older == ("<" in marker)):
                name, version = requirement.split("==")
                stated[name] = version
    pins = load("00_check_gpu.py").PINS
    assert pins == {name: stated[name] for name in pins}
