"""Where the rows of a data set are, in a file, a folder or a repository of the Hub, and what is in them.

A value is what stands in the file: no column gets a type. Rows are read one by one, and a million take no more memory.
"""

import contextlib
import csv
import glob
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath

import pyarrow
from folders import check_download, fail, sha256
from fsspec.utils import glob_translate
from huggingface_hub import (
    HfApi,
    HfFileSystem,
    errors,
    get_cached_repo_tree,
    hf_hub_download,
    is_offline_mode,
    metadata_load,
    snapshot_download,
)
from pyarrow.parquet import ParquetFile

LINES, TABLES, ARROW = (".jsonl", ".ndjson"), (".csv", ".tsv"), (".parquet", ".arrow")
KINDS = (*LINES, ".json", *TABLES, ".txt", *ARROW)
PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# What a split is called; of the held-out ones the first that is there is taken.
TRAIN, HELD_OUT = ("train", "training"), ("validation", "val", "valid", "dev", "eval", "evaluation", "test", "testing")
# What stands beside rows and is none: of datasets.save_to_disk, of a repository, of a step, and what is hidden.
OTHER = r"(^|/)([._]|cache-|(dataset_infos?|dataset_dict|state|config|package|run|step|audit)\.json$"
OTHER += r"|(readme|license|requirements)\.txt$)"
PARQUET = ' The hub may have the rows as parquet: make download ARGS="--dataset_revision refs/convert/parquet"'
# Keys by which an object is a row, and not one that holds a list of rows.
ROW = {"text", "messages", "conversations", "conversation", "contents", "prompt", "instruction", "question", "input"}
csv.field_size_limit(sys.maxsize)


def find_kind(file: str) -> tuple[str, str | None]:
    """The ending of a file, in small letters, and what it is packed with."""
    *endings, last = ["", *(ending.lower() for ending in PurePosixPath(file).suffixes)]
    return (endings[-1], PACKED[last]) if last in PACKED else (last, None)


# Files ----------------------------------------------------------------------------------------------------------------
def read_lines(file: str, lines: Iterable[str]) -> Iterator[dict]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                fail(f"{file}, line {number} is cut off, or no JSON object: {error}. Mend that line.")
            if not isinstance(row, dict):
                fail(f"{file}, line {number} is no JSON object: {line.strip()[:40]}. Mend that line.")
            yield row


