"""read_rows.py and find_rows.py: what people have, in files, folders and repositories, becomes rows of training."""

import bz2
import gzip
import hashlib
import io
import json

import datasets
import pyarrow
import pytest
from conftest import check_refusal, load, write_rows
from helpers import OPTIONS, call, read, read_rows
from transformers import AutoTokenizer

TEXT = [{"text": f"row {number}"} for number in range(3)]
PAIR = {"prompt": "q", "completion": "a"}


@pytest.fixture
def fetch(tmp_path, capsys):
    """Reads a data set into out/; returns what is said, and the rows to train on and held out."""

    def fetch(name, *args) -> tuple[str, list, list]:
        call("chain/read_rows.py", "--dataset_name", tmp_path / name, "--output_dir", tmp_path / "out", *args)
        files = [tmp_path / f"out/{split}.jsonl" for split in ("train", "validation")]
        return capsys.readouterr().out, *(read_rows(file) if file.exists() else [] for file in files)

    return fetch


@pytest.fixture
def refuse(tmp_path, monkeypatch, capsys):
    """Asserts that a data set is refused, with some words, in a line."""

    def refuse(name, said: str, *args) -> None:
        command = ["--dataset_name", str(name), "--output_dir", "out", *args]
        check_refusal("chain/read_rows.py", command, said, tmp_path, monkeypatch, capsys)

    return refuse


def write(folder, files: dict) -> None:
    """Files by name, of bytes, text or rows."""
    for name, content in files.items():
        (file := folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            write_rows(file, content)
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())


