#!/usr/bin/env bash
# Pins anew, with all they need, the packages that `make setup` installs: writes env/locks/ from env/requirements*.txt.
# `make lock` calls it, with uv in the PATH: pip install uv.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv > /dev/null || { echo "error: no uv. Type: pip install uv" >&2; exit 1; }

# The build of torch for BACKEND=rocm; env/setup.sh takes the address of its index from the lock.
ROCM=rocm7.2

# Markers make one file right for each Python from 3.10 on and each system.
resolve="uv pip compile --universal --python-version 3.10 --no-annotate --no-header --quiet"
needed="$resolve env/requirements.txt"
tests="$resolve env/requirements-test.txt --constraints env/locks/packages.txt"

write() { # NAME WHAT COMMAND: the pins on standard input to env/locks/NAME.txt
	{ printf '# %s Made by make lock:\n# %s\n' "$2" "$3"; cat; } > "env/locks/$1.txt"
}
all=$($needed)
of_torch='^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)=='
torch=$(grep -oE '^torch==[0-9.]+' <<< "$all")
triton=$(grep -oE '^triton==[0-9.]+' <<< "$all")
grep -vE "$of_torch" <<< "$all" | write packages "All but torch, for each backend." "$needed, without cuda.txt"
grep -E "$of_torch" <<< "$all" | write cuda "torch and the CUDA libraries it needs." "$needed, without packages.txt"
write cpu "torch, whose CPU build needs no libraries." "the torch of cuda.txt" <<< "$torch"
# PyTorch's index would have to answer for a resolution. It has the same release of Triton under another name.
write rocm "torch, which brings ROCm's libraries along." "the torch of cuda.txt for $ROCM, with its release of Triton" \
	<<< "$torch+$ROCM"$'\n'"${triton/triton/triton-rocm}"
pins=$($tests)
write test "What make test and make lint need besides." "$tests" <<< "$pins"