def read_json(file: str, text: io.TextIOBase) -> Iterator[dict]:
    """Rows a line each, or a list of them, which may stand under a name in an object."""
    lines = filter(str.strip, text)
    first, second = next(lines, ""), next(lines, "")
    if first.strip()[:1] + first.strip()[-1:] == "{}" and second.strip():
        yield from read_lines(file, chain((first, second), lines))
        return
    try:
        rows = json.loads(first + second + text.read())
    except ValueError as error:
        fail(f"{file} is cut off, or no JSON: {error}. Mend it there.")
    if isinstance(rows, dict):
        lists = [key for key, value in rows.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        is_row = ROW & {*lists} or any(isinstance(rows[key], str) for key in ROW & rows.keys())
        if len(lists) != 1 and not is_row:
            lines = 'Write a row a line; in pandas: to_json(FILE, orient="records", lines=True)'
            fail(f"{file} is one object, of {', '.join([*rows][:9])}, and no list of rows. {lines}")
        rows = [rows] if is_row else rows[lists[0]]
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        if not isinstance(row, dict):
            fail(f'{file}, row {number} is no JSON object: {json.dumps(row)[:40]}. Give it a name: {{"text": …}}')
        yield row


def find_separator(file: str, text: io.TextIOBase) -> str:
    """The one by which the first lines have the most columns, as many in each."""
    sample, widths = list(islice(text, 100)), {}
    for separator in sorted(SEPARATORS, key=lambda each: each != "\t") if find_kind(file)[0] == ".tsv" else SEPARATORS:
        counts = [len(fields) for fields in islice(filter(None, csv.reader(sample, delimiter=separator)), 20)] or [0]
        widths[separator] = (counts[0] > 1 and len({*counts}) == 1, counts[0])
    return max(widths, key=widths.get)


def read_table(file: str, text: io.TextIOBase, separator: str) -> Iterator[dict]:
    reader = csv.reader(text, delimiter=separator, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if doubled := [name for name, count in Counter(header).items() if name and count > 1]:
            fail(f"{file} has several columns {', '.join(doubled)}. Give each a name of its own.")
        for fields in filter(None, reader):
            if len(fields) != len(header):
                cause = f"{file}, line {reader.line_num} has {len(fields)} fields, and the first line {len(header)}"
                fail(f"{cause}. Put texts that have {SEPARATORS[separator]} or ends of lines in them in quotes.")
            yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        fail(f"{file}, line {reader.line_num}: {error}. Close the quotes of that text, and double those within it.")


def read_file(file: str, open_bytes: Callable[[], io.IOBase], documents: bool) -> Iterator[dict]:
    """The rows of a file; documents: of a text file the whole is a row, and not each line."""
    kind, packed = find_kind(file)

    def open_text() -> io.TextIOBase:
        stream = open_bytes()
        if packed:
            stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), packed)
        stream = io.BufferedReader(stream)
        wide = stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff")
        return io.TextIOWrapper(stream, "utf-16" if wide else "utf-8-sig", newline="" if kind in TABLES else "\n")

    try:
        if kind == ".parquet":
            yield from (row for batch in ParquetFile(open_bytes()).iter_batches(1000) for row in batch.to_pylist())
        elif kind == ".arrow":
            stream = io.BufferedReader(open_bytes())
            is_file = stream.peek(6)[:6] == b"ARROW1"
            table = pyarrow.ipc.open_file(stream) if is_file else pyarrow.ipc.open_stream(stream)
            batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
            yield from (row for batch in batches for row in batch.to_pylist())
        elif kind in TABLES:
            yield from read_table(file, open_text(), find_separator(file, open_text()))
        elif kind == ".txt":
            texts = [open_text().read()] if documents else open_text()
            yield from ({"text": text.strip("\r\n")} for text in texts if text.strip())
        else:
            yield from (read_json if kind == ".json" else read_lines)(file, open_text())
    except UnicodeError as error:
        save = "Save it so; what comes from Windows: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
        fail(f"{file} is not in UTF-8: {error}. {save}")
    except (pyarrow.ArrowInvalid, OSError) as error:
        if type(error) is OSError and error.errno or isinstance(error, ConnectionError):
            raise
        fail(f"{file} is cut off, or not what its ending says: {error}. Fetch or write it again.")


@dataclass
class Part:
    """The rows of a split; read anew each time."""

    files: dict[str, Callable[[], io.IOBase]]  # how each is opened
    documents: bool  # text files are a row each
    most: int | None

    def read(self) -> Iterator[dict]:
        rows = (read_file(file, opened, self.documents) for file, opened in self.files.items())
        return islice(chain.from_iterable(rows), self.most)

    def list_columns(self) -> list[str]:
        """Those of all rows; of a table, the first has all."""
        same = {file: opened for file, opened in self.files.items() if find_kind(file)[0] in TABLES + ARROW}
        rows = chain.from_iterable(islice(read_file(file, same[file], False), 1) for file in same)
        return [*dict.fromkeys(key for row in (rows if same else self.read()) for key in row)]


# Splits ---------------------------------------------------------------------------------------------------------------
def name_split(file: str) -> str:
    """The split of a file: its name or its folder's in letters, such as train_sft; none where that names no split."""
    for part in reversed(PurePosixPath(file).parts):
        part = re.sub(r"\d+-of-\d+.*", "", part.lower())  # with the sum that older shards have in their names
        words = [word for word in re.findall("[a-z]+", part) if f".{word}" not in (*KINDS, *PACKED)]
        if {*TRAIN, *HELD_OUT} & {*words}:
            return "_".join(words)
    return ""


