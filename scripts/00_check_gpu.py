# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""Find out whether this machine is ready for the tutorial, and which model fits it.

    python 00_check_gpu.py                                   what is wrong, and the command that mends it
    python 00_check_gpu.py --model MODEL [--memory 192]      what fits: peak memory of LoRA, QLoRA and full fine-tuning
    python 00_check_gpu.py --model MODEL --method lora -- --max_length 512 --lora_r 16      the same of one training

Needs nothing installed: what is missing is a finding. What may crash or hang runs in a process of its own (a probe).
MODEL is a folder, or a hub id, which needs huggingface-hub. After -- stand options of the training scripts, --config
FILE.yaml among them.
Writes  a JSON report to --output, if given.
Exits   with status 0: ready, 1: not ready, 2: ready, with warnings, 3: the one training does not fit.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# The tutorial's packages, and those that its libraries need for it: the versions that were tested together.
PINS = {
    "torch": "2.13.0", "transformers": "5.23.0", "datasets": "5.2.0", "peft": "0.21.2", "trl": "1.16.0",
    "bitsandbytes": "0.50.2", "huggingface-hub": "2.4.0", "scipy": "1.17.1", "accelerate": "1.15.0",
    "python-dotenv": "1.2.4", "tensorboard": "2.21.0",
}  # fmt: skip
if sys.version_info < (3, 11):
    PINS |= {"transformers": "5.20.2", "trl": "1.14.2", "scipy": "1.15.3"}
MODULES = {"huggingface-hub": "huggingface_hub", "python-dotenv": "dotenv"}
# Product names: the first of these tools that is there and works is asked. rocm-smi does not come with ROCm 10.
TOOLS = (
    ["amd-smi", "static", "--asic"],
    ["rocm-smi", "--showproductname"],
    ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv"],
)
# Environment variables that hide accelerators, or make one pass for another.
VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
OVERRIDES = ("HSA_OVERRIDE_GFX_VERSION", "BNB_ROCM_VERSION", "BNB_CUDA_VERSION")
# For what PyTorch's index has no build of: AMD's own, with the kernels of a device as an extra.
AMD_INDEX = (
    "make setup BACKEND=rocm TORCH_INDEX=https://repo.amd.com/rocm/whl-multi-arch/ 'TORCH_VERSION=torch[device-{}]'"
)
FREE_DISK = 10e9  # bytes: the environment, the embedded model and what the steps leave take about 7e9

# What decides about memory among the options of a training, with the tutorial's values.
SETTINGS = {
    "dtype": "float32", "bf16": False, "load_in_4bit": False, "load_in_8bit": False, "use_bnb_nested_quant": False,
    "token_metrics": False, "packing": False,
    "lora_r": 64, "lora_dropout": 0.1, "lora_target_modules": ["q_proj", "v_proj"], "gradient_checkpointing": False,
    "optim": "paged_adamw_32bit", "per_device_train_batch_size": 4, "max_length": 1024,
}  # fmt: skip
QLORA = {
    "load_in_4bit": True, "use_bnb_nested_quant": True, "lora_target_modules": ["all-linear"],
    "gradient_checkpointing": True,
}  # fmt: skip
METHODS = {
    "LoRA, fp32 (the tutorial)": ("lora", {}),
    "LoRA, bf16": ("lora", {"dtype": "bfloat16", "bf16": True}),
    "QLoRA (RECIPE=qlora)": ("lora", QLORA),
    "full, fp32 (the tutorial)": ("full", {}),
    "full, bf16 autocast": ("full", {"bf16": True}),
}


@dataclass
class Finding:
    level: str  # error or warning
    cause: str
    command: str


# Probes: each runs in a process of its own and returns what it found -------------------------------------------------
def probe_torch() -> dict:
    """What PyTorch was built for, and the accelerators that it finds; memory in bytes."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            free, _ = torch.cuda.mem_get_info(index)
        except Exception:  # one full or broken device of several is no reason to say nothing of the others
            free = 0
        gpus.append({"name": properties.name, "memory_bytes": properties.total_memory, "free_bytes": free})
        gpus[-1]["arch"] = properties.gcnArchName.split(":")[0] if torch.version.hip else ""
    available = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "preinstalled": not Path(torch.__file__).is_relative_to(sys.prefix),
        "hip": torch.version.hip,
        "cuda": torch.version.cuda,
        "available": available,
        "gpus": gpus,
        "arch_list": torch.cuda.get_arch_list() if available else [],
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if available else None,
    }


def probe_packages() -> dict:
    """Versions of the packages that import, and for the others the reason."""
    versions, missing = {}, {}
    for package in PINS:
        try:
            importlib.import_module(MODULES.get(package, package))
            versions[package] = importlib.metadata.version(package)
        except Exception as error:  # a broken package may raise anything at import
            missing[package] = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"versions": versions, "missing": missing}


def probe_bitsandbytes() -> dict:
    """The native library that bitsandbytes loaded, and those that it and PyTorch were built for: rocm72, cuda130."""
    import torch
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, get_available_cuda_binary_versions, lib

    wanted = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        wanted = wanted if torch.version.hip or torch.cuda.is_available() else "the CPU"
        there = ", ".join(get_available_cuda_binary_versions()) or "none"
        raise RuntimeError(f"no native library of bitsandbytes for {wanted} could be loaded (versions there: {there})")
    name = Path(lib._lib._name).name
    built = re.search(r"(rocm|cuda)\d+", name)
    kind, version = wanted.lower().split()
    needed = kind + "".join(version.split(".")[:2])
    return {"library": name, "built_for": built and built[0], "torch_for": built and needed}


def within_bound(found, expected, bound: float) -> dict:
    """The largest difference, as a share of the spread (standard deviation) of what was expected."""
    difference = ((found.double().cpu() - expected).abs().max() / expected.std()).item()
    if not difference <= bound:  # NaN too
        raise ArithmeticError(f"the result is wrong: off by {difference:.3g} of its spread, {bound:g} is allowed")
    return {"difference": difference, "bound": bound}


def normal(*shape: int):
    import torch

    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def probe_matmul_fp32() -> dict:
    a, b = normal(256, 512), normal(512, 256)
    return within_bound(a.float().to(device()) @ b.float().to(device()), a @ b, 1e-3)


def probe_matmul_bf16() -> dict:
    a, b = normal(256, 512), normal(512, 256)
    return within_bound(a.bfloat16().to(device()) @ b.bfloat16().to(device()), a @ b, 0.05)


def probe_backward() -> dict:
    weight, rows = normal(64, 128), normal(256, 128)

    def gradient(weight, rows):
        weight = weight.detach().requires_grad_()
        (rows @ weight.T).tanh().square().sum().backward()
        return weight.grad

    return within_bound(gradient(weight.float().to(device()), rows.float().to(device())), gradient(weight, rows), 1e-3)


def probe_attention() -> dict:
    """torch's scaled_dot_product_attention against the formula."""
    import torch

    query, key, value = normal(3, 2, 4, 96, 64)
    scores = (query @ key.mT / 8).masked_fill(torch.ones(96, 96).triu(1).bool(), float("-inf"))
    inputs = [tensor.float().to(device()) for tensor in (query, key, value)]
    found = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
    return within_bound(found, scores.softmax(-1) @ value, 1e-3)


