# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""Check the accelerators of this machine and the packages that the tutorial imports.

    python 00_check_gpu.py --require gpu

Needs nothing installed: each package is tried, and what is missing is named with the command that installs it.
Writes  a JSON report to --output, if given.
Exits   with status 1 if a package is missing, or with --require gpu if PyTorch finds no accelerator.
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

# The tutorial's packages, and those that its libraries need for it.
PACKAGES = (
    "torch", "transformers", "datasets", "peft", "trl", "bitsandbytes", "huggingface-hub", "scipy", "accelerate",
    "python-dotenv", "tensorboard",
)  # fmt: skip
MODULES = {"huggingface-hub": "huggingface_hub", "python-dotenv": "dotenv"}
# Product names: the first of these tools that is there and works is asked.
TOOLS = (
    ["amd-smi", "static", "--asic"],
    ["rocm-smi", "--showproductname"],
    ["nvidia-smi", "--query-gpu=index,name,memory.total,driver_version", "--format=csv"],
)


def check_packages() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the packages that import, and for the others the reason, both by package name."""
    versions, missing = {}, {}
    for package in PACKAGES:
        try:
            importlib.import_module(MODULES.get(package, package))
            versions[package] = importlib.metadata.version(package)
        except Exception as error:  # a broken package may raise anything at import
            missing[package] = f"{type(error).__name__}: {error}".splitlines()[0]
    return versions, missing


def check_torch() -> dict:
    """What PyTorch was built for, and the accelerators it finds: name and memory in bytes."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append({"name": properties.name, "memory_bytes": properties.total_memory})
        if torch.version.hip:
            devices[-1]["arch"] = properties.gcnArchName
    return {
        "available": torch.cuda.is_available(),
        "hip": torch.version.hip,
        "cuda": torch.version.cuda,
        "gpus": devices,
    }


def ask_tool() -> tuple[str | None, str]:
    """The system's own tool that lists accelerators, and what it printed."""
    for command in TOOLS:
        if shutil.which(command[0]):
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode == 0:
                return command[0], answer.stdout.strip()
    return None, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--require", choices=["any", "gpu"], default="any", help="gpu: fail without an accelerator")
    parser.add_argument("--output", type=Path, help="file for the report, JSON")
    args = parser.parse_args()

    versions, missing = check_packages()
    torch_report = check_torch() if "torch" in versions else {"available": False, "hip": None, "cuda": None, "gpus": []}
    tool, listing = ask_tool()

    gpu = "ROCm-GPU" if torch_report["hip"] else "GPU"
    print(f"Is a {gpu} detected?  {torch_report['available']}")
    print(f"How many {gpu}s are detected?  {len(torch_report['gpus'])}")
    for index, device in enumerate(torch_report["gpus"]):
        print(f"  cuda:{index}  {device['name']}  {device['memory_bytes'] / 2**30:.0f} GiB  {device.get('arch', '')}")
    if tool:
        print(f"\n{tool}:\n{listing}")
    else:
        print("\nNone of amd-smi, rocm-smi, nvidia-smi is there and works: no product names.")

    print(f"\nPython {platform.python_version()}")
    for package in PACKAGES:
        print(f"  {package:16} {versions.get(package) or 'MISSING OR BROKEN, ' + missing[package]}")

    problems = []
    if missing:
        problems.append(
            f"missing or broken: {', '.join(missing)}. Type: make setup, or: pip install {' '.join(missing)}"
        )
    if args.require == "gpu" and not torch_report["available"]:
        problems.append("PyTorch finds no accelerator. Without one, leave out --require gpu to work on the CPU.")
    ready = "ready, on the accelerator" if torch_report["available"] else "ready, on the CPU (no accelerator found)"
    verdict = "not ready" if problems else ready
    print(f"\nVerdict: {verdict}")

    if args.output:
        report = {
            "verdict": verdict,
            "problems": problems,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch_report,
            "tool": tool,
            "products": listing.splitlines(),
            "packages": versions,
            "missing": missing,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        temporary.replace(args.output)
    if problems:
        sys.exit("\n".join(f"error: {problem}" for problem in problems))


if __name__ == "__main__":
    main()
