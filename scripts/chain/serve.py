"""Serve a base model, an adapter on its base model, or a trained model by vLLM, as OpenAI's API.

    python serve.py --model_name_or_path out/lora/adapter --base_model MODEL --name adapter --port 8000

Reads   folders; what has an adapter_config.json is an adapter, which stays unmerged.
Writes  the log of vLLM to --log. Options that --help does not name go to vLLM: --gpu-memory-utilization 0.5

The chat template and the EOS are those that were trained: vLLM would take the base model's for an adapter. With API_KEY
in the environment or in .env a client must send it. The server ends with this process.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from dotenv import find_dotenv, load_dotenv
from folders import fail, make_parser, read_json

load_dotenv(find_dotenv(usecwd=True))  # API_KEY

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's --max-lora-rank
HEADROOM = 3 * 2**30  # vLLM's three processes beside weights and cache, measured with 2.2 GiB
# What vLLM's log says, and what helps.
CAUSES = (
    ("Free memory on device.*", "End what else uses it, or type: make serve ARGS='--gpu-memory-utilization 0.5'"),
    (".*KV cache is needed.*|No available memory for the cache.*", "Type: make serve ARGS='--max-model-len 2048'"),
    ("unrecognized arguments.*|argument --.*", "ARGS takes the options of vLLM and of scripts/chain/serve.py"),
)


def check_adapter(adapter: dict) -> None:
    """Refuses what vLLM cannot put on a base model while it serves."""
    kinds = {"use_dora": "DoRA", "modules_to_save": "modules_to_save", "trainable_token_indices": "trained tokens"}
    kinds |= {"rank_pattern": "ranks", "alpha_pattern": "alphas", "target_parameters": "trained parameters"}
    kinds |= {"layer_replication": "repeated layers", "lora_bias": "biases"}
    what = [f"{name} of its own" if name.endswith("s") else name for key, name in kinds.items() if adapter.get(key)]
    if adapter["peft_type"] != "LORA" or adapter["bias"] != "none" or adapter["r"] > RANKS[-1]:
        what.append(f"type {adapter['peft_type']}, bias {adapter['bias']}, rank {adapter['r']}")
    if what:
        fail(f"vLLM serves no adapter with {' and '.join(what)} beside its base. Type: make merge serve FROM=merged")


def gather(adapter: Path, base: Path, folder: Path) -> None:
    """The tokenizer, template and EOS of an adapter with the config of its base, in a folder for vLLM."""
    if not (adapter / "tokenizer_config.json").is_file():
        fail(
            f"{adapter} has no tokenizer, so what it was trained with is not known. Type: make merge serve FROM=merged"
        )
    for file in adapter.iterdir():
        if file.is_file() and not file.name.startswith("adapter_model"):
            shutil.copy(file, folder)
    shutil.copy(base / "config.json", folder)


def plan_memory(model: Path, config: dict, dtype: str, length: int) -> int:
    """GiB of keys and values on the CPU: for one answer of that length, at least 1. Stops where it does not fit."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = 2 * config["num_hidden_layers"] * heads * size * BYTES[dtype]
    cache = max(1, math.ceil(token * length / 2**30))
    weights = (
        sum(file.stat().st_size for file in model.glob("*.safetensors")) / BYTES[stored_type(config)] * BYTES[dtype]
    )
    needed = weights + cache * 2**30 + HEADROOM
    free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    limit, _ = resource.getrlimit(resource.RLIMIT_DATA)  # of the runner, which knows what a container has
    free = free if limit < 0 else min(free, limit)
    if needed > free:
        advice = "End what else runs" + (", or type: make serve ARGS='--max-model-len 1024'" if cache > 1 else "")
        fail(
            f"{model} takes about {needed / 2**30:.1f} GiB to serve: {weights / 2**30:.1f} for weights in {dtype}, "
            f"{cache} for answers of {length} tokens, {HEADROOM >> 30} for vLLM. {free / 2**30:.1f} are free. {advice}."
        )
    return cache


def stored_type(config: dict) -> str:
    """The type of the weights in the files."""
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def explain(log: Path) -> str:
    """What vLLM ended with, in a line, and what to type."""
    text = log.read_text(encoding="utf-8", errors="replace")
    for pattern, advice in CAUSES:
        if found := re.search(pattern, text):
            return f"{' '.join(found[0].split())[:300]}. {advice}"
    errors = re.findall(r"^.*?\b(\w+(?:Error|Exception): .+)$", text, re.MULTILINE)
    causes = [error for error in errors if "Engine core init" not in error and "WorkerProc init" not in error]
    return f"{(causes or errors or ['no error is in its log'])[0][:300]}. The log is {log}"


def answers(url: str) -> bool:
    """Whether the server is ready."""
    with contextlib.suppress(OSError):
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        return direct.open(f"{url}/health", timeout=5).status == 200
    return False


