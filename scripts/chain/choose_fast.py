"""Write a recipe with the settings that train fastest on this machine and learn the same, each with its reason.

    python choose_fast.py --method lora --config RECIPE.yaml --output fast.yaml [-- COMMAND ...]

Reads   RECIPE.yaml, whose other settings stay as they are, and its own attention, Liger kernels, and any optimizer but
        AdamW in 32 bits; none: the tutorial's. Of one with 4-bit weights only the precision is chosen.
Writes  fast.yaml, for --config of 02_train_lora.py (lora) or 03_train_full.py (full).

COMMAND is run then: predict_memory.py for that file. Where it exits with status 3, for want of memory, settings that
take less are written and it is run again, as long as there are any. What each setting gains: docs/performance.md.
"""

import argparse
import subprocess
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml
from folders import fail, make_parser, write_text

ROWS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}  # of a step; the tutorial's
OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "paged_adamw", "paged_adamw_32bit")  # of one and the same step


def read_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--method", choices=["lora", "full"], required=True, help="what is trained")
    parser.add_argument("--config", type=Path, help="recipe whose other settings stay")
    parser.add_argument("--output", type=Path, required=True, help="file of the recipe, YAML")
    parser.add_argument("--keep", action="store_true", help="what was chosen before stays, if it may be chosen still")
    parser.add_argument("command", nargs="*", help="after --: run then; where it exits with 3, less memory is taken")
    return parser.parse_args()


def has_bf16() -> bool:
    """Whether the hardware itself computes in bfloat16, and fast. For any AMD GPU PyTorch answers that it does."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's


def choose(method: str, recipe: dict) -> dict[str, tuple]:
    """Settings of this machine: name, value and reason."""
    gpu, chosen = torch.cuda.is_available(), {}
    if not has_bf16() and (recipe.get("bf16") or recipe.get("load_in_4bit")):
        reason = "the hardware does not multiply in bfloat16"
        chosen = {"bf16": (False, reason), "dtype": ("float32", reason)}
    elif has_bf16():
        chosen["bf16"] = (True, "matrices are multiplied in bfloat16, which the hardware has")
        if method == "lora":
            chosen["dtype"] = ("bfloat16", "of the frozen weights; the adapter is trained in float32")
        if not gpu:
            chosen["use_cpu"] = (True, "else bf16 is refused without an accelerator")
    if recipe.get("load_in_4bit"):
        return chosen
    chosen["optim"] = ("adamw_torch_fused", "the same step as the paged one, in one kernel")
    if "bf16" in chosen and gpu and list(distributions(name="flash-attn")):  # not flash-attn-4, of the same module
        chosen["attn_implementation"] = ("flash_attention_2", "FlashAttention is installed")
    if gpu and find_spec("liger_kernel") and find_spec("triton"):
        chosen["use_liger_kernel"] = (True, "norms, MLP and rotary positions in one kernel each: Liger is installed")
    return chosen


def list_attempts(recipe: dict, given: list[str]) -> list[dict[str, tuple]]:
    """What is tried, one after another: nothing more, and settings that take less memory and more time."""
    reason = "the memory does not suffice for"
    chunks = {"token_metrics": (True, f"the loss in chunks: {reason} all logits at once")}
    recompute = {"gradient_checkpointing": (True, f"activations are computed twice: {reason} keeping them")}
    (rows, parts), batches = (int(recipe.get(name) or default) for name, default in ROWS.items()), [{}]
    fixed = any(name in word.replace("-", "_") for name in ROWS for word in given)  # an option goes before a recipe
    while rows >= 8 and rows % 2 == 0 and not fixed:  # as many rows a step, in smaller parts
        rows, parts = rows // 2, 2 * parts
        sizes = zip(ROWS, (rows, parts), strict=True)
        batches.append({name: (value, f"{reason} all rows of a step at once") for name, value in sizes})
    smallest = batches[-1]
    if torch.cuda.is_available():
        return [*batches, smallest | chunks, smallest | recompute, smallest | chunks | recompute]
    return [*batches, smallest | recompute]  # without Triton the chunks take more


def read_recipe(file: Path) -> dict:
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(f"cannot read {file}: {' '.join(str(error).split())}. Give a recipe: FILE.yaml")
    if not isinstance(recipe, dict):
        fail(f"{file} has no settings. Give a recipe with lines like lora_r: 8")
    return recipe


def keep_own(recipe: dict, chosen: dict[str, tuple]) -> dict[str, tuple]:
    """What is chosen, but for the settings of the recipe that are not only a matter of speed."""
    own = {"attn_implementation", "use_liger_kernel"} & recipe.keys()
    if "optim" in recipe and recipe["optim"] not in OPTIMIZERS:
        own.add("optim")
    return {name: choice for name, choice in chosen.items() if name not in own}


def format_recipe(recipe: dict, chosen: dict[str, tuple]) -> str:
    """YAML of the recipe's settings, but for those that are chosen, and then these, with their reasons."""
    replaced = {*chosen, "fp16"} if chosen.get("bf16", (False,))[0] else {*chosen}
    kept = {name: value for name, value in recipe.items() if name not in replaced}
    settings = yaml.safe_dump(kept, sort_keys=False) if kept else "# none: the tutorial's values\n"
    lines = ["# Settings of the recipe:", *settings.splitlines()]
    lines += ["", "# What trains fastest on this machine, chosen by choose_fast.py:"]
    lines += [f"{name}: {str(value).lower()}  # {reason}" for name, (value, reason) in chosen.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = read_options()
    recipe = read_recipe(args.config) if args.config else {}
    chosen = keep_own(recipe, choose(args.method, recipe))
    try:
        attempts = [chosen | less for less in list_attempts(recipe, args.command)]
    except (TypeError, ValueError) as error:
        fail(f"{args.config}: {error}. Give {' and '.join(ROWS)} as numbers.")
    if args.keep and args.output.is_file():
        old = args.output.read_text(encoding="utf-8")
        attempts = [chosen for chosen in attempts if format_recipe(recipe, chosen) == old] or attempts
    for number, chosen in enumerate(attempts):
        if number:
            print("That does not fit. What takes less memory is tried in its place:", flush=True)
        write_text(args.output, format_recipe(recipe, chosen))
        print(f"{args.output}: {', '.join(f'{name} {value}' for name, (value, _) in chosen.items())}", flush=True)
        status = subprocess.run(args.command).returncode if args.command else 0
        if status != 3:
            break
    sys.exit(status)


if __name__ == "__main__":
    main()
