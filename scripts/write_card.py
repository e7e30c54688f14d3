# /// script
# requires-python = ">=3.10"
# dependencies = ["huggingface-hub==2.4.0"]
# ///
"""Write the model card of an adapter or a model: what it is, of what, what was measured, how to load it.

    python write_card.py out/run.json

Reads   run.json as the training and merging scripts write it.
Writes  README.md in out/adapter/ for a LoRA run, else in out/model/.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

CARD = """
# {title}

{what}

## Training

| | |
| --- | --- |
{figures}

Packages: {packages}.

## Loading

```python
{loading}
question = [{{"role": "user", "content": "What is a large language model?"}}]
inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

FOLDER is this folder, or its name on the Hub.{where}

## Licences

Base model: {base_license}. Training data: {data_license}. What was made of them here is subject to both.
"""
LOADING = {
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype="float32")
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
""",
    "model": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
""",
}


def fail(message: str) -> None:
    """Ends with an error; a token in it is not shown: libraries quote headers, where it may stand in another form."""
    token = os.environ.get("HF_TOKEN", "").strip() or "hf_..."
    sys.exit("error: " + re.sub(r"\bhf_[A-Za-z0-9]{16,}\S*", "<HF_TOKEN>", message.replace(token, "<HF_TOKEN>")))


def describe_source(source: dict) -> str:
    """Name of a model or data set, and what pins it: its commit on a hub, its package, or the sha256 of its files."""
    pin = source.get("revision")
    if package := source.get("package"):
        pin = f"out of the Python package {package}"
    elif not pin and (sha256 := source.get("sha256") or source.get("train", {}).get("sha256")):
        pin = f"sha256 {sha256[:12]}"
    name = source["name"] if "revision" in source else Path(source["name"]).name  # no paths of this machine
    return f"`{name}`" + (f" ({pin})" if pin else "")


def list_figures(run: dict) -> dict[str, str]:
    """What was trained and measured, as rows of a table."""
    arguments, metrics, parameters = run["arguments"], run["metrics"], run["parameters"]
    figures = {
        "recipe": run.get("recipe") or "the script's defaults and options",
        "trainable parameters": f"{parameters['trainable']:,} of {parameters['total']:,}",
        "learning rate": f"{arguments['learning_rate']:g}, {arguments['lr_scheduler_type']}",
        "rows in a batch": str(arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]),
        "epochs": f"{metrics['epoch']:g}",
        "seed": str(arguments["seed"]),
        "mean training loss": f"{metrics['train_loss']:.4f}",
        "runtime": f"{metrics['train_runtime']:.0f} s, {metrics['tokens_per_second']:.0f} tokens/s",
        "peak memory": f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB",
        "accelerator": run["accelerator"],
    }
    if arguments["use_peft"]:
        targets = arguments["lora_target_modules"]
        layers = ", ".join(targets) if isinstance(targets, list) else targets or "PEFT's choice for the architecture"
        figures["LoRA"] = f"r={arguments['lora_r']}, alpha={arguments['lora_alpha']}, layers: {layers}"
    if quantization := run.get("quantization"):
        bits = f"4 bits, {quantization['bnb_4bit_quant_type']}" if quantization["load_in_4bit"] else "8 bits"
        double = ", double quantization" if quantization["bnb_4bit_use_double_quant"] else ""
        figures["weights of the base model in training"] = f"quantized: {bits}{double} (QLoRA)"
    if "eval_loss" in metrics:
        figures["held-out loss"] = f"{metrics['eval_loss']:.4f} (nats per token, {metrics['eval_tokens']} tokens)"
    return figures


def write_text(file: Path, text: str) -> None:
    """Writes the file whole or not at all, and sees that it is on the disk."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: fail(f"{message}. See --help.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run.json of a training or of a merge")
    file = parser.parse_args().run
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        fail(f"no run at {file}. Train first, for example: make train-lora")
    merged = "adapter" in run
    training = run["training"] if merged else run
    if "metrics" not in training:
        fail(f"{file} has no record of a training. Train first, for example: make train-lora")
    folder = file.parent / ("adapter" if training["arguments"]["use_peft"] and not merged else "model")
    if not folder.is_dir():
        fail(f"{folder} is not there. Train again.")
    base, data = run["base_model"], run["dataset"]
    origin = data["origin"] or data
    on_hub = "revision" in base
    kind = "LoRA adapter" if folder.name == "adapter" else "merged LoRA adapter" if merged else "full fine-tuning"
    what = {
        "LoRA adapter": "A LoRA adapter for {base}, trained on {data}.",
        "merged LoRA adapter": "{base} and a LoRA adapter trained on {data}, merged into one model.",
        "full fine-tuning": "{base}, all of its parameters fine-tuned on {data}, without LoRA.",
    }[kind].format(base=describe_source(base), data=f"{data['rows']} rows of {describe_source(origin)}")
    figures = list_figures(training)
    if merged:
        check = run["check"]
        figures["merge"] = (
            f"in float32, saved as {run['arguments']['dtype']}; the logits differ from the adapter's by at most "
            f"{check['largest_difference']:.1g} of their spread"
        )
        if run.get("quantized_base"):
            figures["merge"] += "; merged into the weights of full precision, not into the quantized ones"
    loading = LOADING[folder.name].format(
        base=base["name"] if on_hub else "BASE",
        revision=f', revision="{base["revision"]}"' if on_hub else "",
        dtype=run["arguments"]["dtype"],
    )
    where = (
        "" if on_hub or folder.name == "model" else f" BASE is the folder of the base model: {describe_source(base)}."
    )
    card = CARD.format(
        title=f"{base['name'] if on_hub else Path(base['name']).name}, {kind}",
        what=what,
        figures="\n".join(f"| {key} | {value} |" for key, value in figures.items()),
        packages=", ".join(f"{name} {number}" for name, number in training["packages"].items()),
        loading=loading,
        where=where,
        base_license=base.get("license") or "not recorded",
        data_license=origin.get("license") or "not recorded",
    )
    header = ModelCardData(
        base_model=base["name"] if on_hub else None,
        datasets=[origin["name"]] if "revision" in origin else None,
        license=base.get("license"),
        library_name="peft" if folder.name == "adapter" else "transformers",
        pipeline_tag="text-generation",
    )
    write_text(folder / "README.md", str(ModelCard(f"---\n{header.to_yaml()}\n---\n{card}")))
    print(f"The model card is {folder / 'README.md'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
