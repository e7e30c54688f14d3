#!/usr/bin/env bash
# Prints the commands that build the image of env/Dockerfile and run a step in it. `make docker-run` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."

# By number: the device files belong to the groups of the host, whose names may have other numbers in the image.
groups=$({ getent group video render || true; } | sed -E 's/^[^:]*:[^:]*:([0-9]+):.*/ --group-add \1/' | tr -d '\n')
# Mounted rather than given with --env-file, which takes quotes and comments as part of a value.
dotenv=""
[ ! -e .env ] || dotenv=" --volume \"$PWD/.env:/app/.env:ro\""
cache=${HF_HOME:-$HOME/.cache/huggingface}

cat << TEXT
docker build --file env/Dockerfile --tag single-accelerator .
mkdir -p "$PWD/outputs" "$cache"
docker run --rm --interactive --tty \\
  --device /dev/kfd --device /dev/dri$groups --shm-size 8g --user $(id -u):$(id -g) \\
  --volume "$PWD/outputs:/app/outputs" --volume "$cache:/cache"$dotenv \\
  single-accelerator make train-lora
TEXT