# Files ----------------------------------------------------------------------------------------------------------------
LINES = "".join(json.dumps(row) + "\n" for row in TEXT)
TABLE = "text,n\nrow 0,1\nrow 1,2\nrow 2,3\n"
FILES = {
    "rows.jsonl": LINES,
    "ROWS.JSONL": LINES,
    "blank.json": LINES.replace("\n", "\n\n"),
    "blanks.csv": TABLE.replace("text,n", "text , n"),
    "rows.ndjson": LINES.replace("\n", "\r\n\r\n"),
    "rows.json": json.dumps(TEXT),
    "lines.json": LINES,
    "pretty.json": json.dumps(TEXT, indent=2),
    "wrapped.json": json.dumps({"version": "1.0", "data": TEXT}),
    "mac.csv": TABLE.replace("\n", "\r"),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(TEXT).encode(),
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "two.jsonl.gz": b"".join(gzip.compress(line.encode()) for line in LINES.splitlines(keepends=True)),
    "rows.json.GZ": gzip.compress(json.dumps(TEXT).encode()),
    "rows.jsonl.bz2": bz2.compress(LINES.encode()),
    "rows.jsonl.zst": pyarrow.compress(LINES.encode(), "zstd", asbytes=True),
    "rows.csv.gz": gzip.compress(TABLE.encode()),
    "rows.csv": TABLE,
    "semicolons.csv": TABLE.replace(",", ";"),
    "bars.csv": TABLE.replace(",", "|"),
    "tabs.csv": TABLE.replace(",", "\t"),
    "excel.csv": TABLE.replace(",", "\t").encode("utf-16"),
    "bom.CSV": b"\xef\xbb\xbf" + TABLE.encode(),
    "rows.tsv": TABLE.replace(",", "\t"),
    "rows.txt": "row 0\n\nrow 1\r\n  \nrow 2",
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_many_kinds_are_read(name, fetch, tmp_path):
    write(tmp_path, {name: FILES[name]})
    assert fetch(name)[1] == TEXT


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved", "saved splits"])
def test_files_of_the_library_are_read(kind, fetch, tmp_path):
    rows = [{"text": f"row {number}", "more": {"a": [number]}} for number in range(2500)]
    table = datasets.Dataset.from_list(rows)
    if kind == "parquet":
        table.to_parquet(tmp_path / "given.parquet")
    elif kind == "arrow":
        table.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved/data-00000-of-00001.arrow").rename(tmp_path / "given.arrow")
    else:
        splits = datasets.DatasetDict({"train": table, "test": table.select(range(5))})
        (splits if "splits" in kind else table).save_to_disk(tmp_path / "given", num_shards={"train": 3, "test": 1}
                                                             if "splits" in kind else 3)  # fmt: skip
        write(tmp_path, {"given/cache-0123.arrow": "a cache"})
    said, train, held_out = fetch("given" if "saved" in kind else f"given.{kind}")
    assert train == [{"text": row["text"]} for row in rows] and "Left out: more" in said
    assert held_out == (train[:5] if "splits" in kind else [])


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_both_formats_of_arrow_are_read(kind, fetch, tmp_path):
    table = pyarrow.table({"text": ["a", "b"]})
    opened = {"file": pyarrow.ipc.new_file, "stream": pyarrow.ipc.new_stream}[kind]
    with opened(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert fetch("rows.arrow")[1] == rows("a", "b")


def test_a_row_may_have_lists_of_objects(fetch, tmp_path):
    row = {"question": "q", "answer": "a", "sources": [{"text": "x"}]}
    write(tmp_path, {"rows.json": json.dumps(row, indent=1)})
    assert fetch("rows.json")[1] == [PAIR]


def test_a_file_that_is_named_is_read_whatever_its_name(fetch, tmp_path):
    write(tmp_path, {"_run.json": json.dumps(rows("a"))})
    assert fetch("_run.json")[1] == rows("a")


def test_files_behind_links_are_read(fetch, tmp_path):
    write(tmp_path, {"there/train.jsonl": rows("a"), "in/test.jsonl": rows("b")})
    (tmp_path / "in/linked").symlink_to(tmp_path / "there")
    assert fetch("in")[1:] == (rows("a"), rows("b"))


def test_one_row_alone_is_no_list_of_its_messages(fetch, tmp_path):
    write(tmp_path, {"rows.json": json.dumps({"messages": say("q", "a")}, indent=1)})
    assert fetch("rows.json")[1] == [{"messages": say("q", "a")}]


def test_the_separator_is_the_one_that_fits_all_lines():
    table = "what (a, b, c);answer\n1;2\n3, 4;5\n"
    assert load("chain/find_rows.py").find_separator("rows.csv", io.StringIO(table)) == ";"


def test_a_field_may_hold_what_separates_fields(fetch, tmp_path):
    write(tmp_path, {"rows.csv": 'question;answer\n"a; b";"c ""d""\ne"\n1,5;2,5\n'})
    assert fetch("rows.csv")[1] == [
        {"prompt": "a; b", "completion": 'c "d"\ne'},
        {"prompt": "1,5", "completion": "2,5"},
    ]


def test_documents_are_a_row_each_and_a_text_of_lines_a_row_a_line(fetch, tmp_path):
    write(tmp_path, {"books/a.txt": "one\n\ntwo\n", "books/b.txt": "three\n", "books/README.txt": "about"})
    said, train, _ = fetch("books")
    assert train == [{"text": "one\n\ntwo"}, {"text": "three"}] and "read as texts: each file is a row" in said


def test_texts_that_are_named_as_splits_are_lines(fetch, tmp_path):
    write(tmp_path, {"given/train.1.txt": "a\nb", "given/train.2.txt": "c", "given/test.txt": "d\n"})
    said, *found = fetch("given")
    assert found == [[{"text": "a"}, {"text": "b"}, {"text": "c"}], [{"text": "d"}]]
    assert "read as texts: each line is a row" in said


@pytest.mark.parametrize(
    "word", ["None", "NA", "007", "1.10", "true", "2024-01-01", "2024-01-01T10:00:00Z", "2024-01-01 a", "1e5"]
)
def test_words_stay_words_up_to_the_training(word, fetch, tiny_model, tmp_path):
    """What the library's reader would take for a number, a date or nothing."""
    write(tmp_path, {"rows.csv": "question,answer\n" + f"{word},{word}\n" * 3})
    assert fetch("rows.csv")[1] == [{"prompt": word, "completion": word}] * 3
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (row, *_) = load("02_train_lora.py").load_rows(str(tmp_path / "out"), "train", tokenizer, OPTIONS)
    assert [row["prompt"][0]["content"], row["completion"][0]["content"]] == [word, word]


@pytest.mark.parametrize("held_out", [0, 2])
def test_a_few_dates_stay_words_too(held_out, fetch, tiny_model, tmp_path):
    """Of the last two rows alone the reader would make dates, and of parts of a large file."""
    texts = ["hello", "hi", "2024-01-01", "2024-01-02"]
    write(tmp_path, {"rows.jsonl": rows(*texts)})
    fetch("rows.jsonl", "--validation_rows", held_out)
    tokenizer, load_rows = AutoTokenizer.from_pretrained(tiny_model), load("02_train_lora.py").load_rows
    splits = ("train", "validation") if held_out else ("train",)
    found = [row["text"] for split in splits for row in load_rows(str(tmp_path / "out"), split, tokenizer, OPTIONS)]
    assert found == texts


def test_dates_beside_numbers_are_refused(refuse, tmp_path):
    write(tmp_path, {"rows.jsonl": rows("2024-01-01", "1.10", "a")})
    refuse("rows.jsonl", "some texts of text are dates, and some are numbers, true, null or JSON")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", '{"text": "a"}\n\n{"text": "b', "rows.jsonl, line 3 is cut off, or no JSON object: Unterm"),
        ("rows.jsonl", '{"text": "a"}\n[1, 2]\n', "rows.jsonl, line 2 is no JSON object: [1, 2]. Mend that line"),
        ("rows.jsonl", "null\n", "rows.jsonl, line 1 is no JSON object: null"),
        ("rows.jsonl", '{"text": "ä"}\n'.encode("latin-1"), "rows.jsonl is not in UTF-8: "),
        (
            "rows.jsonl",
            '{"text": "a \\ud800 b"}\n',
            "row 1 of train.jsonl has half a character, '\\ud800'. Mend that text",
        ),
        ("rows.jsonl", "", "'rows.jsonl' has no rows in rows.jsonl. Give files with rows"),
        ("rows.jsonl.gz", b"no gzip at all", "rows.jsonl.gz is cut off, or not what its ending says: "),
        ("rows.jsonl.gz", gzip.compress(LINES.encode() * 99, mtime=0)[:-20], "rows.jsonl.gz is cut off, or not what"),
        ("rows.jsonl.zst", b"no zstd at all", "rows.jsonl.zst is cut off, or not what its ending says: "),
        ("rows.json", '[{"text": "a"}, {"te', "rows.json is cut off, or no JSON: "),
        (
            "rows.json",
            '{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
            "is one object, of train, test, and no list",
        ),
        ("rows.json", '["a", "b"]', 'rows.json, row 1 is no JSON object: "a". Give it a name: {"text": …}'),
        ("rows.json", '{"question": {"0": "q"}, "answer": {"0": "a"}}', 'in pandas: to_json(FILE, orient="records"'),
        ("rows.csv", 'text\n"a', "rows.csv, line 2: unexpected end of data. Close the quotes"),
        ("rows.csv", "question,answer\nq,a\nq, with comma,a\n", "rows.csv, line 3 has 3 fields, and the first line 2"),
        ("rows.csv", "text\n", "'rows.csv' has no rows"),
        ("rows.csv", "text,text,,\na,b,,\n", "rows.csv has several columns text. Give each a name of its own"),
        (
            "rows.csv",
            "What is it?,It is\n" * 2,
            "has the columns What is it?, It is: not text, messages, or prompt and completion; name them: --columns q",
        ),
        ("latin.csv", "question,answer\nä,ö\n".encode("latin-1"), "iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"),
        ("rows.parquet", "PAR1xx", "rows.parquet is cut off, or not what its ending says: "),
        ("rows.xlsx", "PK", "'rows.xlsx' has no file of rows, but .xlsx. Save rows as .jsonl, .ndjson, .json, .csv"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_what_to_do(name, content, said, refuse, tmp_path):
    write(tmp_path, {name: content})
    refuse(name, said)


def test_a_byte_order_mark_and_rare_characters_are_read(tmp_path):
    text = "a \u200b \u0000 😀 \u2028 \x85 \u202e שלום b"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}) + "\r\n", encoding="utf-8-sig")
    call("chain/read_rows.py", "--dataset_name", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out")
    written = (tmp_path / "out/train.jsonl").read_bytes().decode()
    assert written == json.dumps({"text": text}, ensure_ascii=False) + "\n"
    assert datasets.load_dataset(str(tmp_path / "out"), split="train")[0]["text"] == text


# Folders --------------------------------------------------------------------------------------------------------------
def rows(*words) -> list:
    return [{"text": word} for word in words]


@pytest.mark.parametrize(
    ("files", "train", "held_out", "said"),
    [
        ({"train.10.jsonl": "b", "train.9.jsonl": "a"}, "ab", "", "train on: train.9.jsonl, train.10.jsonl"),
        ({"train.0.jsonl": "a", "train.1.jsonl": "b"}, "ab", "", "train on: train.0.jsonl, train.1.jsonl"),
        ({"train.jsonl": "a", "train_extra.jsonl": "b"}, "ab", "", "train on: train.jsonl, train_extra.jsonl"),
        ({"data/train-00000-of-00002.jsonl": "a", "data/train-00001-of-00002.jsonl": "b"}, "ab", "", ""),
        ({"x.train.jsonl": "a", "x.test.jsonl": "b"}, "a", "b", "held out: x.test.jsonl"),
        ({"train/0.jsonl": "a", "train/1.jsonl": "b", "val/0.jsonl": "c"}, "ab", "c", "held out: val/0.jsonl"),
        ({"part1.jsonl": "a", "part2.jsonl": "b"}, "ab", "", "train on: part1.jsonl, part2.jsonl"),
        ({"mine.jsonl": "a", "test.jsonl": "b"}, "a", "b", "train on: mine.jsonl\nheld out: test.jsonl"),
        ({"train.jsonl": "a", "mine.jsonl": "b"}, "a", "", "not read: mine.jsonl"),
        ({"train.jsonl": "a", "test.jsonl": "b", "validation.jsonl": "c"}, "a", "c", "not read: test.jsonl"),
        ({"train.jsonl": "a", "latest.jsonl": "b"}, "a", "", "not read: latest.jsonl"),
        ({"train.jsonl": "a", "valid.csv": "text\nb\n"}, "a", "b", ""),
        ({"train.jsonl": "a", ".hidden/train.jsonl": "b", "state.json": "{}", "README.md": "A card."}, "a", "", ""),
    ],
)
def test_the_files_of_a_folder_are_found_and_said(files, train, held_out, said, fetch, tmp_path):
    write(tmp_path / "in", {name: rows(words) if len(words) == 1 else words for name, words in files.items()})
    out, *found = fetch("in")
    assert found == [rows(*train), rows(*held_out)] and said in out


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev", "eval", "test"])
def test_held_out_rows_are_found_by_the_usual_names(name, fetch, tmp_path):
    write(tmp_path / "in", {"train.jsonl": rows("a", "b"), f"{name}.jsonl": rows("c")})
    out, *found = fetch("in")
    assert found == [rows("a", "b"), rows("c")] and f"held out: {name}.jsonl" in out


def test_splits_of_other_names_are_asked_for(fetch, refuse, tmp_path):
    names = ("train_sft", "test_sft", "train_gen")
    write(tmp_path / "in", {f"data/{name}-00000-of-00001.jsonl": rows(name) for name in names})
    refuse(
        "in", "has the splits test_sft, train_gen, train_sft. Name one: --dataset_train_split (make: DATASET_SPLIT=)"
    )
    refuse("in", "no split 'train', but test_sft, train_gen, train_sft", "--dataset_train_split", "train")
    splits = ("--dataset_train_split", "train_sft", "--dataset_test_split", "test_sft")
    out, *found = fetch("in", *splits)
    assert found == [rows("train_sft"), rows("test_sft")] and "not read: data/train_gen" in out
    record = read(tmp_path / "out/run.json")["dataset"]
    assert (record["dataset_train_split"], record["dataset_test_split"]) == ("train_sft", "test_sft")


@pytest.mark.parametrize("card", [True, False])
def test_configs_are_asked_for(card, fetch, refuse, tmp_path):
    given = "configs:\n- config_name: one\n  data_files:\n  - {split: train, path: one/tr*}\n"
    given += "- config_name: two\n  data_files: [{split: train, path: [two/train.jsonl]}, {split: dev, path: one/*}]\n"
    write(tmp_path / "in", {"one/train.jsonl": rows("a"), "two/train.jsonl": rows("b")})
    if card:
        write(tmp_path / "in", {"README.md": f"---\n{given}---\nA card.\n"})
    refuse("in", "has the configs one, two. Name one: --dataset_config (make: DATASET_CONFIG=)")
    refuse("in", "has the configs one, two. Name one", "--dataset_config", "three")
    assert fetch("in", "--dataset_config", "two")[1:] == (rows("b"), rows("a") if card else [])


def test_a_card_without_splits_and_one_config_needs_no_name(fetch, tmp_path):
    card = "---\nlicense: mit\nconfigs:\n- config_name: main\n  data_files: '**/deep/*.csv'\n---\n"
    write(tmp_path / "in", {"README.md": card, "a/deep/more.csv": "text\nb\n", "x.jsonl": rows("a")})
    assert fetch("in")[1:] == (rows("b"), [])
    assert read(tmp_path / "out/run.json")["dataset"]["license"] == "mit"


CARD = "---\nconfigs:\n- {}\n---\n"


@pytest.mark.parametrize(
    ("card", "files", "args", "train", "held_out"),
    [
        # a split is not all whose names hold its name, where a card or numbers say what belongs together
        ("data_files: [{split: train, path: a*}, {split: train_1M, path: b*}]", "a b", (), "a", ""),
        ("", "train-00000-of-00001 train_1M-00000-of-00001", (), "train-00000-of-00001", ""),
        ("", "train-00000-of-00001-a3ecf92756993583 x", (), "train-00000-of-00001-a3ecf92756993583", ""),
        # rows to train on are not held out
        ("", "train train_eval", (), "train", "train_eval"),
        ("", "test", ("--dataset_train_split", "test"), "test", ""),
        ("", "test validation", ("--dataset_train_split", "validation"), "validation", "test"),
        # of a config its own files, and of a folder its splits
        ("data_dir: en", "en/train en/test de/train", (), "en/train", "en/test"),
        ("data_files: '*.jsonl'", "a old/b", (), "a", ""),
        ("data_files: '**/*.jsonl'", "a old/b", (), "a old/b", ""),
        (
            "{config_name: x, data_dir: x}\n- {config_name: y, data_dir: y, default: true}",
            "x/train y/train",
            (),
            "y/train",
            "",
        ),
        ("config_name: one\n  data_dir: one", "one/train two/train", ("--dataset_config", "one"), "one/train", ""),
    ],
)
def test_a_split_is_its_files_and_no_others(card, files, args, train, held_out, fetch, tmp_path):
    write(tmp_path / "in", {f"{name}.jsonl": rows(name) for name in files.split()})
    if card:
        write(tmp_path / "in", {"README.md": CARD.format(card)})
    assert fetch("in", *args)[1:] == (rows(*train.split()), rows(*held_out.split()))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train.jsonl": rows("a"), "train.jsonl.gz": gzip.compress(LINES.encode())}, "maybe the same rows twice"),
        (
            {
                "README.md": CARD.format("data_files: [{split: train, path: '*.jsonl'}, {split: test, path: test*}]"),
                "a.jsonl": rows("a"),
                "test.jsonl": rows("b"),
            },
            "has test.jsonl both to train on and held out",
        ),
        ({"train.jsonl": rows("a"), "train.csv": "text\na\n"}, "has .csv and .jsonl of one split, train.csv, train"),
        ({"test.jsonl": rows("a")}, "has no rows to train on, but test. Name one: --dataset_train_split"),
        ({"train-00001-of-00002.jsonl": rows("a")}, "has 1 of 2 files train-*-of-00002.jsonl. Fetch or write those"),
        ({"notes.pdf": "x", "code.py": "y"}, "has no file of rows, but .pdf, .py. Save rows as"),
        ({"README.md": "Nothing else."}, "has no file of rows, but .md. Save rows as"),
        (
            {"train.jsonl": [PAIR], "test.jsonl": TEXT},
            "rows to train on are read as prompt, completion, held-out ones as text",
        ),
    ],
)
def test_folders_that_are_not_clear_are_refused(files, said, refuse, tmp_path):
    write(tmp_path / "in", files)
    refuse("in", said)