def probe_optimizer() -> dict:
    """One step of the tutorial's paged_adamw_32bit: the first one is lr in the direction of the gradient's sign. The
    state is paged from 100,000 values on.
    """
    import bitsandbytes
    import torch

    start, gradient = normal(2, 512, 256)
    weight = torch.nn.Parameter(start.float().to(device()))
    weight.grad = gradient.float().to(device())
    bitsandbytes.optim.PagedAdamW32bit([weight], lr=0.01, weight_decay=0.0).step()
    return within_bound(weight.detach(), start - 0.01 * gradient / (gradient.abs() + 1e-8), 1e-3)


def probe_quantize() -> dict:
    """4-bit NormalFloat and back: the largest gap between two of its 16 values is 0.3 of a block's largest weight."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = normal(256, 256)
    quantized, state = quantize_4bit(weight.float().to(device()), quant_type="nf4", compress_statistics=True)
    return within_bound(
        dequantize_4bit(quantized, state), weight, 0.16 * weight.abs().max().item() / weight.std().item()
    )


def probe_decode_4bit() -> dict:
    """A 4-bit layer on one token, as in inference; bitsandbytes before 0.50 gives NaN here on AMD."""
    import torch
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    weight, token = normal(256, 512), normal(1, 1, 512)
    quantized, state = quantize_4bit(weight.to(device(), dtype), quant_type="nf4")
    expected = token @ dequantize_4bit(quantized, state).double().cpu().T
    with torch.no_grad():
        return within_bound(matmul_4bit(token.to(device(), dtype), quantized.t(), quant_state=state), expected, 0.05)


def probe_hub(model: str = "") -> dict:
    """Whether there is a token, which is never shown, and access to a model; its config."""
    from dotenv import find_dotenv, load_dotenv

    load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the next import
    import huggingface_hub

    facts = {"token": bool(huggingface_hub.get_token()), "cache": huggingface_hub.constants.HF_HUB_CACHE}
    if model:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            huggingface_hub.HfApi().auth_check(model)
            file = huggingface_hub.hf_hub_download(model, "config.json")
        except (GatedRepoError, RepositoryNotFoundError) as error:
            raise RuntimeError(f"no access to {model}: {type(error).__name__}") from None
        facts["config"] = json.loads(Path(file).read_text(encoding="utf-8"))
    return facts


PROBES = {name[6:]: function for name, function in globals().items() if name.startswith("probe_")}
COMPUTE = ("matmul_fp32", "matmul_bf16", "backward", "attention")
BITSANDBYTES = ("bitsandbytes", "optimizer", "quantize", "decode_4bit")


def run_bounded(command: list[str], timeout: float) -> tuple[int | None, str, str]:
    """Exit status, standard output and error of a command; the status is None where it did not end in time."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, errors="replace")
    try:
        printed, complaints = process.communicate(timeout=timeout)
        return process.returncode, printed, complaints
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: a process that hangs in a driver does not end
        return None, "", ""


def run_probe(name: str, timeout: float, *arguments: str) -> dict:
    """status (passed, failed, crashed or timed out), seconds, and facts or error."""
    start = time.monotonic()
    status, printed, complaints = run_bounded([sys.executable, __file__, "--probe", name, *arguments], timeout)
    if status is None:
        return {"status": "timed out", "seconds": timeout, "error": f"it did not end within {timeout:g} s"}
    seconds = round(time.monotonic() - start, 1)
    try:
        return {**json.loads(printed.splitlines()[-1]), "seconds": seconds}
    except (IndexError, ValueError):
        last = (complaints.strip() or "it said nothing").splitlines()[-1]
        cause = f"signal {-status}" if status < 0 else f"status {status}"
        return {"status": "crashed", "seconds": seconds, "error": f"it ended with {cause}: {last[:200]}"}


def answer_probe(name: str, arguments: list[str]) -> None:
    """The other end of run_probe."""
    try:
        answer = {"status": "passed", "facts": PROBES[name](*arguments)}
    except Exception as error:  # whatever a library raises is the finding
        reason = re.sub(r"\bhf_[A-Za-z0-9]{16,}\S*", "<HF_TOKEN>", " ".join(str(error).split()))
        answer = {"status": "failed", "error": f"{type(error).__name__}: {reason[:300]}"}
    print("\n" + json.dumps(answer), flush=True)
    os._exit(0)  # without the tidying up of libraries that may hang