def group_files(name: str, files: list[str], card: dict | None, config: str | None) -> dict[str, list[str]]:
    """The files of each split, of the config that is asked for: those of the card, or folders that repeat names."""
    configs, splits = {}, {}
    for each in (card or {}).get("configs") or []:
        place, here = each.get("data_dir") or ".", configs.setdefault(each.get("config_name", "default"), {})
        inside = {file: PurePosixPath(file) for file in files if PurePosixPath(file).is_relative_to(place)}
        inside = {file: path.relative_to(place).as_posix() for file, path in inside.items()}
        if not (found := each.get("data_files")):
            for file, path in inside.items():
                here.setdefault(name_split(path), []).append(file)
            continue
        found = found if isinstance(found, list) else [found]
        for part in (part if isinstance(part, dict) else {"split": "train", "path": part} for part in found):
            patterns = [part["path"]] if isinstance(part["path"], str) else part["path"]
            patterns = [re.compile(glob_translate(pattern.removeprefix("./"))) for pattern in patterns]
            found = [file for file, path in inside.items() if any(pattern.match(path) for pattern in patterns)]
            here.setdefault(part["split"], []).extend(found)
    if not configs:
        for file in files:
            splits.setdefault(name_split(file), []).append(file)
        places = {file: PurePosixPath(file).parts[0] for file in files if "/" in file}
        inside = [PurePosixPath(*PurePosixPath(file).parts[1:]) for file in places if name_split(file)]
        if not config and (len({*inside}) == len(inside) or any(map(name_split, places.values()))):
            return splits
        for file, place in places.items():
            configs.setdefault(place, {}).setdefault(name_split(file), []).append(file)
    chosen = [each.get("config_name", "default") for each in (card or {}).get("configs") or [] if each.get("default")]
    chosen = [config] if config else chosen or [each for each in configs if len(configs) == 1 or each == "default"]
    chosen = chosen[0] if chosen else ""
    if chosen not in configs:
        others = f"the configs {', '.join(configs)}" if configs else "no configs"
        fail(f"{name!r} has {others}. Name one: --dataset_config (make: DATASET_CONFIG=)")
    return configs[chosen]


def choose_splits(name: str, splits: list[str], words: tuple, asked: str | None, option: str, exact: bool) -> list[str]:
    """Those with the first of the words that is there; exits where they may be different things."""
    if asked and asked not in splits:
        fail(f"{name!r} has no split {asked!r}, but {', '.join(filter(None, splits)) or 'none with a name'}. {option}")
    for word in words:
        found = [split for split in splits if word in re.findall("[a-z]+", split.lower())]
        if found and not asked:
            if len(found) > 1 and word not in found:
                fail(f"{name!r} has the splits {', '.join(splits)}. {option}")
            if word in found and exact:
                return [word]
            return [split for split in found if words is HELD_OUT or not {*HELD_OUT} & {*split.split("_")}] or found
    return [asked] if asked else []


def list_files(name: str, revision: str | None) -> tuple[Path | None, list[str], dict | None]:
    """The folder of a data set, none for what is on a hub and reached; its files; what its card says."""
    folder, repository = Path(name), dict(repo_type="dataset", revision=revision)
    if revision:
        try:
            files = HfApi().list_repo_files(name, **repository)
            card = "README.md" in files and hf_hub_download(name, "README.md", **repository)
            return None, files, metadata_load(card) if card else None
        except Exception as error:  # no network: of this commit the cache may have the list and the files
            with contextlib.suppress(errors.CachedRepoTreeNotFoundError):
                files = [file.path for file in get_cached_repo_tree(name, **repository)]
                card = "README.md" in files and hf_hub_download(name, "README.md", local_files_only=True, **repository)
                return None, files, metadata_load(card) if card else None
            raise error
    if folder.is_file():
        return folder.parent, [folder.name], None
    files = glob.glob("**", root_dir=folder, recursive=True)  # noqa: PTH207  also behind links, and nothing hidden
    files = sorted(file for file in files if not Path(folder, file).is_dir())
    return folder, files, metadata_load(folder / "README.md") if "README.md" in files else None