# Rows -----------------------------------------------------------------------------------------------------------------
USER = {"role": "user", "content": "q"}


def say(*words, system=()) -> list:
    turns = [("system", system)] * bool(system) + [*zip(["user", "assistant"] * 9, words, strict=False)]
    return [{"role": role, "content": text} for role, text in turns]


def answer(text) -> list:
    return [{"role": "assistant", "content": text}]


BOTH = "read as prompt and completion, both texts or both messages"
FORMS = [
    ({"q": "q", "a": "a"}, PAIR, "read as pairs: q and a become"),
    ({"Prompt": "q", "Completion ": "a"}, PAIR, ""),
    ({"input": "q", "output": "a"}, PAIR, "read as pairs: input and output become prompt and completion"),
    ({"query": "q", "response": "a"}, PAIR, "read as pairs: query and response become"),
    (
        {"problem": "q", "solution": "a", "answer": "4"},
        PAIR,
        "read as pairs: problem and solution become prompt and completion. Left out: answer",
    ),
    ({"Context": "q", "Response": "a"}, PAIR, "read as pairs: context and response become"),
    (
        {"system_prompt": "", "question": "q", "response": "a"},
        {"prompt": say("q"), "completion": answer("a")},
        "read as pairs: system_prompt, question and response become",
    ),
    (
        {"system_prompt": "s", "question": "q", "response": "a"},
        {"prompt": say("q", system="s"), "completion": answer("a")},
        "read as pairs: system_prompt, question and response",
    ),
    (
        {"instruction": "q", "input": "", "output": "a", "history": [["b", "c"]], "system": "s"},
        {"prompt": say("b", "c", "q", system="s"), "completion": answer("a")},
        "read as alpaca: system, history, instruction, input and output become",
    ),
    ({"prompt": say("q"), "completion": "a"}, {"prompt": say("q"), "completion": answer("a")}, BOTH),
    ({"prompt": "q", "completion": answer("a")}, {"prompt": say("q"), "completion": answer("a")}, BOTH),
    ({"messages": json.dumps(say("q", "a"))}, {"messages": say("q", "a")}, "read as messages, with roles"),
    (
        {"conversation": say("q", "a"), "lang": "x"},
        {"messages": say("q", "a")},
        "read as chats: conversation becomes messages. Left out: lang",
    ),
    (
        {"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]},
        {"messages": say("q", "a")},
        "read as Gemini: contents become messages",
    ),
    (
        {"contents": [{"role": "user", "parts": [{"text": "q"}]}], "systemInstruction": {"parts": [{"text": "s"}]}},
        {"messages": say("q", system="s")},
        "read as Gemini: contents become messages",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"text": "r"}]}, *answer("a")]},
        {"messages": say("qr", "a")},
        "read as messages, with",
    ),
    (PAIR | {"messages": say("x", "y")}, PAIR, "Left out: messages"),
    ({"messages": say("q", "a"), "prompt": "q"}, {"messages": say("q", "a")}, "Left out: prompt"),
    ({"messages": say("q", "a"), "tools": [{"n": 1}]}, {"messages": say("q", "a"), "tools": [{"n": 1}]}, ""),
]