# The system, without any package --------------------------------------------------------------------------------------
def read(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""


def ask(path: str, *command: str) -> str:
    """What a tool of the system prints; nothing if it is not there, fails or hangs."""
    tool = shutil.which(command[0], path=path)
    status, printed, _ = run_bounded([tool, *command[1:]], timeout=30) if tool else (1, "", "")
    return printed.strip() if status == 0 else ""


def look_at_system(root: Path) -> dict:
    """Accelerators, drivers and permissions, as the files and the tools under root show them."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/opt/rocm/bin"]
    path = os.pathsep.join(str(root / folder.lstrip("/")) for folder in folders)
    amd = []
    for node in sorted(root.glob("sys/class/kfd/kfd/topology/nodes/*/properties")):
        target = re.search(r"gfx_target_version (\d+)", read(node))
        if target and (number := int(target[1])):  # 0 is a CPU
            arch = f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}"
            banks = [
                re.search(r"size_in_bytes (\d+)", read(bank)) for bank in node.parent.glob("mem_banks/*/properties")
            ]
            amd.append({"arch": arch, "memory_bytes": sum(int(bank[1]) for bank in banks if bank)})
    kfd = root / "dev/kfd"
    nodes = [kfd, *sorted(root.glob("dev/dri/renderD*"))] if kfd.exists() else []
    vendors = {file: read(root / f"sys/class/drm/{file.name}/device/vendor") for file in nodes}
    nodes = [file for file, vendor in vendors.items() if vendor in ("", "0x1002")]  # not those of other graphics
    # Class 0x12: a processing accelerator, such as an Instinct; vendor 0x1002: AMD
    pci = [read(file.parent / "class") for file in root.glob("sys/bus/pci/devices/*/vendor") if read(file) == "0x1002"]
    tool, listing = next(((command[0], text) for command in TOOLS if (text := ask(path, *command))), (None, ""))
    versions = ask(path, "amd-smi", "version")
    rocm = re.search(r"[\d.]+", read(root / "opt/rocm/.info/version")) or re.search(
        r"(?<=ROCm version: )[\d.]+", versions
    )
    driver = read(root / "sys/module/amdgpu/version") or "".join(re.findall(r"(?<=amdgpu version: )\S+", versions))
    names = ask(path, "nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    cuda = re.search(r"(?<=CUDA Version: )[\d.]+", ask(path, "nvidia-smi")) if names else None
    return {
        "platform": platform.platform(),
        "container": (root / ".dockerenv").exists(),
        "tool": tool,
        "products": listing.splitlines(),
        "amd": {
            "kfd": kfd.exists(),
            "gpus": amd,
            "on_pci_bus": sum(kind.startswith("0x12") for kind in pci),
            "driver": driver or None,
            "rocm": rocm[0] if rocm else None,
            "no_permission": [f"/{file.relative_to(root)}" for file in nodes if not os.access(file, os.R_OK | os.W_OK)],
        },
        "nvidia": {
            "gpus": [name.split(", ")[0] for name in names],
            "driver": names[0].split(", ")[-1] if names else None,
            "cuda": cuda[0] if cuda else None,
        },
        "variables": {name: os.environ[name] for name in (*VISIBLE, *OVERRIDES) if name in os.environ},
    }


# Findings -------------------------------------------------------------------------------------------------------------
def judge_system(system: dict, torch: dict, require: str) -> list[Finding]:
    """What is wrong with drivers, permissions, variables, and with PyTorch for this hardware."""
    findings = []
    amd, nvidia, variables = system["amd"], system["nvidia"], system["variables"]
    level = "warning" if require == "cpu" else "error"

    def add(level: str, cause: str, command: str) -> None:
        findings.append(Finding(level, cause, command))

    devices = "--device /dev/kfd --device /dev/dri"
    if amd["on_pci_bus"] and not amd["kfd"]:
        cause = f"{amd['on_pci_bus']} AMD accelerator(s) on the PCI bus, but no /dev/kfd"
        if system["container"]:
            add(level, f"{cause}: the container was not given it", f"docker run {devices} ...")
        else:
            add(level, f"{cause}: the driver amdgpu is not loaded", "sudo modprobe amdgpu")
    elif amd["no_permission"]:
        cause = f"no permission to read and write {', '.join(amd['no_permission'])}"
        if system["container"]:
            add(level, cause, "docker run --group-add video --group-add $(getent group render | cut -d: -f3) ...")
        else:
            add(level, cause, "sudo usermod -a -G video,render $USER   (then log in again)")
    if torch and torch["available"]:
        there = "AMD" if torch["hip"] else "NVIDIA"
    elif nvidia["gpus"] and not amd["on_pci_bus"]:  # the graphics of an AMD processor have a /dev/kfd too
        there = "NVIDIA"
    else:
        there = "AMD" if amd["on_pci_bus"] or amd["gpus"] and system["tool"] else ""
    hidden = " ".join(name for name in VISIBLE if name in variables)
    if not torch:
        pass  # missing packages are a finding of their own
    elif there == "AMD" and not torch["hip"]:
        kind = f"CUDA {torch['cuda']}" if torch["cuda"] else "the CPU alone"
        add(level, f"PyTorch {torch['version']} is built for {kind}, this is an AMD machine", "make setup BACKEND=rocm")
    elif there == "NVIDIA" and not torch["cuda"]:
        kind = f"ROCm {torch['hip']}" if torch["hip"] else "the CPU alone"
        add(
            level,
            f"PyTorch {torch['version']} is built for {kind}, this is an NVIDIA machine",
            "make setup BACKEND=cuda",
        )
    elif there and not torch["available"]:
        if there == "NVIDIA" and nvidia["cuda"] and version_tuple(nvidia["cuda"]) < version_tuple(torch["cuda"]):
            cause = f"driver {nvidia['driver']} is for CUDA {nvidia['cuda']}, PyTorch needs {torch['cuda']}"
            older = "make setup BACKEND=cuda TORCH_INDEX=cu126"
            add(level, cause, f"update the driver, https://www.nvidia.com/drivers   (or: {older})")
        elif hidden and not findings:
            shown = ", ".join(f"{name}={variables[name]!r}" for name in hidden.split())
            add(level, f"PyTorch finds no accelerator, and {shown} is set", f"unset {hidden}")
        elif not findings:
            tool = "amd-smi list" if there == "AMD" else "nvidia-smi"
            add(level, f"PyTorch {torch['version']} finds no accelerator on this {there} machine", tool)
    elif require == "gpu" and not torch["available"]:
        add("error", "there is no accelerator here, and one is required", "make setup BACKEND=cpu")
    if "HSA_OVERRIDE_GFX_VERSION" in variables:
        value = variables["HSA_OVERRIDE_GFX_VERSION"]
        add(
            "warning",
            f"HSA_OVERRIDE_GFX_VERSION={value} makes the device pass for another",
            "unset HSA_OVERRIDE_GFX_VERSION",
        )
    if not (torch and torch["available"]):
        return findings

    first, gpus = torch["gpus"][0], torch["gpus"]
    if torch["hip"] and first["arch"] not in torch["arch_list"]:
        cause = f"PyTorch has kernels for {', '.join(torch['arch_list'])}, not for {first['arch']}"
        add("error", cause, AMD_INDEX.format(first["arch"]))
    if torch["hip"] and amd["rocm"] and version_tuple(amd["rocm"])[0] != version_tuple(torch["hip"])[0]:
        cause = f"PyTorch is built for ROCm {torch['hip']}, the system has {amd['rocm']}: not tested together"
        add("warning", cause, AMD_INDEX.format(first["arch"]))
    if len(gpus) > 1:
        free = max(range(len(gpus)), key=lambda index: gpus[index]["free_bytes"])
        name = "HIP_VISIBLE_DEVICES" if torch["hip"] else "CUDA_VISIBLE_DEVICES"
        if {"ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"} & variables.keys():
            # Then the scripts leave the choice to the variable.
            chosen = variables.get(name, "").split(",")
            free = chosen[free] if len(chosen) == len(gpus) else free
            add("error", f"{len(gpus)} accelerators are visible; the trainer takes one alone", f"export {name}={free}")
        else:
            add("warning", f"{len(gpus)} accelerators are visible; the scripts take the first", f"export {name}={free}")
    if first["free_bytes"] < 0.8 * first["memory_bytes"]:
        used = f"{(first['memory_bytes'] - first['free_bytes']) / 2**30:.0f} of {first['memory_bytes'] / 2**30:.0f} GiB"
        tool = "amd-smi process" if torch["hip"] else "nvidia-smi"
        add("warning", f"{used} of the accelerator's memory are taken already", tool)
    return findings


def install(packages: dict) -> str:
    """The command; a plain pip would take a torch for CUDA, whatever the machine."""
    named = " ".join(f"{name}=={PINS[name]}" for name in packages if name != "torch")
    return f"make setup   (or: {sys.executable} -m pip install {named})" if named else "make setup"


def judge_probes(probes: dict, torch: dict, variables: dict) -> list[Finding]:
    """What the probes showed of PyTorch, bitsandbytes, the packages and the hub."""
    findings = []
    packages = probes["packages"].get("facts", {"versions": {}, "missing": {}})
    missing = packages["missing"]
    if missing:
        named = "; ".join(f"{name} ({reason})" for name, reason in missing.items())
        findings.append(Finding("error", f"missing or broken: {named}"[:500], install(missing)))
    others = {name: is_ for name, is_ in packages["versions"].items() if is_.split("+")[0] != PINS[name]}
    if torch and torch["preinstalled"]:
        others.pop("torch", None)  # the one of a Docker image stays
    if others:
        named = ", ".join(f"{name} {is_} instead of {PINS[name]}" for name, is_ in others.items())
        findings.append(Finding("warning", f"not the versions that were tested: {named}", install(others)))
    broken = {name: probe["error"] for name, probe in probes.items() if probe["status"] != "passed"}
    if "packages" in broken:
        findings.append(Finding("error", f"importing the packages: {broken['packages']}", "make setup"))
    if "torch" in broken and "torch" not in missing:
        hangs = probes["torch"]["status"] in ("timed out", "crashed")
        mend = "sudo dmesg | tail -n 50   (what the driver says)" if hangs else "make setup"
        findings.append(Finding("error", f"PyTorch does not work: {broken['torch']}", mend))
    if torch:
        where = "the accelerator" if torch["available"] else "the CPU"
        for name in COMPUTE:
            if name in broken:
                tool = "amd-smi" if torch["hip"] else "nvidia-smi" if torch["available"] else "make setup"
                findings.append(Finding("error", f"{name} on {where}: {broken[name]}", tool))
        if "bitsandbytes" not in missing:
            findings += judge_bitsandbytes(probes, torch, variables)
    if "hub" in broken and not {"huggingface-hub", "python-dotenv"} & missing.keys():
        model = re.search(r"no access to (\S+):", broken["hub"])
        page = (
            f"ask for access at https://huggingface.co/{model[1]}, then HF_TOKEN= in .env"
            if model
            else "try again when the network is there, or take BASE_MODEL=FOLDER"
        )
        findings.append(Finding("error", f"the Hugging Face Hub: {broken['hub']}", page))
    return findings


def judge_bitsandbytes(probes: dict, torch: dict, variables: dict) -> list[Finding]:
    """An error on an accelerator, where the tutorial's optimizer needs it; a warning on the CPU."""
    library, level = probes["bitsandbytes"], "error" if torch["available"] else "warning"
    override = next((name for name in ("BNB_ROCM_VERSION", "BNB_CUDA_VERSION") if name in variables), None)
    mend = f"unset {override}" if override else "make bitsandbytes"  # which builds it where the wheel's does not work
    if library["status"] != "passed":
        note = f" ({override}={variables[override]} is set)" if override else ""
        return [Finding(level, f"bitsandbytes: {library['error']}{note}", mend)]
    findings = []
    for name in BITSANDBYTES[1:]:
        if probes[name]["status"] != "passed":
            cause = f"bitsandbytes, {name} with {library['facts']['library']}: {probes[name]['error']}"
            findings.append(Finding(level, cause, mend))
    built, needed = library["facts"]["built_for"], library["facts"]["torch_for"]
    if built and built != needed and torch["available"]:
        cause = f"bitsandbytes took its library for {built}, PyTorch is built for {needed}"
        findings.append(Finding("warning", cause, mend if override else "make bitsandbytes FORCE=1"))
    return findings


def version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def examine(args: argparse.Namespace) -> int:
    """The check: prints and reports what was found, and returns the exit status."""
    system = look_at_system(args.root)
    names = ["torch", "packages", *COMPUTE, *BITSANDBYTES, "hub"]
    with ThreadPoolExecutor(max_workers=2) as pool:
        more = {"hub": [args.access] if args.access else []}
        answers = pool.map(lambda name: run_probe(name, args.timeout, *more.get(name, [])), names)
        probes = dict(zip(names, answers, strict=True))
    torch = probes["torch"].get("facts")
    findings = judge_system(system, torch, args.require) + judge_probes(probes, torch, system["variables"])
    cache = Path(probes["hub"].get("facts", {}).get("cache", "~/.cache/huggingface")).expanduser()
    disks = {}
    for place in (Path.cwd(), cache):
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        disks[str(place)] = shutil.disk_usage(existing).free
    for place, free in disks.items():
        if free < FREE_DISK:
            cause = f"{free / 1e9:.1f} GB of disk are free at {place}, the tutorial takes about {FREE_DISK / 1e9:.0f}"
            findings.append(Finding("warning", cause, f"df -h {place}   (elsewhere: OUT=, HF_HOME=)"))

    gpus = torch["gpus"] if torch else []
    gpu = "ROCm-GPU" if torch and torch["hip"] else "GPU"
    print(f"Is a {gpu} detected?  {bool(torch and torch['available'])}")
    print(f"How many {gpu}s are detected?  {len(gpus)}")
    for index, found in enumerate(gpus):
        memory = f"{found['free_bytes'] / 2**30:.0f} of {found['memory_bytes'] / 2**30:.0f} GiB free"
        print(f"  cuda:{index}  {found['name']}  {found['arch']}  {memory}")
    amd, nvidia = system["amd"], system["nvidia"]
    if amd["kfd"]:
        print(f"AMD: driver {amd['driver']}, ROCm {amd['rocm']}, {', '.join(gpu['arch'] for gpu in amd['gpus'])}")
    if nvidia["gpus"]:
        print(f"NVIDIA: driver {nvidia['driver']}, for CUDA up to {nvidia['cuda']}")
    for name, value in system["variables"].items():
        print(f"{name}={value}")
    print("\n".join(["", f"{system['tool']}:", *system["products"]]) if system["tool"] else "")
    if torch:
        built = f"ROCm {torch['hip']}" if torch["hip"] else f"CUDA {torch['cuda']}" if torch["cuda"] else "the CPU"
        print(f"Python {platform.python_version()}, PyTorch {torch['version']} for {built}")
    packages = probes["packages"].get("facts", {"versions": {}, "missing": {}})
    for package in PINS:
        print(f"  {package:16} {packages['versions'].get(package) or 'MISSING OR BROKEN'}")
    print("\nProbes")
    for name, probe in probes.items():
        facts = probe.get("facts", {})
        detail = probe.get("error") or facts.get("library") or ""
        detail = f"off by {facts['difference']:.2g}, allowed {facts['bound']:.2g}" if "difference" in facts else detail
        print(f"  {name:16} {probe['status']:10} {probe['seconds']:5.1f} s  {detail}")
    for place, free in disks.items():
        print(f"{free / 1e9:.0f} GB of disk free at {place}")
    token = probes["hub"].get("facts", {}).get("token", False)
    print(f"Hugging Face token: {'there' if token else 'none'}")

    print()
    for finding in findings:
        print(f"{finding.level}: {finding.cause}\n    type: {finding.command}")
    status = 1 if any(finding.level == "error" for finding in findings) else 2 if findings else 0
    verdict = {0: "ready", 1: "not ready", 2: "ready, with warnings"}[status]
    place = "" if status == 1 else ", on the accelerator" if torch["available"] else ", on the CPU"
    print(f"Verdict: {verdict}{place}")
    if args.output:
        report = {
            "verdict": verdict,
            "findings": [vars(finding) for finding in findings],
            "python": platform.python_version(),
            "system": system,
            "torch": torch,
            **packages,
            "probes": probes,
            "free_disk_bytes": disks,
            "token": token,
        }
        write_json(args.output, report)
    return status


# What fits ------------------------------------------------------------------------------------------------------------
def count_weights(config: dict, targets: list[str], rank: int) -> dict:
    """Parameters of a Llama-like decoder (Llama, Mistral, Qwen2, Qwen3, ...) and of a LoRA adapter of it."""
    hidden, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    heads, inner = config["num_attention_heads"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // heads
    query, value = heads * head, (config.get("num_key_value_heads") or heads) * head
    linear = {  # input and output size of each linear layer
        "q_proj": (hidden, query), "k_proj": (hidden, value), "v_proj": (hidden, value), "o_proj": (query, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
    chosen = {name: sizes for name, sizes in linear.items() if name in targets or "all-linear" in targets}
    embedding, norms = vocabulary * hidden, (2 * layers + 1) * hidden
    if config.get("model_type") == "qwen3":
        norms += 2 * layers * head
    biases = layers * (query + 2 * value) if config.get("model_type") == "qwen2" else 0
    quantizable = layers * sum(into * out for into, out in linear.values())
    head_weights = 0 if config.get("tie_word_embeddings") else embedding
    return {
        "total": embedding + head_weights + quantizable + norms + biases,
        "quantizable": quantizable,
        "adapter": layers * rank * sum(into + out for into, out in chosen.values()),
        "targets": chosen,
        "query": query,
        "value": value,
    }


def unknown_to(config: dict, targets: list[str]) -> str:
    """Why the formulas do not hold for this model, or nothing."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if lacking := [name for name in sizes if not config.get(name)]:
        return f"its config has no {', '.join(lacking)}"
    if experts := [name for name in config if name.startswith("num_") and name.endswith("experts") and config[name]]:
        return f"it is a mixture of experts ({', '.join(experts)})"
    others = set(targets) - {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")} - {"all-linear"}
    return f"LoRA on {', '.join(sorted(others))} is not counted" if others else ""


def describe_optimizer(name: str) -> tuple[float, bool]:
    """Bytes of state for a parameter, and whether it is bitsandbytes'. A moment takes 4 bytes, or as the name says."""
    moments = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1}
    moment = 1 if "8bit" in name else 0.5 if "4bit" in name else 4
    number = next((number for kind, number in moments.items() if kind in name), 0)
    return number * moment, bool(re.match("paged_|lion_|ademamix|rmsprop_bnb|adamw_8bit|adamw_bnb", name))


def predict_memory(config: dict, method: str, settings: dict, tokens: int, where: str) -> dict:
    """Peak memory in bytes of a training, by part; tokens is the length of the longest row, packed or not, where is cpu
    or gpu.

    With P parameters, T trainable ones, B rows of L tokens in a batch, N = B L, b bytes a value (2 in bf16 or fp16,
    under autocast too, else 4), h hidden, q query, i intermediate size, H heads, V words, r the rank of LoRA:

    weights      4 P or 2 P. 4-bit NormalFloat: half a byte and a 4-byte scale for 64 weights, 4.5 bits; 4.127 bits with
                 double quantization (QLoRA, arXiv 2305.14314, section 3); embeddings, norms and head are not quantized.
                 Under autocast a bf16 copy of every fp32 linear weight is kept for the backward pass.
    gradients    4 T: the trainable weights are fp32, also of an adapter on bf16 or 4-bit weights.
    optimizer    AdamW keeps two fp32 values: 8 T (ZeRO, arXiv 1910.02054, section 3.1); 2 T with 8 bits. The state of a
                 paged one is not PyTorch's: allocated is the peak without it, to compare with what PyTorch counts; it
                 may move to the memory of the host where the accelerator's is short, at the cost of time.
    activations  What autograd keeps of a layer of transformers' Llama, with attention that does not keep its scores.
                 The method is that of arXiv 2205.05198, section 4; a test counts the values:
                   N (4 (2h + 2 + H) + b (2q + 2v + 3i))       norms, attention, MLP; v: size of keys, of values
                   N b (2q - 2v + L) with token_metrics, for the mask, and keys and values of every head; with
                   packing N b (2q - 2v + N), for all rows of the batch are one; in fp32 on an accelerator
                   N b (2q - 2v + H L) where heads share keys, for in a batch without padding the scores are kept
                   full: N (8h + b (2h + i)), under autocast N (8h + b (5h + i)), a copy for each linear layer
                   LoRA: N r b a target, and of its input of size n: n b, once for several targets that read the same;
                   n 4 each on bf16 weights without autocast; with dropout n b each and a mask of n (4 on the CPU)
                 With gradient checkpointing N h b a layer, and one whole layer.
    logits       Three tensors [N, V] in fp32: log-probabilities and two gradients. With token_metrics TRL takes them in
                 tiles of 4096 tokens and 32768 words: one tile with Triton, eight fp32 ones on the CPU.
    overhead     On the CPU the interpreter and its libraries, 0.53 GiB, and what malloc of glibc keeps of freed blocks:
                 0.4 of activations and logits (measured 0.2 to 0.6), 1.3 with gradient checkpointing (measured 1.4);
                 none if MALLOC_MMAP_THRESHOLD_ is set. In bf16 0.75 GiB (measured 0.4 to 1.1): oneDNN compiles kernels
                 for each length of a batch and keeps them. With 4 bits the pages of the file that the weights were
                 read from, 4 bytes each. On an accelerator none: its allocator counts tensors.

    Peak = weights + optimizer + overhead + the greater of gradients, and activations + logits: a gradient comes as the
    activations go. What an adapter adds to the gradients is small.
    """
    counts = count_weights(config, settings["lora_target_modules"], settings["lora_r"])
    lora, autocast, four_bit = method == "lora", settings["bf16"], settings["load_in_4bit"]
    short = settings["dtype"] in ("bfloat16", "float16")
    b = 2 if short or autocast else 4
    n = settings["per_device_train_batch_size"] * tokens
    hidden, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    inner, query, heads = config["intermediate_size"], counts["query"], config["num_attention_heads"]
    trainable = counts["adapter"] if lora else counts["total"]

    plain = counts["total"] - (counts["quantizable"] if four_bit else 0)
    weights = plain * (2 if short else 4) + (4 * trainable if lora else 0)
    if four_bit:
        weights += counts["quantizable"] * (4.127 if settings["use_bnb_nested_quant"] else 4.5) / 8
    elif autocast and not short:
        weights += 2 * counts["quantizable"]
    optimizer = trainable * describe_optimizer(settings["optim"])[0]

    value = counts["value"]
    layer = 4 * (2 * hidden + 2 + heads) + b * (2 * query + 2 * value + 3 * inner)
    scores = where == "gpu" and b == 4 and query != value
    if settings["packing"]:
        layer += b * (2 * query - 2 * value + n)
    elif settings["token_metrics"] or scores:
        layer += b * (2 * query - 2 * value + (heads if scores else 1) * tokens)
    if not lora:
        layer += 8 * hidden + b * ((5 if autocast else 2) * hidden + inner)
    else:
        mask = 4 if where == "cpu" else 1
        sizes = {name: into for name, (into, _) in counts["targets"].items()}
        kept = 2 if autocast else 4
        if settings["lora_dropout"]:
            layer += sum(sizes.values()) * (kept + mask)
        elif b == 2:
            layer += sum(sizes.values()) * kept
        else:  # one tensor for q, k and v, one for gate and up; that of o is kept by the attention
            same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
            layer += kept * sum(
                {same.get(name, name): into for name, into in sizes.items() if name != "o_proj"}.values()
            )
        layer += kept * settings["lora_r"] * len(sizes)
    activations = n * (layers * hidden * b + layer if settings["gradient_checkpointing"] else layers * layer)
    if settings["token_metrics"]:
        tile = min(n, 4096) * min(vocabulary, 32768)
        logits = tile * (8 * 4 if where == "cpu" else b)
    else:
        logits = 12 * n * vocabulary
    gradients = 4 * trainable
    passing = max(gradients, activations + logits)
    overhead = 0.0
    if where == "cpu":
        kept = 1.3 if settings["gradient_checkpointing"] else 0.4
        overhead = 0.53 * 2**30 + (0 if "MALLOC_MMAP_THRESHOLD_" in os.environ else kept * (activations + logits))
        overhead += 0.75 * 2**30 if b == 2 or four_bit else 0
        overhead += 4 * counts["quantizable"] if four_bit else 0
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    parts |= {"activations": activations, "logits": logits, "overhead": overhead}
    parts = {name: int(size) for name, size in parts.items()}
    peak = int(weights + optimizer + passing + overhead)
    paged = where == "gpu" and settings["optim"].startswith("paged")
    return {**parts, "peak": peak, "allocated": peak - (parts["optimizer"] if paged else 0)}


def read_settings(options: list[str], base: dict) -> tuple[dict, list[str]]:
    """SETTINGS as a training script would read them: base, then --config, then the options. And the other options."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--config")
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="*")
        if isinstance(default, bool):
            parser.add_argument(f"--no_{name}", action="store_const", const=["false"], dest=name)
    given, others = parser.parse_known_args(options)
    settings = {**SETTINGS, **base}
    if given.config:
        import yaml

        recipe = yaml.safe_load(Path(given.config).read_text(encoding="utf-8")) or {}
        settings |= {name: value for name, value in recipe.items() if name in SETTINGS and value is not None}
        if isinstance(settings["lora_target_modules"], str):
            settings["lora_target_modules"] = [settings["lora_target_modules"]]
    for name, values in vars(given).items():
        if name == "config" or values is None:
            continue
        default = SETTINGS[name]
        if isinstance(default, bool):
            settings[name] = not values or values[0].lower() in ("true", "1", "yes")
        else:
            settings[name] = values if isinstance(default, list) else type(default)(values[0])
    return settings, others


def check_settings(method: str, settings: dict) -> str:
    """What no training can have, or nothing."""
    if settings["dtype"] not in ("float32", "bfloat16", "float16"):
        return f"--dtype {settings['dtype']} is none of float32, bfloat16, float16"
    if settings["per_device_train_batch_size"] < 1 or settings["max_length"] < 1 or settings["lora_r"] < 1:
        return "--per_device_train_batch_size, --max_length and --lora_r are at least 1"
    quantized = settings["load_in_4bit"] or settings["load_in_8bit"]
    return "quantized weights are not trained in full" if quantized and method == "full" else ""


def find_memory(torch: dict | None, root: Path) -> tuple[str, str, int]:
    """Where a training would run (cpu or gpu), its name, and the bytes of memory there."""
    if torch and torch["available"]:
        return "gpu", torch["gpus"][0]["name"], torch["gpus"][0]["free_bytes"]
    available = re.search(r"MemAvailable:\s+(\d+)", read(root / "proc/meminfo"))
    memory = int(available[1]) * 1024 if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = read(root / "sys/fs/cgroup/memory.max")
    return "cpu", "the CPU", min(memory, int(limit)) if limit.isdigit() else memory


def fits(peak: int, where: str, memory: int) -> bool:
    """On an accelerator the context of the driver (1 GiB) and gaps between tensors (5 %) come on top; on the CPU a
    fifth of it, by which a prediction may be off.
    """
    return (peak * 1.2 if where == "cpu" else peak * 1.05 + 2**30) <= memory


def read_config(model: str, timeout: float) -> dict:
    """The config of a hub id or a folder."""
    if Path(model, "config.json").is_file():
        try:
            return json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            fail(f"{model}/config.json is damaged: {error}. Bring it back, or make the model anew.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or Path(model).parent.exists():
        fail(f"no model at {model!r}. Give a hub id (user/name) or a folder with a config.json.")
    answer = run_probe("hub", timeout, model)
    if answer["status"] != "passed":
        mend = "Type: make setup" if "ModuleNotFoundError" in answer["error"] else "See to the network and the access"
        fail(f"cannot read the config of {model}: {answer['error']}. {mend}, or give a folder with a config.json.")
    return answer["facts"]["config"]


def list_savings(method: str, settings: dict, where: str) -> list[dict]:
    """Changes of the settings that save memory, those that cost least first."""
    chunks, recompute = {"token_metrics": True}, {"gradient_checkpointing": True}
    whole = [recompute]  # the batch stays
    if where == "gpu" and not settings["token_metrics"]:  # on the CPU chunks take more
        whole = [chunks, recompute, chunks | recompute]
    batches = [settings["per_device_train_batch_size"] // 2**power for power in range(1, 20)]
    smaller = [{"per_device_train_batch_size": batch} for batch in batches if batch]
    changes = [*whole, *smaller, *(recompute | change for change in smaller)]
    short = {"dtype": "bfloat16"}
    return changes + ([recompute | change | short for change in smaller[-1:]] if method == "lora" else [])


def write_options(change: dict) -> str:
    return " ".join(f"--{key} {str(value).lower()}" for key, value in change.items())


def judge_memory(prediction: dict, config: dict, where: str, name: str, memory: int) -> list[Finding]:
    """Whether a training fits, and if not, what does."""
    if prediction["fits"]:
        return []
    method, settings, tokens = prediction["method"], prediction["settings"], prediction["tokens"]
    needed = f"{prediction['bytes']['peak'] / 2**30:.1f} GiB"
    cause = f"{method} needs {needed}, there are {memory / 2**30:.1f} ({name})"
    force = "(all the same: FORCE=1 with Make, --force here)"

    def would_fit(method: str, change: dict) -> bool:
        return fits(predict_memory(config, method, settings | change, tokens, where)["peak"], where, memory)

    for change in list_savings(method, settings, where):
        if would_fit(method, change):
            return [Finding("error", cause, f"add the option {write_options(change)}   {force}")]
    if would_fit("lora", QLORA):
        return [Finding("error", cause, f"make train-lora RECIPE=qlora   {force}")]
    return [Finding("error", f"{cause}, whatever the batch", f"take a smaller model   {force}")]


def judge_needs(settings: dict, timeout: float) -> list[Finding]:
    """Whether bitsandbytes works in what a training takes from it: tried before a model is loaded."""
    quantized = settings["load_in_4bit"] or settings["load_in_8bit"]
    optimizer = describe_optimizer(settings["optim"])[1]
    probes = ["bitsandbytes"] * bool(quantized or optimizer) + ["optimizer"] * optimizer
    probes += ["quantize", "decode_4bit"] * settings["load_in_4bit"]
    for probe in probes:
        answer = run_probe(probe, timeout)
        if answer["status"] != "passed":
            what = "quantized weights need" if quantized else f"{settings['optim']} needs"
            mend = "make bitsandbytes" + ("" if quantized else "   (or add to ARGS: --optim adamw_torch_fused)")
            return [Finding("error", f"{what} bitsandbytes, {probe}: {answer['error']}", mend)]
    return []


def what_fits(args: argparse.Namespace) -> int:
    """The prediction: prints and reports it, and returns the exit status."""
    config = read_config(args.model, args.timeout)
    if args.memory:
        where, name, memory = "gpu", f"{args.memory:g} GiB", int(args.memory * 2**30)
    else:
        where, name, memory = find_memory(run_probe("torch", args.timeout).get("facts"), args.root)
    try:
        if args.method:
            method = args.method.removeprefix("q")
            settings, others = read_settings(args.options, QLORA if args.method == "qlora" else {})
            if settings["dtype"] == "auto":  # the checkpoint's own
                settings["dtype"] = config.get("dtype") or config.get("torch_dtype") or "float32"
            if wrong := check_settings(method, settings):
                raise ValueError(wrong)
            if others:
                print(f"Options that do not count for the memory: {' '.join(others)}")
            tokens = settings["max_length"]
            if args.audit and not settings["packing"]:
                tokens = min(tokens, json.loads(args.audit.read_text(encoding="utf-8"))["longest_row"])
            trainings = [(args.method, method, settings, tokens)]
        else:
            trainings = []
            for label, (method, base) in METHODS.items():
                for batch in args.batch:
                    settings = SETTINGS | base | {"per_device_train_batch_size": batch}
                    trainings += [(label, method, settings, tokens) for tokens in args.length]
    except Exception as error:  # of a file, of YAML, of a value
        given = " ".join(map(str, [*args.options, args.audit or ""]))
        fail(f"cannot read the options of the training: {' '.join(str(error).split())}. Mend {given}")

    predictions = []
    if reason := unknown_to(config, trainings[0][2]["lora_target_modules"]):
        print(f"No prediction of the memory for {args.model}: {reason}. The formulas are for Llama-like decoders.")
    else:
        print(f"{args.model}: {count_weights(config, [], 0)['total']:,} parameters. GiB, {name}: {memory / 2**30:.1f}")
        parts = ("weights", "gradients", "optimizer", "activations", "logits", "overhead", "peak")
        print(f"{'':26}{'batch':>6}{'length':>7}" + "".join(f"{part:>12}" for part in parts))
        for label, method, settings, tokens in trainings:
            sizes = predict_memory(config, method, settings, tokens, where)
            fit = fits(sizes["peak"], where, memory)
            line = f"{label:26}{settings['per_device_train_batch_size']:6}{tokens:7}"
            line += "".join(f"{sizes[part] / 2**30:12.2f}" for part in parts)
            print(f"{line}  {'fits' if fit else 'does not fit'}")
            prediction = {"method": method if args.method else label, "tokens": tokens, "settings": settings}
            predictions.append(prediction | {"bytes": sizes, "fits": fit})
        margin = "a fifth of it, by which it may be off" if where == "cpu" else "1 GiB for the driver and 5 % for gaps"
        print(f"What fits: the peak and {margin}.")
    findings = []
    if args.method:
        findings = [found for each in predictions for found in judge_memory(each, config, where, name, memory)]
        findings += judge_needs(settings, args.timeout)
    for finding in findings:
        print(f"{finding.level}: {finding.cause}\n    type: {finding.command}", file=sys.stderr)
    if args.output and (not findings or args.force):
        report = {"model": args.model, "memory_bytes": memory, "where": where, "predictions": predictions}
        if args.method and predictions:  # for whom the memory runs out all the same
            sizes = {
                write_options(change): predict_memory(config, method, settings | change, tokens, where)["peak"]
                for change in list_savings(method, settings, where)
            }
            most = predictions[0]["bytes"]["peak"]
            report["smaller"] = [{"options": name, "bytes": size} for name, size in sizes.items() if size < most]
        write_json(args.output, report)
    if args.force or not findings:
        return 0
    return 1 if all(each["fits"] for each in predictions) else 3


def write_text(file: Path, text: str) -> None:
    """Writes the file whole or not at all, and sees that it is on the disk."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_json(file: Path, content: dict) -> None:
    write_text(file, json.dumps(content, indent=2, default=str) + "\n")


def fail(message: str) -> None:
    """Ends with an error; a token in it is not shown: libraries quote headers, where it may stand in another form."""
    token = os.environ.get("HF_TOKEN", "").strip() or "hf_..."
    sys.exit("error: " + re.sub(r"\bhf_[A-Za-z0-9]{16,}\S*", "<HF_TOKEN>", message.replace(token, "<HF_TOKEN>")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--require", choices=["auto", "gpu", "cpu"], default="auto", help="auto: an accelerator that is in the machine "
        "has to work; gpu: there has to be one; cpu: none is needed (default: auto)")  # fmt: skip
    add("--access", metavar="HUB_ID", help="a model on the hub: check the access to it")
    add("--model", help="hub id or folder: predict what fits instead of checking the machine")
    add("--memory", type=float, metavar="GIB", help="memory of an accelerator that is not here; MI300X 192, H100 80")
    add("--method", choices=["lora", "qlora", "full"], help="predict this one training, with its options after --, "
        "and fail if it does not fit or if the bitsandbytes that it needs does not work")  # fmt: skip
    add("--batch", type=int, nargs="+", default=[1, 4], help="rows in a batch, of the table (default: 1 4)")
    add("--length", type=int, nargs="+", default=[512, 1024, 2048], help="tokens of the longest row, of the table")
    add("--audit", type=Path, metavar="FILE", help="report of audit_tokens.py: the longest row is taken from there")
    add("--force", action="store_true", help="with --method: exit with 0 all the same")
    add("--timeout", type=float, default=120, help="seconds that a probe may take (default: 120)")
    add("--root", type=Path, default=Path("/"), help="folder of another system's files: /dev, /sys, /opt/rocm, tools")
    add("--output", type=Path, help="file for the report, JSON")
    add("--probe", choices=PROBES, help=argparse.SUPPRESS)
    add("options", nargs="*", help="after --: options of the training")
    parser.error = lambda message: fail(f"{message}. See --help.")  # not with the status 2 of a warning
    args = parser.parse_args()
    if args.probe:
        answer_probe(args.probe, args.options)
    if args.options and not args.method:
        fail("options of a training stand after -- only with --method. See --help.")
    if (args.memory is not None or args.method) and not args.model:
        fail("--memory and --method need --model. See --help.")
    if args.memory is not None and args.memory <= 0:
        fail("--memory is in GiB, above 0. See --help.")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    sys.exit(what_fits(args) if args.model else examine(args))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
