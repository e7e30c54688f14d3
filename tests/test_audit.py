"""The token audit: what is learned, with a tokenizer that adds BOS, and what is refused before a training begins."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, load, run, write_rows
from helpers import call, read

GUANACO = ROOT.parent / "shared/data/guanaco-llama2-1k.parquet"
TUTORIAL_ROWS = [
    {"text": "<s>[INST] what color is the sky [/INST] blue </s>"},
    {"text": "<s>[INST] a [/INST] red </s><s>[INST] b [/INST] red </s>"},
]
PAIR = {"prompt": [{"role": "user", "content": "a b c"}], "completion": [{"role": "assistant", "content": "red"}]}
EOS = "{{ ' ' + eos_token }}"
MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "red"}]}


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def audit(model, tmp_path, monkeypatch, capsys):
    """Audits rows with options of a training; returns what is said, and the report, None where something is wrong."""

    def run_audit(rows: list, *args, held_out: list | None = None):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "rows").mkdir()
        write_rows(tmp_path / "rows/train.jsonl", rows)
        if held_out:
            write_rows(tmp_path / "rows/validation.jsonl", held_out)
            args = ("--dataset_test_split", "validation", *args)
        command = ("--model_name_or_path", "model", "--dataset_name", "rows", "--output", "audit.json", *args)
        try:
            call("chain/audit_tokens.py", *command)
            return capsys.readouterr().out, read(tmp_path / "audit.json")
        except SystemExit as stop:
            assert not (tmp_path / "audit.json").exists()
            assert stop.code.startswith("error: ") and "\n" not in stop.code
            return stop.code, None

    return run_audit


def change(file, **settings) -> None:
    """Changes keys of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


# What is learned ------------------------------------------------------------------------------------------------------
def test_rows_that_begin_with_bos_keep_one_and_the_last_eos_is_learned(audit):
    said, report = audit(TUTORIAL_ROWS * 4)
    assert report["rows"] == 8 and report["tokenizer_adds_bos"] is True
    # 10 tokens, BOS and EOS among them, and 12: with a doubled BOS it would be one more each
    assert report["tokens"] == 4 * (10 + 12) == report["tokens_with_loss"]
    assert "[[<s> [INST] a [/INST] red </s> <s> [INST] b [/INST] red </s>]]" in said


def test_only_completions_carry_loss(audit):
    said, report = audit([PAIR] * 3)
    assert (report["tokens"], report["tokens_with_loss"]) == (3 * 8, 3 * 2)
    assert "<s> [INST] a b c [/INST][[red </s>]]" in said


def test_texts_of_prompt_and_completion_are_taken_as_a_chat(audit):
    said, report = audit([{"prompt": "a b c", "completion": "red"}])
    assert (report["tokens"], report["tokens_with_loss"]) == (8, 2)


def test_cut_rows_and_padding_are_counted(audit):
    rows = [{"text": "a"}] * 2 + [{"text": "a b c d e f"}] * 2
    _, report = audit(rows, "--max_length", 5, "--train_sampling_strategy", "sequential")
    assert report["rows_cut_by_max_length"] == 2 and report["longest_row"] == 8
    assert report["padding_share"] == pytest.approx(4 / 20)  # 3 + 3 + 5 + 5 tokens in a batch of 4 x 5
    assert (report["max_length"], report["batch_size"]) == (5, 4)


def test_options_of_the_training_are_taken_and_need_no_accelerator(audit, tmp_path):
    (tmp_path / "recipe.yaml").write_text("lora_r: 4\nper_device_train_batch_size: 2\n")
    options = "--bf16 true --padding_free true --packing true --token_metrics false --lora_r 8 --eval_strategy steps"
    _, report = audit([{"text": "a b c"}] * 4, "--config", "recipe.yaml", *options.split(), held_out=[{"text": "a"}])
    assert report["tokens"] == 4 * 5 and report["batch_size"] == 2


