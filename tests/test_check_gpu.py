"""00_check_gpu.py on machines with and without accelerators; the system's tools and torch's view are stand-ins."""

import json

import pytest
from conftest import load, run


def stand_in(folder, name, text, status=0):
    (folder / name).write_text(f"#!/bin/sh\necho '{text}'\nexit {status}\n")
    (folder / name).chmod(0o755)


def test_a_machine_without_accelerator_is_ready_unless_one_is_required(tmp_path):
    result = run("00_check_gpu.py", "--output", "check/report.json", cwd=tmp_path, PATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "Is a GPU detected?  False" in result.stdout and "How many GPUs are detected?  0" in result.stdout
    report = json.loads((tmp_path / "check/report.json").read_text())
    assert report["verdict"].startswith("ready, on the CPU") and report["missing"] == {}
    assert report["packages"]["trl"] and report["torch"]["available"] is False
    result = run("00_check_gpu.py", "--require", "gpu", "--output", "check/report.json", cwd=tmp_path)
    assert result.returncode == 1 and "finds no accelerator" in result.stderr
    assert json.loads((tmp_path / "check/report.json").read_text())["verdict"] == "not ready"


@pytest.mark.parametrize(
    ("tools", "asked", "said"),
    [
        ({"amd-smi": 0, "rocm-smi": 0}, "amd-smi", "amd-smi sees MI300X"),
        ({"amd-smi": 1, "rocm-smi": 0}, "rocm-smi", "rocm-smi sees MI300X"),
        ({"nvidia-smi": 0}, "nvidia-smi", "nvidia-smi sees MI300X"),
        ({"nvidia-smi": 9}, None, ""),
    ],
)
def test_product_names_come_from_the_first_tool_that_works(tools, asked, said, tmp_path, monkeypatch):
    for name, status in tools.items():
        stand_in(tmp_path, name, f"{name} sees MI300X", status)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load("00_check_gpu.py").ask_tool() == (asked, said)


def test_missing_packages_are_named_with_the_command(monkeypatch):
    script = load("00_check_gpu.py")
    monkeypatch.setattr(script, "PACKAGES", ("torch", "no-such-package"))
    versions, missing = script.check_packages()
    assert versions.keys() == {"torch"}
    assert "No module named 'no-such-package'" in missing["no-such-package"]


def test_the_tutorials_lines_on_a_rocm_machine(monkeypatch, capsys):
    import torch

    class Properties:
        name, total_memory, gcnArchName = "AMD Instinct MI300X", 192 * 2**30, "gfx942:sramecc+:xnack-"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch.version, "hip", "7.2")
    monkeypatch.setattr("sys.argv", ["00_check_gpu.py", "--require", "gpu"])
    script = load("00_check_gpu.py")
    monkeypatch.setattr(script, "PACKAGES", ("torch",))  # the others do not import into this make-believe
    script.main()
    printed = capsys.readouterr().out
    assert "Is a ROCm-GPU detected?  True\nHow many ROCm-GPUs are detected?  4\n" in printed
    assert "cuda:3  AMD Instinct MI300X  192 GiB  gfx942" in printed
    assert "Verdict: ready, on the accelerator" in printed