@pytest.mark.parametrize("number", range(len(FORMS)))
def test_forms_of_rows_are_read_and_said(number, fetch, tmp_path):
    row, expected, said = FORMS[number]
    write(tmp_path, {"rows.jsonl": [row] * 2})
    out, train, _ = fetch("rows.jsonl")
    assert train == [expected] * 2 and said in out and ("read as" in out) == ("read as" in said)


def test_a_form_is_that_of_the_first_row_that_has_it(fetch, tmp_path):
    write(tmp_path, {"rows.jsonl": [{"messages": None, "text": None}, *[{"messages": say("q", "a")}] * 20]})
    assert fetch("rows.jsonl")[1] == [{"messages": say("q", "a")}] * 20


def test_an_answer_that_looks_like_messages_is_a_text(fetch, tmp_path):
    call = '[{"name": "f", "arguments": {}}]'
    write(tmp_path, {"rows.jsonl": [{"system": "s", "prompt": "q", "completion": call}] * 2})
    assert fetch("rows.jsonl")[1] == [{"prompt": say("q", system="s"), "completion": answer(call)}] * 2


def test_keys_that_the_first_row_lacks_are_read(fetch, tmp_path):
    write(
        tmp_path,
        {"rows.jsonl": [{"instruction": "q", "output": "a"}, {"instruction": "q", "input": "i", "output": "a"}]},
    )
    assert fetch("rows.jsonl")[1] == [PAIR, {"prompt": "q\n\ni", "completion": "a"}]


