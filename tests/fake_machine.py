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
        self.is_integrated = gpu.get("integrated", 0)

torch.cuda.is_available = lambda: bool(gpus)
torch.cuda.device_count = lambda: len(gpus)
torch.cuda.get_device_properties = lambda index: Properties(gpus[index])
torch.cuda.get_device_capability = lambda device=None: (9, 4)
torch.cuda.mem_get_info = lambda index: (gpus[index]["free"], gpus[index]["memory"])
torch.cuda.get_arch_list = lambda: fake["arch_list"]
torch.cuda.is_bf16_supported = lambda including_emulation=True: True
torch.cuda.reset_peak_memory_stats = lambda: None
torch.cuda.memory_allocated = lambda: 0
kernels = gpus and not gpus[0].get("experimental") or os.environ.get("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL") == "1"
torch.cuda.max_memory_allocated = lambda: 2**20 if kernels else 2**30
torch._C._cuda_getCurrentRawStream = lambda index: 0
move = torch.Tensor.to

def stay(tensor, *args, **kwargs):
    moved = move(tensor, *("cpu" if arg == "cuda" else arg for arg in args), **kwargs)
    return moved * float("nan") if os.environ.get("FAKE_BROKEN") and "cuda" in args else moved

torch.Tensor.to = stay
multiply = torch.Tensor.__matmul__

def multiply_in_tf32(*pair):
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1" and gpus and pair[0].dtype == torch.float32:
        pair = [(tensor.view(torch.int32) & -8192).view(torch.float32) for tensor in pair]  # 10 of 23 bits
    return multiply(*pair)

torch.Tensor.__matmul__ = multiply_in_tf32
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
  echo "GPU: 0"; echo "    ASIC:"; echo "        MARKET_NAME: PRODUCT"
fi"""
NVIDIA_SMI = """case "$*" in
  -L) echo "GPU 0: NVIDIA H100 80GB HBM3" ;;
  *noheader) echo "NVIDIA H100 80GB HBM3, DRIVER" ;;
  *csv) echo 'index, name, memory.total [MiB], driver_version, compute_mode'
    echo '0, NVIDIA H100 80GB HBM3, 81559 MiB, DRIVER, MODE' ;;
  *) echo "| NVIDIA-SMI DRIVER    Driver Version: DRIVER    CUDA Version: 13.0     |" ;;
esac"""
MI300X = {"name": "AMD Instinct MI300X", "memory": 192 * GIB, "free": 191 * GIB, "arch": "gfx942"}
H100 = {"name": "NVIDIA H100 80GB HBM3", "memory": 80 * GIB, "free": 79 * GIB, "arch": ""}
RADEON = {"name": "AMD Radeon RX 7900 XTX", "memory": 24 * GIB, "free": 23 * GIB, "arch": "gfx1100"}
# What HIP says of its memory is the carve-out.
STRIX_HALO = {
    "name": "AMD Radeon 8060S", "memory": GIB // 2, "free": GIB // 4, "arch": "gfx1151",
    "integrated": 1, "experimental": True,
}  # fmt: skip


def torch_for(hip: str | None = None, cuda: str | None = None, gpus: list = ()) -> dict:
    local = f"+rocm{hip}" if hip else "" if cuda else "+cpu"
    return {
        "version": "2.14.0+rocm10.1.0" if hip == "10.1" else f"2.13.0{local}",
        "hip": hip,
        "cuda": cuda,
        "gpus": list(gpus),
        "arch_list": ["gfx90a", "gfx942", "gfx1100", "gfx1151"],
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

    def add_amd(
        self, number: int = 1, rocm: str = "7.2.0", tools: tuple = ("amd-smi", "rocm-smi"), gpu: dict = MI300X
    ) -> "Machine":
        """number accelerators with driver, ROCm and tools."""
        self.write("dev/kfd")
        nodes = "sys/class/kfd/kfd/topology/nodes"
        self.write(f"{nodes}/0/properties", "cpu_cores_count 96\ngfx_target_version 0\n")
        major, minor, step = gpu["arch"][3:-2], gpu["arch"][-2], gpu["arch"][-1]
        version = int(major) * 10000 + int(minor, 16) * 100 + int(step, 16)
        kind = "0x120000" if major == "9" else "0x030000"
        for index in range(number):
            self.write(f"dev/dri/renderD{128 + index}")
            self.write(f"{nodes}/{index + 1}/properties", f"simd_count 1216\ngfx_target_version {version}\n")
            bank = f"heap_type 1\nsize_in_bytes {gpu['memory']}\n"
            self.write(f"{nodes}/{index + 1}/mem_banks/0/properties", bank)
            self.write(f"sys/bus/pci/devices/0000:{index:02}:00.0/vendor", "0x1002\n")
            self.write(f"sys/bus/pci/devices/0000:{index:02}:00.0/class", f"{kind}\n")
        self.write("sys/module/amdgpu/version", "6.16.6\n")
        self.write("opt/rocm/.info/version", f"{rocm}-43\n")
        for tool in tools:
            script = AMD_SMI.replace("ROCM", rocm).replace("PRODUCT", gpu["name"])
            self.add_tool(tool, script if tool == "amd-smi" else 'echo "Card Series: MI300X"')
        return self

    def add_memory(self, available: float, total: float, **sizes: float) -> "Machine":
        """GiB of the processor, and of a device that shares it: vram_total, vram_used, gtt_total, gtt_used."""
        text = f"MemTotal: {int(total * 2**20)} kB\nMemAvailable:   {int(available * 2**20)} kB\n"
        self.write("proc/meminfo", text)
        self.write("sys/class/drm/renderD128/device/vendor", "0x1002\n")
        for kind, size in sizes.items():
            self.write(f"sys/class/drm/renderD128/device/mem_info_{kind}", f"{int(size * GIB)}\n")
        return self

    def add_nvidia(self, driver: str = "580.95.05", mode: str = "Default") -> "Machine":
        banner = NVIDIA_SMI
        if driver >= "610":
            banner = banner.replace("Driver Version:", "KMD Version:").replace("CUDA Version:", "CUDA UMD Version:")
        self.add_tool("nvidia-smi", banner.replace("DRIVER", driver).replace("MODE", mode))
        return self