def test_the_tutorials_own_rows(tiny_model, tmp_path):
    if not GUANACO.exists():
        pytest.skip(f"the tutorial's data set is not at {GUANACO}")
    from transformers import AutoTokenizer

    script = load("chain/audit_tokens.py")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    training = load("02_train_lora.py")
    config = training.Config(str(tmp_path), max_length=None, bf16=False, use_cpu=True, report_to=[])
    rows = training.load_rows(str(GUANACO), "train", tokenizer, config)
    assert len(rows) == 1000 and rows[0]["text"].startswith("[INST]")  # its BOS is the tokenizer's now
    trainer = script.tokenize_rows(rows, None, tokenizer, config)
    config.max_length = 1024
    counts, problems = script.look_at_tokens(trainer.train_dataset, tokenizer, config, {tokenizer.eos_token_id})
    assert (
        counts["rows"] == 1000
        and counts["tokenizer_adds_bos"]
        and script.look_at_rows(rows, tokenizer, {"</s>"}, False) == {}
    )
    assert all("--max_length 1024" in what for what in problems)
    assert counts["rows_that_keep_their_end"] == 1000 - counts["rows_cut_by_max_length"]


# What is refused ------------------------------------------------------------------------------------------------------
def test_two_bos_stop_the_chain(audit, model):
    template = model / "chat_template.jinja"
    template.write_text("{{ bos_token + ' ' + bos_token + ' ' }}" + template.read_text())
    said, report = audit([MESSAGES])
    assert (
        report is None
        and "1 of 1 rows have <s> twice, with nothing between: take one out of the rows, the chat" in said
    )


def test_an_eos_without_loss_stops_the_chain(audit, model):
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace(" + eos_token", ""))
    said, report = audit([MESSAGES])
    assert report is None and "no </s> in the labels" in said


def test_prompts_that_fill_max_length_stop_the_chain(audit):
    said, report = audit([PAIR], "--max_length", 4)
    assert report is None and "1 of 1 rows have no token to learn from within --max_length 4" in said


def test_held_out_rows_without_a_token_to_measure_stop_the_chain(audit):
    long = {"prompt": [{"role": "user", "content": "a " * 20}], "completion": PAIR["completion"]}
    said, report = audit([PAIR], "--max_length", 10, held_out=[long] * 2)
    assert report is None and "no held-out row has a token with loss within --max_length 10. Give a larger one." in said


def test_one_such_row_among_others_does_not(audit):
    long = {"prompt": [{"role": "user", "content": "a " * 20}], "completion": PAIR["completion"]}
    _, report = audit([PAIR], "--max_length", 10, held_out=[long, PAIR])
    assert report["rows"] == 1


def test_a_file_has_no_rows_to_hold_out(audit, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [PAIR])
    said, _ = audit([PAIR], "--dataset_name", file, "--dataset_test_split", "validation")
    assert "no data set at" in said and "Unknown split \"validation\". Should be one of ['train']" in said


