"""Bad input: what a user may type or hand over, and what comes of it.

Each row of the tables: what is bad, the command, what the files are changed to, and the outcome. It WORKS, or it stops
with one message of at most three lines that has these words, and every file is what it was.
"""

import argparse
import gc
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import folders
import pytest
import torch
import transformers.trainer
from conftest import ROOT, run
from dotenv import dotenv_values
from safetensors.torch import load_file, save_file
from test_makefile import TRAINING, Project

SCRIPTS = {script.name: script for script in (ROOT / "scripts").rglob("*.py")}
WORKS = ""
OPTIONS = "--max_steps 1 --optim adamw_torch --report_to none"
# What Make calls, as the Makefile has it; before each training comes the audit, see list_calls.
TRAINS = f"--model_name_or_path $MODEL --dataset_name $DATA {OPTIONS}"
LORA = f"run_step.py $OUT/lora --reads $MODEL $DATA -- 02_train_lora.py {TRAINS}"
FULL = f"run_step.py $OUT/full --reads $MODEL $DATA -- 03_train_full.py {TRAINS}"
AUDIT = f"run_step.py --reads $MODEL $DATA -- audit_tokens.py {TRAINS} --output $OUT/audit.json"
MODEL = "run_step.py $OUT/base-model -- 01_download.py --only model --model_name_or_path=$MODEL"
DATA = "run_step.py $OUT/dataset -- 01_download.py --only dataset --dataset_name=$DATA --validation_rows=0"


def make(command: str) -> str:
    """The command after the downloads that Make has before it."""
    for given, fetched in (("$MODEL", "$OUT/base-model"), ("$DATA", "$OUT/dataset")):
        command = command.replace(given, fetched)
    return f"{MODEL} && {DATA} && {command}"


TRAIN, TRAIN_FULL = make(LORA), make(FULL)
MERGE = (
    "run_step.py $OUT/merged --reads $MODEL lora -- 04_merge_adapter.py --model_name_or_path lora/adapter "
    "--base_model $MODEL"
)
INFER = "run_step.py --reads $MODEL -- 05_generate.py --model_name_or_path $MODEL --prompt=sky --max_new_tokens 2"
INFER += " --output $OUT/answers.jsonl"
INFER_ADAPTER = INFER.replace("--reads", "--reads lora").replace("path $MODEL", "path lora/adapter --base_model $MODEL")
PIPELINE = INFER.replace("05_generate", "06_pipeline_infer")
PIPELINE_ADAPTER = INFER_ADAPTER.replace("05_generate", "06_pipeline_infer")
EVALUATE = (
    "run_step.py --reads lora $DATA $MODEL -- evaluate.py --base_model $MODEL --models lora/adapter "
    "--dataset_name $DATA --dataset_test_split train --max_new_tokens 2 --output_dir $OUT/report"
)
PREDICT = "predict_memory.py --model $MODEL --method lora --output $OUT/memory.json -- --optim adamw_torch"
PREDICT_AUDITED = PREDICT.replace("--output", "--audit a.json --output")
REPRODUCE = "reproduce_run.py a.json --output_dir $OUT"
TEXT = {"text": "<s> [INST] what color is the sky [/INST] blue </s>"}
PAIR = {"prompt": "what color is the sky", "completion": "blue"}
LONG = {"prompt": "a " * 20, "completion": "b"}
USER = {"role": "user", "content": "what color is the sky"}
BLUE = {"role": "assistant", "content": "blue"}


# What is given: each changes files in a folder ------------------------------------------------------------------------
def nothing(folder: Path) -> None:
    pass