@pytest.mark.parametrize(
    ("history", "turns"),
    [
        ([["b", "c"]], ["b", "c"]),
        ("[]", []),
        (None, []),
        ('[["b", "c"]]', ["b", "c"]),
        ([{"role": "user", "content": "b"}, {"from": "gpt", "value": "c"}], ["b", "c"]),
    ],
)
def test_a_history_is_turns_before_the_question(history, turns, fetch, tmp_path):
    write(tmp_path, {"rows.jsonl": [{"instruction": "q", "output": "a", "history": history}] * 2})
    assert fetch("rows.jsonl")[1] == [{"prompt": say(*turns, "q"), "completion": answer("a")}] * 2


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"instruction": "x", "output": "y", "text": "t"}, "text:text", {"text": "t"}),
        ({"messages": say("x", "y"), "f": "q", "g": "a"}, "f:instruction,g:output", PAIR),
        ({"prompt": "x", "completion": "y", "chat": say("q", "a")}, "chat:messages", {"messages": say("q", "a")}),
        ({"prompt": "x", "completion": "y", "f": "q", "g": "a"}, "f:instruction,g:output", PAIR),
        (PAIR | {"label": "science"}, "prompt:prompt,completion:completion", PAIR),
        ({"image": None, "text": "t"}, "text:text", {"text": "t"}),
        ({"prompt": "q", "answer": "a", "text": "t"}, "answer:completion", PAIR),
    ],
)
def test_what_is_named_comes_before_what_is_known(row, columns, expected, fetch, tmp_path):
    write(tmp_path, {"rows.jsonl": [row] * 2})
    assert fetch("rows.jsonl", "--columns", columns)[1] == [expected] * 2


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("frage:prompt,antwort:completion", {"prompt": "q", "completion": "a"}),
        (" frage : prompt, antwort : completion", {"prompt": "q", "completion": "a"}),
        ("antwort:text", {"text": "a"}),
        ("thema:system,frage:prompt,antwort:completion", {"prompt": say("q", system="t"), "completion": answer("a")}),
        ("frage:instruction,thema:input,antwort:output", {"prompt": "q\n\nt", "completion": "a"}),
        ("frage:prompt,prompt:completion", {"prompt": "q", "completion": "other"}),
    ],
)
def test_columns_of_any_name_can_be_named(columns, expected, fetch, tmp_path):
    write(tmp_path, {"rows.jsonl": [{"frage": "q", "antwort": "a", "thema": "t", "prompt": "other"}] * 2})
    assert fetch("rows.jsonl", "--columns", columns)[1] == [expected] * 2
    assert read(tmp_path / "out/run.json")["dataset"]["columns"] == columns


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ("frge:prompt", "there is no column 'frge', but 'frage'. Give OLD:NEW,OLD:NEW with old ones of frage, antwort"),
        ("frage:ask", "there is no 'ask' to make of 'frage'. Give OLD:NEW"),
        ("frage", "there is no column ''. Give OLD:NEW"),
        ("frage:prompt,antwort:prompt", "'prompt' is made of two columns. Give one of them"),
        (
            "frage:prompt",
            "questions without answers, as GRPO asks. Add the answers, or name them: --columns frage:prompt,antwort:",
        ),
    ],
)
def test_columns_that_are_named_wrongly_are_answered_with_those_there_are(columns, said, refuse, tmp_path):
    write(tmp_path, {"rows.jsonl": [{"frage": "q", "antwort": "a"}]})
    refuse("rows.jsonl", said, "--columns", columns)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"chosen": "a", "rejected": "b"},
            "rows of preferences, as DPO learns from. Take what was chosen: --columns",
        ),
        ({"prompt": "q", "completion": "a", "label": True}, "rows of answers marked good or bad, as KTO learns from"),
        (
            {"prompt": say("q")},
            "questions without answers, as GRPO asks. Add the answers, or name them: --columns prompt:prompt,ANSWERS:c",
        ),
        (
            {"context": "c", "question": "q"},
            "questions without answers, as GRPO asks. Add the answers, or name them: --columns question:prom",
        ),
        ({"question": "q", "answers": "a"}, "name them: --columns question:prompt,answers:completion (make: COLUMNS=)"),
        (
            {"messages": [USER, {"role": "assistant", "content": "b", "weight": 0}]},
            "row 1: a message is not to be learned (weight 0), and all are. Make a prompt of it and those before",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b", "train": False}]},
            "row 1: a message is not to be learned",
        ),
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, "rows of multiple choice. Write the right one out"),
        ({"image": "x", "text": "a"}, "rows with images, and text alone is trained here"),
        ({"message_id": "1", "parent_id": "0", "text": "a"}, "rows of a tree of messages"),
        (
            {"title": "t", "abstract": "a"},
            "not text, messages, or prompt and completion; name them: --columns title:prompt,abs",
        ),
        ({"question": "q", "answer": {"text": ["a"]}}, "row 1: {'text': ['a']} in answer is no text"),
        ({"question": "q", "answer": 2.5}, "row 1: 2.5 in answer is no text. Put it in quotes"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "row 1: a message holds image, and text alone",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}]}, "holds no text, and text"),
        ({"messages": [{"speaker": "x", "text": "a"}]}, "row 1: a message has the keys speaker, text, and no role"),
        ({"messages": [{"role": "user", "content": 5}]}, "row 1: 5 in content is no text"),
        ({"messages": [["a", "b"]]}, "has the columns messages: not text, messages, or prompt and completion"),
        (
            {"messages": [{"role": "user", "content": "", "name": None}]},
            "1 of 1 rows have an empty question or answer (first: row 1)",
        ),
        ({"prompt": "q", "completion": None}, "1 of 1 rows have an empty question or answer (first: row 1)"),
        ({"prompt": "q", "completion": " "}, "1 of 1 rows have an empty question or answer (first: row 1)"),
    ],
)
def test_other_rows_are_named_for_what_they_are(row, said, refuse, tmp_path):
    write(tmp_path, {"rows.jsonl": [row]})
    refuse("rows.jsonl", said)


