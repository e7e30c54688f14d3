"""Machines that are not here: device files and tools under a root folder, and a PyTorch that believes in them.

PyTorch, its CPU kernels and bitsandbytes' CPU library are the real ones: what a probe computes is computed. Only what
they say of the hardware is made up, by a sitecustomize.py that Python runs when the machine's environment is set.
"""

import json
import stat
from pathlib import Path

GIB = 2**30
SITE = """
import ctypes, json, os
import torch
fake = json.loads(os.environ["FAKE_TORCH"])
torch.__version__ = type(torch.__version__)(fake["version"])
torch.version.hip, torch.version.cuda = fake["hip"], fake["cuda"]
gpus = fake["gpus"]

class Properties:
    def __init__(self, gpu):
        self.name, self.total_memory, self.gcnArchName = gpu["name"], gpu["memory"], gpu["arch"] + ":sramecc+:xnack-"

torch.cuda.is_available = lambda: bool(gpus)
torch.cuda.device_count = lambda: len(gpus)
torch.cuda.get_device_properties = lambda index: Properties(gpus[index])
torch.cuda.get_device_capability = lambda device=None: (9, 4)
torch.cuda.mem_get_info = lambda index: (gpus[index]["free"], gpus[index]["memory"])
torch.cuda.get_arch_list = lambda: fake["arch_list"]
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
torch._C._cuda_getCurrentRawStream = lambda index: 0
move = torch.Tensor.to

def stay(tensor, *args, **kwargs):
    moved = move(tensor, *("cpu" if arg == "cuda" else arg for arg in args), **kwargs)
    return moved * float("nan") if os.environ.get("FAKE_BROKEN") and "cuda" in args else moved

torch.Tensor.to = stay
load = ctypes.cdll.LoadLibrary

def load_other(name):
    if not any(kind in name for kind in ("libbitsandbytes_rocm", "libbitsandbytes_cuda")):
        return load(name)
    library = load(os.path.join(os.path.dirname(name), "libbitsandbytes_cpu.so"))
    library._name = name
    return library

ctypes.cdll.LoadLibrary = load_other
"""
AMD_SMI = """if [ "$1" = version ]; then
  echo "AMDSMI Tool: 26.2.0 | AMDSMI Library version: 26.2.0 | ROCm version: ROCM | amdgpu version: 6.16.6"
else
  echo "GPU: 0"; echo "    ASIC:"; echo "        MARKET_NAME: AMD Instinct MI300X"
fi"""
NVIDIA_SMI = """case "$*" in
  -L) echo "GPU 0: NVIDIA H100 80GB HBM3" ;;
  *noheader) echo "NVIDIA H100 80GB HBM3, 580.95.05" ;;
  *csv) printf 'index, name, memory.total [MiB], driver_version\\n0, NVIDIA H100 80GB HBM3, 81559 MiB, 580.95.05\\n' ;;
  *) echo "| NVIDIA-SMI 580.95.05    Driver Version: 580.95.05    CUDA Version: 13.0     |" ;;
esac"""
MI300X = {"name": "AMD Instinct MI300X", "memory": 192 * GIB, "free": 191 * GIB, "arch": "gfx942"}
H100 = {"name": "NVIDIA H100 80GB HBM3", "memory": 80 * GIB, "free": 79 * GIB, "arch": ""}


def torch_for(hip: str | None = None, cuda: str | None = None, gpus: list = ()) -> dict:
    local = f"+rocm{hip}" if hip else "" if cuda else "+cpu"
    return {
        "version": f"2.13.0{local}",
        "hip": hip,
        "cuda": cuda,
        "gpus": list(gpus),
        "arch_list": ["gfx90a", "gfx942"],
    }


class Machine:
    """A root folder of device files and tools, and the environment in which PyTorch believes in them."""

    def __init__(self, root: Path, torch: dict, **environment: str):
        self.root = root
        self.write("site/sitecustomize.py", SITE)
        self.environment = {"PYTHONPATH": str(root / "site"), "FAKE_TORCH": json.dumps(torch), **environment}

    def write(self, name: str, text: str = "") -> Path:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def add_tool(self, name: str, script: str) -> None:
        file = self.write(f"usr/bin/{name}", f"#!/bin/bash\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def add_amd(self, number: int = 1, rocm: str = "7.2.0", tools: tuple = ("amd-smi", "rocm-smi")) -> "Machine":
        """number accelerators MI300X with driver, ROCm and tools."""
        self.write("dev/kfd")
        nodes = "sys/class/kfd/kfd/topology/nodes"
        self.write(f"{nodes}/0/properties", "cpu_cores_count 96\ngfx_target_version 0\n")
        for index in range(number):
            self.write(f"dev/dri/renderD{128 + index}")
            self.write(f"{nodes}/{index + 1}/properties", "simd_count 1216\ngfx_target_version 90402\n")
            self.write(f"{nodes}/{index + 1}/mem_banks/0/properties", f"heap_type 1\nsize_in_bytes {192 * GIB}\n")
            self.write(f"sys/bus/pci/devices/0000:{index:02}:00.0/vendor", "0x1002\n")
            self.write(f"sys/bus/pci/devices/0000:{index:02}:00.0/class", "0x120000\n")
        self.write("sys/module/amdgpu/version", "6.16.6\n")
        self.write("opt/rocm/.info/version", f"{rocm}-43\n")
        for tool in tools:
            self.add_tool(tool, AMD_SMI.replace("ROCM", rocm) if tool == "amd-smi" else 'echo "Card Series: MI300X"')
        return self

    def add_nvidia(self) -> "Machine":
        self.add_tool("nvidia-smi", NVIDIA_SMI)
        return self
