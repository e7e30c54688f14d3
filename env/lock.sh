#!/usr/bin/env bash
# Pins anew, with all they need, the packages that `make setup` installs: writes env/locks/ from env/requirements*.txt.
# `make lock` calls it, with uv in the PATH: pip install uv.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv > /dev/null || { echo "error: no uv. Type: pip install uv" >&2; exit 1; }

# The build of torch for BACKEND=rocm; env/setup.sh takes the address of its index from the lock.
ROCM=rocm7.2

# Markers make one file right for each Python from 3.10 on and each system; the hashes are those of all files of a release.
resolve="uv pip compile --universal --python-version 3.10 --generate-hashes --no-annotate --no-header --quiet"
needed="$resolve env/requirements.txt"
tests="$resolve env/requirements-test.txt --constraints env/locks/packages.txt"

write() { # NAME WHAT COMMAND: the pins on standard input to env/locks/NAME.txt
	{ printf '# %s Made by make lock:\n# %s\n' "$2" "$3"; cat; } > "env/locks/$1.txt"
}
pins() { # 0 or 1: the pins, each with the lines of its hashes, that are not, or are, torch or what only torch needs
	awk -v of_torch="$1" '/^[^ ]/ { keep = /^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==/ == of_torch } keep'
}
all=$($needed)
torch=$(grep -oE '^torch==[0-9.]+' <<< "$all")
triton=$(grep -oE '^triton==[0-9.]+' <<< "$all")
pins 0 <<< "$all" | write packages "All but torch, for each backend." "$needed, without cuda.txt"
pins 1 <<< "$all" | write cuda "torch and the CUDA libraries it needs." "$needed, without packages.txt"
# PyTorch's index would have to answer for a resolution, and for hashes. It has the same release of Triton under another
# name.
write cpu "torch, whose CPU build needs no libraries; without a hash." "the torch of cuda.txt" <<< "$torch"
write rocm "torch, which brings ROCm's libraries along; without hashes." "the torch of cuda.txt for $ROCM, with its release of Triton" \
	<<< "$torch+$ROCM"$'\n'"${triton/triton/triton-rocm}"
all=$($tests)
write test "What make test and make lint need besides." "$tests" <<< "$all"

# The engines. vLLM has a torch of its own, whose companions for images and sound its CPU build does not load.
serve="${resolve/3.10/3.11} env/requirements-serve"
companions=$(printf "%s; python_version < '3'\n" torchvision torchaudio torchcodec)
all=$($serve-cpu.txt --override <(printf 'torch\n%s\n' "$companions"))
pins 0 <<< "$all" | write serve-cpu "vLLM for the CPU, but for torch." "$serve-cpu.txt, without torchvision, torchaudio, torchcodec"
all=$($serve-cuda.txt)
write serve-cuda "vLLM for CUDA, with its torch." "$serve-cuda.txt" <<< "$all"
# On top of packages.txt: what it has for the same systems is there already.
besides() {
	awk 'NR == FNR { known[$0]; next } /^[^ ]/ { keep = !($0 in known) } keep' env/locks/packages.txt -
}
export="${tests/test/export}" benchmark="${tests/test/benchmark}"
of_llama() { # 0 or 1: the pins that are not, or are, llama.cpp's
	awk -v of_llama="$1" '/^[^ ]/ { keep = /^llama-cpp-python==/ == of_llama } keep'
}
all=$(besides <<< "$($export)")
of_llama 0 <<< "$all" | write export "What llama.cpp's converters and its build need besides." "$export, without packages.txt"
of_llama 1 <<< "$all" | write runtime "llama.cpp, with its converters." "$export"
pins 0 <<< "$($benchmark)" | besides | write benchmark "What lm-eval needs besides." "$benchmark, without packages.txt and cuda.txt"
