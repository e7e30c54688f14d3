"""Measure the training scripts beside what else could be run, in one run: the same model, rows and number of steps.

    make bench
    make bench ARGS="--data guanaco.parquet --rows 200 --rounds 3 --only 'bare loop' --only 'script, fast'"
    make bench DEVICE=gpu PRICE=3       # on an accelerator that costs 3 dollars an hour, from nothing but data/
    make bench ARGS="--size llama2-7b --data guanaco.parquet"    # on an accelerator, the tokenizer trained on the rows

All train the tutorial's LoRA adapter (r=64, alpha 16, dropout 0.1), or all parameters with --full, for one epoch:

bare loop           a PyTorch loop over unpadded batches, fused AdamW (bare_loop.py): the practical limit
bare loop, fast     the same with the precision and the attention kernel of the recipe fast
script              02_train_lora.py or 03_train_full.py as they are: the tutorial's values
script, fast        the same with the recipe fast of this machine
fast, VARIANT       with --variants: the recipe fast with one setting changed, for what each of them gains
trl sft             TRL's script sft.py, which its command line starts, with the tutorial's values
trl sft, defaults   the same with TRL's own values
trl sft, bfloat16   trl sft as with --dtype bfloat16; this one and the next with --device gpu or --only
script, qlora       02_train_lora.py with env/recipes/qlora.yaml, but with a step for each batch as the others
tutorial            the tutorial's snippets (tutorial_snippet.py)
Trainer             transformers' own Trainer with the tutorial's values (plain_trainer.py)
LLaMA-Factory, litgpt, torchtune    with --peers, each in an environment of its own, which is made here

--device gpu is the short way on an accelerator, estimated at 5 minutes on an H100: six of the above, once, on 160 rows
of up to 1024 tokens, with a model of Llama-2-7B's width in half of its layers. Without --model and --data, synthetic.py
makes the model and the rows of nothing but data/.

Each runs in a process of its own, in turn, --rounds times, every other time in reverse. What runs out of memory is not
run again, and stays in the table. None saves a checkpoint; what is made and trained lies in the temporary folder
(TMPDIR) until the end: with --size llama2-7b 14 GB, with --full 27 GB more, with llama2-7b-half half of that. Real
tokens are those of the rows, each cut at --max_length; padding is never counted. tokens/s is real tokens over the time
from the first forward pass to the last step: what is compiled in the first step counts, so give enough rows; a price is
that of the same time. The rows are tokenized anew each time, and the time to the first step is the least of the rounds:
what runs first reads its files from the disk. Memory of an accelerator is PyTorch's, what tensors took and what was
reserved for them: where it is paged, the state of the optimizer is not in it.
TFLOP/s are those that the arithmetic of the model takes. MFU (model FLOPs utilisation) is their share of the matmul
peak: the most that a product of two 2048 x 2048 matrices reaches here (8192 x 8192 on an accelerator), of bfloat16
where it multiplies in that. What the maker names as the peak is in machine.py. For a token, the forward takes 2
operations for each weight of a matrix and, for causal attention, 2 x layers x query size x length; the backward 2 for
each weight, 2 more for each that is trained, and for attention twice what the forward took. What is computed twice with
gradient checkpointing does not count (PaLM, arXiv 2204.02311, appendix B).
Writes speed.json, speed.md and speed.png to --output_dir; speed-full.* with --full.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import synthetic

BENCH = Path(__file__).resolve().parent
SCRIPTS = BENCH.parent / "scripts"
PEERS = {
    "LLaMA-Factory": ["llamafactory==0.9.5"],
    "litgpt": ["litgpt==0.5.13", "transformers<5.4", "datasets<5"],  # which take huggingface-hub as litgpt does
    "torchtune": ["torchtune==0.6.1", "torchao==0.9.0"],  # newer torchao has no torchao.dtypes.nf4tensor
}
TUTORIAL = """--learning_rate 4e-5 --weight_decay 0.001 --max_grad_norm 0.3 --warmup_steps 0.03
--optim paged_adamw_32bit --lr_scheduler_type constant --train_sampling_strategy group_by_length
--gradient_checkpointing false --logging_steps 50 --report_to tensorboard""".split()
VARIANTS = {
    "float32": "--bf16 false --dtype float32 --attn_implementation sdpa",
    "paged_adamw_32bit": "--optim paged_adamw_32bit",
    "token_metrics": "--token_metrics true",
    "random order": "--train_sampling_strategy random",
    "packing": "--packing true",
    "eager attention": "--attn_implementation eager",
    "gradient_checkpointing": "--gradient_checkpointing true",
    "4-bit weights": "--load_in_4bit true --use_bnb_nested_quant true",
    "torch.compile": "--torch_compile true",
}
# With --device gpu, where nothing else is asked for. docs/performance.md has the estimate of the time.
SHORT = {"size": "llama2-7b-half", "model": None, "data": None, "rows": 160, "max_length": 1024, "rounds": 1}
SHORT_CONTENDERS = ("bare loop, fast", "script", "script, fast", "trl sft", "trl sft, bfloat16", "script, qlora")
# As PyTorch says it of accelerators and of the CPU, Python, and the system, which else kills (SIGKILL).
OUT_OF_MEMORY = re.compile("MemoryError|out of memory|can(not|'t) allocate memory", re.IGNORECASE)
LORA = ["--use_peft", "--lora_r", "64", "--lora_alpha", "16", "--lora_dropout", "0.1"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=["embedded", *synthetic.SIZES], default="embedded", help="embedded: the weights "
        "of --model; else random weights (default: embedded)")  # fmt: skip
    add("--model", type=Path, default=Path("outputs/base-model"), help="model folder, also of the tokenizer "
        "(default: outputs/base-model)")  # fmt: skip
    add("--data", default="data", help="folder or file of texts, or of prompts and completions (default: data)")
    add("--rows", type=int, default=64, help="how many of its rows, the first ones (default: 64)")
    add("--max_length", type=int, default=512, help="tokens of a row (default: 512)")
    add("--batch_size", type=int, default=4, help="rows of a batch (default: 4)")
    add("--rounds", type=int, default=2, help="how often each is run (default: 2)")
    add("--device", choices=["auto", "cpu", "gpu"], default="auto", help="cpu: though there is an accelerator; gpu: an "
        "accelerator, with other defaults, see above (default: auto)")  # fmt: skip
    add("--price", type=float, metavar="DOLLARS", help="of an hour of this machine, for the price of the tokens")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of bare loop, trl sft, peers: bfloat16 "
        "is autocast, on frozen weights of bfloat16 with LoRA, in litgpt of float32; in torchtune all is bfloat16, "
        "what is trained too (default: float32)")  # fmt: skip
    add("--full", action="store_true", help="train all parameters, with 03_train_full.py")
    add("--variants", action="store_true", help="the recipe fast with one setting changed, too")
    add("--profile", action="store_true", help="the second step of the bare loops by operation, to profile-*.txt")
    add("--peers", action="store_true", help="other projects too; each environment takes up to 6 GB in --output_dir")
    add("--only", action="append", help="one of those above; may be repeated")
    add("--output_dir", type=Path, default=Path("outputs/bench"), help="folder of the results")
    if parser.parse_known_args()[0].device == "gpu":
        parser.set_defaults(**SHORT)
    return parser.parse_args()


if __name__ == "__main__":
    if parse_arguments().device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one accelerator
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")  # as run_step.py has them
    if Path("/dev/nvidiactl").exists():
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import yaml
from datasets import load_dataset
from machine import DATA_SHEET, check_model, describe_machine, format_machine, name_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

GPU = torch.cuda.is_available()


def read_texts(args, model: Path, data: str) -> list[str]:
    """The first rows as texts that end with EOS, as TRL would end them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    kind = "" if Path(data).is_dir() else Path(data).suffix[1:].replace("jsonl", "json")
    source = {"path": kind, "data_files": data} if kind else {"path": data}
    try:
        rows = load_dataset(**source, split="train")
    except Exception as error:  # each kind of file raises its own
        text = " ".join(str(error).split())[:300]
        sys.exit(f"error: no rows in {data}: {text}. Give a .jsonl, .json, .csv or .parquet file, or a folder: --data")
    count = min(args.rows, len(rows)) // args.batch_size * args.batch_size
    if not count or not {"text", "prompt"} & set(rows.column_names):
        few = f"fewer than {args.batch_size} rows (--rows, --batch_size)"
        sys.exit(f"error: {data} has {few}, or neither text nor prompt and completion. Give others: --data")
    texts = []
    for row in rows.select(range(count)):
        if not (text := row.get("text")):
            turns = row["prompt"], row["completion"]
            text = turns[0] + turns[1]
            text = text if isinstance(text, str) else tokenizer.apply_chat_template(text, tokenize=False).strip()
        texts.append(text.removesuffix(tokenizer.eos_token) + tokenizer.eos_token)
    return texts


