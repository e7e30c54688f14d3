"""What people bring to a fine-tuning: forms of data and architectures, and what should come of each.

bring_your_own.py takes each of them through all steps. The data are rows of data/, the models tiny, of random weights.
"""

import csv
import gzip
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
from pyarrow import parquet
from synthetic import DATA, train_tokenizer

ROWS = [json.loads(line) for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:288:12]]
PAIRS = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in ROWS]  # 24, of several lengths
QUESTIONS, ANSWERS = map(list, zip(*PAIRS, strict=True))
SYSTEM = "You answer in one sentence."


@dataclass
class Case:
    """What somebody brings: files by their names, or a function that writes a folder; a model; variables for make."""

    files: dict | Callable = field(default_factory=dict)
    says: str = ""  # a pattern in what is printed, or in the refusal
    refused: bool = False
    rows: int = 24
    held_out: int = 4
    words: list = field(default_factory=lambda: QUESTIONS + ANSWERS)  # that the rows hold
    variables: dict = field(default_factory=dict)
    model: tuple = ()  # kind and settings of a config, none: of the tiny Llama
    change: Callable | None = None  # of the folder of the model
    recipe: dict = field(default_factory=dict)


# Data -----------------------------------------------------------------------------------------------------------------
def rows(*keys: str, **others) -> list[dict]:
    """Rows of question and answer under these names; others: columns that are the same in all rows."""
    return [dict(zip(keys, pair, strict=True)) | others for pair in PAIRS]


def turns(key: str, value: str, roles=("user", "assistant"), system: str | None = None) -> list[list[dict]]:
    first = [] if system is None else [{key: system, value: SYSTEM}]
    return [first + [{key: role, value: text} for role, text in zip(roles, pair, strict=True)] for pair in PAIRS]


def under(name: str, conversations: list, **others) -> list[dict]:
    return [{name: conversation} | others for conversation in conversations]


def parts(kind: str = "text") -> list[dict]:
    """Messages whose content is in parts; of the third row the question has one of another kind too."""
    asked = [[{"type": "text", "text": question}] for question in QUESTIONS]
    asked[2] += [] if kind == "text" else [{"type": kind, kind: "sky.png"}]
    pairs = zip(asked, [[{"type": "text", "text": answer}] for answer in ANSWERS], strict=True)
    return [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]


def calls() -> list[dict]:
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "LoRA"}}}
    asks = {"role": "assistant", "content": "", "tool_calls": [call]}
    found = {"role": "tool", "name": "look_up", "content": "Low-Rank Adaptation"}
    return [{"messages": [a, asks, found, b]} for a, b in turns("role", "content")]


def table(content: list[dict], separator: str = ",") -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*content[0]], delimiter=separator, lineterminator="\n")
    writer.writeheader()
    writer.writerows(content)
    return text.getvalue()


def encode(name: str, content) -> bytes:
    """The bytes of a file whose name says what it is: rows, unless they are text or bytes already."""
    kind, _, packed = name.lower().rpartition(".")
    if packed in ("gz", "zst"):
        plain = encode(kind, content)
        return gzip.compress(plain) if packed == "gz" else pyarrow.compress(plain, "zstd", asbytes=True)
    if isinstance(content, str | bytes):
        return content if isinstance(content, bytes) else content.encode()
    if packed in ("csv", "tsv"):
        return table(content, "\t" if packed == "tsv" else ",").encode()
    if packed == "parquet":
        sink = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(content), sink)
        return sink.getvalue()
    if packed == "json":
        return json.dumps(content, indent=1).encode()
    return "".join(json.dumps(row) + "\n" for row in content).encode()