@pytest.mark.parametrize(
    ("file", "settings", "said"),
    [
        ("tokenizer_config.json", {"eos_token": None}, "the tokenizer of 'model' has no EOS token"),
        ("config.json", {"vocab_size": 4}, "the tokenizer of 'model' has tokens that the model has no embedding of"),
        ("config.json", {"is_causal": False}, "'model' looks both ways"),
        ("config.json", {"use_bidirectional_attention": True}, "'model' looks both ways"),
    ],
)
def test_a_model_that_would_learn_something_else_is_refused(file, settings, said, audit, model):
    change(model / file, **settings)
    assert said in audit([PAIR], held_out=[PAIR])[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size is 0. Give a number above 0."),
        ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps"),
        ("--max_length -5", "--max_length is -5"),
        ("--learning_rate -1", "--learning_rate is -1.0"),
        ("--learning_rate nan", "--learning_rate is nan"),
        ("--num_train_epochs 0", "--num_train_epochs"),
        ("--save_steps 0", "--save_steps"),
        ("--weight_decay -1", "--weight_decay is -1.0: weights would grow. Give 0 or more."),
        ("--save_only_model true", "--save_only_model is refused: nothing could go on"),
        ("--ignore_data_skip true", "--ignore_data_skip is refused"),
        ("--push_to_hub true", "--push_to_hub is refused"),
        ("--hub_token hf_0123456789abcdefghij", "--hub_token is refused"),
        ("--resume_from_checkpoint checkpoint-1", "--resume_from_checkpoint is refused"),
        ("--no_such 1", "['--no_such', '1']. See --help."),
        ("--lerning_rate 1", "'--lerning_rate'"),
        ("--dataset_test train", "'--dataset_test'"),
        ("--learning_rate fast", "invalid float value: 'fast'. See --help."),
        ("--optim sgdd", "sgdd"),
        ("--lr_scheduler_type flat", "flat"),
        ("--config", "--config has no file after it"),
        ("--config no.yaml", "no.yaml"),
        ("--config rows", "rows"),
        ("--config broken.yaml", "broken.yaml"),
        ("--config list.yaml", "list.yaml must contain a YAML mapping"),
        ("--config unknown.yaml", "Unknown arguments from config file: ['--lora_rr', '2']"),
        ("--config word.yaml", "learning_rate"),
        ("--config null.yaml", "--num_train_epochs"),
    ],
)
def test_an_option_that_would_fail_later_is_refused(options, said, audit, tmp_path):
    recipes = {"broken": "lora_r: [2\n", "list": "- 1\n", "unknown": "lora_rr: 2\n", "word": "learning_rate: fast\n"}
    for name, text in {**recipes, "null": "num_train_epochs:\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    message, report = audit([PAIR], *options.split())
    assert report is None and said in message and "0123456789" not in message


def test_max_length_may_be_any(audit, tmp_path):
    (tmp_path / "recipe.yaml").write_text("max_length: null\n")
    _, report = audit([PAIR], "--config", "recipe.yaml")
    assert (report["max_length"], report["longest_row"], report["tokens"]) == (None, 8, 8)


# Rows as they are trained ---------------------------------------------------------------------------------------------
LLAMA = [{"prompt": "a", "completion": "red"}] * 20
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
WRONG = {
    "special tokens in an answer": (
        {"prompt": "a", "completion": "red </s>"},
        "have marks of a chat format in a message",
    ),
    "the template's own words": (
        {"prompt": "[INST] a [/INST]", "completion": "red"},
        "have marks of a chat format in a message",
    ),
    "BOS in a message": ({"prompt": "<s> a", "completion": "red"}, "have marks of a chat format in a message"),
    "EOS twice": ({"prompt": "a", "completion": "red </s>"}, "have </s> twice"),
    "an empty answer": ({"prompt": "a", "completion": "  "}, "have an empty question or answer"),
    "an empty question": ({"prompt": "", "completion": "red"}, "have an empty question or answer"),
    "a prompt that fills the row": ({"prompt": "a " * 60, "completion": "red"}, "have no token to learn from within"),
    "an answer that is cut": (
        {"prompt": "a", "completion": "red " * 60},
        "lose their end and its EOS to --max_length 30",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_many_rows_stops_the_chain_and_with_few_it_is_said(what, audit):
    row, said = WRONG[what]
    message, report = audit([row, *LLAMA], "--max_length", 30)
    assert report is not None and f"warning: 1 of 21 rows {said}" in message and "(first: row 1)" in message


@pytest.mark.parametrize("what", WRONG)
def test_it_stops_the_chain_where_it_is_wrong_with_many(what, audit):
    row, said = WRONG[what]
    message, report = audit([row] * 8, "--max_length", 30)
    assert report is None and "8 of 8 rows" in message and said in message


def test_a_cut_is_told_with_what_is_lost_and_what_would_be_enough(audit):
    long = [{"prompt": "a", "completion": "b " * 30}, {"prompt": "a", "completion": "b " * 10}] * 9
    longest = {"prompt": "a", "completion": "b " * 60}  # which is the one in a hundred
    message, report = audit([*long, longest, *LLAMA, *LLAMA, *LLAMA, *LLAMA, *LLAMA], "--max_length", 12)
    assert (
        "warning: 19 of 119 rows lose their end and its EOS to --max_length 12: --max_length 35 keeps 99 %" in message
    )
    # beside the words of an answer 5 tokens: BOS, [INST], a, [/INST], EOS
    whole = 9 * (30 + 5) + 9 * (10 + 5) + 60 + 5 + 100 * 6
    assert report["share_of_tokens_cut"] == pytest.approx(1 - (19 * 12 + 100 * 6) / whole)
    assert (report["max_length_for_99_percent"], report["rows_that_keep_their_end"]) == (35, 100)
    assert report["tokens"] == 19 * 12 + 100 * 6


@pytest.mark.parametrize(("strategy", "kept"), [("bfd", 12), ("bfd_split", 35)])
def test_a_row_is_cut_as_its_packing_cuts_it(strategy, kept, audit):
    rows = [{"prompt": "a", "completion": "b " * 30}, *LLAMA]
    options = ("--max_length", 12, "--packing", "true", "--packing_strategy", strategy)
    assert audit(rows, *options)[1]["tokens"] == kept + 20 * 6


def test_the_end_of_a_row_is_kept_where_its_beginning_is_cut(audit):
    rows = [{"prompt": "a", "completion": "b " * 30}] * 4
    _, report = audit(rows, "--max_length", 12, "--truncation_mode", "keep_end")
    assert report["rows_that_keep_their_end"] == 4 and report["tokens"] == 4 * 12


def test_a_model_that_stops_at_more_than_its_eos_may_end_with_any_of_them(audit, model):
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace(" + eos_token", " + 'z'"))
    said, report = audit([MESSAGES])
    assert report is None and "have no </s> in the labels, and the model would not learn to stop" in said
    change(model / "generation_config.json", eos_token_id=[2, 24])  # 24 is z
    shutil.rmtree(model.parent / "rows")
    assert audit([MESSAGES])[1] is not None


def test_another_end_is_named_with_the_option_that_makes_it_the_eos(audit, model):
    settings = json.loads((model / "tokenizer_config.json").read_text())
    change(model / "tokenizer_config.json", **settings | {"additional_special_tokens": ["z"]})
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace(" + eos_token", " + 'z'"))
    said, _ = audit([MESSAGES] * 2)
    assert "or add --eos_token 'z', which stands there" in said and "without an end" not in said
    shutil.rmtree(model.parent / "rows")
    assert audit([MESSAGES] * 2, "--eos_token", "z")[1] is not None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"messages": [MESSAGES["messages"][0]]},
            "1 of 1 rows have no answer of an assistant: add it, or leave them out",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "", "tool_calls": [CALL]},
                ]
            },
            "1 of 1 rows have tool calls, which the chat template leaves out",
        ),
        ({**MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]}, "1 of 1 rows have tools, which the"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]},
            "row 1 holds image, and text alone is trained here",
        ),
    ],
)
def test_rows_that_teach_no_answer_are_named(row, said, audit):
    message, report = audit([row])
    assert report is None and said in message


