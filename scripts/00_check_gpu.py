# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""Find out whether this machine is ready for the tutorial, and what mends it where it is not.

    python 00_check_gpu.py --output report.json

Needs nothing installed: what is missing is a finding. What may crash or hang runs in a process of its own (a probe).
Writes  a JSON report to --output, if given.
Exits   with status 0: ready, 1: not ready, 2: ready, with warnings.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shutil
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired

# The tutorial's packages, and those that its libraries need for it: the versions that were tested together.
PINS = {
    "torch": "2.13.0", "transformers": "5.23.0", "datasets": "5.2.0", "peft": "0.21.2", "trl": "1.16.0",
    "bitsandbytes": "0.50.2", "huggingface-hub": "2.4.0", "scipy": "1.17.1", "accelerate": "1.15.0",
    "python-dotenv": "1.2.4", "tensorboard": "2.21.0",
}  # fmt: skip
if sys.version_info < (3, 11):
    PINS |= {"transformers": "5.20.2", "trl": "1.14.2", "scipy": "1.15.3"}
# Product names: the first of these tools that is there and works is asked. rocm-smi does not come with ROCm 10.
NVIDIA = ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version,compute_mode", "--format=csv"]
TOOLS = (["amd-smi", "static", "--asic"], ["rocm-smi", "--showproductname"], NVIDIA)
# Environment variables that hide accelerators, make one pass for another, or change what is computed.
VISIBLE = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
OVERRIDES = ("HSA_OVERRIDE_GFX_VERSION", "BNB_ROCM_VERSION", "BNB_CUDA_VERSION")
SWITCHES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL")
# For what PyTorch's index has no build of: AMD's own index, with kernels for more devices, and its torch.
AMD_SETUP, AMD_TORCH = "make setup BACKEND=rocm TORCH_INDEX=amd", "2.14.0+rocm10.1.0"
# By how much of its spread a result in fp32 may be off. TF32 keeps 10 of 23 bits; AMD's is as near as bf16.
FP32_BOUND = 0.05 if any(os.environ.get(name) == "1" for name in SWITCHES[:2]) else 1e-3
FREE_DISK = 10e9  # bytes: the environment, the embedded model and what the steps leave take about 7e9
Finding = namedtuple("Finding", "level cause command")  # level: error or warning


# Probes: each runs in a process of its own and returns what it found -------------------------------------------------
def probe_torch() -> dict:
    """What PyTorch was built for, and the accelerators that it finds; memory in bytes."""
    import torch

    hip, available, gpus = torch.version.hip, torch.cuda.is_available(), []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        gpus.append({"name": found.name, "memory_bytes": found.total_memory, "free_bytes": 0})
        gpus[-1]["integrated"] = bool(getattr(found, "is_integrated", False))
        gpus[-1]["arch"] = found.gcnArchName.split(":")[0] if hip else ""
        with suppress(Exception):  # one full or broken device of several is no reason to say nothing of the others
            gpus[-1]["free_bytes"], _ = torch.cuda.mem_get_info(index)
    return {
        "version": torch.__version__, "hip": hip, "cuda": torch.version.cuda, "available": available, "gpus": gpus,
        "preinstalled": not Path(torch.__file__).is_relative_to(sys.prefix),
        "arch_list": torch.cuda.get_arch_list() if available else [],
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if available else None,
    }  # fmt: skip


def probe_packages() -> dict:
    """Versions of the packages that import, and for the others the reason."""
    versions, missing = {}, {}
    for package in PINS:
        try:
            importlib.import_module(package.removeprefix("python-").replace("-", "_"))
            versions[package] = importlib.metadata.version(package)
        except Exception as error:  # a broken package may raise anything at import
            missing[package] = f"{type(error).__name__}: {error}".splitlines()[0]
    return {"versions": versions, "missing": missing}


def sample(*shape: int, dtype: str = "float32") -> tuple:
    """A random tensor in fp64 on the CPU, and the same one in dtype on the accelerator, where there is one."""
    import torch

    exact = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return exact, exact.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype))


