# /// script
# requires-python = ">=3.10"
# dependencies = ["huggingface-hub==2.4.0", "python-dotenv==1.2.4"]
# ///
"""Upload the folder of an adapter or a model to the Hugging Face Hub.

    python push_model.py --folder out/adapter --repo_id user/name

Reads   the folder, and a token with write access: HF_TOKEN in the environment or in .env, or that of hf auth login.
Writes  a private repository, made where there is none; --public allows and makes a public one. Without a token, or with
        --dry_run, it says what it would upload and uploads nothing.

Only files of the folder itself are uploaded; a link that leads out of it stops the upload.
"""

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path

from dotenv import find_dotenv, load_dotenv

load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the imports below

from huggingface_hub import HfApi, get_token


def fail(message: str) -> None:
    """Ends with an error; a token in it is not shown: libraries quote headers, where it may stand in another form."""
    token = os.environ.get("HF_TOKEN", "").strip() or "hf_..."
    sys.exit("error: " + re.sub(r"\bhf_[A-Za-z0-9]{16,}\S*", "<HF_TOKEN>", message.replace(token, "<HF_TOKEN>")))


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def find_damage(folder: Path) -> str | None:
    """What is missing in a folder, or is not as SHA256SUMS there says; None where nothing is, or no SHA256SUMS."""
    if not (sums := folder / "SHA256SUMS").is_file():
        return None
    *lines, end = sums.read_text(encoding="utf-8", errors="replace").split("\n")
    if end or lines[:1] != [f"# {len(lines) - 1} files"]:
        return f"{sums} is not what was written: it does not list as many files as it says"
    for line in lines[1:]:
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file():
            return f"{folder / name} is missing: {sums.name} lists it"
        if sha256(folder / name) != digest:
            return f"{folder / name} is not what was written: it differs from {sums.name}"
    return None


def check_files(folder: Path) -> None:
    """Stops where a folder has a SHA256SUMS and its files are others."""
    if damage := find_damage(folder):
        fail(f"{damage}. Bring it back, or remove {folder} and make it anew. If you changed it: remove its SHA256SUMS.")


def list_files(folder: Path) -> list[Path]:
    """The files of the folder; stops where one of them lies elsewhere."""
    files = sorted(file for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())
    if outside := [file for file in files if not file.resolve().is_relative_to(folder.resolve())]:
        fail(f"{outside[0]} is a link that leads out of {folder}. Only what lies in the folder is uploaded.")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: fail(f"{message}. See --help.")
    parser.add_argument("--folder", type=Path, required=True, help="folder of an adapter or a model")
    parser.add_argument("--repo_id", required=True, help="user/name on the Hub")
    parser.add_argument("--public", action="store_true", help="make a public repository, or upload into one")
    parser.add_argument("--dry_run", action="store_true", help="say what would be uploaded, upload nothing")
    args = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo_id):
        fail(f"{args.repo_id!r} is not a name on the Hub. Give user/name.")
    if not any((args.folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        fail(f"no adapter or model at {args.folder}. Give a folder with an adapter_config.json or a config.json.")
    check_files(args.folder)
    files = list_files(args.folder)
    for file in files:
        print(f"{file.stat().st_size / 1e6:10.1f} MB  {file.relative_to(args.folder)}")
    if args.dry_run or not get_token():
        print(f"Dry run: nothing was uploaded to {args.repo_id}.")
        if not get_token():
            print("To upload: put HF_TOKEN=<token with write access> into .env, or run: hf auth login")
        return
    try:
        repo = HfApi().create_repo(args.repo_id, private=not args.public, exist_ok=True)
        if not (args.public or HfApi().model_info(args.repo_id).private):
            fail(f"{args.repo_id} is there already, and public. To upload into it all the same: --public")
        HfApi().upload_folder(
            repo_id=args.repo_id,
            folder_path=args.folder,
            allow_patterns=[str(file.relative_to(args.folder)) for file in files],
            commit_message=f"Upload {args.folder.name}",
        )
    except Exception as error:  # no network, no right to write
        fail(f"cannot upload to {args.repo_id}: {' '.join(str(error).split())[:300]} Type the command again to go on.")
    print(f"Uploaded to {repo}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
