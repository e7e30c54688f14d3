"""Write the model card of an adapter or a model: what it is, of what, what was measured, how to load it.

    python write_card.py out/lora/run.json

Reads   run.json of a training or of a merge.
Writes  README.md in the folder adapter/ or model/ beside it.
"""

from pathlib import Path

from figures import find_base, find_data, find_training, measure
from folders import fail, make_parser, read_json, write_text
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

{licences}
"""
LOADING = {
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

base = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype="float32")
model = PeftModel.from_pretrained(base, "FOLDER")
model.generation_config = GenerationConfig.from_pretrained("FOLDER")  # with the EOS that was trained
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
""",
    "model": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="{dtype}")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
""",
}
WHAT = {
    "LoRA adapter": "A LoRA adapter for {base}, trained on {data}.",
    "merged LoRA adapter": "{base} and a LoRA adapter trained on {data}, merged into one model.",
    "full fine-tuning": "{base}, all of its parameters fine-tuned on {data}, without LoRA.",
}


def describe_source(source: dict) -> str:
    """Name of a model or data set, and what pins it: its commit on a hub, its package, or a sha256 of its files."""
    sha256 = source.get("sha256") or source.get("train", {}).get("sha256")
    package = "package" in source and f"out of the Python package {source['package']}"
    pin = package or source.get("revision") or (sha256 and f"sha256 {sha256[:12]}")
    name = source["name"] if "revision" in source else Path(source["name"]).name  # no paths of this machine
    return f"`{name}`" + (f" ({pin})" if pin else "")


def list_figures(run: dict) -> dict[str, str]:
    """What was trained and measured, as rows of a table."""
    arguments, metrics, parameters, measured = run["arguments"], run["metrics"], run["parameters"], measure(run)
    figures = {
        "recipe": run["options"].get("config", "the script's defaults and options"),
        "trainable parameters": f"{parameters['trainable']:,} of {parameters['total']:,}",
        "learning rate": f"{arguments['learning_rate']:g}, {arguments['lr_scheduler_type']}",
        "rows in a batch": str(arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]),
        "epochs, seed": f"{measured['epochs']:g}, {arguments['seed']}",
        "mean training loss": f"{measured['loss']:.4f}",
        "runtime": f"{measured['seconds']:.0f} s, {measured['tokens_per_second']:.0f} tokens/s",
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


def list_licences(base: dict, data: dict) -> str:
    known = [each.get("license") or "not recorded" for each in (base, data)]
    return f"Base model: {known[0]}. Training data: {known[1]}. What was made of them here is subject to both."


def write_card(run: dict, training: dict, folder: Path) -> str:
    """The text of the card: a header for the Hub, and the rest in English."""
    base, data, rows = find_base(training), find_data(training), training["dataset"]["rows"]
    on_hub, merged = "revision" in base, "adapter" in run
    kind = "LoRA adapter" if folder.name == "adapter" else "merged LoRA adapter" if merged else "full fine-tuning"
    figures = list_figures(training)
    if merged:
        figures["merge"] = (
            f"in float32, saved as {run['arguments']['dtype']}; the logits differ from the adapter's by at most "
            f"{run['check']['largest_difference']:.1g} of their spread"
        )
        if training.get("quantization"):
            figures["merge"] += "; merged into the weights of full precision, not into the quantized ones"
    card = CARD.format(
        title=f"{base['name'] if on_hub else Path(base['name']).name}, {kind}",
        what=WHAT[kind].format(base=describe_source(base), data=f"{rows} rows of {describe_source(data)}"),
        figures="\n".join(f"| {key} | {value} |" for key, value in figures.items()),
        packages=", ".join(f"{name} {number}" for name, number in training["packages"].items()),
        loading=LOADING[folder.name].format(
            base=base["name"] if on_hub else "BASE",
            revision=f', revision="{base["revision"]}"' if on_hub else "",
            dtype=run["arguments"]["dtype"],
        ),
        where="" if on_hub or folder.name == "model" else f" BASE is the base model's folder: {describe_source(base)}.",
        licences=list_licences(base, data),
    )
    header = ModelCardData(
        base_model=base["name"] if on_hub else None,
        datasets=[data["name"]] if "revision" in data else None,
        license=base.get("license"),
        library_name="peft" if folder.name == "adapter" else "transformers",
        pipeline_tag="text-generation",
    )
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n{card}"))


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run.json of a training or of a merge")
    file = parser.parse_args().run
    run = read_json(file) if file.is_file() else {}
    training = find_training(run)
    if training is None:
        fail(f"{file} has no record of a training. Train first, for example: make train-lora")
    folder = next((path for name in ("adapter", "model") if (path := file.parent / name).is_dir()), None)
    if folder is None:
        fail(f"there is no adapter or model beside {file}. Train again, for example: make train-lora")
    write_text(folder / "README.md", write_card(run, training, folder))
    print(f"The model card is {folder / 'README.md'}")


if __name__ == "__main__":
    main()