def test_texts_and_messages_are_not_mixed(refuse, fetch, tmp_path):
    messages = {"prompt": say("q"), "completion": answer("a")}
    write(tmp_path, {"rows.jsonl": [PAIR, messages], "turned.jsonl": [messages, PAIR]})
    assert fetch("turned.jsonl")[1] == [messages] * 2
    (tmp_path / "out").rename(tmp_path / "done")
    refuse("rows.jsonl", "row 2: it has messages, where the first row has texts. Mend that row, or leave it out")


def test_an_input_beside_messages_is_not_lost(refuse, fetch, tmp_path):
    row = {"instruction": say("q"), "input": "", "output": "a"}
    write(tmp_path, {"rows.jsonl": [row], "more.jsonl": [row, row | {"input": "b"}]})
    assert fetch("rows.jsonl")[1] == [{"prompt": say("q"), "completion": answer("a")}]
    (tmp_path / "out").rename(tmp_path / "done")
    refuse("more.jsonl", "row 2: instruction has messages, and input a text. Put that into a message. Mend that row")


def test_what_was_chosen_can_be_learned(fetch, tmp_path):
    write(tmp_path, {"rows.jsonl": [{"prompt": "q", "chosen": "a", "rejected": "b"}]})
    assert fetch("rows.jsonl", "--columns", "chosen:completion")[1] == [PAIR]