def within_bound(found, expected, bound: float) -> dict:
    """The largest difference, as a share of the spread (standard deviation) of what was expected."""
    difference = ((found.double().cpu() - expected).abs().max() / expected.std()).item()
    if not difference <= bound:  # NaN too
        raise ArithmeticError(f"the result is wrong: off by {difference:.3g} of its spread, {bound:g} is allowed")
    return {"difference": difference, "bound": bound}


def probe_matmul_fp32(dtype: str = "float32", bound: float = FP32_BOUND) -> dict:
    a, near_a = sample(256, 512, dtype=dtype)
    b, near_b = sample(512, 256, dtype=dtype)
    return within_bound(near_a @ near_b, a @ b, bound)


def probe_attention(dtype: str = "float32", bound: float = 5 * FP32_BOUND) -> dict:
    """torch's attention and its gradients: causal and under a mask, with shared key heads and without."""
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")  # as the runner of the scripts does
    import torch

    attend, facts = torch.nn.functional.scaled_dot_product_attention, []
    for length, heads, masked in itertools.product((97, 192), (4, 2), (False, True)):
        query, key, value = sample(3, 2, 4, length, 64, dtype=dtype)[1]
        # Scores of about -120: with them, a mask, and a length like 192, cuDNN gave NaN (pytorch 196678).
        near = query + 15, (key - key.mean(-1, keepdim=True) - 1)[:, :heads], value[:, :heads]
        near, exact = ([to.requires_grad_() for to in group] for group in (near, [to.double().cpu() for to in near]))
        mask = torch.ones(length, length, device=query.device).tril().bool()
        found = attend(*near, attn_mask=mask if masked else None, is_causal=not masked, enable_gqa=heads < 4)
        keys, values = (tensor.repeat_interleave(4 // heads, 1) for tensor in exact[1:])
        right = (exact[0] @ keys.mT / 8).masked_fill(~mask.cpu(), float("-inf")).softmax(-1) @ values
        pairs = ([end, *torch.autograd.grad(end, of, query.to(end))] for end, of in ((found, near), (right, exact)))
        facts += map(within_bound, *pairs, [bound] * 4)
    facts = max(facts, key=lambda each: each["difference"])
    if torch.cuda.is_available():
        long = sample(3, 1, 8, 2048, 64, dtype=dtype)[1].requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        attend(*long, is_causal=True).sum().backward()
        peak, scores = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated(), 8 * 2048**2 * long.itemsize
        return facts | {"keeps_scores": peak >= scores}
    return facts | {"keeps_scores": None}


probe_matmul_bf16 = partial(probe_matmul_fp32, "bfloat16", 0.05)
probe_attention_bf16 = partial(probe_attention, "bfloat16", 0.25)


def name_build(hip: str | None, cuda: str | None) -> str:
    return f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else "the CPU"


def probe_bitsandbytes() -> dict:
    """The native library that bitsandbytes loaded, and those that it and PyTorch were built for: rocm72, cuda130."""
    import torch
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, get_available_cuda_binary_versions, lib

    wanted = name_build(torch.version.hip, torch.version.cuda if torch.cuda.is_available() else None)
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        there = ", ".join(get_available_cuda_binary_versions()) or "none"
        raise RuntimeError(f"no native library of bitsandbytes for {wanted} could be loaded (versions there: {there})")
    library = Path(lib._lib._name).name
    built = find(r"(rocm|cuda)\d+", library)
    needed = "".join(wanted.lower().replace(" ", "").split(".")[:2])
    return {"library": library, "built_for": built, "torch_for": built and needed}


def probe_optimizer() -> dict:
    """The first step of the tutorial's paged_adamw_32bit: lr times the gradient's sign. 100,000 values are paged."""
    import bitsandbytes
    import torch

    (start, gradient), (weight, grad) = sample(2, 512, 256)
    weight, many = map(torch.nn.Parameter, (weight, weight.new_zeros(2**26 if weight.is_cuda else 2**18)))
    weight.grad, many.grad = grad, torch.ones_like(many)
    optimizer = bitsandbytes.optim.PagedAdamW32bit([weight, many], lr=0.01, weight_decay=0.0)
    optimizer.step()
    facts = within_bound(weight.detach(), start - 0.01 * gradient / (gradient.abs() + 1e-8), 1e-3)
    begun = time.perf_counter()
    optimizer.step()  # reads and writes the two moments, which the first one made, and waits for the accelerator
    return facts | {"gb_per_second": round(4e-9 * (weight.nbytes + many.nbytes) / (time.perf_counter() - begun), 2)}


def probe_quantize() -> dict:
    """4-bit NormalFloat and back: the largest gap between two of its 16 values is 0.3 of a block's largest weight."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight, near = sample(256, 256)
    bound = 0.16 * (weight.abs().max() / weight.std()).item()
    quantized, state = quantize_4bit(near, quant_type="nf4", compress_statistics=True)
    return within_bound(dequantize_4bit(quantized, state), weight, bound)


def probe_decode_4bit() -> dict:
    """A 4-bit layer on one token, as in inference; bitsandbytes before 0.50 gives NaN here on AMD."""
    import torch
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    token, near = sample(1, 1, 512, dtype=dtype)
    quantized, state = quantize_4bit(sample(256, 512, dtype=dtype)[1], quant_type="nf4")
    expected = token @ dequantize_4bit(quantized, state).double().cpu().T
    with torch.no_grad():
        return within_bound(matmul_4bit(near, quantized.t(), quant_state=state), expected, 0.05)


def probe_hub(model: str = "") -> dict:
    """Whether there is a token, which is never shown, and access to a model; its config."""
    from dotenv import find_dotenv, load_dotenv

    load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the next import
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    facts = {"token": bool(huggingface_hub.get_token()), "cache": huggingface_hub.constants.HF_HUB_CACHE}
    if model:
        try:
            huggingface_hub.HfApi().auth_check(model)
            facts["config"] = json.loads(Path(huggingface_hub.hf_hub_download(model, "config.json")).read_bytes())
        except (GatedRepoError, RepositoryNotFoundError) as error:
            raise RuntimeError(f"no access to {model}: {type(error).__name__}") from None
    return facts


PROBES = {name[6:]: function for name, function in globals().items() if name.startswith("probe_")}


def run_bounded(command: list[str], timeout: float) -> tuple[int | None, str, str]:
    """Exit status, standard output and error of a command; the status is None where it did not end in time."""
    process = Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, text=True, errors="replace")
    with suppress(TimeoutExpired):
        printed, complaints = process.communicate(timeout=timeout)
        return process.returncode, printed, complaints
    process.kill()  # and not waited for: a process that hangs in a driver does not end
    return None, "", ""


def mask(text: str) -> str:
    """Without the token of the Hub: libraries quote headers, and it may stand in them."""
    token = os.environ.get("HF_TOKEN", "").strip() or "hf_..."
    return re.sub(r"hf_[A-Za-z0-9]{16,}\S*", "<HF_TOKEN>", text.replace(token, "<HF_TOKEN>"))


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
        last = mask(complaints.strip() or "it said nothing").splitlines()[-1]
        cause = f"signal {-status}" if status < 0 else f"status {status}"
        return {"status": "crashed", "seconds": seconds, "error": f"it ended with {cause}: {last[:200]}"}


def answer_probe(name: str, *arguments: str) -> None:
    """The other end of run_probe."""
    try:
        answer = {"status": "passed", "facts": PROBES[name](*arguments)}
    except Exception as error:  # whatever a library raises is the finding
        answer = {"status": "failed", "error": f"{type(error).__name__}: {mask(' '.join(str(error).split()))[:300]}"}
    print("\n" + json.dumps(answer), flush=True)
    os._exit(0)  # without the tidying up of libraries that may hang


# The system, without any package --------------------------------------------------------------------------------------
def read(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(errors="replace").strip()
    return ""


def find(pattern: str, text: str) -> str | None:
    return found[0] if (found := re.search(pattern, text)) else None


def share_memory(torch: dict | None, root: Path) -> dict | None:
    """What PyTorch says, with the memory right of accelerators that share the processor's; an MI300A has its own."""
    found = re.findall(r"Mem(?:Total|Available):\s+(\d+)", read(root / "proc/meminfo"))
    ram, available = (1024 * int(size) for size in found) if len(found) == 2 else (0, 0)
    kinds = [f"mem_info_{kind}" for kind in ("vram_total", "vram_used", "gtt_total", "gtt_used")]  # files of amdgpu
    files = root.glob(f"sys/class/drm/renderD*/device/{kinds[0]}")
    amd = [[int(read(file.with_name(kind)) or 0) for kind in kinds] for file in files]
    for gpu in torch["gpus"] if torch and available else []:
        if gpu["integrated"] and gpu["arch"] != "gfx942":
            # CUDA leaves out file caches; HIP says the carve-out, or more free than in all (ROCm/hip 3892, ROCm 6004)
            gpu |= {"ram_bytes": ram, "free_bytes": min(gpu["memory_bytes"], available)}
            if torch["hip"] and amd:
                vram, vram_used, gtt, gtt_used = min(amd)  # a Radeon beside it has more of its own
                # amdgpu takes the larger of the two, GTT as far as TTM lets it (ROCm/rocm-systems 5596, ROCm 6004)
                most = min(gtt, ram, 4096 * int(read(root / "sys/module/ttm/parameters/pages_limit") or ram))
                shared = gtt > vram
                gpu["memory_bytes"] = most if shared else vram
                gpu["free_bytes"] = max(0, min(most - gtt_used, available)) if shared else vram - vram_used
    return torch


def ask(path: str, name: str, *arguments: str) -> str:
    """What a tool of the system prints; nothing if it is not there, fails or hangs."""
    tool = shutil.which(name, path=path)
    status, printed, _ = run_bounded([tool, *arguments], timeout=30) if tool else (1, "", "")
    return printed.strip() if status == 0 else ""


def look_at_system(root: Path) -> dict:
    """Accelerators, drivers and permissions, as the files and the tools under root show them."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/opt/rocm/bin"]
    path = os.pathsep.join(str(root / folder.lstrip("/")) for folder in folders)
    amd = []
    for node in sorted(root.glob("sys/class/kfd/kfd/topology/nodes/*/properties")):
        if number := int(find(r"(?<=gfx_target_version )\d+", read(node)) or 0):  # 0 is a CPU
            arch = f"gfx{number // 10000}{number // 100 % 100:x}{number % 100:x}"
            banks = [find(r"(?<=size_in_bytes )\d+", read(bank)) for bank in node.parent.glob("mem_banks/*/properties")]
            amd.append({"arch": arch, "memory_bytes": sum(int(size or 0) for size in banks)})
    kfd = root / "dev/kfd"
    nodes = [kfd, *sorted(root.glob("dev/dri/renderD*"))] if kfd.exists() else []
    # Vendor 0x1002: AMD, for other graphics do not matter; class 0x12: a processing accelerator, such as an Instinct
    vendor = {file: read(root / f"sys/class/drm/{file.name}/device/vendor") or "0x1002" for file in nodes}
    denied = [file for file in nodes if vendor[file] == "0x1002" and not os.access(file, os.R_OK | os.W_OK)]
    pci = [read(file.parent / "class") for file in root.glob("sys/bus/pci/devices/*/vendor") if read(file) == "0x1002"]
    tool, listing = next(((command[0], text) for command in TOOLS if (text := ask(path, *command))), (None, ""))
    said = ask(path, "amd-smi", "version")
    rows = [line.rsplit(", ", 3) for line in ask(path, *NVIDIA).splitlines()[1:]]  # a name may have a comma
    nvidia = [[row[0].partition(", ")[2], *row[1:]] for row in rows if len(row) == 4]
    return {
        "platform": platform.platform(), "container": (root / ".dockerenv").exists(),
        "tool": tool, "products": listing.splitlines(),
        "variables": {name: os.environ[name] for name in (*VISIBLE, *OVERRIDES, *SWITCHES) if name in os.environ},
        "amd": {
            "kfd": kfd.exists(), "gpus": amd, "on_pci_bus": sum(kind.startswith("0x12") for kind in pci),
            "graphics_on_pci_bus": sum(kind.startswith(("0x0300", "0x0380")) for kind in pci),
            "driver": read(root / "sys/module/amdgpu/version") or find(r"(?<=amdgpu version: )\S+", said),
            "rocm": find(r"[\d.]+", read(root / "opt/rocm/.info/version")) or find(r"(?<=ROCm version: )[\d.]+", said),
            "no_permission": [f"/{file.relative_to(root)}" for file in denied],
        },
        "nvidia": {
            "gpus": [columns[0] for columns in nvidia], "driver": nvidia[0][2] if nvidia else None,
            "cuda": find(r"((?<=CUDA Version: )|(?<=CUDA UMD Version: ))[\d.]+", ask(path, "nvidia-smi")),
            "exclusive": any(columns[-1] == "Exclusive_Process" for columns in nvidia),
        },
    }  # fmt: skip


# Findings -------------------------------------------------------------------------------------------------------------
def judge_system(system: dict, torch: dict | None, require: str) -> Iterator[Finding]:
    """What is wrong with drivers, permissions, variables, and with PyTorch for this hardware."""
    amd, nvidia, variables = system["amd"], system["nvidia"], system["variables"]
    level = "warning" if require == "cpu" else "error"
    if (name := OVERRIDES[0]) in variables:
        arch = next((gpu["arch"] for gpu in amd["gpus"]), "")  # the driver's word: the variable does not change it
        kernels = ["", *torch["arch_list"]] if torch and torch["available"] else [arch]
        mend = f"unset {name}" if arch in kernels else f"{AMD_SETUP}; unset {name}"
        yield Finding("warning", f"{name}={variables[name]} makes {arch or 'the device'} pass for another", mend)
    radeon = require == "gpu" and not nvidia["gpus"] and not (torch and torch["cuda"])
    on_bus = amd["on_pci_bus"] or amd["graphics_on_pci_bus"] * radeon  # which looks there as a processor's graphics do
    if unloaded := on_bus and not amd["kfd"]:
        why, mend = "the driver amdgpu is not loaded", "sudo modprobe amdgpu"
        if system["container"]:
            why, mend = "the container was not given it", "docker run --device /dev/kfd --device /dev/dri ..."
        yield Finding(level, f"{on_bus} AMD accelerator(s) on the PCI bus, but no /dev/kfd: {why}", mend)
    elif amd["no_permission"]:
        mend = "sudo usermod -a -G video,render $USER   (then log in again)"
        if system["container"]:
            mend = "docker run --group-add video --group-add $(getent group render | cut -d: -f3) ..."
        yield Finding(level, f"no permission to read and write {', '.join(amd['no_permission'])}", mend)
    graphics = amd["gpus"] and system["tool"]  # those of an AMD processor have a /dev/kfd too
    there = "AMD" if on_bus else "NVIDIA" if nvidia["gpus"] else "AMD" if graphics else ""
    backend, key, tool = ("rocm", "hip", "amd-smi list") if there == "AMD" else ("cuda", "cuda", "nvidia-smi")
    if not torch:
        return  # missing packages are a finding of their own
    has, needs = ([int(part) for part in re.findall(r"\d+", text or "")] for text in (nvidia["cuda"], torch["cuda"]))
    if torch["available"]:
        yield from judge_accelerators(torch, amd["rocm"], variables)
    elif there and not torch[key]:
        built = name_build(torch["hip"], torch["cuda"]).replace("the CPU", "the CPU alone")
        cause = f"PyTorch {torch['version']} is built for {built}, this is an {there} machine"
        yield Finding(level, cause, f"make setup BACKEND={backend}")
    elif there == "NVIDIA" and nvidia["cuda"] and has < needs:
        cause = f"driver {nvidia['driver']} is for CUDA {nvidia['cuda']}, PyTorch needs {torch['cuda']}"
        older = "make setup BACKEND=cuda TORCH_INDEX=cu126"
        yield Finding(level, cause, f"update the driver, https://www.nvidia.com/drivers   (or: {older})")
    elif there and not unloaded and not amd["no_permission"]:
        cause, mend = f"PyTorch {torch['version']} finds no accelerator on this {there} machine", tool
        if hidden := [name for name in VISIBLE if name in variables]:
            shown = ", ".join(f"{name}={variables[name]!r}" for name in hidden)
            cause, mend = f"PyTorch finds no accelerator, and {shown} is set", f"unset {' '.join(hidden)}"
        yield Finding(level, cause, mend)
    elif require == "gpu" and not there:
        yield Finding("error", "there is no accelerator here, and one is required", "make setup BACKEND=cpu")


def judge_accelerators(torch: dict, rocm: str | None, variables: dict) -> Iterator[Finding]:
    """Whether PyTorch suits the accelerators that it finds, which of them is taken, and what is free there."""
    gpus, hip, kernels = torch["gpus"], torch["hip"], torch["arch_list"]
    arch, memory, free = (gpus[0][key] for key in ("arch", "memory_bytes", "free_bytes"))
    if hip and arch not in kernels:
        yield Finding("error", f"PyTorch has kernels for {', '.join(kernels)}, not for {arch}", AMD_SETUP)
    if hip and rocm and (has := int(rocm.split(".")[0])) != (needs := int(hip.split(".")[0])):
        mend = "update ROCm, https://rocm.docs.amd.com/projects/install-on-linux" if has < needs else AMD_SETUP
        yield Finding("warning", f"PyTorch is built for ROCm {hip}, the system has {rocm}: not tested together", mend)
    if tf32 := " ".join(name for name in SWITCHES[:2] if variables.get(name) == "1"):
        yield Finding("warning", f"products of fp32 are computed in TF32, 10 of 23 bits: {tf32} is 1", f"unset {tf32}")
    if len(gpus) > 1:
        level, why = "warning", "the scripts take the first"
        best = max(range(len(gpus)), key=lambda index: gpus[index]["free_bytes"])
        name = "HIP_VISIBLE_DEVICES" if hip else "CUDA_VISIBLE_DEVICES"
        if {"ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"} & variables.keys():
            level, why = "error", "the trainer takes one alone"  # the scripts leave the choice to the variable then
            chosen = variables.get(name, "").split(",")
            best = chosen[best] if len(chosen) == len(gpus) else best
        yield Finding(level, f"{len(gpus)} accelerators are visible; {why}", f"export {name}={best}")
    if ram := gpus[0].get("ram_bytes", 0):
        if hip and memory < 0.6 * ram and ram > 30 * 2**30:  # the kernel's default; a small machine needs its half
            cause = f"the accelerator may take {memory / 2**30:.0f} of {ram / 2**30:.0f} GiB of the memory it shares"
            yield Finding("warning", cause, f"pipx install amd-debug-tools; amd-ttm --set {ram * 7 >> 33}   (reboot)")
    elif free < 0.8 * memory:
        used = f"{(memory - free) / 2**30:.0f} of {memory / 2**30:.0f} GiB of the accelerator's memory"
        yield Finding("warning", f"{used} are taken already", "amd-smi process" if hip else "nvidia-smi")


def judge_probes(probes: dict, torch: dict | None, variables: dict) -> Iterator[Finding]:
    """What the probes showed of PyTorch, bitsandbytes, the packages and the hub."""
    packages = probes["packages"].get("facts", {"versions": {}, "missing": {}})
    if missing := packages["missing"]:
        named = "; ".join(f"{name} ({reason})" for name, reason in missing.items())
        yield Finding("error", f"missing or broken: {named}"[:500], install(missing))
    others = {name: is_ for name, is_ in packages["versions"].items() if is_.split("+")[0] != PINS[name]}
    if torch and (torch["preinstalled"] or torch["version"] == AMD_TORCH):
        others.pop("torch", None)  # that of a Docker image, and that asked for by TORCH_INDEX=amd, stays
    if others:
        named = ", ".join(f"{name} {is_} instead of {PINS[name]}" for name, is_ in others.items())
        yield Finding("warning", f"not the versions that were tested: {named}", install(others))
    broken = {name: probe["error"] for name, probe in probes.items() if probe["status"] != "passed"}
    if "packages" in broken:
        yield Finding("error", f"importing the packages: {broken['packages']}", "make setup")
    if "torch" in broken and "torch" not in missing:
        mend = "make setup" if probes["torch"]["status"] == "failed" else "sudo dmesg | tail -n 50   (the driver says)"
        yield Finding("error", f"PyTorch does not work: {broken['torch']}", mend)
    if torch:
        where = "the accelerator" if torch["available"] else "the CPU"
        mend = "amd-smi" if torch["hip"] else "nvidia-smi" if torch["available"] else "make setup"
        for name in filter(broken.get, ("matmul_fp32", "matmul_bf16", "attention", "attention_bf16")):
            yield Finding("error", f"{name} on {where}: {broken[name]}", mend)
        if probes["attention_bf16"].get("facts", {}).get("keeps_scores"):
            mend = "make train-lora ARGS='--attn_implementation flex_attention'"
            if torch["gpus"][0]["arch"].startswith(("gfx11", "gfx12", "gfx908")) and variables.get(SWITCHES[2]) != "1":
                mend = f"export {SWITCHES[2]}=1"  # AOTriton calls its kernels for some of these experimental
            yield Finding("warning", "attention keeps all its scores: more memory than predicted, and slow", mend)
    if torch and "bitsandbytes" not in missing:
        level = "error" if torch["available"] else "warning"  # the tutorial's optimizer needs it on an accelerator
        override = next((name for name in OVERRIDES[1:] if name in variables), None)
        mend = f"unset {override}" if override else "make bitsandbytes"  # builds it where the wheel's does not work
        name, built, needed = map(probes["bitsandbytes"].get("facts", {}).get, ("library", "built_for", "torch_for"))
        if "bitsandbytes" in broken:
            note = f" ({override}={variables[override]} is set)" if override else ""
            yield Finding(level, f"bitsandbytes: {broken['bitsandbytes']}{note}", mend)
        for probe in filter(broken.get, ("optimizer", "quantize", "decode_4bit") if name else ()):
            yield Finding(level, f"bitsandbytes, {probe} with {name}: {broken[probe]}", mend)
        if built and built != needed and torch["available"]:
            cause = f"bitsandbytes took its library for {built}, PyTorch is built for {needed}"
            yield Finding("warning", cause, mend if override else "make bitsandbytes FORCE=1")
    if "hub" in broken and not {"huggingface-hub", "python-dotenv"} & missing.keys():
        mend = "try again when the network is there, or take BASE_MODEL=FOLDER"
        if model := find(r"(?<=no access to )\S+(?=:)", broken["hub"]):
            mend = f"ask for access at https://huggingface.co/{model}, then HF_TOKEN= in .env"
        yield Finding("error", f"the Hugging Face Hub: {broken['hub']}", mend)


def install(packages: dict) -> str:
    """The command; a plain pip would take a torch for CUDA, whatever the machine."""
    named = " ".join(f"{name}=={PINS[name]}" for name in packages if name != "torch")
    return f"make setup   (or: {sys.executable} -m pip install {named})" if named else "make setup"


# The check ------------------------------------------------------------------------------------------------------------
def examine(args: argparse.Namespace) -> dict:
    system = look_at_system(args.root)
    with ThreadPoolExecutor(max_workers=1 if system["nvidia"]["exclusive"] else 2) as pool:
        tasks = {name: pool.submit(run_probe, name, args.timeout, *[args.access] * (name == "hub")) for name in PROBES}
    probes = {name: task.result() for name, task in tasks.items()}
    torch, hub = share_memory(probes["torch"].get("facts"), args.root), probes["hub"].get("facts", {})
    findings = [*judge_system(system, torch, args.require), *judge_probes(probes, torch, system["variables"])]
    disks = {}
    for place in (Path.cwd(), Path(hub.get("cache", "~/.cache/huggingface")).expanduser()):
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        disks[str(place)] = free = shutil.disk_usage(existing).free
        if free < FREE_DISK:
            cause = f"{free / 1e9:.1f} GB of disk are free at {place}, the tutorial takes about {FREE_DISK / 1e9:.0f}"
            findings.append(Finding("warning", cause, f"df -h {place}   (elsewhere: OUT=, HF_HOME=)"))
    levels = {finding.level for finding in findings}
    return {
        "verdict": "not ready" if "error" in levels else "ready, with warnings" if levels else "ready",
        "findings": [finding._asdict() for finding in findings],
        "python": platform.python_version(), "system": system, "torch": torch, "probes": probes,
        **probes["packages"].get("facts", {"versions": {}, "missing": {}}),
        "free_disk_bytes": disks, "token": hub.get("token", False),
    }  # fmt: skip


def show(report: dict) -> None:
    system, torch = report["system"], report["torch"] or {"available": False, "hip": None, "gpus": []}
    amd, nvidia, gpu = system["amd"], system["nvidia"], "ROCm-GPU" if torch["hip"] else "GPU"
    lines = [f"Is a {gpu} detected?  {torch['available']}", f"How many {gpu}s are detected?  {len(torch['gpus'])}"]
    for index, found in enumerate(torch["gpus"]):
        memory = f"{found['free_bytes'] / 2**30:.0f} of {found['memory_bytes'] / 2**30:.0f} GiB free"
        lines.append(f"  cuda:{index}  {found['name']}  {found['arch']}  {memory}")
    archs = ", ".join(gpu["arch"] for gpu in amd["gpus"])
    lines += [f"AMD: driver {amd['driver']}, ROCm {amd['rocm']}, {archs}"] * amd["kfd"]
    lines += [f"NVIDIA: driver {nvidia['driver']}, for CUDA up to {nvidia['cuda']}"] * bool(nvidia["gpus"])
    lines += [f"{name}={value}" for name, value in system["variables"].items()]
    lines += ["", f"{system['tool']}:", *system["products"]] if system["tool"] else [""]
    if report["torch"]:
        build = name_build(torch["hip"], torch["cuda"])
        lines.append(f"Python {report['python']}, PyTorch {torch['version']} for {build}")
    lines += [f"  {name:16} {report['versions'].get(name) or 'MISSING OR BROKEN'}" for name in PINS] + ["", "Probes"]
    for name, probe in report["probes"].items():
        facts = probe.get("facts", {})
        detail = probe.get("error") or facts.get("library") or ""
        detail = f"off by {facts['difference']:.2g}, allowed {facts['bound']:.2g}" if "difference" in facts else detail
        detail += f", {facts['gb_per_second']:.1f} GB/s" if "gb_per_second" in facts and torch["available"] else ""
        lines.append(f"  {name:16} {probe['status']:10} {probe['seconds']:5.1f} s  {detail}")
    lines += [f"{free / 1e9:.0f} GB of disk free at {place}" for place, free in report["free_disk_bytes"].items()]
    lines += [f"Hugging Face token: {'there' if report['token'] else 'none'}", ""]
    lines += ["{level}: {cause}\n    type: {command}".format(**finding) for finding in report["findings"]]
    where = ", on the accelerator" if torch["available"] else ", on the CPU"
    print(*lines, f"Verdict: {report['verdict']}" + ("" if report["verdict"] == "not ready" else where), sep="\n")


def main() -> None:
    if sys.argv[1:2] == ["--probe"]:
        answer_probe(*sys.argv[2:])
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=raw)
    add = parser.add_argument
    add("--require", choices=["auto", "gpu", "cpu"], default="auto", help="gpu: one has to be there; cpu: none has to")
    add("--access", metavar="HUB_ID", default="", help="a model on the hub: check the access to it")
    add("--timeout", type=float, default=120, help="seconds that a probe may take (default: 120)")
    add("--root", type=Path, default=Path("/"), help="folder of another system's files: /dev, /sys, /opt/rocm, tools")
    add("--output", type=Path, help="file for the report, JSON")
    parser.error = lambda message: sys.exit(f"error: {mask(message)}. See --help.")  # not 2
    args = parser.parse_args()
    show(report := examine(args))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit({"ready": 0, "not ready": 1, "ready, with warnings": 2}[report["verdict"]])


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, a folder that cannot be written
        sys.exit(f"error: {error}. Mend that, and type the same command again.")