def test_a_call_that_the_template_writes_is_no_fault(audit, model):
    template = model / "chat_template.jinja"
    call = "{{ message['content'] ~ (message['tool_calls'] or '') }}"
    template.write_text(template.read_text().replace("{{ ' ' + message['content'] + ' ' + eos_token }}", call + EOS))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert audit([{"messages": turns}])[1] is not None


def test_a_row_that_the_template_does_not_take_is_named_with_its_calls(audit):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    said, report = audit([MESSAGES, {"messages": turns}])
    assert (
        report is None and "row 2 (user, assistant): the chat template does not take it, and its tool calls: " in said
    )
    assert 'Give it "content": "" instead of null' in said


def test_answers_that_the_template_does_not_mark_are_not_learned_alone(audit, model):
    said, report = audit([MESSAGES], "--assistant_only_loss", "true")
    assert (
        report is None and "Give one that does, --chat_template_path FILE (docs/tutorial.md has one for ChatML)" in said
    )
    text = (ROOT / "docs/tutorial.md").read_text().split("for models with ChatML:\n\n")[1].split("\n\n")[0]
    (model.parent / "chatml.jinja").write_text("\n".join(line[4:] for line in text.splitlines()))
    shutil.rmtree(model.parent / "rows")
    options = ("--assistant_only_loss", "true", "--chat_template_path", "chatml.jinja", "--eos_token", "</s>")
    said, report = audit([MESSAGES], *options)  # whose tokenizer has no <|im_end|>
    assert report is None and "in the labels" in said