def test_a_few_empty_rows_are_left_out_and_said(fetch, tmp_path):
    empty = [{"prompt": "q", "completion": ""}, {"prompt": None, "completion": "a"}]
    write(tmp_path, {"rows.jsonl": [*[PAIR] * 9, *empty, *[PAIR] * 10]})
    out, train, _ = fetch("rows.jsonl")
    assert train == [PAIR] * 19 and "2 of 21 rows have an empty question or answer (first: row 10): left out" in out


def test_rows_can_be_cut_and_held_out(fetch, tmp_path):
    write(tmp_path, {"in/train.jsonl": rows(*"abcdef"), "in/test.jsonl": rows(*"uvwxyz"), "one.jsonl": rows(*"abcdef")})
    said, *found = fetch("in", "--rows", 2)
    assert found == [rows("a", "b"), rows("u", "v")] and "of the train rows the first 2\n" in said
    assert read(tmp_path / "out/run.json")["dataset"]["rows"] == 2


def test_there_are_no_rows_below_none(refuse, tmp_path):
    write(tmp_path, {"rows.jsonl": rows("a")})
    refuse("rows.jsonl", "--rows (make: ROWS) is -1: give 1 or more", "--rows", "-1")


def test_of_the_rows_that_are_taken_the_last_are_held_out(fetch, tmp_path):
    write(tmp_path, {"one.jsonl": rows(*"abcdef")})
    assert fetch("one.jsonl", "--rows", 5, "--validation_rows", 2)[1:] == (rows("a", "b", "c"), rows("d", "e"))