def file(name: str, content: str | bytes):
    def give(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return give


def recipe(text: str):
    return file("a.yaml", text)


def template(text: str):
    return file("model/chat_template.jinja", text)


def rows(*content, encoding="utf-8", end="\n"):
    """rows.jsonl; a text is a line as it stands."""
    lines = [each if isinstance(each, str) else json.dumps(each) for each in content]
    return file("rows.jsonl", "".join(f"{line}{end}" for line in lines).encode(encoding))


def messages(*content):
    return rows({"messages": content})


def moved(old: str, new: str):
    return lambda folder: shutil.move(folder / old, folder / new)


def sealed(name: str):
    return lambda folder: folders.seal(folder / name)


def without(*names: str):
    return lambda folder: [(folder / "model" / name).unlink() for name in names]


def both(*given):
    return lambda folder: [give(folder) for give in given]


def keys(name: str, **changes):
    """Changes keys of a JSON file; None removes one."""

    def give(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return give


def weights(change):
    """The weights of the model, changed one by one: None removes one."""

    def give(folder: Path) -> None:
        path = folder / "model/model.safetensors"
        changed = {key: change(key, value) for key, value in load_file(path).items()}
        save_file({key: value for key, value in changed.items() if value is not None}, path, {"format": "pt"})

    return give


def cut(folder: Path) -> None:
    path = folder / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model/model.safetensors"), folder / "model/pytorch_model.bin")
    (folder / "model/model.safetensors").unlink()


def bert(folder: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=24)
    BertForMaskedLM(BertConfig(**size)).save_pretrained(folder / "model")


def adapter(kind: str = "LoraConfig", options: dict | None = None, **changes):
    """An adapter of a kind of PEFT, for a model with these changes of its config."""

    def give(folder: Path) -> None:
        import peft
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model", **changes))
        config = getattr(peft, kind)(task_type="CAUSAL_LM", **(options or {}))
        peft.get_peft_model(model, config).save_pretrained(folder / "lora/adapter")

    return give


HALF = weights(lambda key, value: value.half())
NO_HEAD = weights(lambda key, value: None if key == "lm_head.weight" else value)
NO_QUERY = weights(lambda key, value: None if "q_proj" in key else value)
FOUR_WORDS = weights(lambda key, value: value[:4].clone() if "embed" in key or "lm_head" in key else value)
NO_TOKENIZER = without("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
NO_TEMPLATE = without("chat_template.jinja")
NO_EOS = keys("model/tokenizer_config.json", eos_token=None)
RAISES = "{{ raise_exception('a system message comes first') }}"
PROMPT_TUNING = adapter("PromptTuningConfig", {"num_virtual_tokens": 2})
NO_BASE = both(adapter(), keys("lora/adapter/adapter_config.json", base_model_name_or_path=None))
OTHER_BASE = both(
    adapter(),
    file("lora/run.json", '{"inputs": {"model": {"sha256": "of another model"}}}'),
)

ARGUMENTS = [
    ("unknown option, 00", "00_check_gpu.py --no_such 1", nothing, "--no_such"),
    ("unknown option, 01", f"{DATA} --no_such 1", nothing, "--no_such"),
    ("unknown option, 02", f"{LORA} --no_such 1", nothing, "--no_such"),
    ("unknown option, 03", f"{FULL} --no_such 1", nothing, "--no_such"),
    ("unknown option, 04", f"{MERGE} --no_such 1", adapter(), "--no_such"),
    ("unknown option, 05", f"{INFER} --no_such 1", nothing, "--no_such"),
    ("unknown option, 06", f"{PIPELINE} --no_such 1", nothing, "--no_such"),
    ("unknown option, evaluate", f"{EVALUATE} --no_such 1", adapter(), "--no_such"),
    ("option of the training, audit", f"{AUDIT} --lora_r 4 --token_metrics false", nothing, WORKS),
    ("unknown option, audit", f"{AUDIT} --no_such 1", nothing, "--no_such"),
    ("unknown option, prediction", f"{PREDICT} --no_such 1", nothing, WORKS),
    ("misspelt option, 02", f"{LORA} --lerning_rate 1", nothing, "--lerning_rate"),
    ("abbreviated option, 00", "00_check_gpu.py --req cpu", nothing, "--req"),
    ("abbreviated option, 01", f"{DATA} --validation 1", nothing, "--validation"),
    ("abbreviated option, 02", f"{LORA} --dataset_test train", nothing, "--dataset_test"),
    ("abbreviated option, 03", f"{FULL} --dataset_test train", nothing, "--dataset_test"),
    ("abbreviated option, 04", f"{MERGE} --max_new 1", adapter(), "--max_new"),
    ("abbreviated option, 05", f"{INFER} --max_new 1", nothing, "--max_new"),
    ("abbreviated option, 06", f"{PIPELINE} --max_new 1", nothing, "--max_new"),
    ("abbreviated option, evaluate", f"{EVALUATE} --max_new 1", adapter(), "--max_new"),
    ("abbreviated option, compare", "compare_runs.py a b --allow", nothing, "--allow"),
    ("abbreviated option, plot", "plot_loss.py out/run.json --out x.png", nothing, "--out"),
    ("abbreviated option, push", "push_model.py --fold model --repo_id a/b --dry_run", nothing, "--folder"),
    ("abbreviated option, verify", "verify_run.py out/run.json --rec x", nothing, "--rec"),
    ("abbreviated option, card", "write_card.py out/run.json --hel", nothing, "--hel"),
    ("abbreviated option, reproduce", f"{REPRODUCE} --comp b", nothing, "--comp"),
    ("value left out", f"{INFER} --seed", nothing, "--seed"),
    ("word for a number, 00", "00_check_gpu.py --timeout long", nothing, "--timeout"),
    ("word for a number, 01", f"{DATA} --validation_rows many", nothing, "--validation_rows"),
    ("word for a number, 03", f"{FULL} --learning_rate fast", nothing, "--learning_rate"),
    ("word for a number, 02", f"{LORA} --learning_rate fast", nothing, "--learning_rate"),
    ("word for a number, 05", f"{INFER} --max_new_tokens many", nothing, "max_new_tokens"),
    ("word for true or false", f"{INFER} --do_sample perhaps", nothing, "perhaps"),
    ("batch of 0, 02", f"{LORA} --per_device_train_batch_size 0", nothing, "--per_device_train_batch_size"),
    ("negative batch, 03", f"{FULL} --per_device_train_batch_size -1", nothing, "--per_device_train_batch_size"),
    ("batch of 0, audit", f"{AUDIT} --per_device_train_batch_size 0", nothing, "--per_device_train_batch_size"),
    ("batch of 0, prediction", f"{PREDICT} --per_device_train_batch_size 0", nothing, "--per_device_train_batch_size"),
    ("length of 0, evaluate", f"{EVALUATE} --max_length 0", adapter(), "--max_length"),
    ("held-out batch of 0", f"{LORA} --per_device_eval_batch_size 0", nothing, "--per_device_eval_batch_size"),
    ("accumulation of 0", f"{LORA} --gradient_accumulation_steps 0", nothing, "--gradient_accumulation_steps"),
    ("length of 0, 02", f"{LORA} --max_length 0", nothing, "--max_length"),
    ("negative length, audit", f"{AUDIT} --max_length -5", nothing, "--max_length"),
    ("negative learning rate", f"{LORA} --learning_rate -1", nothing, "--learning_rate"),
    ("learning rate that is no number", f"{LORA} --learning_rate nan", nothing, "--learning_rate"),
    ("no epochs", f"{LORA} --max_steps -1 --num_train_epochs 0", nothing, "--num_train_epochs"),
    ("rank 0", f"{LORA} --lora_r 0", nothing, "`r`"),
    ("checkpoints every 0 steps", f"{LORA} --save_steps 0", nothing, "--save_steps"),
    ("log lines every 0 steps", f"{LORA} --logging_steps 0", nothing, "--logging_steps"),
    ("negative warm-up", f"{LORA} --warmup_steps -1", nothing, "warmup_steps"),
    ("negative seed, 02", f"{LORA} --seed -1", nothing, "Seed"),
    ("negative seed, 05", f"{INFER} --do_sample true --seed -1", nothing, "Seed"),
    ("0 new tokens, 04", f"{MERGE} --max_new_tokens 0", adapter(), "max_new_tokens"),
    ("0 new tokens, 05", f"{INFER} --max_new_tokens 0", nothing, "max_new_tokens"),
    ("negative new tokens, 06", f"{PIPELINE} --max_new_tokens -3", nothing, "max_new_tokens"),
    ("0 new tokens, evaluate", f"{EVALUATE} --max_new_tokens 0", adapter(), "max_new_tokens"),
    ("checkpoints without optimizer", f"{LORA} --save_only_model true", nothing, "--save_only_model"),
    ("skipped rows", f"{FULL} --ignore_data_skip true", nothing, "--ignore_data_skip"),
    ("audit of a run that evaluates", f"{AUDIT} --eval_strategy steps", nothing, WORKS),
    ("top_p above 1: all of the probability", f"{INFER} --do_sample true --top_p 2", nothing, WORKS),
    ("top_p below 0", f"{INFER} --do_sample true --top_p -1", nothing, "top_p"),
    ("weight decay below 0", f"{LORA} --weight_decay -1", nothing, "--weight_decay"),
    ("temperature 0", f"{INFER} --do_sample true --temperature 0", nothing, "temperature"),
    ("negative held-out rows", f"{DATA} --validation_rows -1", nothing, "--validation_rows"),
    ("more held-out rows than there are", f"{DATA} --validation_rows 9", nothing, "--validation_rows"),
    ("unknown type, 02", f"{LORA} --dtype float99", nothing, "float99"),
    ("unknown type, 04", f"{MERGE} --dtype float99", adapter(), "float99"),
    ("unknown type, 05", f"{INFER} --dtype int8", nothing, "int8"),
    ("unknown type, 06", f"{PIPELINE} --dtype float99", nothing, "float99"),
    ("unknown type, evaluate", f"{EVALUATE} --dtype float99", adapter(), "float99"),
    ("unknown optimizer", f"{LORA} --optim sgdd", nothing, "sgdd"),
    ("unknown schedule", f"{LORA} --lr_scheduler_type flat", nothing, "flat"),
    ("unknown module", f"{LORA} --lora_target_modules nope", nothing, "nope"),
    ("recipe left out", f"{LORA} --config", nothing, "--config has no file"),
    ("recipe that is not there, 02", f"{LORA} --config no.yaml", nothing, "no.yaml"),
    ("recipe that is not there, 03", f"{FULL} --config no.yaml", nothing, "no.yaml"),
    ("recipe that is not there, audit", f"{AUDIT} --config no.yaml", nothing, "no.yaml"),
    ("recipe that is not there, prediction", f"{PREDICT} --config no.yaml", nothing, "no.yaml"),
    ("recipe that is a folder", f"{LORA} --config out", nothing, "out"),
    ("recipe of broken YAML, 02", f"{LORA} --config a.yaml", recipe("lora_r: [2\n"), "a.yaml"),
    ("recipe of broken YAML, audit", f"{AUDIT} --config a.yaml", recipe("lora_r: [2\n"), "a.yaml"),
    ("recipe of broken YAML, prediction", f"{PREDICT} --config a.yaml", recipe("lora_r: [2\n"), "a.yaml"),
    ("recipe that is empty", f"{LORA} --config a.yaml", recipe(""), "a.yaml"),
    ("recipe that is a list, 02", f"{LORA} --config a.yaml", recipe("- 1\n"), "a.yaml"),
    ("recipe that is a list, prediction", f"{PREDICT} --config a.yaml", recipe("- 1\n"), "a.yaml"),
    ("recipe with an unknown key", f"{LORA} --config a.yaml", recipe("lora_rr: 2\n"), "lora_rr"),
    ("recipe with a word for a number", f"{LORA} --config a.yaml", recipe("learning_rate: fast\n"), "learning_rate"),
    ("recipe with a list for a number", f"{LORA} --config a.yaml", recipe("learning_rate: [1]\n"), "learning_rate"),
    ("recipe with null for a number", f"{LORA} --config a.yaml", recipe("num_train_epochs:\n"), "--num_train_epochs"),
    ("recipe that is no text", f"{LORA} --config a.yaml", file("a.yaml", b"\xff\x00\x80"), "--config"),
    ("prompts in a folder", f"{INFER} --prompts_file out", nothing, "out"),
    ("prompts that are no text", f"{INFER} --prompts_file a.txt", file("a.txt", b"\xff\xfe\x00"), "a.txt"),
    ("empty prompt", INFER.replace("sky", "''"), nothing, WORKS),
    (
        "prediction that is cut off",
        LORA.replace("--reads", "--prediction a.json --reads"),
        file("a.json", "{"),
        "a.json",
    ),
    ("audit that is cut off", PREDICT_AUDITED, file("a.json", "{"), "a.json"),
    ("run.json that is cut off", "compare_runs.py a.json out/run.json", file("a.json", "{"), "a.json"),
    ("run.json that is a list, compare", "compare_runs.py a.json out/run.json", file("a.json", "[]"), "a.json"),
    ("run.json that is a list, plot", "plot_loss.py a.json", file("a.json", "[]"), "a.json"),
    ("run.json that is a list, verify", "verify_run.py a.json", file("a.json", "[]"), "a.json"),
    ("run.json that is a list, card", "write_card.py a.json", file("a.json", "[]"), "a.json"),
    ("run.json that is a list, reproduce", REPRODUCE, file("a.json", "[]"), "a.json"),
]
PATHS = [
    (
        "data with spaces",
        TRAIN.replace("$DATA", "'my röws 行.jsonl'"),
        moved("rows.jsonl", "my röws 行.jsonl"),
        WORKS,
    ),
    ("model with spaces", TRAIN_FULL.replace("$MODEL", "'my möd 行'"), moved("model", "my möd 行"), WORKS),
    ("results with spaces, 01", DATA.replace("$OUT", "'my öut 行'"), nothing, WORKS),
    ("results with spaces, 02", LORA.replace("$OUT", "'my öut 行'"), nothing, WORKS),
    ("results with spaces, 04", MERGE.replace("$OUT", "'my öut 行'"), adapter(), WORKS),
    ("no such model", LORA.replace("$MODEL", "no"), nothing, "no is not there"),
    ("no such data", LORA.replace("$DATA", "no.jsonl"), nothing, "no.jsonl"),
    ("not writable, 00", PREDICT.replace("$OUT", "/proc/out"), nothing, "/proc/out"),
    ("not writable, 01", DATA.replace("$OUT", "/proc/out"), nothing, "/proc/out"),
    ("not writable, 02", LORA.replace("$OUT", "/proc/out"), nothing, "/proc/out"),
    ("not writable, 03", FULL.replace("$OUT", "/proc/out"), nothing, "/proc/out"),
    ("not writable, 04", MERGE.replace("$OUT", "/proc/out"), adapter(), "/proc/out"),
    ("not writable, 05", INFER.replace("$OUT", "/proc/out"), nothing, "/proc/out"),
    ("not writable, 06", PIPELINE.replace("$OUT", "/proc/out"), nothing, "/proc/out"),
    ("not writable, audit", AUDIT.replace("$OUT", "/proc/out"), nothing, "/proc/out"),
    ("not writable, evaluate", EVALUATE.replace("$OUT", "/proc/out"), adapter(), "/proc/out"),
    ("a file for a folder, 01", DATA.replace("$OUT", "rows.jsonl"), nothing, "rows.jsonl"),
    ("a file for a folder, 02", LORA.replace("$OUT", "rows.jsonl"), nothing, "rows.jsonl"),
    ("a folder for a file, 05", INFER.replace("$OUT/answers.jsonl", "out"), nothing, "Is a directory: 'out'"),
    ("a folder for a file, 06", PIPELINE.replace("$OUT/answers.jsonl", "out"), nothing, "Is a directory: 'out'"),
]
ROWS = [
    ("empty line", TRAIN, rows(TEXT, "", TEXT), WORKS),
    ("empty row", TRAIN, rows(TEXT, {}), "row 2"),
    ("empty file", TRAIN, rows(), "rows.jsonl"),
    ("null text", TRAIN, rows(TEXT, {"text": None}), "row 2"),
    ("number for a text", TRAIN, rows({"text": 5}), "row 1"),
    ("number for a text, 01", DATA, rows({"text": 5}), "row 1"),
    ("number for a text, audit", make(AUDIT), rows({"text": 5}), "row 1"),
    ("number for a text, evaluate", make(EVALUATE), both(adapter(), rows({"text": 5})), "row 1"),
    ("number among texts", TRAIN, rows(TEXT, {"text": 5}), "rows.jsonl"),
    ("true for a text", TRAIN, rows({"text": True}), "row 1"),
    ("list for a text", TRAIN, rows({"text": ["a", "b"]}), "row 1"),
    ("nested text", TRAIN, rows({"text": {"a": "b"}}), "row 1"),
    ("row that is a list", TRAIN, rows(TEXT, [1, 2]), "line 2"),
    ("row that is a number", TRAIN, rows("5"), "line 1"),
    ("row that is null", TRAIN, rows("null"), "line 1"),
    ("row that is cut off", TRAIN, rows(TEXT, '{"text": "a'), "line 2"),
    ("row of NaN", TRAIN, rows('{"text": NaN}'), "row 1"),
    ("other columns", TRAIN, rows({"question": "a"}), "question"),
    ("prompt alone", TRAIN, rows({"prompt": "a"}), "prompt"),
    ("messages that are a text", TRAIN, rows({"messages": "hi"}), "row 1"),
    ("messages that are numbers", TRAIN, messages(1), "row 1"),
    ("messages that are texts", TRAIN, messages("a"), "row 1"),
    ("message without content", TRAIN, messages({"role": "user"}), "row 1"),
    ("message of null", TRAIN, messages(USER, {"role": "assistant", "content": None}), "row 1"),
    ("message of a number", TRAIN, messages({"role": "user", "content": 5}), "row 1"),
    ("messages of another form", TRAIN, messages({"from": "human", "value": "a"}), "row 1"),
    ("role that the template takes for another", AUDIT, messages(USER, {**BLUE, "role": "robot"}), WORKS),
    (
        "role that the template refuses",
        TRAIN,
        both(messages({**USER, "role": "robot"}), template(RAISES)),
        "system message",
    ),
    ("prompt that is a list of texts", TRAIN, rows({"prompt": ["a", "b"], "completion": "c"}), "row 1"),
    ("prompt a text, completion messages", TRAIN, rows({"prompt": "a", "completion": [BLUE]}), "row 1"),
    ("completion that is empty", TRAIN, rows(PAIR, {**PAIR, "completion": ""}), "row 2"),
    ("completion that is null", TRAIN, rows(PAIR, {**PAIR, "completion": None}), "row 2"),
    ("message that is empty", TRAIN, rows({"prompt": [USER], "completion": [{**BLUE, "content": ""}]}), "row 1"),
    ("text, then a pair", TRAIN, rows(TEXT, PAIR), "row 1"),
    ("pair, then a text", TRAIN, rows(PAIR, TEXT), "row 2"),
    ("texts, then messages", TRAIN, rows(PAIR, {"prompt": [USER], "completion": [BLUE]}), "row 2"),
    ("1 row, 02", TRAIN, rows(TEXT), WORKS),
    ("1 row, 03", TRAIN_FULL, rows(TEXT), WORKS),
    ("row of 1e6 characters", TRAIN, rows({"text": "a " * 500_000}), WORKS),
    ("word of 1e6 characters", AUDIT, rows({"text": "a" * 1_000_000 + " </s>"}), WORKS),
    ("only rows that are too long, 02", f"{TRAIN} --max_length 4", rows(LONG), "--max_length"),
    ("only rows that are too long, 03", f"{TRAIN_FULL} --max_length 4", rows(LONG), "--max_length"),
    ("only rows that are too long, audit", f"{AUDIT} --max_length 4", rows(LONG), "--max_length"),
    ("half of a surrogate pair, 01", DATA, rows('{"text": "a \\ud800 b"}'), "rows.jsonl"),
    ("half of a surrogate pair, 02", TRAIN, rows('{"text": "a \\ud800 b"}'), "rows.jsonl"),
    ("surrogate pair", AUDIT, rows('{"text": "a \\ud83d\\ude00 b </s>"}'), WORKS),
    (
        "zero width, NUL, emoji, right to left",
        DATA,
        rows({"text": "a \u200b \u0000 😀 \u2028 \x85 \u202e שלום b"}),
        WORKS,
    ),
    ("zero width, NUL, emoji, right to left, 02", TRAIN, rows({"text": "a \u200b \u0000 😀 \u202e שלום b"}), WORKS),
    ("byte order mark, 01", DATA, rows(TEXT, encoding="utf-8-sig"), WORKS),
    ("byte order mark, 02", TRAIN, rows(TEXT, encoding="utf-8-sig"), WORKS),
    ("UTF-16", TRAIN, rows(TEXT, encoding="utf-16"), "rows.jsonl"),
    ("Latin-1", TRAIN, rows('{"text": "ä"}', encoding="latin-1"), "rows.jsonl"),
    ("CRLF", AUDIT, rows(TEXT, TEXT, end="\r\n"), WORKS),
    ("JSON list", AUDIT.replace("$DATA", "a.json"), file("a.json", json.dumps([TEXT])), WORKS),
    ("CSV that is cut off", TRAIN.replace("$DATA", "a.csv"), file("a.csv", 'text\n"a'), "a.csv"),
    ("Parquet that is none", TRAIN.replace("$DATA", "a.parquet"), file("a.parquet", "PAR1xx"), "a.parquet"),
    ("text file: a row a line", TRAIN.replace("$DATA", "a.txt"), file("a.txt", "a\nb\n"), WORKS),
    ("unknown kind of file", DATA.replace("$DATA", "a.yaml"), file("a.yaml", "text: a"), "a.yaml"),
    ("folder without rows", TRAIN.replace("$DATA", "model"), nothing, "'model'"),
]
MODELS = [
    ("not causal, 02", TRAIN, bert, "BertForMaskedLM"),
    ("not causal, 03", TRAIN_FULL, bert, "BertForMaskedLM"),
    ("not causal, 05", make(INFER), bert, "BertForMaskedLM"),
    ("unknown architecture", TRAIN, keys("model/config.json", model_type="nope"), "nope"),
    ("no tokenizer, 02", TRAIN, NO_TOKENIZER, "model"),
    ("no tokenizer, 05", make(INFER), NO_TOKENIZER, "model"),
    ("no tokenizer, audit", AUDIT, NO_TOKENIZER, "tokenizer"),
    ("no chat template, texts", TRAIN, NO_TEMPLATE, WORKS),
    ("no chat template, pairs", TRAIN, both(NO_TEMPLATE, rows(PAIR)), WORKS),
    ("no chat template, messages", TRAIN, both(NO_TEMPLATE, messages(USER, BLUE)), "template"),
    ("no chat template, 05", INFER, NO_TEMPLATE, "--raw"),
    ("no chat template, 06", PIPELINE, NO_TEMPLATE, "--raw"),
    ("no chat template, 05 --raw", f"{INFER} --raw", NO_TEMPLATE, WORKS),
    ("broken chat template, 02", TRAIN, both(template("{% for x"), rows(PAIR)), "template"),
    ("broken chat template, 05", INFER, template("{% for x"), "--raw"),
    ("chat template that refuses, audit", AUDIT, both(template(RAISES), rows(PAIR)), "system message"),
    ("chat template that refuses, 05", INFER, template(RAISES), "system message"),
    ("chat template that refuses, 06", PIPELINE, template(RAISES), "system message"),
    ("no pad token, 02", TRAIN, nothing, WORKS),  # the tiny model has none, as Llama-2
    ("no EOS token, 02", TRAIN, NO_EOS, "EOS"),
    ("no EOS token, audit", AUDIT, NO_EOS, "EOS"),
    ("no EOS token, 05", make(INFER), NO_EOS, "EOS"),
    ("tied head", TRAIN_FULL, both(keys("model/config.json", tie_word_embeddings=True), NO_HEAD), WORKS),
    ("float16", TRAIN_FULL, HALF, WORKS),
    ("fewer embeddings than tokens", TRAIN, both(keys("model/config.json", vocab_size=4), FOUR_WORDS), "embedding"),
    ("weights that are cut off, 02", TRAIN, cut, "model"),
    ("weights that are cut off, 05", make(INFER), cut, "model"),
    ("weights that are none", TRAIN, file("model/model.safetensors", "garbage"), "model"),
    ("weights of no bytes, 01", MODEL, file("model/model.safetensors", ""), "'model'"),
    ("weights of no bytes, 02", TRAIN, file("model/model.safetensors", ""), "model"),
    ("weights that are missing, 02", TRAIN, NO_QUERY, "q_proj"),
    ("weights that are missing, 05", make(INFER), NO_QUERY, "q_proj"),
    ("pickled weights, 01", MODEL, pickled, "safetensors"),
    ("pickled weights, 02", TRAIN, pickled, "safetensors"),
    ("pickled weights, 05", INFER, pickled, "safetensors"),
    ("pickled weights, 06", PIPELINE, pickled, "safetensors"),
    ("config that is cut off, 00", PREDICT, file("model/config.json", "{"), "config"),
    ("config that is cut off, 02", TRAIN, file("model/config.json", "{"), "'model'"),
    ("config that is cut off, 05", INFER, file("model/config.json", "{"), "model/config.json"),
    ("tokenizer that is cut off", TRAIN, file("model/tokenizer.json", "{"), "model"),
    ("record that is cut off", LORA, file("model/run.json", "{"), "run.json"),
    ("record of its own that is cut off", MODEL, file("model/run.json", "{"), WORKS),
]
ADAPTERS = [
    ("of other shapes, 04", MERGE, adapter(hidden_size=16), "shapes differ"),
    ("of other shapes, 05", INFER_ADAPTER, adapter(hidden_size=16), "shapes differ"),
    ("of another base, 04", MERGE, OTHER_BASE, "was made from another model"),
    ("of another base, 05", INFER_ADAPTER, OTHER_BASE, "was made from another model"),
    ("IA3, 04", MERGE, adapter("IA3Config"), WORKS),
    ("IA3, 05", INFER_ADAPTER, adapter("IA3Config"), WORKS),
    ("prompt tuning, 04", MERGE, PROMPT_TUNING, "merge"),
    ("prompt tuning, 05", INFER_ADAPTER, PROMPT_TUNING, WORKS),
    ("prompt tuning, 06", PIPELINE_ADAPTER, PROMPT_TUNING, WORKS),
    (
        "unknown kind",
        INFER_ADAPTER,
        both(adapter(), keys("lora/adapter/adapter_config.json", peft_type="NOPE")),
        "NOPE",
    ),
    (
        "weights that are none, 04",
        MERGE,
        both(adapter(), file("lora/adapter/adapter_model.safetensors", "x")),
        "adapter",
    ),
    (
        "weights that are none, 05",
        INFER_ADAPTER,
        both(adapter(), file("lora/adapter/adapter_model.safetensors", "x")),
        "adapter",
    ),
    (
        "config that is cut off",
        INFER_ADAPTER,
        both(adapter(), file("lora/adapter/adapter_config.json", "{")),
        "lora/adapter",
    ),
    ("base that is not named", INFER.replace("path $MODEL", "path lora/adapter"), NO_BASE, "base_model_name_or_path"),
    ("trained further", TRAIN.replace("$MODEL", "lora/adapter"), adapter(), "'lora/adapter/config.json'"),
    ("a whole model merged", MERGE.replace("lora/adapter", "$MODEL").replace(" lora ", " "), nothing, "whole model"),
]
STEPS = [
    ("no script", "run_step.py $OUT/lora --reads $MODEL", nothing, "no script after --"),
    ("script that is not there", "run_step.py $OUT/lora -- 02_train.py", nothing, "no script 02_train.py"),
    ("unknown option", "run_step.py $OUT/lora --no_such -- 02_train_lora.py", nothing, "--no_such"),
    ("changed model", LORA, both(sealed("model"), cut), "model/model.safetensors"),
    (
        "changed adapter",
        INFER_ADAPTER,
        both(adapter(), sealed("lora"), file("lora/adapter/a", "")),
        "lora/adapter/a is not among",
    ),
    ("incomplete model", INFER, both(sealed("model"), without("config.json")), "model/config.json is missing"),
    ("sums that are cut off", INFER, both(sealed("model"), file("model/SHA256SUMS", "# 9")), "model/SHA256SUMS"),
]
TABLES = {"step": STEPS, "argument": ARGUMENTS, "path": PATHS, "data": ROWS, "model": MODELS, "adapter": ADAPTERS}
CASES = [pytest.param(*case, id=f"{table}: {what}") for table, rows in TABLES.items() for what, *case in rows]


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A model, rows, and in out/ an earlier result of every step."""
    shutil.copytree(tiny_model, tmp_path / "model")
    rows(*[TEXT] * 4)(tmp_path)
    for name in ("base-model", "dataset", "lora", "full", "merged"):
        file(f"out/{name}/step.json", "{}")(tmp_path)
    for name in ("answers.jsonl", "audit.json"):
        file(f"out/{name}", "{}")(tmp_path)
    return tmp_path


def read_files(folder: Path) -> dict[str, bytes]:
    """All but what is under way: the marks of who is writing, and of what was verified; the work folders."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    under_way = re.compile(r"(.*/)?([.][^/]*[.]lock|[.]verified|[^/]*[.]part/.*)")
    return {str(name): path.read_bytes() for name, path in files.items() if not under_way.fullmatch(str(name))}


def list_calls(command: str) -> list[list[str]]:
    """The processes of a command, before each training the audit of it."""
    for name, value in {"$MODEL": "model", "$DATA": "rows.jsonl", "$OUT": "out"}.items():
        command = command.replace(name, value)
    calls = []
    for words in map(shlex.split, command.split(" && ")):
        if script := {"02_train_lora.py", "03_train_full.py"} & set(words):
            place = words.index(*script)
            audit = ["audit_tokens.py", "--output", str(Path(words[1]).parent / "check/audit.json")]
            calls.append(["run_step.py", *words[2:place], *audit, *words[place + 1 :]])
        calls.append(words)
    return [[str(SCRIPTS.get(word, word)) for word in words] for words in calls]


class Finders(list):
    """sys.meta_path, where what waits for the import of transformers' Trainer finds it at once."""

    def insert(self, place, finder):
        super().insert(place, finder)
        finder.find_spec("transformers.trainer").loader.exec_module(transformers.trainer)


@pytest.fixture
def call(folder, monkeypatch):
    """Runs a process in this one, and returns its exit status or its message. Else there is a traceback."""

    def call(words: list[str]) -> str | int | None:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        environment, thresholds = dict(os.environ), gc.get_threshold()
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", words)
            patch.setattr("sys.path", [str(Path(words[0]).parent), *sys.path])
            patch.setattr("sys.meta_path", Finders(sys.meta_path))
            patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS])
            patch.setattr(transformers.trainer.__spec__.loader, "exec_module", lambda module: None)
            patch.setattr("argparse.ArgumentParser.error", argparse.ArgumentParser.error)
            patch.setattr("resource.setrlimit", lambda *limits: None)  # they would be those of all tests
            try:
                runpy.run_path(words[0], run_name="__main__")
            except SystemExit as stop:
                return stop.code
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                os.environ.clear()
                os.environ.update(environment)
                gc.set_threshold(*thresholds)
        return 0

    monkeypatch.chdir(folder)
    return call


# A sixth of the table without FAULTS=full (make test-faults).
@pytest.mark.parametrize(("command", "given", "said"), CASES if os.environ.get("FAULTS") == "full" else CASES[::6])
def test_a_command(command, given, said, folder, call):
    given(folder)
    for words in list_calls(command):
        before = read_files(folder)
        if message := call(words):
            break
    if said == WORKS:
        assert not message
        return
    assert isinstance(message, str) and message.startswith("error: ") and len(message.splitlines()) <= 3
    assert said in message
    assert read_files(folder) == before


def test_a_file_of_null_is_named(tmp_path):
    """In a process of its own: at it the reader of datasets would crash."""
    (tmp_path / "a.json").write_text(" null")
    command = ("out", "--", SCRIPTS["read_rows.py"], "--dataset_name", "a.json")
    result = run(SCRIPTS["run_step.py"], *command, cwd=tmp_path)
    assert result.returncode == 1 and "a.json" in result.stderr and "Traceback" not in result.stderr


def test_results_on_another_disk(call):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        merge = MERGE.replace(" lora", f" {memory}/lora")
        for words in list_calls(" && ".join([DATA, MODEL, LORA, FULL, merge]).replace("$OUT", memory)):
            assert not call(words)


# The Makefile ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "REPO=a/b\n",
        "REPO=a/b",
        "REPO=a/b\r\n",
        "\ufeffREPO=a\n",
        "REPO = a/b  \n",
        "export REPO=a/b\n",
        "  export  REPO=a/b\n",
        'REPO="a b"\n',
        "REPO='a b'\r\n",
        'REPO="a b" # c\n',
        'REPO="a b"\r\n',
        'REPO="a b" # c\r\n',
        "REPO='\"a\"'\n",
        "REPO=\"'a'\"\n",
        'REPO="a#b"\n',
        'REPO="a \\"b\\" c"\n',
        'REPO=a "b" c\n',
        "REPO=it's\n",
        "REPO='$HOME `x`'\n",
        "REPO=a;b $x %y (z)\n",
        "REPO=a # c\n",
        "REPO=a#c\n",
        "REPO=#c\n",
        "REPO= # c\n",
        "REPO=\n",
        "REPO=''\n",
        "# REPO=b\nREPO=a\n",
        "REPO=a\nREPO=b\n",
        "REPO=a=b\n",
        "REPO=ünï 行\n",
        "REPO:a\n",
        "REPOS=a\n",
    ],
)
def test_make_reads_env_as_the_scripts_do(text, tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "env/recipes", tmp_path / "env/recipes")
    shutil.copy(ROOT / "env/use.mk", tmp_path / "env")
    (tmp_path / ".env").write_bytes(text.encode())
    show = ["make", "-s", "--eval", 'show: ; @printf "%s" "$$REPO"', "show"]
    result = subprocess.run(show, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == (dotenv_values(tmp_path / ".env").get("REPO") or "")


def test_a_repository_in_a_folder_with_spaces(tmp_path):
    (tmp_path / "my röpo 行").mkdir()
    project = Project(tmp_path / "my röpo 行")
    result = project.make("train-lora")
    assert result.returncode == 0, result.stderr
    assert project.steps() == TRAINING
    assert project.make("train-lora").returncode == 0 and project.steps() == []


@pytest.mark.parametrize(
    ("argument", "given", "said"),
    [
        ("OUT=my results", nothing, "OUT=my results"),
        ("OUT=a;b", nothing, "OUT=a;b"),
        ("RECIPE=no.yaml", nothing, "no.yaml"),
        ("RUN=", file(".env", "OUT=my results\n"), "OUT=my results"),
        ("RUN=", file(".env", 'RECIPE="my recipe"\r\n'), "my recipe"),
    ],
    ids=["OUT with spaces", "OUT with a mark of the shell", "RECIPE not there", "OUT in .env", "RECIPE in .env"],
)
def test_make_refuses(argument, given, said, tmp_path):
    project = Project(tmp_path)
    given(tmp_path)
    before = read_files(tmp_path)
    result = project.make("train-lora", argument)
    assert result.returncode != 0 and said in result.stderr and len(result.stderr.splitlines()) <= 2
    assert read_files(tmp_path) == before


def test_make_takes_results_on_another_disk(tmp_path):
    project = Project(tmp_path)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        assert project.make("train-lora", f"OUT={memory}").returncode == 0
        assert project.steps() == TRAINING
        assert Path(memory, "lora/run.json").is_file()
