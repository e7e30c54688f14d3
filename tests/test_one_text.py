"""What is trained, audited, measured, saved and answered with is the same text, against plain PyTorch, row by row."""

import json
import shutil

import pytest
import torch
from conftest import check_refusal, load, write_rows
from datasets import Dataset, load_dataset
from helpers import call, measure, read
from peft import PeftModel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    pipeline,
)
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FAST = ("--learning_rate", 0.01, "--optim", "adamw_torch", "--lora_dropout", 0, "--save_strategy", "no")
FAST += ("--report_to", "none", "--lora_target_modules", "all-linear", "--max_grad_norm", 1)
HELD_OUT = ("--dataset_test_split", "validation")
# Assistant turns alone, and a turn ends with the word z, which is not the tokenizer's EOS.
TURNS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + ' z' }}"
    "{% endgeneration %}{{ ' ' }}{% else %}{{ '[' + m['role'] + '] ' + m['content'] + ' ' }}{% endif %}{% endfor %}"
)
# Without generation markers, with another end of the prompt.
OTHER = (
    "{{ bos_token + ' ' }}{% for m in messages %}{{ 'what ' + m['content'] + ' ' }}{% if m['role'] == 'assistant' %}"
)
OTHER += "{{ eos_token + ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'what ' }}{% endif %}"


def say(*words: str, system: str = "") -> list[dict]:
    turns = [{"role": "system", "content": system}] if system else []
    return turns + [
        {"role": "user assistant".split()[number % 2], "content": word} for number, word in enumerate(words)
    ]


def write_both(folder, rows: list, held_out: list | None = None):
    folder.mkdir(exist_ok=True)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "validation.jsonl", held_out or rows)
    return folder


def train(model, data, output, *args, script="02_train_lora.py"):
    lora = FAST if script.startswith("02") else (*FAST[:4], *FAST[6:10], *FAST[12:])
    call(script, "--model_name_or_path", model, "--dataset_name", data, "--output_dir", output, *lora, *args)
    return read(output / "run.json")["metrics"]


def load_plainly(base, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


@torch.inference_mode()
def measure_tokens(model, rows: list[tuple[list[int], list[int]]]) -> float:
    """Mean cross-entropy over labels, of rows of ids and labels, each row alone."""
    losses = []
    for ids, labels in rows:
        chances = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses += [-chances[place - 1, ids[place]] for place in range(1, len(ids)) if labels[place] != -100]
    return torch.stack(losses).mean().item()


def evaluate(base, models, data, report, *args) -> list[dict]:
    command = ("--base_model", base, "--models", *models, "--dataset_name", data, "--output_dir", report)
    call("chain/evaluate.py", *command, "--max_new_tokens", 5, *args)
    return read(report / "evaluation.json")["models"]


@pytest.fixture
def uneven(tmp_path):
    """Rows of many lengths, four of them held out."""
    words = "a b c d e f g red green blue".split()
    rows = [
        {"prompt": " ".join(words[number % 3 :]), "completion": " ".join(words[: 1 + number * 3 % 7])}
        for number in range(16)
    ]
    return write_both(tmp_path / "uneven", rows[:12], rows[12:])


def as_chat(file) -> list[dict]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: [{"role": role, "content": row[key]}] for key, role in ROLES.items()} for row in rows]


ROLES = {"prompt": "user", "completion": "assistant"}


# Held-out loss --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    ["--packing true", "--packing true --packing_strategy wrapped", "--packing false", "--loss_type dft",
     "--label_smoothing_factor 0.2", "--token_metrics true", "--label_smoothing_factor 0.2 --token_metrics true"],
)  # fmt: skip
def test_the_held_out_loss_is_cross_entropy_row_by_row_whatever_is_trained(options, tiny_model, uneven, tmp_path):
    options = (*options.split(), "--eval_packing", "true", "--max_length", 64, "--max_steps", 3, *HELD_OUT)
    metrics = train(tiny_model, uneven, tmp_path / "lora", *options)
    model = load_plainly(tiny_model, tmp_path / "lora/adapter")
    held_out = write_rows(tmp_path / "chat.jsonl", as_chat(uneven / "validation.jsonl"))
    loss, tokens = measure(model, AutoTokenizer.from_pretrained(tiny_model), held_out)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5) and metrics["eval_tokens"] == tokens


