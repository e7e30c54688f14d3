"""Upload the folder of an adapter or a model to the Hugging Face Hub.

    python push_model.py --folder out/lora/adapter --repo_id user/name

Reads   the folder, and a token with write access: HF_TOKEN in the environment or in .env, or that of hf auth login.
Writes  a private repository, made where there is none; --public allows and makes a public one. Without a token, or with
        --dry_run, it says what it would upload and uploads nothing.

Only files of the folder itself are uploaded; a link that leads out of it stops the upload.
"""

import re
from pathlib import Path

from dotenv import find_dotenv, load_dotenv
from folders import fail, make_parser

load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the import below

from huggingface_hub import HfApi, get_token


def list_files(folder: Path) -> list[Path]:
    """The files of the folder; stops where one of them lies elsewhere."""
    files = sorted(file for file in folder.rglob("*") if not file.is_dir() or file.is_symlink())
    if outside := [file for file in files if not file.resolve().is_relative_to(folder.resolve())]:
        fail(f"{outside[0]} is a link that leads out of {folder}. Only what lies in the folder is uploaded.")
    return files


def upload(folder: Path, files: list[Path], repo_id: str, public: bool) -> None:
    hub = HfApi()
    repo = hub.create_repo(repo_id, private=not public, exist_ok=True)
    if not (public or hub.model_info(repo_id).private):
        fail(f"{repo_id} is there already, and public. To upload into it all the same: --public")
    names = [str(file.relative_to(folder)) for file in files]
    hub.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message=f"Upload {folder.name}")
    print(f"Uploaded to {repo}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder of an adapter or a model")
    parser.add_argument("--repo_id", required=True, help="user/name on the Hub")
    parser.add_argument("--public", action="store_true", help="make a public repository, or upload into one")
    parser.add_argument("--dry_run", action="store_true", help="say what would be uploaded, upload nothing")
    args = parser.parse_args()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo_id):
        fail(f"{args.repo_id!r} is not a name on the Hub. Give user/name.")
    if not any((args.folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        fail(f"no adapter or model at {args.folder}. Give a folder with an adapter_config.json or a config.json.")
    files = list_files(args.folder)
    for file in files:
        print(f"{file.stat().st_size / 1e6:10.1f} MB  {file.relative_to(args.folder)}")
    if args.dry_run or not get_token():
        print(f"Dry run: nothing was uploaded to {args.repo_id}.")
        if not get_token():
            print("To upload: put HF_TOKEN=<token with write access> into .env, or run: hf auth login")
        return
    try:
        upload(args.folder, files, args.repo_id, args.public)
    except Exception as error:  # no network, no right to write
        fail(f"cannot upload to {args.repo_id}: {' '.join(str(error).split())[:300]} Type the command again to go on.")


if __name__ == "__main__":
    main()