@pytest.mark.parametrize(("count", "most"), [(5, 4), (6, 4), (-1, 4)])
def test_rows_to_hold_out_leave_some_to_train_on(count, most, refuse, tmp_path):
    write(tmp_path, {"rows.jsonl": rows(*"abcde")})
    refuse("rows.jsonl", f"(make: VALIDATION_ROWS) is {count}: give 0 to {most}.", "--validation_rows", str(count))


def test_the_record_and_the_card_say_what_the_rows_are(fetch, tmp_path):
    write(tmp_path, {"in/README.md": "---\nlicense: mit\n---\n", "in/train.jsonl": [PAIR] * 30})
    out, *_ = fetch("in")
    assert "train.jsonl: 30 rows. Row 11, counted from 0:\n{'prompt': 'q', 'completion': 'a'}\n" in out
    digest = hashlib.sha256((tmp_path / "out/train.jsonl").read_bytes()).hexdigest()
    expected = {"name": str(tmp_path / "in"), "license": "mit", "held_out_rows": 0}
    assert read(tmp_path / "out/run.json") == {"dataset": expected | {"train": {"rows": 30, "sha256": digest}}}
    assert datasets.load_dataset(str(tmp_path / "out"), split="train").features["prompt"] == datasets.Value("string")


def test_what_was_read_can_be_read_again(fetch, tmp_path):
    write(tmp_path, {"in/train.jsonl": [PAIR] * 3, "in/val.jsonl": [PAIR]})
    out, *found = fetch("in")
    (tmp_path / "out").rename(tmp_path / "again")
    assert fetch("again")[1:] == tuple(found) == ([PAIR] * 3, [PAIR])