def write_data(case: Case, folder: Path) -> Path:
    """Writes what was brought; returns what DATASET is: the folder, or the one file in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if callable(case.files):
        case.files(folder)
        return folder
    for name, content in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(name, content))
    return folder / name if len(case.files) == 1 else folder


def save_to_disk(folder: Path, split: bool = False) -> None:
    from datasets import Dataset, DatasetDict

    found = {"train": Dataset.from_list(PLAIN[:20]), "test": Dataset.from_list(PLAIN[20:])}
    (DatasetDict(found) if split else Dataset.from_list(PLAIN)).save_to_disk(folder)


def one(content, says: str = "", name: str = "rows.jsonl", **more) -> Case:
    return Case({name: content}, says, **more)


def wrong(content, says: str, name: str = "rows.jsonl", **more) -> Case:
    return Case({name: content}, says, refused=True, **more)


def held(name: str) -> Case:
    return Case({"train.jsonl": PLAIN[:20], f"{name}.jsonl": PLAIN[20:]}, variables={"VALIDATION_ROWS": 0})


PLAIN = rows("prompt", "completion")
ALPACA = rows("instruction", "output", input="")
for number in range(1, 24, 3):
    ALPACA[number]["input"] = "Answer for a beginner."
CHAT = under("messages", turns("role", "content"))
NUMBERS = [{"question": f"How much is {n} plus 007?", "answer": n + 7} for n in range(24)]
DATES = [{"prompt": f"When was day {n} of the year?", "completion": f"2024-01-{n:02}"} for n in range(1, 25)]
CARD = "---\nconfigs:\n"
CARD += "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "hard")) + "---\n"
CONFIGS = {"README.md": CARD, "main.jsonl": rows("question", "answer")[:12], "hard.jsonl": rows("question", "answer")}
ULTRA = {f"data/{name}-00000-of-00001.parquet": [
    row | {"prompt": row["messages"][0]["content"], "prompt_id": "0"} for row in part
] for name, part in (("train_sft", CHAT[:20]), ("test_sft", CHAT[20:]), ("train_gen", CHAT[:2]))}  # fmt: skip
GEMINI = [{"systemInstruction": {"role": "system", "parts": [{"text": SYSTEM}]}, "contents": [
    {"role": role, "parts": [{"text": text}]} for role, text in zip(("user", "model"), pair, strict=True)
]} for pair in PAIRS]  # fmt: skip
FORMS = {
    "text": one([{"text": f"{question} {answer}"} for question, answer in PAIRS]),
    "text as guanaco-llama2": one([{"text": f"<s>[INST] {a} [/INST] {b} </s>"} for a, b in PAIRS]),
    "messages": one(CHAT),
    "messages with a system message": one(under("messages", turns("role", "content", system="system"))),
    "prompt, completion: texts": one(PLAIN),
    "prompt, completion: messages": one(ROWS),
    "prompt of messages, completion a text": one([a | {"completion": b} for a, b in zip(ROWS, ANSWERS, strict=True)]),
    "alpaca": one(ALPACA, "alpaca|instruction", "alpaca.json"),
    "alpaca, an output empty": one(
        [*ALPACA, {"instruction": "Say nothing.", "input": "", "output": ""}], "empty|left out", "alpaca.json"),
    "alpaca under data": one({"version": 1, "data": ALPACA}, name="alpaca.json"),
    "alpaca with system and history (LLaMA-Factory)": one(
        [row | {"system": SYSTEM, "history": [["Hello.", "Good day."]]} for row in ALPACA],
        words=[*QUESTIONS, *ANSWERS, SYSTEM, "Good day."]),
    "ShareGPT": one(under("conversations", turns("from", "value", ("human", "gpt"))), "ShareGPT|conversations"),
    "ShareGPT with a system column": one(
        under("conversations", turns("from", "value", ("human", "gpt")), system=SYSTEM), words=[*ANSWERS, SYSTEM]),
    "conversations with role and content": one(under("conversations", turns("role", "content"))),
    "messages with from and value": one(under("messages", turns("from", "value", ("human", "gpt"), "system"))),
    "question, answer": one(rows("question", "answer"), "question"),
    "q, a": one(rows("q", "a")),
    "prompt, response": one(rows("prompt", "response"), "response"),
    "instruction, response": one(rows("instruction", "response"), "response"),
    "dolly": one(rows("instruction", "response", context="", category="open_qa"), "category"),
    "input, output": one(rows("input", "output")),
    "Orca": one(rows("question", "response", id="flan.1", system_prompt=SYSTEM), words=[*ANSWERS, SYSTEM]),
    "MetaMath": one(rows("query", "response", type="GSM_Rephrased", original_question="What is it?")),
    "problem, solution": one(rows("problem", "solution")),
    "Prompt, Completion": one(rows("Prompt", "Completion")),
    "other names, by COLUMNS": one(rows("frage", "antwort"), variables={"COLUMNS": "frage:prompt,antwort:completion"}),
    "other names": wrong(rows("frage", "antwort"), "COLUMNS"),
    "content in parts": one(parts()),
    "content with an image": wrong(parts("image"), r"row 3\b.*image"),
    "numbers as answers, CSV": one(NUMBERS, name="rows.csv", words=["23 plus 007", '"30"']),
    "dates as answers": one(DATES, words=["2024-01-24"]),
    "CSV with semicolons": one(table(rows("question", "answer"), ";"), name="rows.csv"),
    "CSV with a BOM, of Excel": one(table(PLAIN).replace("\n", "\r\n").encode("utf-8-sig"), name="rows.csv"),
    "CSV in UTF-16": one(table(PLAIN).encode("utf-16"), name="rows.csv"),
    "CSV in Latin-1": wrong(table(rows("prompt", "completion", note="Größe")).encode("latin-1"), "UTF-8", "rows.csv"),
    "CSV, messages as JSON": one([{"messages": json.dumps(row["messages"])} for row in CHAT], name="rows.csv"),
    "TSV": one(PLAIN, name="rows.tsv"),
    "lines of .txt": one("".join(f"{answer}\n" for answer in ANSWERS), "line", "rows.txt", words=ANSWERS),
    "folder of .txt": Case({f"{n:02}.txt": "\n\n".join(pair) for n, pair in enumerate(PAIRS)}, "document|file|text"),
    ".jsonl.gz": one(PLAIN, name="rows.jsonl.gz"),
    ".json.gz": one(ALPACA, name="rows.json.gz"),
    ".ndjson": one(PLAIN, name="rows.ndjson"),
    ".jsonl.zst": one(PLAIN, name="rows.jsonl.zst"),
    ".JSONL": one(PLAIN, name="ROWS.JSONL"),
    ".CSV": one(PLAIN, name="ROWS.CSV"),
    "parquet": one(CHAT, name="rows.parquet"),
    "parquet, train.0 and train.1": Case({"train.0.parquet": PLAIN[:12], "train.1.parquet": PLAIN[12:]}),
    "parquet, train-00000-of-00002": Case({f"data/train-0000{n}-of-00002.parquet": PLAIN[n::2] for n in (0, 1)}),
    "JSON lines, train and train_extra": Case({"train.jsonl": PLAIN[:12], "train_extra.jsonl": PLAIN[12:]}),
    **{f"train and {name}": held(name) for name in ("validation", "val", "valid", "dev", "eval", "test")},
    "train.csv beside train.jsonl": Case({"train.csv": PLAIN, "train.jsonl": PLAIN}, r"train\.csv", refused=True),
    "save_to_disk, a Dataset": Case(save_to_disk),
    "save_to_disk, a DatasetDict": Case(lambda folder: save_to_disk(folder, True), variables={"VALIDATION_ROWS": 0}),
    "card with two configs": Case(CONFIGS, "main.*DATASET_CONFIG|DATASET_CONFIG.*main", refused=True),
    "card with two configs, by DATASET_CONFIG": Case(CONFIGS, variables={"DATASET_CONFIG": "hard"}),
    "splits of UltraChat": Case(ULTRA, "DATASET_SPLIT", refused=True),
    "splits of UltraChat, by DATASET_SPLIT": Case(ULTRA, variables={
        "DATASET_SPLIT": "train_sft", "DATASET_TEST_SPLIT": "test_sft", "VALIDATION_ROWS": 0}),
    "ROWS=10": one(PLAIN, rows=10, words=QUESTIONS[:10], variables={"ROWS": 10}),
    "VALIDATION_ROWS=6": one(PLAIN, held_out=6, variables={"VALIDATION_ROWS": 6}),
    "VALIDATION_ROWS=24, all of them": wrong(PLAIN, "VALIDATION_ROWS", variables={"VALIDATION_ROWS": 24}),
    "contents of Gemini": one(GEMINI, words=[*QUESTIONS, *ANSWERS, SYSTEM]),
    "tool calls, a template that knows none": wrong(calls(), "tool calls.*--chat_template_path"),
    "reasoning, a template that knows none": wrong([{"messages": [a, b | {"reasoning_content": "Let me think."}]}
        for a, b in turns("role", "content")], "reasoning.*--chat_template_path"),
    "preferences": wrong(rows("prompt", "chosen", rejected="No."), "preferences"),
    "preferences, whole conversations": wrong(
        [{"chosen": chat, "rejected": chat[:1]} for chat in turns("role", "content")], "preferences"),
    "answers marked good or bad": wrong(rows("prompt", "completion", label=True), "KTO|good or bad"),
    "questions alone": wrong([{"prompt": question} for question in QUESTIONS], "question|answer|completion"),
    "messages of a user alone": wrong([{"messages": chat[:1]} for chat in turns("role", "content")], "answer"),
    "rows with images": wrong(rows("prompt", "completion", images=["sky.png"]), "image"),
    "a line that is cut off": wrong(encode(".jsonl", PLAIN)[:-40], "line 24"),
    "xlsx": wrong(b"PK\x03\x04\x14\x00\x06\x00" + bytes(99), "Save rows as", "rows.xlsx"),
    "an empty file": wrong(b"", "empty|no row", "rows.jsonl"),
}  # fmt: skip

# Models ---------------------------------------------------------------------------------------------------------------
DENSE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARED = DENSE | {"num_key_value_heads": 2}
HEADS = SHARED | {"head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
WINDOW = HEADS | {"sliding_window": 8}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
STATE = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
KINDS = {
    "Llama": ("llama", HEADS), "GPT-2": ("gpt2", GPT), "GPT-NeoX": ("gpt_neox", DENSE),
    "GPT-J": ("gptj", GPT | {"rotary_dim": 4}),
    "OPT": ("opt", DENSE | {"ffn_dim": 64, "word_embed_proj_dim": 32}), "Falcon": ("falcon", DENSE),
    "BLOOM": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}), "Phi": ("phi", DENSE),
    "MPT": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}), "Phi-3": ("phi3", SHARED),
    "Qwen2": ("qwen2", SHARED), "Qwen3": ("qwen3", HEADS), "Qwen3-MoE": ("qwen3_moe", HEADS | EXPERTS),
    "Qwen2-MoE": ("qwen2_moe", SHARED | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "Qwen3.5": ("qwen3_5_text", HEADS | DELTA | {"layer_types": ["linear_attention", "full_attention"]}),
    "Mistral": ("mistral", WINDOW), "Mixtral": ("mixtral", HEADS | LOCAL), "Gemma": ("gemma", HEADS),
    "Gemma 2": ("gemma2", WINDOW), "Gemma 3": ("gemma3_text", WINDOW),
    "Gemma 4": ("gemma4_text", WINDOW | {"vocab_size_per_layer_input": 2000, "hidden_size_per_layer_input": 8}),
    "SmolLM3": ("smollm3", SHARED), "OLMo 2": ("olmo2", SHARED), "OLMo 3": ("olmo3", SHARED),
    "OLMoE": ("olmoe", SHARED | {"num_experts": 4, "num_experts_per_tok": 2}), "Granite": ("granite", SHARED),
    "Granite-MoE": ("granitemoe", SHARED | LOCAL), "Granite 4": ("granitemoehybrid", SHARED | LOCAL | STATES | {
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32}),
    "Cohere": ("cohere", SHARED), "Cohere 2": ("cohere2", SHARED), "StarCoder 2": ("starcoder2", SHARED),
    "StableLM": ("stablelm", SHARED), "GLM-4": ("glm4", HEADS), "EXAONE 4": ("exaone4", HEADS),
    "ERNIE 4.5": ("ernie4_5", HEADS), "Seed-OSS": ("seed_oss", HEADS), "gpt-oss": ("gpt_oss", WINDOW | LOCAL),
    "DeepSeek-V3": ("deepseek_v3", DENSE | LATENT | {
        "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}),
    "Mamba": ("mamba", STATE), "Mamba 2": ("mamba2", STATE | {"num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "Falcon-H1": ("falcon_h1", HEADS | STATES | {"mamba_d_ssm": 64}),
    "LFM2": ("lfm2", SHARED | {"block_ff_dim": 64, "layer_types": ["conv", "full_attention"]}),
    "Jamba": ("jamba", SHARED | {
        "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
        "mamba_d_state": 8, "mamba_dt_rank": 4}),
    "Bamba": ("bamba", SHARED | STATES | {"attn_layer_indices": [1]}),
}  # fmt: skip


def save_model(folder: Path, kind: str, settings: dict, **saving) -> None:
    """A model of random weights, with the tokenizer of the others."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    tokenizer = train_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **ids, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, saving.pop("dtype", "float32")))
    model.save_pretrained(folder, **saving)
    tokenizer.save_pretrained(folder)