def show_request(url: str, name: str, key: bool, chat: bool) -> str:
    """A command that asks the server."""
    asked = {"messages": [{"role": "user", "content": "What is LoRA?"}]} if chat else {"prompt": "LoRA is"}
    header = """ -H "Authorization: Bearer $API_KEY\"""" if key else ""
    body = shlex.quote(json.dumps({"model": name, "temperature": 0, "max_tokens": 64} | asked))
    kind = "chat/completions" if chat else "completions"
    return f"  curl {url}/v1/{kind} -H 'Content-Type: application/json'{header} \\\n    -d {body}"


def has_template(folder: Path) -> bool:
    """Whether a tokenizer has a chat template."""
    return (folder / "chat_template.jinja").is_file() or "chat_template" in read_json(folder / "tokenizer_config.json")


def end_with_parent() -> None:
    """In the child: Ctrl-C reaches it through its parent alone, and it ends if that is killed."""
    os.setsid()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)  # the runner's limit is for one process
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def stop(server: subprocess.Popen) -> None:
    """Ends vLLM with all its processes, also those whose parent was killed."""
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(seconds)
            if number == signal.SIGTERM:
                time.sleep(0.5)


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model_name_or_path", type=Path, default=Path("outputs/lora/adapter"), help="folder of an adapter or a model")
    add("--base_model", type=Path, help="folder of the adapter's base model")
    add("--name", default="adapter", help="what clients call it (default: adapter)")
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8000, help="port to listen at (default: 8000)")
    add("--dtype", choices=tuple(BYTES), help="type of the weights (default: on the CPU float32, else as stored)")
    add(
        "--max-model-len",
        type=int,
        help="the most tokens of question and answer (default: the model's, on the CPU 4096)",
    )
    add("--python", default=sys.executable, help="Python that has vLLM (default: this one)")
    add("--log", type=Path, default=Path("serve.log"), help="file for the log of vLLM")
    return parser.parse_known_args()


def main() -> None:
    args, options = read_arguments()
    path, key = args.model_name_or_path, os.environ.pop("API_KEY", "")
    adapter = read_json(path / "adapter_config.json") if (path / "adapter_config.json").is_file() else None
    model = Path(args.base_model or adapter["base_model_name_or_path"]) if adapter else path
    if not (model / "config.json").is_file():
        fail(f"no model at {model}. Give the folder of one.")
    if not 0 < args.port < 2**16:
        fail(f"there is no port {args.port}. Type: make serve PORT=8000")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, args.port))
        except OSError as error:
            fail(f"{args.host}:{args.port}: {error}. Type: make serve PORT={args.port + 1}, or end what listens there.")

    # What vLLM is to be told
    config = read_json(model / "config.json")
    text = config.get("text_config", config) | {"dtype": stored_type(config)}
    cpu = not any(Path(device).exists() for device in ("/dev/kfd", "/dev/nvidiactl"))
    dtype = args.dtype or ("float32" if cpu else stored_type(config))
    folder = tempfile.TemporaryDirectory()
    command = [args.python, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--dtype", dtype, "--host", args.host, "--port", str(args.port)]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if key:
        shutil.copy(Path(__file__).with_name("require_key.py"), folder.name)
        search = os.pathsep.join(filter(None, [folder.name, os.environ.get("PYTHONPATH")]))
        environment |= {"VLLM_API_KEY": key, "PYTHONPATH": search}
        command += ["--middleware", "require_key.RequireKey"]
    if adapter:
        check_adapter(adapter)
        gather(path, model, Path(folder.name))
        rank = next(rank for rank in RANKS if rank >= adapter["r"])
        command += ["--tokenizer", folder.name, "--generation-config", folder.name, "--served-model-name", "base"]
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{args.name}={path}"]
    else:
        command += ["--served-model-name", args.name]
    if cpu:
        args.max_model_len = args.max_model_len or min(text["max_position_embeddings"], 4096)
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", str(plan_memory(model, text, dtype, args.max_model_len)))
    command += ["--max-model-len", str(args.max_model_len)] if args.max_model_len else []

    # Start it, say when it answers, and stay until it ends
    url, began = f"http://{args.host}:{args.port}", time.monotonic()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    print(f"Starting vLLM with {path}; its log is {args.log}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with args.log.open("w", encoding="utf-8") as log:
        server = subprocess.Popen(
            [*command, *options], stdout=log, stderr=log, env=environment, preexec_fn=end_with_parent
        )
    try:
        while server.poll() is None and not answers(url):
            time.sleep(0.5)
        if server.poll() is None:
            if args.host not in ("127.0.0.1", "localhost") and not key:
                print(f"Who reaches {args.host} may use it. To ask for a key, put API_KEY=<words of yours> into .env.")
            print(f"{url}/v1 answers as {args.name}, after {time.monotonic() - began:.0f} s. Ctrl-C ends it. Try:")
            print(show_request(url, args.name, bool(key), has_template(path)), flush=True)
            server.wait()
        stop(server)
        if server.returncode < 0:
            fail(f"vLLM was killed, by signal {-server.returncode}. Type the same command again.")
        fail(f"vLLM ended with status {server.returncode}: {explain(args.log)}")
    except KeyboardInterrupt:
        print("\nThe server has ended.")
    finally:
        stop(server)
        folder.cleanup()


if __name__ == "__main__":
    main()
