"""Bad input: what a user may type or hand over, and what comes of it.

Each row of a table: what is bad, the command, the files it is given, and what happens: it WORKS, or it stops with one
message that has these words. A message has at most two lines; what stood in the folder stays as it was.
"""

import json
import os
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file, save_file

WORKS = ""
OPTIONS = "--max_steps 1 --optim adamw_torch --report_to none"
LORA = f"02_train_lora.py --model_name_or_path model --dataset_name rows.jsonl --output_dir out {OPTIONS}"
FULL = LORA.replace("02_train_lora", "03_train_full")
AUDIT = "audit_tokens.py --model_name_or_path model --dataset_name rows.jsonl --output out/audit.json"
DATA = "01_download.py --only dataset --dataset_name rows.jsonl --output_dir out"
MODEL = "01_download.py --only model --model_name_or_path model --output_dir out"
MERGE = "04_merge_adapter.py --model_name_or_path adapter --base_model model --output_dir out"
INFER = "05_generate.py --model_name_or_path model --prompt sky --max_new_tokens 2 --output out/answers.jsonl"
ADAPTER = INFER.replace("path model", "path adapter --base_model model")
PIPELINE = INFER.replace("05_generate", "06_pipeline_infer")
EVALUATE = (
    "evaluate.py --base_model model --models adapter --dataset_name rows.jsonl --dataset_test_split train "
    "--max_new_tokens 2 --output_dir out"
)
CHECK = "00_check_gpu.py --model model --method lora --output out/memory.json --"
TEXT = [{"text": "<s> [INST] what color is the sky [/INST] blue </s>"}]
PAIR = [{"prompt": "what color is the sky", "completion": "blue"}]


# Files and models that are given -------------------------------------------------------------------------------------
def config(**changes):
    """Changes keys of the model's config.json; None removes one."""
    return lambda folder: change_json(folder / "model/config.json", changes)


def tokenizer(**changes):
    return lambda folder: change_json(folder / "model/tokenizer_config.json", changes)


def change_json(file: Path, changes: dict) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def without(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def weights(change):
    """Writes the model's weights anew, changed."""
    return lambda folder: save_file(
        change(load_file(folder / "model/model.safetensors")), folder / "model/model.safetensors", {"format": "pt"}
    )


def cut(name: str, size: int):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=24)
    BertModel(BertConfig(**size)).save_pretrained(folder / "model")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model/model.safetensors"), folder / "model/pytorch_model.bin")
    (folder / "model/model.safetensors").unlink()


def adapter(kind: str = "LoraConfig", **changes):
    """An adapter of a kind of PEFT for a model with these changes."""

    def give(folder: Path) -> None:
        import peft
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model", **changes))
        options = {"num_virtual_tokens": 2} if kind == "PromptTuningConfig" else {}
        peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).save_pretrained(
            folder / "adapter"
        )

    return give


def of_another_base(folder: Path) -> None:
    adapter()(folder)
    (folder / "run.json").write_text('{"base_model": {"name": "other", "sha256": "1"}}')
    (folder / "model/run.json").write_text('{"base_model": {"name": "model", "sha256": "2"}}')


def rows(*content, encoding="utf-8", end="\n"):
    """rows.jsonl; a text is a line as it stands."""
    lines = [each if isinstance(each, str) else json.dumps(each) for each in content]
    return lambda folder: (folder / "rows.jsonl").write_bytes(
        "".join(f"{line}{end}" for line in lines).encode(encoding)
    )


