"""What a measurement was made on: the model, the machine, the versions of the packages and the commit.

DATA_SHEET: the peaks that the makers name, in TFLOP/s, of products in float32 (no TF32) and in bfloat16 (summed up in
float32, no sparsity), by the name that PyTorch reports. From nvidia.com/en-us/data-center/ h100, h200, a100, l4 and
l40s, the data sheets of HGX B200 (an eighth of it) and RTX A6000, the papers "NVIDIA Ada GPU Architecture" and "NVIDIA
RTX Blackwell GPU Architecture"; amd.com/en/products/accelerators/instinct/ mi200, mi300 and mi350,
amd.com/en/products/graphics/desktops/radeon/ 7000-series. PyTorch sees each of the two dies of an MI250X, so half of it
stands here. A part of a card has the card's name, and less.
"""

import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")
DATA_SHEET = {
    "NVIDIA H100 80GB HBM3": {"float32": 67, "bfloat16": 989},  # SXM
    "NVIDIA H100 PCIe": {"float32": 51, "bfloat16": 756},
    "NVIDIA H100 NVL": {"float32": 60, "bfloat16": 835},
    "NVIDIA H200": {"float32": 67, "bfloat16": 989},
    "NVIDIA B200": {"float32": 75, "bfloat16": 2250},
    **dict.fromkeys(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"),
        {"float32": 19.5, "bfloat16": 312},
    ),
    "NVIDIA L4": {"float32": 30.3, "bfloat16": 121},
    "NVIDIA L40S": {"float32": 91.6, "bfloat16": 362},
    "NVIDIA RTX A6000": {"float32": 38.7, "bfloat16": 154.8},
    "NVIDIA GeForce RTX 4090": {"float32": 82.6, "bfloat16": 165.2},
    "NVIDIA GeForce RTX 5090": {"float32": 104.8, "bfloat16": 209.5},
    "AMD Instinct MI250X": {"float32": 47.9, "bfloat16": 191.5},
    "AMD Instinct MI300X": {"float32": 163.4, "bfloat16": 1307.4},
    "AMD Instinct MI300X VF": {"float32": 163.4, "bfloat16": 1307.4},  # in a virtual machine
    "AMD Instinct MI325X": {"float32": 163.4, "bfloat16": 1307.4},
    "AMD Instinct MI350X": {"float32": 144.2, "bfloat16": 2307},
    "AMD Instinct MI355X": {"float32": 157.3, "bfloat16": 2517},
    **dict.fromkeys(("AMD Radeon RX 7900 XTX", "Radeon RX 7900 XTX"), {"float32": 61.4, "bfloat16": 122.8}),
}


def check_model(folder: Path, target: str) -> None:
    if not (folder / "config.json").is_file():
        sys.exit(f"error: no model in {folder}. Type: make {target}, or give a folder: --model FOLDER")


def name_model(folder: Path) -> str:
    """Its name as 01_download.py keeps it, else that of the folder."""
    note = folder / "run.json"
    return json.loads(note.read_text())["base_model"]["name"] if note.is_file() else folder.resolve().name


def describe_machine(model: str) -> dict:
    cpu = dict(re.findall(r"(?m)^(model name|cpu family|model)\s*: (.+)", Path("/proc/cpuinfo").read_text()))
    name = ", ".join(f"{key} {value}" for key, value in cpu.items()) or platform.machine()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return {
        "model": model,
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cpu": f"{name}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "rocm": torch.version.hip,
        "cuda": torch.version.cuda,
        "packages": {name: version(name) for name in PACKAGES},
        "git_commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
    }


def format_machine(machine: dict) -> str:
    """The same in a line, for the head of a table."""
    device = machine["cpu"] if machine["device"] == "CPU" else machine["device"]
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    packages = ", ".join(f"{name} {machine['packages'][name]}" for name in ("torch", "transformers", "trl"))
    return f"{machine['model']}: {device}, {machine['threads']} threads, {memory}, {packages}, {machine['date'][:10]}"
