"""What a measurement was made on: the model, the machine, the versions of the packages and the commit."""

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