def file(name: str, text: str):
    def give(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return give


def moved(old: str, new: str):
    return lambda folder: shutil.move(folder / old, folder / new)


def nothing(folder: Path) -> None:
    pass


CASES = [
    # Arguments
    ("unknown option, 01", f"{DATA} --no_such 1", nothing, "--no_such"),
    ("unknown option, 02", f"{LORA} --no_such 1", nothing, "--no_such"),
    ("unknown option, 03", f"{FULL} --no_such 1", nothing, "--no_such"),
    ("unknown option, 04", f"{MERGE} --no_such 1", adapter(), "--no_such"),
    ("unknown option, 05", f"{INFER} --no_such 1", nothing, "--no_such"),
    ("unknown option, 06", f"{PIPELINE} --no_such 1", nothing, "--no_such"),
    ("unknown option, audit", f"{AUDIT} --no_such 1", nothing, WORKS),
    ("unknown option, prediction", f"{CHECK} --no_such 1", nothing, WORKS),
    ("unknown option, evaluate", f"{EVALUATE} --no_such 1", adapter(), "--no_such"),
    ("unknown option, compare", "compare_runs.py a b --no_such", nothing, "--no_such"),
    ("unknown option, check", "00_check_gpu.py --no_such", nothing, "--no_such"),
    ("abbreviated option, 01", DATA.replace("output_dir", "output"), nothing, "--output"),
    ("abbreviated option, 02", f"{LORA} --learning 1", nothing, "--learning"),
    ("abbreviated option, 03", f"{FULL} --learning 1", nothing, "--learning"),
    ("abbreviated option, 05", f"{INFER} --max_new 1", nothing, "--max_new"),
    ("abbreviated option, compare", "compare_runs.py a b --allow", nothing, "--allow"),
    ("abbreviated option, plot", "plot_loss.py out/run.json --out x.png", nothing, "--out"),
    ("abbreviated option, push", "push_model.py --fold model --repo_id a/b", nothing, "--fold"),
    ("abbreviated option, check", "00_check_gpu.py --mod model --meth lora", nothing, "--mod"),
    ("abbreviated option, verify", "verify_run.py out/run.json --rec x", nothing, "--rec"),
    ("abbreviated option, card", "write_card.py out/run.json --hel", nothing, "--hel"),
    ("value left out", f"{INFER} --seed", nothing, "--seed"),
    ("word for a number, 02", f"{LORA} --learning_rate fast", nothing, "--learning_rate"),
    ("word for a number, 05", f"{INFER} --max_new_tokens many", nothing, "--max_new_tokens"),
    ("word for a number, check", "00_check_gpu.py --memory much", nothing, "--memory"),
    ("word for true or false", f"{INFER} --do_sample perhaps", nothing, "perhaps"),
    ("batch of 0", f"{LORA} --per_device_train_batch_size 0", nothing, "--per_device_train_batch_size"),
    ("negative batch", f"{FULL} --per_device_train_batch_size -1", nothing, "--per_device_train_batch_size"),
    ("batch of 0, audit", f"{AUDIT} --per_device_train_batch_size 0", nothing, "--per_device_train_batch_size"),
    ("accumulation of 0", f"{LORA} --gradient_accumulation_steps 0", nothing, "--gradient_accumulation_steps"),
    ("length of 0", f"{LORA} --max_length 0", nothing, "--max_length"),
    ("negative length, audit", f"{AUDIT} --max_length -5", nothing, "--max_length"),
    ("negative learning rate", f"{LORA} --learning_rate -1", nothing, "--learning_rate"),
    ("no epochs", f"{LORA} --max_steps -1 --num_train_epochs 0", nothing, "--num_train_epochs"),
    ("rank 0", f"{LORA} --lora_r 0", nothing, "r"),
    ("save_steps 0", f"{LORA} --save_steps 0", nothing, "--save_steps"),
    ("logging_steps 0", f"{LORA} --logging_steps 0", nothing, "--logging_steps"),
    ("warmup negative", f"{LORA} --warmup_steps -1", nothing, "warmup_steps"),
    ("save_total_limit 0", f"{LORA} --save_total_limit 0", nothing, "save_total_limit"),
    ("eval batch 0", f"{LORA} --per_device_eval_batch_size 0", nothing, "--per_device_eval_batch_size"),
    ("negative seed", f"{LORA} --seed -1", nothing, "seed"),
    ("negative weight decay", f"{LORA} --weight_decay -1", nothing, "weight_decay"),
    ("0 new tokens, 05", f"{INFER} --max_new_tokens 0", nothing, "--max_new_tokens"),
    ("negative new tokens, 06", f"{PIPELINE} --max_new_tokens -3", nothing, "--max_new_tokens"),
    ("0 new tokens, merge", f"{MERGE} --max_new_tokens 0", adapter(), "--max_new_tokens"),
    ("0 new tokens, eval", f"{EVALUATE} --max_new_tokens 0", adapter(), "--max_new_tokens"),
    ("batch 0, eval", f"{EVALUATE} --batch_size 0", adapter(), "--batch_size"),
    ("temperature 0", f"{INFER} --do_sample --temperature 0", nothing, "temperature"),
    ("top_p 2", f"{INFER} --do_sample --top_p 2", nothing, "top_p"),
    ("negative validation rows", f"{DATA} --validation_rows -1", nothing, "--validation_rows"),
    ("shard size", f"{MERGE} --max_shard_size big", adapter(), "big"),
    ("shard size 03", f"{FULL} --max_shard_size big", nothing, "big"),
    ("unknown type, 02", f"{LORA} --dtype float99", nothing, "float99"),
    ("unknown type, 05", f"{INFER} --dtype float99", nothing, "float99"),
    ("unknown type, 04", f"{MERGE} --dtype float99", adapter(), "float99"),
    ("unknown type, 06", f"{PIPELINE} --dtype float99", nothing, "float99"),
    ("int type, 05", f"{INFER} --dtype int8", nothing, "int8"),
    ("unknown optimizer", f"{LORA} --optim sgdd", nothing, "sgdd"),
    ("unknown scheduler", f"{LORA} --lr_scheduler_type flat", nothing, "flat"),
    ("modules", f"{LORA} --lora_target_modules nope", nothing, "nope"),
    ("no config", f"{LORA} --config", nothing, "--config"),
    ("missing config", f"{LORA} --config no.yaml", nothing, "no.yaml"),
    ("missing config, audit", f"{AUDIT} --config no.yaml", nothing, "no.yaml"),
    ("missing config, prediction", f"{CHECK} --config no.yaml", nothing, "no.yaml"),
    ("config folder", f"{LORA} --config out", nothing, "out"),
    ("config=", f"{LORA} --config=a.yaml", file("a.yaml", "lora_r: 2\n"), "--config"),
    ("broken yaml", f"{LORA} --config a.yaml", file("a.yaml", "lora_r: [2\n"), "a.yaml"),
    ("broken yaml, audit", f"{AUDIT} --config a.yaml", file("a.yaml", "lora_r: [2\n"), "a.yaml"),
    ("broken yaml, prediction", f"{CHECK} --config a.yaml", file("a.yaml", "lora_r: [2\n"), "a.yaml"),
    ("empty yaml", f"{LORA} --config a.yaml", file("a.yaml", ""), "a.yaml"),
    ("list yaml", f"{LORA} --config a.yaml", file("a.yaml", "- 1\n"), "a.yaml"),
    ("list yaml, prediction", f"{CHECK} --config a.yaml", file("a.yaml", "- 1\n"), "a.yaml"),
    ("unknown key", f"{LORA} --config a.yaml", file("a.yaml", "lora_rr: 2\n"), "lora_rr"),
    ("unknown key, audit", f"{AUDIT} --config a.yaml", file("a.yaml", "lora_rr: 2\n"), WORKS),
    ("word in recipe", f"{LORA} --config a.yaml", file("a.yaml", "learning_rate: fast\n"), "learning_rate"),
    ("list in recipe", f"{LORA} --config a.yaml", file("a.yaml", "learning_rate: [1, 2]\n"), "learning_rate"),
    ("number in recipe word", f"{LORA} --config a.yaml", file("a.yaml", "lora_r: 2.5\n"), "lora_r"),
    ("null in recipe", f"{LORA} --config a.yaml", file("a.yaml", "per_device_train_batch_size:\n"), "per_device"),
    ("env in recipe", f"{LORA} --config a.yaml", file("a.yaml", "env: 1\n"), "env"),
    (
        "utf16 recipe",
        f"{LORA} --config a.yaml",
        lambda f: (f / "a.yaml").write_bytes("lora_r: 2".encode("utf-16")),
        WORKS,
    ),
    ("binary recipe", f"{LORA} --config a.yaml", lambda f: (f / "a.yaml").write_bytes(b"\xff\x00\x80"), "a.yaml"),
    ("no model", LORA.replace("path model", "path no"), nothing, "'no'"),
    ("no data", LORA.replace("rows.jsonl", "no.jsonl"), nothing, "no.jsonl"),
    ("prompts_file folder", f"{INFER} --prompts_file out", nothing, "out"),
    (
        "prompts_file binary",
        f"{INFER} --prompts_file a.txt",
        lambda f: (f / "a.txt").write_bytes(b"\xff\xfe\x00"),
        "a.txt",
    ),
    ("empty prompt", INFER.replace("sky", "''"), nothing, WORKS),
    ("memory_prediction garbage", f"{LORA} --memory_prediction a.json", file("a.json", "{"), "a.json"),
    ("audit garbage", CHECK.replace(" --output", " --audit a.json --output"), file("a.json", "{"), "a.json"),
    ("run.json garbage, compare", "compare_runs.py a.json out/run.json", file("a.json", "{"), "a.json"),
    ("run.json list, compare", "compare_runs.py a.json out/run.json", file("a.json", "[]"), "a.json"),
    ("run.json list, card", "write_card.py a.json", file("a.json", "[]"), "a.json"),
    ("run.json list, plot", "plot_loss.py a.json", file("a.json", "[]"), "a.json"),
    ("run.json list, verify", "verify_run.py a.json", file("a.json", "[]"), "a.json"),
    ("run.json list, reproduce", "reproduce_run.py a.json --output_dir out", file("a.json", "[]"), "a.json"),
    # Paths
    ("data path", LORA.replace("rows.jsonl", "'my röws 行.jsonl'"), moved("rows.jsonl", "my röws 行.jsonl"), WORKS),
    ("model path", LORA.replace("path model", "path 'my möd 行'"), moved("model", "my möd 行"), WORKS),
    ("output path", LORA.replace("dir out", "dir 'my öut 行'"), nothing, WORKS),
    ("output path 01", DATA.replace("dir out", "dir 'my öut 行'"), nothing, WORKS),
    ("output path merge", MERGE.replace("dir out", "dir 'my öut 行'"), adapter(), WORKS),
    ("proc", LORA.replace("dir out", "dir /proc/out"), nothing, "/proc/out"),
    ("proc 01", DATA.replace("dir out", "dir /proc/out"), nothing, "/proc/out"),
    ("proc merge", MERGE.replace("dir out", "dir /proc/out"), adapter(), "/proc/out"),
    ("proc infer", INFER.replace("out/", "/proc/out/"), nothing, "/proc/out"),
    ("proc pipeline", PIPELINE.replace("out/", "/proc/out/"), nothing, "/proc/out"),
    ("proc eval", EVALUATE.replace("dir out", "dir /proc/out"), adapter(), "/proc/out"),
    ("proc audit", AUDIT.replace("out/", "/proc/out/"), nothing, "/proc/out"),
    ("proc check", CHECK.replace("out/", "/proc/out/"), nothing, "/proc/out"),
    ("output is a file", LORA.replace("dir out", "dir rows.jsonl"), nothing, "rows.jsonl"),
    ("output is a file 01", DATA.replace("dir out", "dir rows.jsonl"), nothing, "rows.jsonl"),
    ("output folder 05", INFER.replace("out/answers.jsonl", "out"), nothing, "out"),
    # Data
    ("empty line", LORA, rows(*TEXT, "", *TEXT), WORKS),
    ("empty object", LORA, rows(*TEXT, {}), "row 2"),
    ("empty file", LORA, rows(), "rows.jsonl"),
    ("null text", LORA, rows(*TEXT, {"text": None}), "row 2"),
    ("number text", LORA, rows({"text": 5}), "row 1"),
    ("number among", LORA, rows(*TEXT, {"text": 5}), "rows.jsonl"),
    ("bool text", LORA, rows({"text": True}), "row 1"),
    ("list text", LORA, rows({"text": ["a", "b"]}), "row 1"),
    ("nested text", LORA, rows({"text": {"a": "b"}}), "row 1"),
    ("a list row", LORA, rows([1, 2]), "rows.jsonl"),
    ("a number row", LORA, rows("5"), "rows.jsonl"),
    ("a null row", LORA, rows("null"), "rows.jsonl"),
    ("messages string", LORA, rows({"messages": "hi"}), "row 1"),
    ("messages numbers", LORA, rows({"messages": [1]}), "row 1"),
    ("messages strings", LORA, rows({"messages": ["a"]}), "row 1"),
    ("message without content", LORA, rows({"messages": [{"role": "user"}]}), "row 1"),
    ("message null content", LORA, rows({"messages": [{"role": "user", "content": None}]}), "row 1"),
    ("message number content", LORA, rows({"messages": [{"role": "user", "content": 5}]}), "row 1"),
    ("message from/value", LORA, rows({"messages": [{"from": "human", "value": "a"}]}), "row 1"),
    (
        "unknown role",
        LORA,
        rows({"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}),
        WORKS,
    ),
    ("prompt list of strings", LORA, rows({"prompt": ["a", "b"], "completion": "c"}), "row 1"),
    (
        "prompt string completion chat",
        LORA,
        rows({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}),
        "row 1",
    ),
    ("completion empty", LORA, rows(*PAIR, {"prompt": "a", "completion": ""}), "row 2"),
    ("completion null", LORA, rows(*PAIR, {"prompt": "a", "completion": None}), "row 2"),
    (
        "completion empty chat",
        LORA,
        rows({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": ""}]}),
        "row 1",
    ),
    ("mixed schemas", LORA, rows(*TEXT, *PAIR), "row 2"),
    ("mixed schemas 2", LORA, rows(*PAIR, *TEXT), "row 2"),
    (
        "mixed prompt kinds",
        LORA,
        rows(
            *PAIR, {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "c"}]}
        ),
        "rows.jsonl",
    ),
    ("1 row", LORA, rows(*TEXT), WORKS),
    ("1 row full", FULL, rows(*TEXT), WORKS),
    ("1e6", LORA, rows({"text": "a " * 500000}), WORKS),
    ("1e6 one word", LORA, rows({"text": "a" * 1000000}), WORKS),
    ("only long", LORA + " --max_length 4", rows({"prompt": "a " * 20, "completion": "b"}), "--max_length"),
    ("only long full", FULL + " --max_length 4", rows({"prompt": "a " * 20, "completion": "b"}), "--max_length"),
    ("only long audit", AUDIT + " --max_length 4", rows({"prompt": "a " * 20, "completion": "b"}), "--max_length"),
    ("surrogate", LORA, rows('{"text": "a \\ud800 b"}'), "rows.jsonl"),
    ("surrogate pair", LORA, rows('{"text": "a \\ud83d\\ude00 b"}'), WORKS),
    ("surrogate 01", DATA, rows('{"text": "a \\ud800 b"}'), "rows.jsonl"),
    ("unicode", LORA, rows({"text": "a \u200b \u0000 😀 \u202e שלום b"}), WORKS),
    ("unicode 01", DATA, rows({"text": "a \u200b \u0000 😀 \u2028 \x85 \u202e שלום b"}), WORKS),
    ("only whitespace", LORA, rows({"text": " \u200b"}), WORKS),
    ("bom", LORA, rows(*TEXT, encoding="utf-8-sig"), WORKS),
    ("bom 01", DATA, rows(*TEXT, encoding="utf-8-sig"), WORKS),
    ("utf-16", LORA, rows(*TEXT, encoding="utf-16"), "rows.jsonl"),
    ("latin-1", LORA, rows('{"text": "ä"}', encoding="latin-1"), "rows.jsonl"),
    ("crlf", LORA, rows(*TEXT, *TEXT, end="\r\n"), WORKS),
    ("cr", LORA, rows(*TEXT, *TEXT, end="\r"), "rows.jsonl"),
    ("NaN", LORA, rows('{"text": NaN}'), "row 1"),
    ("other columns", LORA, rows({"question": "a"}), "question"),
    ("half", LORA, rows({"prompt": "a"}), "prompt"),
    ("cut", LORA, rows(*TEXT, '{"text": "a'), "line 2"),
    ("csv garbage", LORA.replace("rows.jsonl", "a.csv"), file("a.csv", 'text\n"a'), "a.csv"),
    ("parquet garbage", LORA.replace("rows.jsonl", "a.parquet"), file("a.parquet", "PAR1xx"), "a.parquet"),
    ("txt", LORA.replace("rows.jsonl", "a.txt"), file("a.txt", "PAR1xx"), "a.txt"),
    ("json list", LORA.replace("rows.jsonl", "a.json"), file("a.json", json.dumps(TEXT)), WORKS),
    ("empty folder", LORA.replace("rows.jsonl", "a"), lambda f: (f / "a").mkdir(), "'a'"),
    # Models
    ("bert 02", LORA, bert, "BertConfig"),
    ("bert 03", FULL, bert, "Bert"),
    ("bert 05", INFER, bert, "Bert"),
    ("bert 01", MODEL, bert, "Bert"),
    ("no tokenizer 02", LORA, without("model/tokenizer.json", "model/tokenizer_config.json"), "tokenizer"),
    ("no tokenizer 05", INFER, without("model/tokenizer.json", "model/tokenizer_config.json"), "tokenizer"),
    ("no tokenizer audit", AUDIT, without("model/tokenizer.json", "model/tokenizer_config.json"), "tokenizer"),
    ("no template text", LORA, without("model/chat_template.jinja"), WORKS),
    (
        "no template messages",
        LORA,
        lambda f: (without("model/chat_template.jinja")(f), rows({"messages": [{"role": "user", "content": "a"}]})(f)),
        "template",
    ),
    ("no template pair", LORA, lambda f: (without("model/chat_template.jinja")(f), rows(*PAIR)(f)), WORKS),
    ("no template 05", INFER, without("model/chat_template.jinja"), "template"),
    ("no template 06", PIPELINE, without("model/chat_template.jinja"), "template"),
    ("broken template 05", INFER, file("model/chat_template.jinja", "{% for x"), "template"),
    (
        "broken template 02",
        LORA,
        lambda f: (file("model/chat_template.jinja", "{% for x")(f), rows(*PAIR)(f)),
        "template",
    ),
    (
        "raising template 02",
        LORA,
        lambda f: (file("model/chat_template.jinja", "{{ raise_exception('only user') }}")(f), rows(*PAIR)(f)),
        "only user",
    ),
    (
        "raising template audit",
        AUDIT,
        lambda f: (file("model/chat_template.jinja", "{{ raise_exception('only user') }}")(f), rows(*PAIR)(f)),
        "only user",
    ),
    (
        "raising template 05",
        INFER,
        file("model/chat_template.jinja", "{{ raise_exception('only user') }}"),
        "only user",
    ),
    (
        "raising template 06",
        PIPELINE,
        file("model/chat_template.jinja", "{{ raise_exception('only user') }}"),
        "only user",
    ),
    ("no eos", LORA, tokenizer(eos_token=None), "eos"),
    ("no eos 05", INFER, tokenizer(eos_token=None), WORKS),
    ("no eos 06", PIPELINE, tokenizer(eos_token=None), WORKS),
    ("no eos audit", AUDIT, tokenizer(eos_token=None), "eos"),
    ("tied", LORA, config(tie_word_embeddings=True), WORKS),
    (
        "tied full",
        FULL,
        lambda f: (
            config(tie_word_embeddings=True)(f),
            weights(lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"})(f),
        ),
        WORKS,
    ),
    ("fp16", FULL, weights(lambda w: {k: v.half() for k, v in w.items()}), WORKS),
    ("truncated", LORA, cut("model/model.safetensors", 5000), "model"),
    ("truncated 05", INFER, cut("model/model.safetensors", 5000), "model"),
    ("truncated 01", MODEL, cut("model/model.safetensors", 5000), "model.safetensors"),
    ("garbage", LORA, file("model/model.safetensors", "garbage"), "model"),
    ("empty weights", LORA, file("model/model.safetensors", ""), "model"),
    ("empty weights 01", MODEL, file("model/model.safetensors", ""), "model"),
    ("missing weights", LORA, weights(lambda w: {k: v for k, v in w.items() if "q_proj" not in k}), "q_proj"),
    ("missing weights 05", INFER, weights(lambda w: {k: v for k, v in w.items() if "q_proj" not in k}), "q_proj"),
    ("bin", LORA, pickled, "safetensors"),
    ("bin 05", INFER, pickled, "safetensors"),
    ("bin 06", PIPELINE, pickled, "safetensors"),
    ("bin 01", MODEL, pickled, "safetensors"),
    ("garbage config", LORA, file("model/config.json", "{"), "config"),
    ("garbage config 05", INFER, file("model/config.json", "{"), "config"),
    ("garbage config check", CHECK, file("model/config.json", "{"), "config"),
    ("garbage tokenizer", LORA, file("model/tokenizer.json", "{"), "model"),
    ("garbage run.json", LORA, file("model/run.json", "{"), "run.json"),
    ("unknown arch", LORA, config(model_type="nope"), "nope"),
    (
        "small vocab",
        LORA,
        lambda f: (
            config(vocab_size=4)(f),
            weights(lambda w: {k: v[:4] if "embed" in k or "lm_head" in k else v for k, v in w.items()})(f),
        ),
        "vocab",
    ),
    # Adapters
    ("other shape 04", MERGE, adapter(hidden_size=16), "shapes differ"),
    ("other shape 05", ADAPTER, adapter(hidden_size=16), "shapes differ"),
    ("other layers 05", ADAPTER, adapter(num_hidden_layers=4), "layers"),
    ("other base 04", MERGE, of_another_base, "trained on"),
    ("other base 05", ADAPTER, of_another_base, "trained on"),
    ("ia3 04", MERGE, adapter("IA3Config"), WORKS),
    ("ia3 05", ADAPTER, adapter("IA3Config"), WORKS),
    ("prompt 04", MERGE, adapter("PromptTuningConfig"), "merge"),
    ("prompt 05", ADAPTER, adapter("PromptTuningConfig"), WORKS),
    ("prompt 06", ADAPTER.replace("05_generate", "06_pipeline_infer"), adapter("PromptTuningConfig"), WORKS),
    (
        "adapter garbage",
        ADAPTER,
        lambda f: (adapter()(f), file("adapter/adapter_model.safetensors", "garbage")(f)),
        "adapter",
    ),
    (
        "adapter garbage 04",
        MERGE,
        lambda f: (adapter()(f), file("adapter/adapter_model.safetensors", "garbage")(f)),
        "adapter",
    ),
    (
        "adapter config garbage",
        ADAPTER,
        lambda f: (adapter()(f), file("adapter/adapter_config.json", "{")(f)),
        "adapter",
    ),
    (
        "adapter config no base",
        ADAPTER.replace("--base_model model", ""),
        lambda f: (adapter()(f), change_json(f / "adapter/adapter_config.json", {"base_model_name_or_path": None})),
        "--base_model",
    ),
    (
        "adapter unknown kind",
        ADAPTER,
        lambda f: (adapter()(f), change_json(f / "adapter/adapter_config.json", {"peft_type": "NOPE"})),
        "NOPE",
    ),
    ("adapter trained as base", LORA.replace("path model", "path adapter"), adapter(), "adapter"),
    ("merge a model", MERGE.replace("path adapter", "path model"), nothing, "whole model"),
]


# Answered wrong so far: a traceback, a second message, or nothing at all where something is wrong.
WRONG = {
    "save_total_limit 0", "negative seed", "negative weight decay", "top_p 2", "number in recipe word",
    "utf16 recipe", "binary recipe", "prompts_file binary", "audit garbage", "run.json list, reproduce", "proc check",
    "output folder 05", "mixed schemas", "mixed prompt kinds", "only long", "only long full", "cr", "bert 02",
    "bert 03", "bert 05", "bert 01", "no eos", "no eos 05", "no eos audit", "truncated 01", "empty weights 01",
    "missing weights", "missing weights 05", "garbage config check", "small vocab", "other layers 05",
    "adapter config no base",
}  # fmt: skip
# A third of the table without FAULTS=full (make test-faults).
TRIED = CASES if os.environ.get("FAULTS") == "full" else CASES[::3]
ROWS = [
    pytest.param(*case, id=name, marks=[pytest.mark.xfail(strict=True)] if name in WRONG else [])
    for name, *case in TRIED
]


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A model, rows, and an earlier result in out/."""
    shutil.copytree(tiny_model, tmp_path / "model")
    rows(*TEXT * 4)(tmp_path)
    for name in (
        "adapter/old",
        "model/old",
        "base-model/old",
        "dataset/old",
        "answers.jsonl",
        "audit.json",
        "run.json",
    ):
        file(f"out/{name}", "{}")(tmp_path)
    return tmp_path


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(("command", "given", "said"), ROWS)
def test_a_script(command, given, said, folder, monkeypatch, capfd):
    given(folder)
    script, *args = shlex.split(command)
    if said == WORKS:
        result = run(script, *args, cwd=folder)
        assert result.returncode == 0, result.stderr
        return
    before = read_all(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [str(ROOT / "scripts" / script), *args])
    monkeypatch.setattr("resource.setrlimit", lambda *limits: None)  # it would be that of the tests
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
    message = stop.value.code
    assert isinstance(message, str), "the status alone, without a message"
    assert said in message and len(message.splitlines()) <= 2
    assert read_all(folder) == before