def make_model(args, texts: list[str], folder: Path) -> Path:
    """Folder with a model of that size with random weights, and a tokenizer of as many words."""
    if args.size == "embedded":
        return args.model.resolve()
    torch.manual_seed(0)
    sizes = synthetic.SIZES[args.size]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ends = tokenizer.eos_token
    tokenizer = tokenizer.train_new_from_iterator(texts, sizes["vocab_size"])
    config = LlamaConfig(**sizes, eos_token_id=tokenizer.convert_tokens_to_ids(ends), bos_token_id=None)
    with torch.device("cuda:0" if GPU else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def list_commands(args, model: Path, rows: Path, folder: Path) -> dict[str, tuple]:
    """For each contender: the command, and whether it multiplies in bfloat16."""
    method = "full" if args.full else "lora"
    script = SCRIPTS / ("03_train_full.py" if args.full else "02_train_lora.py")
    fast = folder / "fast.yaml"
    choose = [sys.executable, SCRIPTS / "chain/choose_fast.py", "--method", method, "--output", fast]
    predict = [sys.executable, SCRIPTS / "chain/predict_memory.py", "--model", model, "--method", method]
    predict += ["--", "--config", fast, "--max_length", args.max_length]
    predict += ["--per_device_train_batch_size", args.batch_size]
    if subprocess.run([*map(str, choose), "--", *map(str, predict)]).returncode:
        sys.exit("error: this does not fit, for the reason above. Give another --size, --max_length or --batch_size.")
    chosen = yaml.safe_load(fast.read_text())
    short = args.dtype == "bfloat16"
    dtype = "bfloat16" if short and not args.full else "float32"
    settings = {"model": str(model), "rows": str(rows), "output_dir": str(folder / "run"), "full": args.full}
    settings |= {"gpu": GPU, "eos_token": AutoTokenizer.from_pretrained(model).eos_token}
    settings |= {"max_length": args.max_length, "batch_size": args.batch_size}
    name = str((args.output_dir / "profile-{}.txt").resolve()) if args.profile else ""
    plain = settings | {"profile": name.format("plain"), "bf16": short, "dtype": dtype, "attn_implementation": None}
    like_fast = {"bf16": False, "dtype": "float32", "attn_implementation": None}
    like_fast |= {name: value for name, value in chosen.items() if name in like_fast}
    files = {"plain": plain, "fast": settings | like_fast | {"profile": name.format("fast")}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))

    common = ["--model_name_or_path", model, "--output_dir", folder / "run", "--max_length", args.max_length]
    common += ["--per_device_train_batch_size", args.batch_size, "--num_train_epochs", 1, "--save_strategy", "no"]
    ours = [script, *common, "--dataset_name", rows]
    trl = ["trl.scripts.sft", *common, "--dataset_name", rows.parent, "--dtype", dtype, *([] if args.full else LORA)]
    on_cpu = [] if GPU else ["--use_cpu", "true"]
    bf16 = ["--bf16", str(short or GPU).lower(), *on_cpu]  # TRL's default is an error without an accelerator
    snippet = [BENCH / "tutorial_snippet.py", folder / "plain.json"]
    commands = {
        "bare loop": ([BENCH / "bare_loop.py", folder / "plain.json"], short),
        "bare loop, fast": ([BENCH / "bare_loop.py", folder / "fast.json"], like_fast["bf16"]),
        "script": (ours, False),
        "script, fast": ([*ours, "--config", fast], like_fast["bf16"]),
        "trl sft": ([*trl, *TUTORIAL, "--bf16", str(short).lower(), *on_cpu], short),
        "trl sft, defaults": ([*trl, "--report_to", "none", *bf16], short or GPU),
        "tutorial": (snippet, False),
        "Trainer": ([BENCH / "plain_trainer.py", folder / "plain.json"], False),
    }
    usual = SHORT_CONTENDERS if args.device == "gpu" else [*commands]
    in_bf16 = ["--bf16", "true", *([] if args.full else ["--dtype", "bfloat16"]), *on_cpu]
    commands["trl sft, bfloat16"] = ([*trl, *TUTORIAL, *in_bf16], True)
    if not args.full:
        qlora = [*ours, "--config", SCRIPTS.parent / "env/recipes/qlora.yaml", "--gradient_accumulation_steps", 1]
        commands["script, qlora"] = (qlora, GPU and like_fast["bf16"])  # what its weights are multiplied in
    others = [name for name in commands if name not in usual]
    if args.variants:
        for name, options in VARIANTS.items():
            if not (args.full and name == "4-bit weights"):  # which are not trained
                command = [*ours, "--config", fast, *options.split()]
                commands[f"fast, {name}"] = (command, like_fast["bf16"] and name != "float32")
    if args.peers:
        commands |= {name: ([BENCH / "peers.py", name, folder / "plain.json"], short) for name in PEERS}
    if unknown := set(args.only or []) - set(commands):
        names = ", ".join(map(repr, commands))
        sys.exit(f"error: there is no {min(unknown)!r}, but: {names}. More there are with --peers and with --variants.")
    only = args.only or commands.keys() - others
    return {name: command for name, command in commands.items() if name in only}