def test_packed_rows_do_not_see_one_another_in_a_step(tiny_model, uneven, tmp_path):
    script, tokenizer = load("02_train_lora.py"), AutoTokenizer.from_pretrained(tiny_model)
    options = {"packing": True, "max_length": 64, "per_device_train_batch_size": 1, "use_cache": True}
    config = script.Config(str(tmp_path), report_to=[], bf16=False, use_cpu=True, completion_only_loss=True, **options)
    rows = script.load_rows(str(uneven), "train", tokenizer, config)
    model = load_plainly(tiny_model)
    trainer = script.TokenLossTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    (row,) = (
        row
        for row in trainer.train_dataset
        if len(row["seq_lengths"]) == max(map(len, trainer.train_dataset["seq_lengths"]))
    )
    loss = trainer.compute_loss(model.train(), trainer.data_collator([row])).item()
    parts, start = [], 0
    for length in row["seq_lengths"]:
        parts.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
        start += length
    assert len(parts) > 2 and loss == pytest.approx(measure_tokens(model.eval(), parts), rel=1e-5)


@pytest.mark.parametrize("option", ["--packing true", "--padding_free true --max_length null"])
@pytest.mark.parametrize("script", ["02_train_lora.py", "03_train_full.py"])
def test_an_architecture_that_mixes_packed_rows_is_refused(script, option, tiny_model, uneven, tmp_path):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    }
    config = OPTConfig(vocab_size=32, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0, init_std=0.3)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "opt")
    options = ("--max_length", 64, "--max_steps", 1)
    train(tmp_path / "opt", uneven, tmp_path / "out", *options, script=script)
    with pytest.raises(SystemExit, match="mixes rows that are packed. Leave --packing and --padding_free out."):
        train(tmp_path / "opt", uneven, tmp_path / "packed", *options, *option.split(), script=script)


def test_packed_rows_are_tried_in_the_precision_of_the_training(tiny_model, uneven, tmp_path):
    def attend(module, query, *args, **kwargs):  # as FlashAttention, which takes half precision alone
        assert (get_target_dtype(query, module) or query.dtype) == torch.bfloat16
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register("half", attend)
    AttentionMaskInterface.register("half", sdpa_mask)
    options = ("--packing", "true", "--max_length", 64, "--max_steps", 1, "--bf16", "true", "--use_cpu", "true")
    train(tiny_model, uneven, tmp_path / "lora", *options, "--attn_implementation", "half")


def test_many_held_out_rows_are_measured_to_the_bit_whatever_order_they_are_drawn_in(tiny_model, tmp_path):
    words = "a b c d e f g red green blue sky sea".split()
    rows = [{"prompt": words[number % 12], "completion": words[number * 5 % 11]} for number in range(48)]
    data = write_both(tmp_path / "rows", rows)
    metrics = train(tiny_model, data, tmp_path / "lora", "--max_steps", 3, "--per_device_eval_batch_size", 3, *HELD_OUT)
    _, lora = evaluate(tiny_model, [tmp_path / "lora/adapter"], data, tmp_path / "report")
    assert lora["loss"] == metrics["eval_loss"]


def test_the_best_checkpoint_is_chosen_by_the_loss_of_all_tokens(tiny_model, uneven, tmp_path):
    best = ("--eval_strategy", "steps", "--eval_steps", 1, "--max_steps", 4, "--load_best_model_at_end", "true")
    best += ("--save_strategy", "steps", "--save_steps", 1, "--learning_rate", 0.3)
    found = []
    for size in (1, 4):
        train(tiny_model, uneven, tmp_path / "lora", *HELD_OUT, *best, "--per_device_eval_batch_size", size)
        record = read(tmp_path / "lora/run.json")
        found.append([entry["eval_loss"] for entry in record["history"] if "eval_loss" in entry])
        assert record["metrics"]["eval_loss"] == pytest.approx(min(found[-1]), rel=1e-5)
        shutil.rmtree(tmp_path / "lora")
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(set(found[0])) > 2