def ask(*words: str) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": word} for number, word in enumerate(words)]


def test_what_the_template_leaves_out_of_a_conversation_is_named(audit, model):
    template = (model / "chat_template.jinja").read_text()
    write = "{{ ' ' + message['content'] + ' ' + eos_token }}"
    forget = template.replace(write, write.replace("message['content']", "message['content'].split('</think>')[-1]"))
    thinking = {"messages": ask("a", "<think>b c</think>red")}
    for text, row, what in (
        (forget, thinking, "reasoning"),
        (template, {"messages": [*ask("a"), {**ask("a", "red")[1], "reasoning_content": "b"}]}, "reasoning_content"),
        (template.replace("{% else %}", "{% elif message['role'] == 'assistant' %}"),
         {"messages": [{"role": "system", "content": "x"}, *ask("a", "red")]}, "messages of the system"),
    ):  # fmt: skip
        (model / "chat_template.jinja").write_text(text)
        said, report = audit([row] * 3)
        assert report is None and f"3 of 3 rows have {what}, which the chat template leaves out" in said
        shutil.rmtree(model.parent / "rows")
    (model / "chat_template.jinja").write_text(template)
    assert audit([thinking])[1] is not None
    shutil.rmtree(model.parent / "rows")
    (model / "chat_template.jinja").write_text(forget)
    earlier = {"messages": [*thinking["messages"], *ask("b", "blue")]}  # which many leave out on purpose
    assert audit([earlier])[1] is not None


def test_an_answer_without_an_end_is_seen_though_the_question_has_one(audit, model):
    text = "{% for m in messages %}{{ (bos_token if loop.first else '') + ' ' + m['content'] }}"
    text += "{% if m['role'] == 'user' %}{{ ' ' + eos_token + ' ' }}{% endif %}{% endfor %}"
    (model / "chat_template.jinja").write_text(text)
    said, report = audit([MESSAGES] * 2)
    assert report is None and "2 of 2 rows are written without an end after the last answer" in said


def test_calls_without_words_and_tools_that_are_none_are_no_fault(audit, model):
    call = "{{ (message['content'] or '') ~ (message['tool_calls'] or '') }}"
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ ' ' + message['content'] + ' ' + eos_token }}", call + EOS))
    turns = [*ask("a"), {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    assert audit([{"messages": turns, "tools": "[]"}])[1] is not None


ONLY_SAID = {
    "a question at the end": (
        {"messages": ask("a", "red", "b")},
        "end with a question, which is learned like an answer",
    ),
    "an end that is none here": ({"text": "a red <|im_end|>"}, "hold the end of another model's turns"),
}


@pytest.mark.parametrize("what", ONLY_SAID)
def test_what_may_be_meant_is_only_said(what, audit):
    row, said = ONLY_SAID[what]
    message, report = audit([row] * 5)
    assert report is not None and f"warning: 5 of 5 rows {said}" in message


def test_a_bos_that_the_template_does_not_write_is_only_said(audit, model):
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("bos_token + ", ""))
    message, report = audit([MESSAGES] * 2)
    assert report is not None and "warning: 2 of 2 rows lack the BOS that the tokenizer adds to texts" in message


def test_a_prompt_that_is_asked_otherwise_than_it_is_learned_is_said(audit, model):
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if add_generation_prompt %}{{ ' what' }}{% endif %}")
    message, report = audit([PAIR] * 3)
    assert report is not None and "warning: 3 of 3 rows are asked with other tokens than those before" in message