def make_environment(name: str, output_dir: Path) -> Path | None:
    """The Python of an environment with a peer and, where that suits it, the torch that is here; None: it fails."""
    folder = output_dir.resolve() / "peers" / name
    python = folder / "bin/python"
    if not (folder / "installed").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "zz_base.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
        result = subprocess.run([python, "-m", "pip", "install", "-q", *PEERS[name]], capture_output=True, text=True)
        if result.returncode:
            print(f"skipped: {name}: {' '.join(result.stderr.split())[-300:]}")
            return None
        (folder / "installed").touch()
    return python


def measure(command: list, python: Path, folder: Path) -> dict | None:
    """What timed.py wrote, with out_of_memory where that ended the command; None: it failed for another reason."""
    out = folder / "out.json"
    out.unlink(missing_ok=True)
    command = [str(part) for part in (python, BENCH / "timed.py", out, *command)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "true"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    for name in ("run", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    found = json.loads(out.read_text()) if out.is_file() else {}
    if result.returncode == 0:
        return found
    if result.returncode == -signal.SIGKILL or OUT_OF_MEMORY.search(result.stderr[-2000:]):
        return found | {"out_of_memory": True}
    print(f"failed: {' '.join(command)}\n{result.stderr[-2000:]}", file=sys.stderr)
    return None


def measure_matmul(dtype: torch.dtype) -> float:
    """The most floating-point operations in a second that a product of two square matrices reaches."""
    device, size = ("cuda:0", 8192) if GPU else ("cpu", 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(30):
        begin = time.perf_counter()
        a @ b
        if GPU:
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    if GPU:
        del a, b
        torch.cuda.empty_cache()  # all of it is for those that are measured
    return best


def count_flops(model: Path, lengths: list[int], full: bool, all_linear: bool = False) -> float:
    """Floating-point operations of forward and backward over rows of these lengths; see the docstring of this file.

    all_linear: where the adapter is beside each linear layer, not on q_proj and v_proj alone.
    """
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        modules = [*AutoModelForCausalLM.from_config(config).named_modules()]
    weights = [(part, weight) for _, part in modules for weight in part.parameters(recurse=False) if weight.dim() == 2]
    base = sum(weight.numel() for part, weight in weights if not isinstance(part, torch.nn.Embedding))
    targets = [part for name, part in modules if name.endswith(("_proj",) if all_linear else (".q_proj", ".v_proj"))]
    adapter = 0 if full else sum(64 * (part.in_features + part.out_features) for part in targets)
    heads = config.num_attention_heads
    query = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    # 4 L^2 of which half is masked
    attention = sum(2 * config.num_hidden_layers * query * length * length for length in lengths)
    return sum(lengths) * (4 * (base + adapter) + 2 * (base if full else adapter)) + 3 * attention


def summarize(args, runs: dict, commands: dict, lengths: list[int], flops: dict, peaks: dict) -> list[dict]:
    """Medians over the runs of each contender, or that the memory did not suffice."""
    table = []
    sheet = DATA_SHEET.get(torch.cuda.get_device_name(), {}) if GPU else {}
    for name, each in runs.items():
        if each[-1].get("out_of_memory"):
            memory = {key: each[-1].get(key) for key in ("peak_memory_bytes", "reserved_memory_bytes")}
            table.append({"what": name, "out_of_memory": True} | memory)
            continue
        steps = sorted(seconds for run in each for seconds in run["step_seconds"])
        seconds = statistics.median(sum(run["step_seconds"]) for run in each)
        dtype = "bfloat16" if commands[name][1] else "float32"
        speed = flops[name] / seconds
        losses = each[-1]["losses"]
        if name == "torchtune":  # which multiplies each with the number of its labels, and then divides the gradients
            losses = [sum(losses) / (sum(lengths) - len(lengths))]
        low, high = (steps[round(share * (len(steps) - 1))] for share in (0.1, 0.9))
        table.append(
            {
                "what": name,
                "tokens_per_second": sum(lengths) / seconds,
                "each_round": [sum(lengths) / sum(run["step_seconds"]) for run in each],
                "samples_per_second": len(lengths) / seconds,
                "step_seconds": {"10%": low, "median": statistics.median(steps), "90%": high},
                "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in each),
                "reserved_memory_bytes": statistics.median(run["reserved_memory_bytes"] for run in each),
                "tflops": speed / 1e12,
                "mfu": speed / peaks[dtype],
                "of_data_sheet": speed / 1e12 / sheet[dtype] if sheet else None,
                "mean_loss": statistics.mean(losses),
                "first_step_at": min(run["first_step_at"] for run in each),
                "dollars_per_million_tokens": args.price and args.price / 3600 * seconds / sum(lengths) * 1e6,
            }
        )
    return table


def write_table(table: list[dict]) -> str:
    """With the columns of an accelerator or of a price where there is one."""
    rows = []
    for row in table:
        allocated, reserved = (
            "" if row[name] is None else f"{row[name] / 2**30:.2f}"
            for name in ("peak_memory_bytes", "reserved_memory_bytes")
        )
        memory = {"allocated, GiB": allocated, "reserved, GiB": reserved} if GPU else {"peak memory, GiB": allocated}
        if row.get("out_of_memory"):
            rows.append({"what": row["what"], "real tokens/s": "out of memory"} | memory)
            continue
        step, sheet, price = row["step_seconds"], row["of_data_sheet"], row["dollars_per_million_tokens"]
        cells = {
            "what": row["what"],
            "real tokens/s": f"{row['tokens_per_second']:.0f}",
            "each round": ", ".join(f"{speed:.0f}" for speed in row["each_round"]),
            "samples/s": f"{row['samples_per_second']:.2f}",
            "step, s: median (10 to 90 %)": f"{step['median']:.2f} ({step['10%']:.2f} to {step['90%']:.2f})",
            **memory,
            **({"TFLOP/s": f"{row['tflops']:.1f}"} if GPU else {}),
            "MFU": f"{row['mfu']:.2f}",
            **({"of the data sheet": f"{sheet:.2f}" if sheet else ""} if GPU else {}),
            "mean loss": f"{row['mean_loss']:.4f}",
            "first step after, s": f"{row['first_step_at']:.1f}",
            **({"$ a million tokens": f"{price:.4f}"} if price else {}),
        }
        rows.append(cells)
    columns = max(rows, key=len)
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(table: list[dict], title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.4 * len(table)), layout="constrained")
    rows = table[::-1]
    colors = ["tab:red" if row["what"].startswith("script") else "tab:gray" for row in rows]
    speeds = [row.get("tokens_per_second", 0) for row in rows]
    bars = axes.barh([row["what"] for row in rows], speeds, color=colors)
    axes.bar_label(bars, [f"{speed:.0f}" if speed else "out of memory" for speed in speeds], padding=3)
    axes.set(title=title, xlabel="real tokens per second", xmargin=0.1)
    figure.savefig(file, dpi=120)


def report(args, runs: dict, commands: dict, lengths: list[int], flops: dict, peaks: dict) -> None:
    table = summarize(args, runs, commands, lengths, flops, peaks)
    model = name_model(args.model) if args.size == "embedded" else f"{args.size}, random weights"
    machine = describe_machine(model) | {
        "matmul_tflops": {name: peak / 1e12 for name, peak in peaks.items()},
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "rows": len(lengths),
        "real_tokens": sum(lengths),
    }
    what = f"{'all parameters' if args.full else 'LoRA'}, {len(lengths)} "
    what += f"{f'rows of {args.data}' if args.data else 'made rows'} cut at {args.max_length}"
    text = f"{format_machine(machine)}\n{what}, {sum(lengths)} real tokens, batches of {args.batch_size}, "
    text += ", ".join(f"{dtype} matmul {peak / 1e12:.3f} TFLOP/s" for dtype, peak in peaks.items())
    text += f"\n\n{write_table(table)}"
    name = "speed-full" if args.full else "speed"
    (args.output_dir / f"{name}.md").write_text(text)
    content = {"machine": machine, "table": table, "runs": runs}
    (args.output_dir / f"{name}.json").write_text(json.dumps(content) + "\n")
    draw(table, f"{model}: {what}", args.output_dir / f"{name}.png")
    print(text, flush=True)


def main() -> None:
    args = parse_arguments()
    if args.device == "gpu" and not GPU:
        sys.exit("error: PyTorch finds no accelerator. Type: make check-gpu, or leave DEVICE=gpu out.")
    if args.model:
        check_model(args.model, "bench")
    elif args.size == "embedded":
        sys.exit("error: --size embedded takes the weights of a model. Give a folder: --model FOLDER")
    if min(args.rows, args.max_length, args.batch_size, args.rounds) < 1:
        sys.exit("error: --rows, --max_length, --batch_size and --rounds are at least 1.")
    if args.price is not None and not 0 < args.price < math.inf:
        sys.exit("error: the price of an hour is above 0: --price DOLLARS, or PRICE=DOLLARS")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows").mkdir()
        rows, model = folder / "rows/train.jsonl", folder / "model"
        if not args.model:
            synthetic.make_model(args.size, model)
        if not args.data:
            synthetic.make_rows(rows.parent, min(args.max_length, 1024))
        texts = read_texts(args, args.model or model, args.data or str(rows))
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        if args.model:
            model = make_model(args, texts, model)
        if GPU:
            torch.cuda.empty_cache()  # all of it is for those that are measured
        tokenizer = AutoTokenizer.from_pretrained(model)
        lengths = [len(tokenizer(text).input_ids[: args.max_length]) for text in texts]
        commands = list_commands(args, model, rows, folder)
        pythons = {
            what: make_environment(what, args.output_dir) if what in PEERS else sys.executable for what in commands
        }
        runs = {what: [] for what in commands}
        flops = {what: count_flops(model, lengths, args.full, what == "script, qlora") for what in commands}
        peaks, steps, failed = {}, len(texts) // args.batch_size, set()
        for number in range(args.rounds):
            for what in [*commands][:: -1 if number % 2 else 1]:
                if not pythons[what] or what in failed or any(run.get("out_of_memory") for run in runs[what]):
                    continue
                run = measure(commands[what][0], pythons[what], folder)
                if run and run.get("out_of_memory"):
                    runs[what].append(run)
                    print(f"round {number + 1}: {what} ran out of memory", flush=True)
                    continue
                if run and len(run["step_seconds"]) != steps and what != "fast, packing":
                    print(f"failed: {what} made {len(run['step_seconds'])} steps, not {steps}", file=sys.stderr)
                    run = None
                if not run:
                    failed.add(what)
                    continue
                runs[what].append(run)
                speed = sum(lengths) / sum(run["step_seconds"])
                print(f"round {number + 1}: {what} {speed:.1f} tokens/s", flush=True)
            for name in ("float32", "bfloat16"):  # the most of all rounds: a machine is not always as fast
                peaks[name] = max(peaks.get(name, 0), measure_matmul(getattr(torch, name)))
            report(args, {what: each for what, each in runs.items() if each}, commands, lengths, flops, peaks)
    if failed or not any(runs.values()):
        sys.exit(f"error: {', '.join(sorted(failed or runs))} failed, for the reason above.")


if __name__ == "__main__":
    main()