@pytest.fixture(scope="module")
def experts(tiny_model, tmp_path_factory):
    """A mixture of experts whose config does not ask for the router's loss."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=2,
        num_key_value_heads=2, num_local_experts=4, initializer_range=0.3, bos_token_id=1, output_router_logits=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("experts")
    MixtralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script", ["02_train_lora.py", "03_train_full.py"])
def test_the_router_has_no_part_in_the_held_out_loss_and_is_saved_as_it_came(script, experts, uneven, tmp_path):
    metrics = train(experts, uneven, tmp_path / "out", "--max_steps", 3, *HELD_OUT, script=script)
    lora = script.startswith("02")
    folder = tmp_path / "out/adapter" if lora else tmp_path / "out/model"
    model = load_plainly(experts, folder) if lora else load_plainly(folder)
    held_out = write_rows(tmp_path / "chat.jsonl", as_chat(uneven / "validation.jsonl"))
    loss, _ = measure(model, AutoTokenizer.from_pretrained(experts), held_out)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert lora or read(folder / "config.json")["output_router_logits"] is False
    base, trained = evaluate(experts, [folder], uneven, tmp_path / "report", "--prompts", "a", "a b c d e")
    assert trained["loss"] == metrics["eval_loss"] and len(trained["answers"]) == 2 and base["name"] == "base"


# Evaluation -----------------------------------------------------------------------------------------------------------
def test_an_evaluation_measures_the_tokens_of_the_training_for_the_base_model_too(tiny_model, tmp_path):
    rows = [{"messages": say("what color " + "x " * number, "red", "sky", "blue", system="a")} for number in range(6)]
    data = write_both(tmp_path / "turns", rows)
    (tmp_path / "turns.jinja").write_text(TURNS)
    options = ("--chat_template_path", tmp_path / "turns.jinja", "--assistant_only_loss", "true", "--eos_token", "z")
    metrics = train(tiny_model, data, tmp_path / "lora", *options, *HELD_OUT, "--num_train_epochs", 8)
    base, lora = evaluate(tiny_model, [tmp_path / "lora/adapter"], data, tmp_path / "report")
    assert lora["loss"] == metrics["eval_loss"]  # to the bit
    assert lora["tokens"] == base["tokens"] == metrics["eval_tokens"] == 6 * 2 * 2
    assert lora["measured"] == "assistant turns"
    text = (tmp_path / "report/evaluation.md").read_text()
    assert "24 tokens: assistant turns." in text and f"| lora | {metrics['eval_loss']:.4f} |" in text

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokens = []
    for row in rows:
        ids, labels = [], []
        for turn in row["messages"]:
            words = turn["content"] + " z" if turn["role"] == "assistant" else f"[{turn['role']}] {turn['content']}"
            part = tokenizer(words, add_special_tokens=False).input_ids
            ids, labels = ids + part, labels + (part if turn["role"] == "assistant" else [-100] * len(part))
        tokens.append((ids, labels))
    trained = load_plainly(tiny_model, tmp_path / "lora/adapter")
    assert lora["loss"] == pytest.approx(measure_tokens(trained, tokens), rel=1e-5)
    assert base["loss"] == pytest.approx(measure_tokens(load_plainly(tiny_model), tokens), rel=1e-5)


def test_a_file_is_measured_by_the_split_asked_for_and_refused_where_it_was_trained_on(tiny_model, tmp_path):
    words = "a b c d e f g red green blue".split()
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": word, "completion": word * 2} for word in words])
    splits = ("--dataset_train_split", "train[:6]", "--dataset_test_split", "train[6:]")
    metrics = train(tiny_model, file, tmp_path / "lora", "--max_steps", 2, *splits)
    adapter = [tmp_path / "lora/adapter"]
    _, lora = evaluate(tiny_model, adapter, file, tmp_path / "report", *splits[2:])
    assert (lora["loss"], lora["rows"]) == (metrics["eval_loss"], 4)
    with pytest.raises(SystemExit, match="lora/adapter was trained on these rows"):
        evaluate(tiny_model, adapter, file, tmp_path / "report")  # of which it saw six
    train(tiny_model, file, tmp_path / "all", "--max_steps", 2)
    for split in ((), splits[2:]):
        with pytest.raises(SystemExit, match="all/adapter was trained on these rows"):
            evaluate(tiny_model, [tmp_path / "all/adapter"], file, tmp_path / "report", *split)


def test_attention_and_padding_are_those_of_the_training(tiny_model, uneven, tmp_path, capsys):
    options = ("--attn_implementation", "eager", "--pad_to_multiple_of", 16, "--max_steps", 3, *HELD_OUT)
    metrics = train(tiny_model, uneven, tmp_path / "lora", *options)
    _, lora = evaluate(tiny_model, [tmp_path / "lora/adapter"], uneven, tmp_path / "report")
    assert lora["loss"] == metrics["eval_loss"] and lora["precision"] == "float32 eager"
    record = read(tmp_path / "lora/run.json")
    record["arguments"]["attn_implementation"] = "flash_attention_2"
    (tmp_path / "lora/run.json").write_text(json.dumps(record))
    _, lora = evaluate(tiny_model, [tmp_path / "lora/adapter"], uneven, tmp_path / "report")
    assert lora["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert "flash_attention_2, of the training, is not installed here" in capsys.readouterr().out


def test_the_base_is_measured_in_the_precision_of_each_run_whatever_the_order(tiny_model, uneven, tmp_path):
    for name, options in (("one", ()), ("two", ("--bf16", "true"))):
        train(tiny_model, uneven, tmp_path / name, "--max_steps", 2, "--use_cpu", "true", *options, *HELD_OUT)
    folders, found = [tmp_path / name / "adapter" for name in ("one", "two")], []
    for order in (folders, folders[::-1]):
        models = evaluate(tiny_model, order, uneven, tmp_path / "report", "--prompts", "a")
        assert [model["name"] for model in models][::2] == ["base", "base"]
        found.append({model["precision"]: model["loss"] for model in models if model["name"] == "base"})
    assert found[0] == found[1] and len(set(found[0].values())) == 2
    assert (tmp_path / "report/evaluation.md").read_text().count("| base |") == 2


def test_all_tokens_of_messages_are_called_so(tiny_model, tmp_path):
    data = write_both(tmp_path / "rows", [{"messages": say("what color", "red\n- sky")}] * 4)
    train(tiny_model, data, tmp_path / "lora", "--completion_only_loss", "true", "--max_steps", 1, *HELD_OUT)
    _, lora = evaluate(tiny_model, [tmp_path / "lora/adapter"], data, tmp_path / "report")
    assert lora["measured"] == "all tokens"
    assert "- **the data set**: red - sky\n" in (tmp_path / "report/evaluation.md").read_text()


def test_what_a_merge_by_hand_was_trained_on_is_measured(tiny_model, tmp_path, capsys):
    rows = [{"messages": say("what color", "red", "sky", "blue")}] * 4
    data = write_both(tmp_path / "rows", rows)
    (tmp_path / "turns.jinja").write_text(TURNS)
    options = ("--chat_template_path", tmp_path / "turns.jinja", "--assistant_only_loss", "true", "--eos_token", "z")
    metrics = train(tiny_model, data, tmp_path / "lora", *options, *HELD_OUT, "--max_steps", 2)
    adapter = tmp_path / "lora/adapter"
    call(
        "04_merge_adapter.py", "--model_name_or_path", adapter, "--output_dir", tmp_path / "merged", "--prompts", "sky"
    )
    _, merged = evaluate(tiny_model, [tmp_path / "merged/model"], data, tmp_path / "report")
    assert merged["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert (merged["tokens"], merged["measured"]) == (metrics["eval_tokens"], "assistant turns")
    with pytest.raises(SystemExit, match="merged/model was trained on these rows"):
        evaluate(tiny_model, [tmp_path / "merged/model"], data, tmp_path / "report", "--dataset_test_split", "train")
    shutil.copytree(adapter, tmp_path / "alone/adapter")
    capsys.readouterr()
    evaluate(tiny_model, [tmp_path / "alone/adapter"], data, tmp_path / "report")
    assert "has no record of its training" in capsys.readouterr().out


def test_models_of_other_tokens_stand_in_tables_of_their_own(tiny_model, uneven, tmp_path):
    for name, longest in (("one", 64), ("two", 64), ("short", 12)):
        train(tiny_model, uneven, tmp_path / name, "--max_steps", 1, "--max_length", longest, *HELD_OUT)
    folders = [tmp_path / name / "adapter" for name in ("one", "short", "two")]
    models = evaluate(tiny_model, folders, uneven, tmp_path / "report", "--prompts", "a")
    assert [model["name"] for model in models] == ["base", "one", "two", "base", "short"]
    for model in models:
        if model["name"] != "base":
            metrics = read(tmp_path / model["name"] / "run.json")["metrics"]
            assert (model["loss"], model["tokens"]) == (metrics["eval_loss"], metrics["eval_tokens"])
    assert models[0]["tokens"] != models[3]["tokens"]
    assert (tmp_path / "report/evaluation.md").read_text().count("| base |") == 2


def test_one_conversation_is_answered_the_same_in_every_way(tiny_model, tmp_path, monkeypatch, capsys):
    rows = [
        {
            "prompt": say("sky", "red", "sea", system=color),
            "completion": [{"role": "assistant", "content": f"{color} x"}],
        }
        for color in ("blue", "green") * 4
    ]
    data = write_both(tmp_path / "rows", rows, rows[:2])
    base = shutil.copytree(tiny_model, tmp_path / "base")
    template = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST] ' }}{% if m['role'] == 'assistant' %}"
    (base / "chat_template.jinja").write_text(template + "{{ eos_token + ' ' }}{% endif %}{% endfor %}")
    train(base, data, tmp_path / "lora", "--num_train_epochs", 15, *HELD_OUT)
    adapter = tmp_path / "lora/adapter"
    call(
        "04_merge_adapter.py", "--model_name_or_path", adapter, "--output_dir", tmp_path / "merged", "--prompts", "sky"
    )
    merged = tmp_path / "merged/model"

    conversation, greedy = rows[0]["prompt"], {"max_new_tokens": 5, "do_sample": False}
    base_row, lora_row, merged_row = evaluate(base, [adapter, merged], data, tmp_path / "report")
    answers = {"evaluate": lora_row["answers"][0], "evaluate, merged": merged_row["answers"][0]}
    generation = load("05_generate.py")
    for name, folder in (("05", adapter), ("05, merged", merged)):
        model, tokenizer = generation.load_model(str(folder), str(base), "float32")
        (answers[name],) = generation.generate(model, tokenizer, [conversation], False, **greedy)
    for name, model in (("pipeline", load_plainly(base, adapter)), ("pipeline, merged", load_plainly(merged))):
        pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(merged))
        answers[name] = pipe(conversation, return_full_text=False, **greedy)[0]["generated_text"]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    row = load_plainly(merged).generate(ids, **greedy)[0, ids.shape[1] :]
    answers["plain transformers"] = tokenizer.decode(row, skip_special_tokens=True)
    assert set(answers.values()) == {answers["05"]} and "blue x" in answers["05"]
    assert "green x" in lora_row["answers"][1] and base_row["answers"] != lora_row["answers"]
    assert "- system: blue\n- user: sky\n- assistant: red\n" in (tmp_path / "report/evaluation.md").read_text()


def test_a_prompt_is_all_that_comes_before_the_last_answer():
    from datasets import Dataset

    def choose(row: dict) -> tuple:
        (chosen,) = load("chain/evaluate.py").choose_prompts(Dataset.from_list([row]))
        return chosen["prompt"], chosen["reference"]

    chat = say("a", "red", "b", "blue", system="c")
    assert choose({"messages": chat}) == (chat[:-1], "blue")
    assert choose({"messages": [*chat, *say("more")]}) == (chat[:-1], "blue")
    assert choose({"messages": [chat[0], chat[2]]}) == ([chat[0]], "red")  # no question
    assert choose({"messages": say("a")}) == (say("a"), None)  # no answer
    assert choose({"prompt": chat[:-1], "completion": chat[-1:]}) == (chat[:-1], "blue")
    assert choose({"prompt": "a", "completion": "red"}) == ("a", "red")
    begins = [{"role": "assistant", "content": "red"}, *chat[1:2]]
    assert load("chain/evaluate.py").choose_prompts(Dataset.from_list([{"messages": begins}])) == []
    assert choose({"text": "a"}) == ("What is a large language model?", None)


# Template and end -----------------------------------------------------------------------------------------------------
@pytest.fixture
def other_end(tiny_model, tmp_path):
    """A model whose tokenizer, config and generation config end with </s>, and whose template ends a turn with z."""
    folder = shutil.copytree(tiny_model, tmp_path / "other-end")
    template = (
        "{% for m in messages %}{{ 'what ' + m['content'] + (' z ' if m['role'] == 'assistant' else ' ') }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text("{{ bos_token + ' ' }}" + template)
    return folder


def test_the_end_that_was_trained_ends_what_is_generated_in_every_way(other_end, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "sky", "completion": "blue"}] * 8)
    with pytest.raises(SystemExit, match="8 of 8 rows have no </s> in the labels.*"):
        call("chain/audit_tokens.py", "--model_name_or_path", other_end, "--dataset_name", data)
    end = ("--eos_token", "z", "--num_train_epochs", 40)
    train(other_end, data, tmp_path / "lora", *end)
    train(other_end, data, tmp_path / "full", *end, script="03_train_full.py")
    adapter = tmp_path / "lora/adapter"
    call(
        "04_merge_adapter.py", "--model_name_or_path", adapter, "--output_dir", tmp_path / "merged", "--prompts", "sky"
    )
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    end = tokenizer.convert_tokens_to_ids("z")
    assert tokenizer.eos_token_id == end and end in GenerationConfig.from_pretrained(adapter).eos_token_id
    ids = tokenizer.apply_chat_template(say("sky"), return_tensors="pt", return_dict=False)
    for folder in (tmp_path / "full/model", tmp_path / "merged/model"):
        assert read(folder / "config.json")["eos_token_id"] == end
        assert end in read(folder / "generation_config.json")["eos_token_id"]
        assert AutoTokenizer.from_pretrained(folder).eos_token_id == end
        answer = load_plainly(folder).generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
        assert answer.tolist()[-1] == end and len(answer) == 3  # what, blue, z
    generate = load("05_generate.py")
    for folder in (adapter, tmp_path / "merged/model"):
        model, tokenizer = generate.load_model(str(folder), None, "float32")
        answer = generate.generate(model, tokenizer, ["sky"], False, max_new_tokens=9, do_sample=False)[0]
        assert answer.split() == ["what", "blue"]
    capsys.readouterr()
    for script in ("05_generate.py", "06_pipeline_infer.py"):
        call(script, "--model_name_or_path", adapter, "--prompt", "sky", "--max_new_tokens", 9)
        assert capsys.readouterr().out.split() == ["what", "blue"]


def test_an_eos_that_the_tokenizer_alone_knows_is_made_known_to_what_generates(other_end, tmp_path):
    settings = read(other_end / "tokenizer_config.json")
    (other_end / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "z"}))
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "sky", "completion": "blue"}] * 4)
    train(other_end, data, tmp_path / "full", "--max_steps", 1, script="03_train_full.py")
    end = AutoTokenizer.from_pretrained(other_end).eos_token_id
    assert read(tmp_path / "full/model/config.json")["eos_token_id"] == end
    assert end in read(tmp_path / "full/model/generation_config.json")["eos_token_id"]


def test_an_end_inside_a_word_is_the_same_before_and_after_it_is_saved(other_end, tmp_path):
    data = write_both(tmp_path / "rows", [{"prompt": "az sky", "completion": "blue bz"}] * 4)
    metrics = train(other_end, data, tmp_path / "lora", "--eos_token", "z", "--max_steps", 2, *HELD_OUT)
    _, lora = evaluate(other_end, [tmp_path / "lora/adapter"], data, tmp_path / "report")
    assert (lora["loss"], lora["tokens"]) == (metrics["eval_loss"], metrics["eval_tokens"])


FORMS = {
    "prompt and completion": {"prompt": "sky", "completion": "blue"},
    "messages": {"messages": say("sky", "blue")},
    "text": {"text": "what sky what blue </s>"},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_template_holds_for_every_form_of_rows_and_is_saved(form, tiny_model, tmp_path, capsys):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    (tmp_path / "other.jinja").write_text(OTHER)
    data = write_rows(tmp_path / "rows.jsonl", [FORMS[form]] * 8)
    options = ("--chat_template_path", tmp_path / "other.jinja", "--num_train_epochs", 12)
    call("chain/audit_tokens.py", "--model_name_or_path", base, "--dataset_name", data, *options)
    assert "what sky" in capsys.readouterr().out
    train(base, data, tmp_path / "lora", *options)
    assert AutoTokenizer.from_pretrained(tmp_path / "lora/adapter").chat_template == OTHER
    asked = ("--model_name_or_path", tmp_path / "lora/adapter", "--prompt", "sky", "--max_new_tokens", 5)
    capsys.readouterr()
    call("05_generate.py", *asked)
    assert capsys.readouterr().out.split() == ["blue"]


def test_tokens_that_the_model_has_not_are_refused_before_the_training(tiny_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [FORMS["text"]])
    options = ("--model_name_or_path", tiny_model, "--dataset_name", rows)
    for script in ("chain/audit_tokens.py", "02_train_lora.py"):
        with pytest.raises(ValueError, match="'<end>'.* is not found in the vocabulary"):
            call(script, *options, "--eos_token", "<end>", "--output_dir", tmp_path / "out")
    with pytest.raises(SystemExit, match="is no .jinja file. Give one, such as the chat_template.jinja of a model."):
        call("chain/audit_tokens.py", *options, "--chat_template_path", tiny_model)


def test_token_type_ids_are_dropped(tiny_model, tmp_path, capsys):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    settings = read(base / "tokenizer_config.json")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"model_input_names": names}))
    assert "token_type_ids" in AutoTokenizer.from_pretrained(base)("a")
    rows = write_rows(tmp_path / "rows.jsonl", [FORMS["prompt and completion"]] * 4)
    train(base, rows, tmp_path / "lora", "--max_steps", 1)
    adapter = tmp_path / "lora/adapter"
    call(
        "04_merge_adapter.py", "--model_name_or_path", adapter, "--output_dir", tmp_path / "merged", "--prompts", "sky"
    )
    bare = shutil.copytree(adapter, tmp_path / "bare", ignore=shutil.ignore_patterns("*tokenizer*", "*.jinja"))
    call("04_merge_adapter.py", "--model_name_or_path", bare, "--output_dir", tmp_path / "other", "--prompts", "sky")
    for folder in (base, adapter, tmp_path / "merged/model"):
        for script in ("05_generate.py", "06_pipeline_infer.py"):
            call(script, "--model_name_or_path", folder, "--prompt", "sky", "--max_new_tokens", 2)
        assert folder == base or "token_type_ids" not in AutoTokenizer.from_pretrained(folder)("a")


def test_a_date_in_the_template_is_said_and_stops_nothing(tiny_model, tmp_path, capsys):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "chat_template.jinja").write_text(OTHER + "{{ strftime_now('%d') }}")
    data = write_both(tmp_path / "rows", [FORMS["messages"]] * 4)
    call("chain/audit_tokens.py", "--model_name_or_path", base, "--dataset_name", data)
    assert "writes today's date" in capsys.readouterr().out
    train(base, data, tmp_path / "lora", "--max_steps", 1, *HELD_OUT)
    evaluate(base, [tmp_path / "lora/adapter"], data, tmp_path / "report")
    assert "The chat template of lora writes the date" in (tmp_path / "report/evaluation.md").read_text()


# Forms of rows --------------------------------------------------------------------------------------------------------
READ = {
    '{"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]}': (
        "read as ShareGPT: conversations become messages",
        {"messages": say("q", system="s")},
    ),
    '{"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}': (
        "read as ShareGPT",
        {"messages": say("q", "a")},
    ),
    '{"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}': (
        "read as messages, with roles, texts and arguments as chat templates know them",
        {"messages": say("q", "a")},
    ),
    '{"messages": [{"role": "Human", "content": "q"}, {"role": "model", "content": "a"}], "parallel": true}': (
        "read as messages, with roles, texts and arguments as chat templates know them. Left out: parallel",
        {"messages": say("q", "a")},
    ),
    '{"messages": [{"role": "user", "content": [{"type": "text", "text": "q "}, {"type": "text", "text": "r"}]},'
    ' {"role": "assistant", "content": [{"type": "text", "text": "a"}]}], "system": "s"}': (
        "read as messages, system, with roles",
        {"messages": say("q r", "a", system="s")},
    ),
    '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": ['
    '{"function": {"name": "f", "arguments": "{\\"x\\": 1}"}},'
    '{"function": {"name": "g", "arguments": {"y": "z"}}}]}]}': (
        "read as messages, with",
        {
            "messages": [
                *say("q"),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"function": {"name": "f", "arguments": {"x": 1}}},
                        {"function": {"name": "g", "arguments": {"y": "z"}}},
                    ],
                },
            ]
        },
    ),
    '{"system": "s", "prompt": "q", "completion": "a", "input": "x"}': (
        "read as pairs: system, prompt and completion become prompt and completion. Left out: input",
        {"prompt": say("q", system="s"), "completion": [{"role": "assistant", "content": "a"}]},
    ),
    '{"messages": [{"role": "system", "content": "t"}, {"role": "user", "content": "q"}], "system": "s"}': (
        "",
        {"messages": say("q", system="t")},
    ),
    '{"messages": [{"from": "human", "value": "q", "role": null, "content": null},'
    ' {"from": null, "value": null, "role": "assistant", "content": "a"}]}': (
        "read as messages, with",
        {"messages": say("q", "a")},
    ),
    '{"conversations": ["x"], "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}': (
        "Left out: conversations",
        {"messages": say("q", "a")},
    ),
    json.dumps({"text": "q a"} | {f"c{number:02}": "x" for number in range(12)}): (
        "Left out: c00, c01, c02, c03, c04, c05, c06, c07, c08, and 3 more",
        {"text": "q a"},
    ),
    '{"text": "q a", "source": "x"}': ("Left out: source", {"text": "q a"}),
    '{"conversations": [{"from": "Human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s", "id": 1}': (
        "read as ShareGPT: conversations become messages. Left out: id",
        {"messages": say("q", "a", system="s")},
    ),
    '{"instruction": "q", "context": "c", "response": "a", "category": "x"}': (
        "read as pairs: instruction, context and response become prompt and completion. Left out: category",
        {"prompt": "q\n\nc", "completion": "a"},
    ),
    '{"instruction": "q", "input": "", "output": "a", "system": "s"}': (
        "read as alpaca: system, instruction, input and output become",
        {"prompt": say("q", system="s"), "completion": [{"role": "assistant", "content": "a"}]},
    ),
    '{"instruction": "q", "input": "i", "output": "a"}': (
        "read as alpaca: instruction, input and output become prompt and completion",
        {"prompt": "q\n\ni", "completion": "a"},
    ),
    '{"instruction": "q", "input": "", "output": "a", "text": "q a"}': (
        "read as alpaca: instruction, input and output become prompt and completion. Left out: text",
        {"prompt": "q", "completion": "a"},
    ),
    '{"question": "q", "answer": 4}': ("read as pairs: question and answer become", {"prompt": "q", "completion": "4"}),
    '{"prompt": "q", "response": "a"}': (
        "read as pairs: prompt and response become",
        {"prompt": "q", "completion": "a"},
    ),
    '{"instruction": "q", "response": "a"}': (
        "read as pairs: instruction and response become",
        {"prompt": "q", "completion": "a"},
    ),
    '{"prompt": "q", "completion": "a"}': ("", {"prompt": "q", "completion": "a"}),
    '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}': (
        "",
        {"messages": say("q", "a")},
    ),
}


@pytest.mark.parametrize("row", READ)
def test_common_forms_of_rows_are_read_and_said(row, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(f"{row}\n" * 3)
    said, expected = READ[row]
    call("chain/read_rows.py", "--dataset_name", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out")
    assert said in (out := capsys.readouterr().out) and (said or "read as" not in out)
    assert [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()] == [expected] * 3


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_arguments_of_other_tools_leave_no_keys_behind(kind, tmp_path):
    """As a struct, which rows of the same keys are read as, each call would get the keys of all."""
    given = [{"city": "Oslo"}, {"zone": "CET", "n": 1}, {}, {"city": 7}] * 300 + [{"late": [1]}]
    rows = []
    for arguments in given:
        calls = [{"type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}]
        turns = [(None, "user", "q"), (calls, "assistant", ""), (None, "assistant", "a")]
        rows += [{"messages": [{"role": role, "content": words, "tool_calls": call} for call, role, words in turns]}]
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    else:
        write_rows(tmp_path / "rows.jsonl", rows)
    call("chain/read_rows.py", "--dataset_name", tmp_path / f"rows.{kind}", "--output_dir", tmp_path / "out")
    read = [json.loads(line)["messages"] for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert [turns[1]["tool_calls"][0]["function"]["arguments"] for turns in read] == given
    assert load_dataset(str(tmp_path / "out"), split="train")[1]["messages"] == read[1]


@pytest.mark.parametrize("cells", [["007", "1"], ["1.10", "2"], ["true", "FALSE"], ["2024-01-01"] * 2, ["None", "NA"]])
def test_cells_of_a_csv_file_are_the_words_that_stand_there(cells, tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\n" + "".join(f"q,{cell}\n" for cell in cells))
    call("chain/read_rows.py", "--dataset_name", tmp_path / "rows.csv", "--output_dir", tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == cells


@pytest.mark.parametrize("answer", ["2.5", "true", '"2024-01-01"', '["red"]', '{"text": "red"}'])
def test_an_answer_that_is_no_text_is_refused_and_not_made_one(answer, tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text(f'{{"question": "q", "answer": {answer}}}\n' * 2)
    command = ["--dataset_name", "rows.jsonl", "--output_dir", "out"]
    said = "in answer is no text. Put it in quotes, or a word beside it."
    if not answer.startswith('"'):  # a date is a text there
        check_refusal("chain/read_rows.py", command, said, tmp_path, monkeypatch, capsys)
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "q", "completion": {answer}}}\n' * 2)
    if not answer.startswith("["):  # which may be messages
        for script in ("02_train_lora.py", "03_train_full.py"):
            command = ["--model_name_or_path", str(tiny_model), "--dataset_name", "rows.jsonl", "--output_dir", "out"]
            said = ": no words in row 1 as text, messages, or prompt and completion."
            check_refusal(script, command, said, tmp_path, monkeypatch, capsys)


OTHERS = {
    '{"prompt": "q", "chosen": "a", "rejected": "b"}': "rows of preferences, as DPO learns from. Take what",
    '{"prompt": "q", "completion": "a", "label": true}': "rows of answers marked good or bad, as KTO learns from",
    '{"messages": [{"role": "user", "content": "q"}], "images": ["x"]}': "rows with images, and text alone is",
}


@pytest.mark.parametrize("row", OTHERS)
@pytest.mark.parametrize("script", ["chain/read_rows.py", "chain/audit_tokens.py"])
def test_rows_for_something_else_are_named_for_what_they_are(script, row, tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text(f"{row}\n")
    model = ("--model_name_or_path", str(tiny_model)) if "audit" in script else ("--output_dir", "out")
    check_refusal(script, [*model, "--dataset_name", "rows.jsonl"], OTHERS[row], tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("names", [("train.0", "train.1"), ("train", "train_extra")])
def test_all_files_of_a_split_are_read(names, tmp_path, monkeypatch):
    for number, name in enumerate(names):
        write_rows(
            (tmp_path / "in").mkdir(exist_ok=True) or tmp_path / f"in/{name}.jsonl", [{"text": f"a {number}"}] * 2
        )
    call("chain/read_rows.py", "--dataset_name", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert len((tmp_path / "out/train.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev", "eval", "test"])
def test_held_out_rows_are_found_by_the_usual_names(name, tmp_path):
    (tmp_path / "in").mkdir()
    for part, count in (("train", 3), (name, 2)):
        write_rows(tmp_path / f"in/{part}.jsonl", [{"text": "a"}] * count)
    call("chain/read_rows.py", "--dataset_name", tmp_path / "in", "--output_dir", tmp_path / "out")
    assert len((tmp_path / "out/validation.jsonl").read_text().splitlines()) == 2
