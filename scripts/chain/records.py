"""Records of runs, run.json, and the functions of the tutorial's scripts that the chain takes from them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from folders import fail, read_json

SCRIPTS = Path(__file__).resolve().parent.parent


def load_script(name: str) -> ModuleType:
    """The module of a script of the tutorial, such as 02_train_lora.py, whose name is none that import takes."""
    key = f"script_{name.removesuffix('.py')}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, SCRIPTS / name)
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


def read_run(file: Path) -> dict:
    """The record of a training."""
    if not file.is_file():
        fail(f"no run at {file}. Train first: make train-lora, make train-full")
    run = read_json(file)
    if not run.keys() >= {"script", "base_model", "dataset", "arguments", "parameters", "metrics", "history"}:
        fail(f"{file} is not of a training run. Give the run.json of one.")
    return run


def name_runs(files: list[Path]) -> list[str]:
    """A short name for each run: its folder's, or the whole path where two folders have one name."""
    names = [file.resolve().parent.name for file in files]
    return names if len(set(names)) == len(names) else [str(file) for file in files]