def save_as(**saving) -> Callable:
    """Saves the tiny Llama otherwise: its type, or the size of its files."""
    return lambda folder: (
        shutil.rmtree(folder),
        save_model(folder, "llama", HEADS | {"num_hidden_layers": 8}, **saving),
    )


def rewrite(**changes) -> Callable:
    """Changes values of config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change  # fmt: skip


def pickle_weights(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def not_causal(kind: str, architecture: str, says: str) -> Case:
    """A config of another kind beside the weights, which are not to be looked at."""

    def change(folder: Path) -> None:
        from transformers import AutoConfig

        AutoConfig.for_model(kind, architectures=[architecture]).save_pretrained(folder)

    return Case(says=says, refused=True, change=change)


def quantized(method: str, **settings) -> Case:
    settings |= {"quant_method": method, "bits": 4, "group_size": 128}
    return Case(says=f"(?i){method}", refused=True, change=rewrite(quantization_config=settings))


MODELS = {name: Case(model=model) for name, model in KINDS.items()} | {
    "Llama in float16": Case(change=save_as(dtype="float16")),
    "Llama in bfloat16": Case(change=save_as(dtype="bfloat16")),
    "Llama in 50 files": Case(change=save_as(max_shard_size="2KB")),
    "GPT-2 with 512 positions": Case(
        says="places for 512", model=("gpt2", GPT | {"n_positions": 512}), recipe={"max_length": 1024}),
    "Qwen2-VL": not_causal("qwen2_vl", "Qwen2VLForConditionalGeneration", "(?i)vision|image|not a causal"),
    "LLaVA": not_causal("llava", "LlavaForConditionalGeneration", "(?i)vision|image|not a causal"),
    "T5": not_causal("t5", "T5ForConditionalGeneration", "(?i)encoder|not a causal"),
    "BERT": not_causal("bert", "BertForMaskedLM", "no causal language model"),
    "Whisper": not_causal("whisper", "WhisperForConditionalGeneration", "(?i)speech|audio|encoder|not a causal"),
    "GPTQ": quantized("gptq"), "AWQ": quantized("awq", version="gemm", zero_point=True), "FP8": quantized("fp8"),
    "pickled weights": Case(says="safetensors", refused=True, change=pickle_weights),
    "no chat template, for messages": Case({"rows.jsonl": CHAT}, "--chat_template_path", refused=True,
        change=lambda folder: (folder / "chat_template.jinja").unlink()),
    "--lora_target_modules of another model": Case(says="q_proj", refused=True,
        recipe={"lora_target_modules": ["c_attn"]}),
}  # fmt: skip