def find_rows(name: str, revision: str | None, config: str | None, asked: dict, most: int | None) -> dict[str, Part]:
    """train and, where there are held-out rows, validation; says of which files. asked: the names of these splits;
    most: so many rows of each, and of a repository no more is fetched."""
    folder, all_files, card = list_files(name, revision)
    files = [file for file in all_files if find_kind(file)[0] in KINDS]
    files = [file for file in files if Path(name).is_file() or not re.search(OTHER, file.lower())]
    files.sort(key=lambda file: [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", file)])
    if not files:
        others = ", ".join(sorted({find_kind(file)[0] or file for file in all_files})[:9]) or "nothing"
        kinds = f"Save rows as {', '.join(KINDS)}, or one of these packed, such as .jsonl.gz or .jsonl.zst."
        fail(f"{name!r} has no file of rows, but {others}. {kinds}{PARQUET if '.py' in others else ''}")
    splits = {"train": files} if Path(name).is_file() else group_files(name, files, card, config)
    options = {"train": "Name one: --dataset_train_split (make: DATASET_SPLIT=)"}
    options["validation"] = "Name one: --dataset_test_split (make: DATASET_TEST_SPLIT=)"
    chosen, parts, taken = {}, {}, []
    for key, words in (("train", TRAIN), ("validation", HELD_OUT)):
        free = [split for split in splits if split not in taken]
        exact = bool((card or {}).get("configs")) or any(re.search(r"-\d+-of-\d+", file) for file in files)
        taken = found = choose_splits(name, free, words, asked[key], options[key], exact)
        found = found or ([""] if key == "train" and "" in splits else [])
        chosen[key] = [file for split in found for file in splits[split]]
        kinds = {" ".join(filter(None, find_kind(file))) for file in chosen[key]}
        if len(kinds) > 1:
            cause = f"{name!r} has {' and '.join(sorted(kinds))} of one split, {', '.join(chosen[key][:4])}"
            fail(f"{cause}: maybe the same rows twice. Leave one kind there, or give one file.")
    if both := {*chosen["train"]} & {*chosen["validation"]}:
        fail(f"{name!r} has {min(both)} both to train on and held out. {options['validation']}")
    if not chosen["train"]:
        fail(f"{name!r} has no rows to train on, but {', '.join(splits)}. {options['train']}")
    left = [file for file in files if file not in chosen["train"] + chosen["validation"]]
    for what, each in (("train on", chosen["train"]), ("held out", chosen["validation"]), ("not read", left)):
        if each and (len(files) > 1 or not Path(name).is_file()):
            print(f"{what}: {', '.join(each[:9])}{f' and {len(each) - 9} more' if len(each) > 9 else ''}")
    shards = Counter(re.sub(r"\d+(-of-\d+)(-[0-9a-f]{16})?", r"*\1", file) for each in chosen.values() for file in each)
    for file, count in shards.items():
        if (of := re.search(r"\*-of-(\d+)", file)) and count != int(of[1]):
            fail(f"{name!r} has {count} of {int(of[1])} files {file}. Fetch or write those that it lacks.")
    streamed = not folder and most and not is_offline_mode() and find_kind(chosen["train"][0])[0] != ".json"
    if not folder and not streamed:
        wanted = [file for each in chosen.values() for file in each]
        patterns = [glob.escape(file) for file in wanted]
        folder = snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns)
        for file in wanted:
            check_download(Path(folder, file), sha256(Path(folder, file)))
    for key, each in chosen.items():
        files = {file: partial(Path(folder or "", file).open, "rb") for file in each}
        if streamed:
            root = f"datasets/{name}@{revision}"
            files = {file: partial(HfFileSystem().open, f"{root}/{file}", "rb") for file in each}
        if each:
            documents = len(each) > 1 and not any(map(name_split, each))
            if most:
                print(f"of the {key} rows the first {most:,}")
            if find_kind(each[0])[0] == ".txt":
                print(f"read as texts: each {'file' if documents else 'line'} is a row")
            parts[key] = Part(files, documents, most)
    return parts