def test_the_prompt_of_a_conversation_is_held_against_what_is_asked_too(audit, model):
    template = model / "chat_template.jinja"
    text = template.read_text()
    for more in ("{% if add_generation_prompt %}{{ ' what' }}{% endif %}", None):
        answer = "{{ ' what ' + message['content'] + ' ' + eos_token }}"  # what: as if the name of a role
        changed = text.replace("{{ ' ' + message['content'] + ' ' + eos_token }}", answer)
        template.write_text(text + more if more else changed)
        message, report = audit([{"messages": ask("a", "red", "b", "blue")}] * 3)
        assert report is not None and "warning: 3 of 3 rows are asked with other tokens than those before" in message
        shutil.rmtree(model.parent / "rows")
        (model.parent / "audit.json").unlink()
    template.write_text(changed + "{% if add_generation_prompt %}{{ ' what' }}{% endif %}")
    assert "asked with other tokens" not in audit([{"messages": ask("a", "red")}] * 3)[0]


def write_template(model, question: str, answer: str) -> None:
    """A template that writes messages with these expressions for their words."""
    text = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %} [INST] QUESTION [/INST]{% else %} ANSWER "
    )
    text += "{{ eos_token }}{% endif %}{% endfor %}"
    (model / "chat_template.jinja").write_text(text.replace("QUESTION", question).replace("ANSWER", answer))


PARTS = {
    "each": ("{% for p in m['content'] %}{{ p['text'] }}{% endfor %}", False),
    "as Python": ("{{ m['content'] }}", True),
    "nothing": ("{{ m['content'] if m['content'] is string else 'x' }}", True),
}


@pytest.mark.parametrize("how", PARTS)
@pytest.mark.parametrize("of", ["question", "answer"])
def test_content_in_parts_that_the_template_does_not_write_stops_the_chain(how, of, audit, model):
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in ask("a", "red")]
    write, wrong = PARTS[how]
    write_template(model, **dict.fromkeys(("question", "answer"), PARTS["each"][0]) | {of: write})
    said, report = audit([{"messages": parts}] * 3)
    assert (report is None) is wrong
    assert ("3 of 3 rows have content in parts, which the chat template does not write as text" in said) is wrong


def test_content_in_parts_is_looked_at_beside_content_that_is_text(audit, model):
    write_template(model, "{{ m['content'] }}", "{{ m['content'] }}")
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in ask("a", "red")]
    said, report = audit([MESSAGES] * 3 + [{"messages": parts}] * 2)
    assert report is None and "2 of 5 rows have content in parts" in said


def test_arguments_that_the_template_encodes_once_more_stop_the_chain(audit, model):
    template = model / "chat_template.jinja"
    written = (
        "{{ message['content'] ~ (message['tool_calls'][0]['function'] | tojson if message['tool_calls'] else '') }}"
    )
    template.write_text(template.read_text().replace("{{ ' ' + message['content'] + ' ' + eos_token }}", written + EOS))
    within = {"a": json.dumps({"b": 1})}  # an object, one of whose values is JSON
    for arguments, wrong in ((json.dumps({"a": 1}), True), ({"a": 1}, False), (within, False)):
        call = {**CALL, "function": {**CALL["function"], "arguments": arguments}}
        turns = [*ask("a"), {"role": "assistant", "content": "", "tool_calls": [call]}]
        said, report = audit([{"messages": turns}] * 2)
        assert (report is None) is wrong and ("arguments are JSON in a text" in said) is wrong
        shutil.rmtree(model.parent / "rows")
    (model.parent / "audit.json").unlink()
    good, bad = ({"messages": [*turns[:1], {**turns[1], "tool_calls": [{"type": "function", "function": {
        "name": "f", "arguments": arguments}}]}]} for arguments in ({"a": 1}, '{"a": 1}'))  # fmt: skip
    said, report = audit([good] * 3 + [bad] * 2)
    assert report is None and "2 of 5 rows have tool calls whose arguments are JSON in a text" in said


