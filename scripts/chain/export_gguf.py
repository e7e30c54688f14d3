"""Export a model or an adapter to GGUF by llama.cpp's own converter, with what Ollama needs to run it.

    python export_gguf.py --model_name_or_path out/merged/model --llama_cpp FOLDER --quant q8_0 --output_dir exported

Reads   the folder of a base model, an adapter, a merged or a full model, and llama.cpp's folder with its converters.
Writes  exported/model.gguf; of an adapter adapter.gguf, and base.gguf, with the template and the EOS of the adapter.
        Modelfile, for Ollama; README.md, a model card; run.json.

f32, f16 and q8_0 are written by the converter, q4_k_m by llama.cpp's runtime (llama-cpp-python).
"""

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from figures import find_base, find_data, find_training
from folders import fail, make_parser, read_json, read_record, write_json, write_text
from gguf import GGUFReader
from huggingface_hub import ModelCard, ModelCardData
from modelfile import write_modelfile
from transformers import AutoConfig, AutoTokenizer
from write_card import WHAT, describe_source, list_figures, list_licences

llama_cpp = None  # the runtime, which q4_k_m alone needs
with contextlib.suppress(ImportError):
    import llama_cpp

# What may be set of an adapter that llama.cpp's LoRA holds: two matrices for each layer, and one alpha.
HELD = {
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
}
HELD |= {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"}
HELD |= {"layers_pattern", "rank_pattern", "megatron_core", "qalora_group_size"}  # the last two alone mean nothing
PLAIN = {"bias": "none", "init_lora_weights": True}
MERGED = "Export what it is merged to: make merge export FROM=merged"
ADVICE = (
    (
        r"not (yet )?supported|not recognized",
        "llama.cpp does not know this model. It runs with: make infer, make serve",
    ),
    (r"No module named", "Not all that the converter needs is installed: remove .venv-export, and make export again."),
    (r"No space left|Errno 28", "Make room, or take another folder (OUT), and type the same command again."),
)
CARD = """
# {title}, GGUF {quant}

{what}

Here it is as GGUF, for [llama.cpp](https://github.com/ggml-org/llama.cpp) and [Ollama](https://ollama.com).

| file | MiB |
| --- | --- |
{files}

## Running

In this folder:

```sh
ollama create my-model -f Modelfile && ollama run my-model
llama-cli {models} --temp 0
```
{training}
{licences}
"""


def check_adapter(folder: Path) -> None:
    """Stops at an adapter of which llama.cpp would leave something out."""
    config = read_json(folder / "adapter_config.json")
    if config["peft_type"] != "LORA":
        fail(f"{folder} is an adapter of the kind {config['peft_type']}, llama.cpp has LoRA alone. {MERGED}")
    if other := [name for name in config.keys() - HELD if config[name] and config[name] != PLAIN.get(name)]:
        fail(f"{folder} is LoRA with {', '.join(sorted(other))}, which llama.cpp's has not. {MERGED}")


def link_base(base: Path, adapter: Path, folder: Path) -> None:
    """A folder of links to the base model with the tokenizer, the chat template and the EOS of the adapter."""
    own = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    files = {file.name: file for place in (base, adapter) for file in place.iterdir() if file.name not in own}
    for name, file in files.items():
        (folder / name).symlink_to(file.resolve())


def convert(args: Namespace, script: str, source: Path, target: Path, kind: str, *options) -> None:
    """Runs a converter of llama.cpp as a process of its own; where it fails, says why in a line."""
    command = [sys.executable, args.llama_cpp / script, source, "--outfile", target, "--outtype", kind, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not re.match("INFO:|WARN|Writing", line)]
        said = re.sub(r"^ERROR:[\w-]+:", "", lines[-1]) if lines else f"it ended with status {done.returncode}"
        advice = MERGED if "lora" in script else f"All that it says: python {' '.join(map(str, command[1:]))}"
        advice = next((advice for pattern, advice in ADVICE if re.search(pattern, said)), advice)
        fail(f"llama.cpp's {script} cannot convert {source}: {said.strip()[:300].rstrip('.')}. {advice}")


def quantize(source: Path, target: Path) -> None:
    """Writes a GGUF in 4 bits, Q4_K_M."""
    said = []
    log = llama_cpp.llama_log_callback(lambda level, text, _: said.append(text.decode(errors="replace").strip()))
    llama_cpp.llama_log_set(log, None)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if llama_cpp.llama_model_quantize(bytes(source), bytes(target), options):
        fail(f"llama.cpp cannot quantize it: {' '.join(said)[-300:]}. Give another --quant (make: QUANT=q8_0).")


def write_gguf(args: Namespace, source: Path, target: Path) -> None:
    if args.quant != "q4_k_m":
        convert(args, "convert_hf_to_gguf.py", source, target, args.quant)
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        convert(args, "convert_hf_to_gguf.py", source, Path(folder, "whole.gguf"), "auto")  # 16 bits
        quantize(Path(folder, "whole.gguf"), target)


def settle(file: Path, tokenizer) -> bool:
    """Sees that a GGUF has the EOS of the run, and adds a BOS only where that does; returns whether it adds one."""
    fields = GGUFReader(file, "r+").fields
    parts = {name: field.parts[field.data[0]] for name, field in fields.items() if name.endswith(("token", "token_id"))}
    if tokenizer.eos_token and "tokenizer.ggml.eos_token_id" in parts:
        parts["tokenizer.ggml.eos_token_id"][0] = tokenizer.eos_token_id
    if (adds := parts.get("tokenizer.ggml.add_bos_token")) is None:
        return bytes(fields["tokenizer.ggml.model"].parts[-1]) == b"llama"  # what llama.cpp takes it to be then
    if tokenizer.chat_template and adds[0]:  # the chat template writes it, or it was not there in the training
        question = [{"role": "user", "content": "?"}]
        adds[0] = tokenizer.apply_chat_template(question, tokenize=False).startswith(tokenizer.bos_token)
    return bool(adds[0])


def write_card(run: dict, args: Namespace, adapter: bool) -> str:
    """The text of a model card."""
    training = find_training(run)
    base = find_base(training) if training else run.get("base_model", {"name": args.model_name_or_path})
    name, what = base["name"] if "revision" in base else Path(base["name"]).name, f"{describe_source(base)}, as it is."
    licences, data, rows = f"Licence of the model: {base.get('license') or 'not recorded'}.", {}, ""
    if training:
        data = find_data(training)
        kind = "LoRA adapter" if adapter else "merged LoRA adapter" if "adapter" in run else "full fine-tuning"
        source = f"{training['dataset']['rows']} rows of {describe_source(data)}"
        name, what = f"{name}, {kind}", WHAT[kind].format(base=describe_source(base), data=source)
        rows = "\n".join(f"| {key} | {value} |" for key, value in list_figures(training).items())
        rows = f"\n## Training\n\n| | |\n| --- | --- |\n{rows}\n"
        licences = list_licences(base, data)
    files = [f"| {file.name} | {file.stat().st_size / 2**20:.0f} |" for file in sorted(args.output_dir.glob("*.gguf"))]
    models = "-m base.gguf --lora adapter.gguf" if adapter else "-m model.gguf"
    header = ModelCardData(
        base_model=base["name"] if "revision" in base else None,
        datasets=[data["name"]] if "revision" in data else None,
        license=base.get("license"),
        library_name="gguf",
        pipeline_tag="text-generation",
        tags=["llama.cpp", "ollama", *(["lora"] if adapter else [])],
    )
    card = {"title": name, "what": what, "quant": args.quant, "files": "\n".join(files), "models": models}
    text = CARD.format(**card, training=rows, licences=f"## Licences\n\n{licences}")
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n{text}"))


def read_arguments() -> Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model_name_or_path", type=Path, required=True, help="folder of an adapter or a model")
    add("--base_model", type=Path, help="folder of the adapter's base, if not the one it names")
    add("--llama_cpp", type=Path, required=True, help="folder of llama.cpp, with its converters")
    add("--quant", choices=["f32", "f16", "q8_0", "q4_k_m"], default="f16", help="of the weights (default: f16)")
    add("--output_dir", type=Path, default=Path("exported"), help="folder to write to")
    return parser.parse_args()


def main() -> None:
    args = read_arguments()
    folder, output, began = args.model_name_or_path, args.output_dir, time.monotonic()
    if not (args.llama_cpp / "convert_hf_to_gguf.py").is_file():
        fail(f"no converter at {args.llama_cpp}. Give llama.cpp's folder: --llama_cpp")
    if args.quant == "q4_k_m" and not llama_cpp:
        fail("q4_k_m needs llama.cpp's runtime: pip install llama-cpp-python. Or give --quant q8_0 (make: QUANT=q8_0).")
    adapter = (folder / "adapter_config.json").is_file()
    base = folder
    if adapter:
        check_adapter(folder)
        base = args.base_model or Path(read_json(folder / "adapter_config.json")["base_model_name_or_path"])
    if not (base / "config.json").is_file():
        fail(f"no model in the folder {base}. Fetch it with 01_download.py, and give its folder.")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as links:
        source, target = (Path(links), output / "base.gguf") if adapter else (folder, output / "model.gguf")
        if adapter:
            link_base(base.resolve(), folder.resolve(), source)
            kind = "f32" if args.quant == "f32" else "f16"
            convert(args, "convert_lora_to_gguf.py", folder, output / "adapter.gguf", kind, "--base", base)
        write_gguf(args, source, target)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False).get_text_config()
        ends = read_record(source, "generation_config.json").get("eos_token_id")
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    stops = tokenizer.convert_ids_to_tokens(sorted(ends))
    adds_bos = settle(target, tokenizer)
    text = write_modelfile(tokenizer, stops, config.max_position_embeddings, adds_bos, adapter)
    print(*re.findall("(?m)^# (TEMPLATE.*)", text), sep="\n", end="")
    write_text(output / "Modelfile", text)
    run = read_record(folder.parent) or read_record(folder)
    write_text(output / "README.md", write_card(run, args, adapter))
    files = {file.name: file.stat().st_size for file in sorted(output.glob("*.gguf"))}
    arguments = {name: str(value) for name, value in vars(args).items() if value}
    made = {"arguments": arguments, "files": files, "metrics": {"seconds": round(time.monotonic() - began, 1)}}
    write_json(output / "run.json", made)
    for name, size in files.items():
        print(f"{size / 2**20:8.1f} MiB  {name}")


if __name__ == "__main__":
    main()
