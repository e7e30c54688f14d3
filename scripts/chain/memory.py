"""Formulas for the peak memory of a training of a Llama-like decoder; predict_memory.py applies them."""

import os
import re

# What decides about memory among the options of a training, with the tutorial's values.
SETTINGS = {
    "dtype": "float32", "bf16": False, "load_in_4bit": False, "load_in_8bit": False, "use_bnb_nested_quant": False,
    "token_metrics": False, "packing": False, "use_liger_kernel": False,
    "lora_r": 64, "lora_dropout": 0.1, "lora_target_modules": ["q_proj", "v_proj"], "optim": "paged_adamw_32bit",
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "gradient_checkpointing": False,
    "max_length": 1024,
}  # fmt: skip
QLORA = {
    "load_in_4bit": True, "use_bnb_nested_quant": True, "lora_target_modules": ["all-linear"],
    "gradient_checkpointing": True, "gradient_accumulation_steps": 4, "bf16": True, "dtype": "bfloat16",
}  # fmt: skip
METHODS = {
    "LoRA, fp32 (the tutorial)": ("lora", {}),
    "LoRA, bf16": ("lora", {"dtype": "bfloat16", "bf16": True}),
    "QLoRA (RECIPE=qlora)": ("lora", QLORA),
    "full, fp32 (the tutorial)": ("full", {}),
    "full, bf16 autocast": ("full", {"bf16": True}),
}