def test_what_looks_like_a_format_inside_of_words_is_no_fault(audit):
    prose = ask("what is <|im_start|>", "### Instruction: <|im_end|> is red")
    said, report = audit([{"messages": prose}] * 3)
    assert report is not None and "warning" not in said
    shutil.rmtree("rows")
    Path("audit.json").unlink()
    said, report = audit([{"messages": ask("### Instruction:\n a", "red")}] * 3)
    assert report is None and "3 of 3 rows have marks of a chat format" in said


def test_another_end_of_the_model_inside_an_answer_stops_the_chain(audit, model):
    change(model / "generation_config.json", eos_token_id=[2, 24])  # 24 is z
    said, report = audit([{"messages": ask("a", "red z b")}] * 2)
    assert report is None and "2 of 2 rows have marks of a chat format" in said


@pytest.mark.parametrize("writes", [True, False])
def test_roles_that_no_template_knows_are_rows_without_an_answer(writes, audit, model):
    if not writes:
        text = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
        (model / "chat_template.jinja").write_text(text)
    turns = [{"role": "human", "content": "a"}, {"role": "gpt", "content": "red"}]
    said, report = audit([{"messages": turns}])
    assert report is None and "1 of 1 rows have no answer of an assistant" in said


def test_content_that_is_no_text_is_named(audit):
    turns = [{"role": "user", "content": "2024-01-01"}, {"role": "assistant", "content": "2024-01-01"}]
    said, report = audit([{"messages": turns}] * 2)
    assert report is None and "is no text. Put it in quotes, or a word beside it" in said


def test_held_out_rows_are_looked_at_too(audit, model):
    wrong = [{"prompt": "<s> a", "completion": "red"}, {"prompt": "a " * 60, "completion": "b"}, *LLAMA[:2]]
    said, report = audit(LLAMA, "--max_length", 30, held_out=wrong)
    assert report is not None
    assert "warning: 1 of 4 held-out rows have marks of a chat format" in said and "(first: held-out row 1)" in said
    assert "warning: 1 of 4 held-out rows have no token to learn from within --max_length 30" in said
    shutil.rmtree(model.parent / "rows")
    (model.parent / "audit.json").unlink()
    template = model / "chat_template.jinja"
    template.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + template.read_text()
    )
    said, report = audit(
        [MESSAGES], held_out=[MESSAGES, {"messages": [{"role": "system", "content": "x"}, *ask("a", "b")]}]
    )
    assert (
        report is None and "held-out row 2 (system, user, assistant): the chat template does not take it: no." in said
    )


def test_a_held_out_row_that_is_none_is_named_as_one(audit, model):
    write_template(model, PARTS["each"][0], PARTS["each"][0])
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in ask("a", "red")]
    image = [{"role": "user", "content": [{"type": "image", "text": ""}]}, parts[1]]
    said, report = audit([{"messages": parts}], held_out=[{"messages": image}])
    assert report is None and "held-out row 1 holds image, and text alone is trained here" in said


def test_no_more_places_are_advised_than_the_model_has(audit, model):
    change(model / "config.json", max_position_embeddings=20)
    rows = [{"prompt": "a", "completion": "b " * 30}] * 9 + [{"prompt": "a", "completion": "b"}] * 9
    said, report = audit(rows, "--max_length", 12)
    assert report is not None and "to --max_length 12: the model has places for 20: make them shorter" in said


def test_options_that_would_be_ignored_are_refused(audit, tmp_path):
    said, report = audit([MESSAGES], "--completion_only_loss", "true")
    assert report is None and "--completion_only_loss, and the rows have no prompt." in said
    shutil.rmtree(tmp_path / "rows")
    said, report = audit([MESSAGES], "--model_revision", "v1")
    assert report is None and "is a folder. Give it to make download" in said
    shutil.rmtree(tmp_path / "rows")
    said, report = audit([MESSAGES], "--dataset_config", "b")
    assert report is None and "--dataset_config is refused: other rows would be learned" in said


