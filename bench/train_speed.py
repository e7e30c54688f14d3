"""Compare the training speed of a training script with a bare PyTorch loop, in one run.

    make bench ARGS="--rounds 2"
    make bench FROM=full

The bare loop is the practical limit: the same model, LoRA layers or none, number of rows and real tokens in a batch,
but each batch is cut from the running tokens of its rows, so that nothing is padded, and nothing but forward, backward
and optimizer step is done. Both are run in turn, each in a process of its own; speed counts real tokens, never padding.
"""

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent


def bare_loop(model_name: str, rows: list[dict], recipe: dict, result) -> None:
    """Sends real tokens per second of a loop over unpadded batches to result. rows hold input_ids and labels."""
    torch.manual_seed(42)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32, use_safetensors=True)
    if "lora_r" in recipe:
        targets = recipe["lora_target_modules"]
        config = LoraConfig(
            r=recipe["lora_r"],
            lora_alpha=recipe["lora_alpha"],
            lora_dropout=recipe["lora_dropout"],
            target_modules=targets[0] if targets == ["all-linear"] else targets,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = model.to(device).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe["learning_rate"], fused=True)
    size = 4
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    batches = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    tokens, start = 0, time.perf_counter()
    for batch in batches:
        ids, labels = (torch.tensor([t for row in batch for t in row[key]]) for key in ("input_ids", "labels"))
        length = len(ids) // size
        ids, labels = (values[: size * length].view(size, length).to(device) for values in (ids, labels))
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, recipe["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        tokens += size * length
    result.put(tokens / (time.perf_counter() - start))


def tokenized_rows(model_name: str, file: Path) -> list[dict]:
    """The rows of prompt and completion as input_ids and labels, the prompt's labels -100."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "prompt" not in row:
            sys.exit(f"error: {file} has no rows of prompt and completion. Type: make bench with the embedded data set")
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        rows.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return rows


def script_run(script: str, model_name: str, data: Path, recipe: Path) -> dict:
    """The run.json of one epoch of a training script."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "scripts" / script, "--config", recipe, "--num_train_epochs", "1"]
        command += ["--model_name_or_path", model_name, "--dataset_name", data, "--output_dir", folder]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
        return json.loads(Path(folder, "run.json").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/base-model", help="model folder (default: outputs/base-model)")
    parser.add_argument("--data", type=Path, default=Path("outputs/dataset"), help="data set folder")
    parser.add_argument("--recipe", type=Path, help="recipe of both (default: the embedded one)")
    parser.add_argument("--full", action="store_true", help="train all parameters, with 03_train_full.py")
    parser.add_argument("--rounds", type=int, default=2, help="how often each is run (default: 2)")
    args = parser.parse_args()

    args.recipe = args.recipe or ROOT / f"env/recipes/embedded{'-full' if args.full else ''}.yaml"
    recipe = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    lora = set() if args.full else {"lora_target_modules", "lora_r", "lora_alpha", "lora_dropout"}
    if lacking := {"learning_rate", "max_grad_norm", *lora} - set(recipe):
        sys.exit(f"error: {args.recipe} does not set {', '.join(sorted(lacking))}. Give a recipe that does.")
    if recipe.get("load_in_4bit"):
        sys.exit(
            f"error: {args.recipe} is for 4-bit weights, which the bare loop does not have. Type: make bench RECIPE="
        )
    rows = tokenized_rows(args.model, args.data / "train.jsonl")
    if args.full:
        recipe.pop("lora_r", None)
    context = multiprocessing.get_context("spawn")
    bare, script = [], []
    for number in range(1, args.rounds + 1):
        result = context.SimpleQueue()
        process = context.Process(target=bare_loop, args=(args.model, rows, recipe, result))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit("error: the bare loop failed, for the reason above.")
        bare.append(result.get())
        run = script_run("03_train_full.py" if args.full else "02_train_lora.py", args.model, args.data, args.recipe)
        script.append(run["metrics"]["tokens_per_second"])
        print(f"round {number}: bare loop {bare[-1]:.1f}, script {script[-1]:.1f} tokens/s", flush=True)
    ratio = statistics.median(script) / statistics.median(bare)
    print(f"script / bare loop: {ratio:.3f} (medians; {run['accelerator']}; torch {run['packages']['torch']})")


if __name__ == "__main__":
    main()