def count_weights(config: dict, targets: list[str], rank: int) -> dict:
    """Parameters of a Llama-like decoder (Llama, Mistral, Qwen2, Qwen3, ...) and of a LoRA adapter of it."""
    hidden, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    heads, inner = config["num_attention_heads"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // heads
    query, value = heads * head, (config.get("num_key_value_heads") or heads) * head
    linear = {  # input and output size of each linear layer
        "q_proj": (hidden, query), "k_proj": (hidden, value), "v_proj": (hidden, value), "o_proj": (query, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip
    chosen = {name: sizes for name, sizes in linear.items() if name in targets or "all-linear" in targets}
    embedding, norms = vocabulary * hidden, (2 * layers + 1) * hidden
    if config.get("model_type") == "qwen3":
        norms += 2 * layers * head
    biases = layers * (query + 2 * value) if config.get("model_type") == "qwen2" else 0
    quantizable = layers * sum(into * out for into, out in linear.values())
    return {
        "total": embedding * (1 if config.get("tie_word_embeddings") else 2) + quantizable + norms + biases,
        "quantizable": quantizable,
        "adapter": layers * rank * sum(into + out for into, out in chosen.values()),
        "targets": chosen,
        "attention": (query, value),
    }


def unknown_to(config: dict, targets: list[str]) -> str:
    """Why the formulas do not hold for this model, or nothing."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if lacking := [name for name in sizes if not config.get(name)]:
        return f"its config has no {', '.join(lacking)}"
    if config.get("quantization_config"):
        return "its weights are quantized already"
    if experts := [name for name in config if name.startswith("num_") and name.endswith("experts") and config[name]]:
        return f"it is a mixture of experts ({', '.join(experts)})"
    others = set(targets) - {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")} - {"all-linear"}
    return f"LoRA on {', '.join(sorted(others))} is not counted" if others else ""


def describe_optimizer(name: str) -> tuple[float, bool]:
    """Bytes of state for a parameter, and whether it is bitsandbytes'. A moment takes 4 bytes, or as the name says."""
    moments = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1}
    moment = 1 if "8bit" in name else 0.5 if "4bit" in name else 4
    number = next((number for kind, number in moments.items() if kind in name), 0)
    return number * moment, bool(re.match("paged_|lion_|ademamix|rmsprop_bnb|adamw_8bit|adamw_bnb", name))


def predict_memory(config: dict, method: str, settings: dict, tokens: int, where: str) -> dict:
    """Peak memory of a training in bytes, by part; tokens: of the longest row, packed or not; where: cpu or gpu.

    With P parameters, T trainable ones, B rows of L tokens in a batch, N = B L, b bytes a value (2 in bf16 or fp16,
    under autocast too, else 4), h hidden, q query, i intermediate size, H heads, V words, r the rank of LoRA:

    weights      4 P or 2 P. 4-bit NormalFloat: half a byte and a 4-byte scale for 64 weights, 4.5 bits; 4.127 bits with
                 double quantization (QLoRA, arXiv 2305.14314, section 3); embeddings, norms and head are not quantized.
                 Under autocast a bf16 copy of every fp32 linear weight is kept for the backward pass.
    gradients    4 T: the trainable weights are fp32, also of an adapter on bf16 or 4-bit weights.
    optimizer    AdamW keeps two fp32 values: 8 T (ZeRO, arXiv 1910.02054, section 3.1); 2 T with 8 bits. A paged one's
                 may move to the host, and PyTorch does not count it: allocated is the peak without it.
    activations  What autograd keeps of a layer of transformers' Llama, with attention that does not keep its scores.
                 The method is that of arXiv 2205.05198, section 4; a test counts the values:
                   N (4 (2h + 2 + H) + b (2q + 2v + 3i))       norms, attention, MLP; v: size of keys, of values
                   N b (2q - 2v + L) with token_metrics, for the mask, and keys and values of every head; with
                   packing N b (2q - 2v + N), for all rows of the batch are one; in fp32 on an accelerator
                   N b (2q - 2v + H L) where heads share keys, for in a batch without padding the scores are kept
                   full: N (8h + b (2h + i)), under autocast N (8h + b (5h + i)), a copy for each linear layer
                   LoRA: N r b a target, and of its input of size n: n b, once for several targets that read the same;
                   n 4 each on bf16 weights without autocast, n 2 each on fp32 weights with it; with dropout n b each
                   and a mask of n, on the CPU of the input's type
                   Liger's kernels keep the input of a norm as it is, and of the MLP b 2i
                 With gradient checkpointing N h b a layer, and one whole layer with the gradients of its MLP, or the
                 logits, whichever is more; on the CPU, whose malloc keeps what was freed, both.
    logits       Three tensors [N, V] in fp32: log-probabilities and two gradients. With token_metrics TRL takes them in
                 tiles of 4096 tokens and 32768 words: one tile with Triton, eight fp32 ones on the CPU.
    overhead     On the CPU the interpreter and its libraries, 0.53 GiB, and what malloc of glibc keeps of freed blocks:
                 0.4 of activations and logits (measured 0.2 to 0.6), 1.3 with gradient checkpointing (measured 1.4);
                 none if MALLOC_MMAP_THRESHOLD_ is set. In bf16 0.75 GiB (measured 0.4 to 1.1): oneDNN compiles kernels
                 for each length of a batch and keeps them. With 4 bits the pages of the file that the weights were
                 read from, 4 bytes each. On an accelerator none: its allocator counts tensors.

    Peak = weights + optimizer + overhead + the greater of gradients, and activations + logits: a gradient comes as the
    activations go. What an adapter adds to the gradients is small. With gradient accumulation the gradients wait: both.
    """
    counts = count_weights(config, settings["lora_target_modules"], settings["lora_r"])
    lora, autocast, four_bit = method == "lora", settings["bf16"], settings["load_in_4bit"]
    short = settings["dtype"] in ("bfloat16", "float16")
    b = 2 if short or autocast else 4
    n = settings["per_device_train_batch_size"] * tokens
    hidden, layers, vocabulary = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
    inner, heads, query, value = config["intermediate_size"], config["num_attention_heads"], *counts["attention"]
    trainable = counts["adapter"] if lora else counts["total"]

    plain = counts["total"] - (counts["quantizable"] if four_bit else 0)
    weights = plain * (2 if short else 4) + (4 * trainable if lora else 0)
    if four_bit:
        weights += counts["quantizable"] * (4.127 if settings["use_bnb_nested_quant"] else 4.5) / 8
    elif autocast and not short:
        weights += 2 * counts["quantizable"]
    gradients, optimizer = 4 * trainable, trainable * describe_optimizer(settings["optim"])[0]

    liger, wide = settings["use_liger_kernel"], 2 if short else 4  # bytes of a value between the layers
    layer = 4 * (2 + heads) + 2 * hidden * (wide if liger else 4) + b * (2 * query + 2 * value + (3 - liger) * inner)
    scores = where == "gpu" and b == 4 and query != value
    if settings["packing"]:
        layer += b * (2 * query - 2 * value + n)
    elif settings["token_metrics"] or scores:
        layer += b * (2 * query - 2 * value + (heads if scores else 1) * tokens)
    if lora:
        kept = 2 if autocast else 4
        read = {name: into for name, (into, _) in counts["targets"].items()}
        layer += kept * settings["lora_r"] * len(read)
        if settings["lora_dropout"]:
            for name, into in read.items():
                in_short = autocast and (short or name in ("o_proj", "down_proj"))
                layer += into * (kept + (1 if where == "gpu" else 2 if in_short else 4))
        elif short and not autocast:
            layer += sum(read.values()) * kept
        else:  # one tensor for q, k and v, one for gate and up, unless autocast copies; that of o the attention keeps
            same = {} if autocast and not short else {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
            once = {same.get(name, name): into for name, into in read.items() if name != "o_proj"}
            layer += sum(once.values()) * kept
    else:
        layer += (0 if liger else 8 * hidden) + b * ((5 if autocast else 2) * hidden + inner)
    logits = 12 * n * vocabulary
    if settings["token_metrics"]:
        logits = min(n, 4096) * min(vocabulary, 32768) * (8 * 4 if where == "cpu" else b)
    activations = n * layers * layer
    passing, overhead = activations + logits, 0.0
    if settings["gradient_checkpointing"]:
        activations = n * (layers * hidden * wide + layer)
        again = n * (layer + 3 * b * inner)  # with the gradients of its MLP
        passing = n * layers * hidden * wide + (max(again, logits) if where == "gpu" else n * layer + logits)
    if where == "cpu":
        freed = 0 if "MALLOC_MMAP_THRESHOLD_" in os.environ else 1.3 if settings["gradient_checkpointing"] else 0.4
        overhead = 0.53 * 2**30 + freed * passing
        overhead += 0.75 * 2**30 if b == 2 or four_bit else 0
        overhead += 4 * counts["quantizable"] if four_bit else 0
    parts = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    parts |= {"activations": activations, "logits": logits, "overhead": overhead}
    waiting = gradients if settings["gradient_accumulation_steps"] > 1 else 0
    parts["peak"] = weights + optimizer + max(gradients, waiting + passing) + overhead
    paged = where == "gpu" and settings["optim"].startswith("paged")
    parts["allocated"] = parts["peak"] - (optimizer if paged else 0)
    return {name: int(size) for name, size in parts.items()}


def fits(peak: int, where: str, memory: int) -> bool:
    """With 1 GiB for the driver and 5 % for gaps between tensors, or on the CPU a fifth, by which it may be off."""
    return (peak * 1.2 if where == "cpu" else peak * 1.05 + 2**30) <= memory