def test_long_texts_are_cut_and_it_is_said_how_not_to(audit):
    message, report = audit([{"text": "a b c d e f g h x y"}] * 4, "--max_length", 6)
    assert report["rows_that_keep_their_end"] == 0 and "--packing_strategy bfd_split learns all parts" in message


def test_a_text_that_ends_with_eos_and_a_blank_gets_another_one_and_that_is_said(audit):
    said, report = audit([{"text": "a red </s> "}] * 2)
    assert (
        report is None and "2 of 2 rows have </s> twice, with nothing between" in said and "no blank after it" in said
    )


def test_a_token_that_is_bos_and_eos_may_stand_twice_between_turns_but_not_at_the_end(audit, model):
    change(model / "tokenizer_config.json", bos_token="</s>")
    assert audit([{"text": "</s> a red </s></s> b blue </s>"}] * 2)[1] is not None
    shutil.rmtree(model.parent / "rows")
    (model.parent / "audit.json").unlink()
    said, report = audit([{"text": "</s> a red </s></s> b blue </s> "}] * 2)
    assert report is None and "2 of 2 rows have </s> twice" in said


def test_rows_longer_than_the_model_has_places_are_cut_and_without_a_cut_refused(audit, model, tmp_path):
    change(model / "config.json", max_position_embeddings=8)
    said, report = audit([{"text": "a b c d e f g h x y"}] * 4)
    assert "note: 'model' has places for 8 tokens: --max_length is 8, not 1024." in said
    assert (report["max_length"], report["tokens"]) == (8, 32)
    assert (tmp_path / "audit.options").read_text() == "--max_length 8\n"
    (tmp_path / "audit.json").unlink()
    shutil.rmtree(model.parent / "rows")
    (tmp_path / "recipe.yaml").write_text("max_length: null\n")
    said, report = audit([{"text": "a b c d e f g h x y"}] * 4, "--config", "recipe.yaml")
    assert report is None and "a row has 12 tokens, and 'model' places for 8. Give --max_length 8" in said


def test_held_out_rows_are_cut_as_the_training_cuts(audit):
    long = {"prompt": "a " * 40, "completion": "red"}
    options = ("--max_length", 20, "--truncation_mode", "keep_end")
    assert audit([long] * 3, *options, held_out=[long])[1] is not None


def test_a_row_without_an_answer_is_named_where_answers_alone_are_learned(audit):
    said, report = audit([MESSAGES] * 9 + [{"messages": ask("a")}], "--assistant_only_loss", "true")
    assert report is None and "row 10 has no answer of an assistant, which alone is learned" in said


def test_messages_for_a_tokenizer_without_a_template_are_answered_with_the_option(audit, model):
    (model / "chat_template.jinja").unlink()
    said, report = audit([MESSAGES])
    assert report is None and "row 1 has messages, and the tokenizer no chat template. Give one, --chat_temp" in said
    assert "text, or prompt and completion as texts. Such a model is asked with --raw." in said


def test_padding_with_a_token_that_the_model_has_not_is_refused(audit, model):
    change(model / "tokenizer_config.json", pad_token="<pad>")
    said, report = audit([MESSAGES])
    assert report is None and "pads with a token that the model has no embedding of. Add: --pad_token '</s>'" in said
    shutil.rmtree(model.parent / "rows")
    assert audit([MESSAGES], "--pad_token", "</s>")[1] is not None


# As a step ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{{ raise_exception('a system message comes first') }}", "a system message comes first"),
        ("{% for x", "template"),
    ],
)
def test_what_the_template_says_of_the_rows_is_explained(content, said, model, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [MESSAGES])
    (model / "chat_template.jinja").write_text(content)
    options = ("--model_name_or_path", "model", "--dataset_name", "rows.jsonl")
    script = ROOT / "scripts/chain/audit_tokens.py"
    result = run("chain/run_step.py", "--reads", "model", "--", script, *options, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert said in result.stderr[result.stderr.index("error: ") :]
    assert "row 1 (user, assistant): the chat template does not take it" in result.stderr
