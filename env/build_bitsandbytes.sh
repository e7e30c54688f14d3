#!/usr/bin/env bash
# Gives a Python environment a bitsandbytes whose native library works with its torch: the installed one where that
# passes a probe, else one built from source.
#
#     PYTHON=.venv/bin/python FORCE=1 bash build_bitsandbytes.sh
#
# Settings, all in the environment:
#   PYTHON           the environment to build for (python3); torch must be installed there
#   COMPUTE_BACKEND  hip, cuda or cpu (what its torch is built for)
#   BNB_ROCM_ARCH    for hip: gfx942, or several, "gfx90a;gfx942" (those of the visible accelerators, else gfx942)
#   BNB_TAG          release to build (0.50.2)
#   BNB_SOURCE       git URL, or a folder with the source, which is copied as it stands (upstream on GitHub)
#   JOBS             compilers at a time (one per core)
#   FORCE            1: build even where the installed package passes the probe
#   ROCM_PATH        where ROCm is (/opt/rocm)
# The package that was there is replaced only by one that passed the probe.
set -euo pipefail

python=${PYTHON:-python3}
release=0.50.2
tag=${BNB_TAG:-$release}
origin=${BNB_SOURCE:-https://github.com/bitsandbytes-foundation/bitsandbytes}
jobs=${JOBS:-$(nproc)}
rocm=${ROCM_PATH:-/opt/rocm}
plain="bash $0" given=PYTHON
[ -z "${MAKELEVEL:-}" ] || plain="make bitsandbytes" given=""
again=$plain # with what was given
for name in $given COMPUTE_BACKEND BNB_ROCM_ARCH BNB_TAG BNB_SOURCE JOBS FORCE; do
    [ -z "${!name:-}" ] || again="$name=$(printf %q "${!name}") $again"
done
unset MAKEFLAGS MAKELEVEL # the make that compiles is none of the calling one's

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Uses the bitsandbytes that $python imports, with the folder $1 searched first, as QLoRA and paged AdamW do. It runs in
# a process of its own with a time limit: a native library of the wrong kind may crash or hang.
probe() {
    (cd "$work" && PYTHONPATH="$1:${PYTHONPATH:-}" COMPUTE_BACKEND="$backend" timeout 600 "$python" -u -) <<'PROBE'
import ctypes, logging, os, sys, warnings

logging.disable()  # the reason of a failure is told below, in one line
warnings.simplefilter("ignore")


class Recorder:
    """Stands before the native library and keeps the names of the functions that are asked for."""

    def __init__(self, library):
        self.library, self.names = library, set()

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(self.library, name)


def check(what, error, bound):
    print(f"  {what}: error {error:.4g} (bound {bound:.4g})")
    if not error <= bound:  # NaN too
        sys.exit(f"probe: {what}: error {error:.4g} is above {bound:.4g}")


def main():
    import torch
    import bitsandbytes as bnb
    from bitsandbytes import cextension, cuda_specs

    print(f"bitsandbytes {bnb.__version__} with torch {torch.__version__}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and os.environ["COMPUTE_BACKEND"] != "cpu":
        version = cuda_specs.get_cuda_version_tuple()
        specs = cuda_specs.CUDASpecs((0, 0), cuda_specs.get_cuda_version_string(), version)
        path = cextension.get_cuda_bnb_library_path(specs)
        ctypes.CDLL(str(path))
        print(f"  native library: {path} loads. No accelerator is visible: nothing was computed")
        return

    if isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary):
        sys.exit(f"probe: no native library was loaded: {cextension.lib.error_msg}")
    library = cextension.lib._lib
    print(f"  native library: {library._name}, on {torch.cuda.get_device_name() if device == 'cuda' else 'the CPU'}")
    recorder = cextension.lib._lib = Recorder(library)

    # A value lies at most half the widest gap of the 16 levels, which are relative to the largest of its block, away.
    torch.manual_seed(0)
    weight = torch.randn(512, 256).to(device)  # the same values on every machine
    levels = bnb.functional.get_4bit_type("nf4", device="cpu").sort().values
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    blocks, returned = (x.reshape(-1, 64) for x in (weight, bnb.functional.dequantize_4bit(packed, state)))
    error = ((returned - blocks).abs().amax(1) / blocks.abs().amax(1)).max().item()
    bound = levels.diff().max().item() / 2 + 1e-4
    check("nf4 quantize and dequantize, against the largest value of a block", error, bound)

    # One token through a layer as QLoRA has it. The results are rounded to bf16: 8 bits, a few roundings.
    layer = bnb.nn.Linear4bit(256, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict({"weight": weight.cpu()})
    layer = layer.to(device)
    token = torch.randn(1, 1, 256, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = token.float() @ bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().T
        error = ((layer(token).float() - expected).norm() / expected.norm()).item()
    check("4-bit decode of one token, relative", error, 0.02)
    if not any("dequantize" in name for name in recorder.names):  # else plain PyTorch took over
        sys.exit("probe: the 4-bit functions did not use the native library")

    # The state is paged from 100,000 values on. In the first step both moments are those of the gradient alone. On an
    # accelerator the weights decay after the step, not before: a difference of lr * lr * weight_decay, 1e-6.
    parameter = torch.nn.Parameter(weight.clone())
    gradient = parameter.grad = torch.randn_like(weight)
    bnb.optim.PagedAdamW32bit([parameter], lr=0.01, weight_decay=0.01, eps=1e-8).step()
    expected = weight * (1 - 0.01 * 0.01) - 0.01 * gradient / (gradient.abs() + 1e-8)
    check("step of paged AdamW at learning rate 0.01", (parameter - expected).abs().max().item(), 1e-5)
    print(f"  native functions of the 4-bit checks: {', '.join(sorted(recorder.names))}")


try:
    main()
except Exception as error:
    sys.exit(f"probe: {type(error).__name__}: {error}".splitlines()[0])
PROBE
}

# What there is -----------------------------------------------------------------------------------------------------
command -v "$python" > /dev/null || fail "there is no $python. Type: PYTHON=/path/to/python $plain"
python=$(command -v "$python")
[[ $python = /* ]] || python=$PWD/$python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# What torch is built for, whether it sees an accelerator, and the architectures of those of AMD.
facts=$("$python" - 2> "$work/reason" << 'FACTS'
import torch

built = "hip" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
visible = range(torch.cuda.device_count())
archs = {torch.cuda.get_device_properties(i).gcnArchName.split(":")[0] for i in visible} if built == "hip" else {}
print(built, "visible" if visible else "none", ";".join(sorted(archs)))
FACTS
) || fail "$python: $(tail -n 1 "$work/reason"). Type: make setup, or install torch: https://pytorch.org/get-started"
read -r built accelerator archs <<< "$facts"

default=$built
[ "$built $accelerator" != "cuda none" ] || default=cpu
backend=${COMPUTE_BACKEND:-$default}
arch=${BNB_ROCM_ARCH:-${archs:-gfx942}}
case "$backend" in
    hip | cuda | cpu) ;;
    *) fail "COMPUTE_BACKEND=$backend is unknown. Type: COMPUTE_BACKEND=hip $plain, or cuda, or cpu" ;;
esac
[[ $arch =~ ^gfx[^,\ \;]+(\;gfx[^,\ \;]+)*$ ]] ||
    fail "BNB_ROCM_ARCH=$arch is no list of architectures. Type: BNB_ROCM_ARCH=\"gfx90a;gfx942\" $plain"
[ "$backend $accelerator" != "cpu visible" ] ||
    fail "torch sees an accelerator: a library for the CPU would not be loaded. Type: COMPUTE_BACKEND=$built $plain"

missing=()
if [ "$backend" != cpu ] && [ "$backend" != "$built" ]; then
    torch="make setup BACKEND=${backend/hip/rocm}, or as https://pytorch.org/get-started says"
    missing+=("torch for $backend (found: for $built): $torch")
elif ! probe ""; then
    echo "The installed bitsandbytes did not pass the probe: building it from source."
elif [ "${FORCE:-}" != 1 ]; then
    echo "The installed bitsandbytes passed the probe: nothing to build. To build all the same, type: FORCE=1 $again"
    exit
fi

# What a build needs ------------------------------------------------------------------------------------------------
# Tools of the environment come first (cmake from PyPI), ROCm's last.
PATH=$(dirname "$python"):$PATH:$rocm/bin
need() { # command, where it comes from
    command -v "$1" > /dev/null || missing+=("$1: $2")
}
[ -e "$origin/bitsandbytes/__init__.py" ] || need git "apt install git"
cmake_version=$(cmake --version 2> /dev/null | sed -n 's/^cmake version //p') || true
[ "$(printf '%s\n' 3.31.6 "${cmake_version:-0}" | sort -V | head -n 1)" = 3.31.6 ] ||
    missing+=("cmake 3.31.6 or newer (found: ${cmake_version:-none}): $python -m pip install 'cmake>=3.31.6'")
need make "apt install make"
[ -n "${CXX:-}" ] || need c++ "apt install g++"
"$python" -m pip --version > /dev/null 2>&1 || missing+=("pip: $python -m ensurepip")
if [ "$backend" = cuda ]; then
    need nvcc "the CUDA toolkit, https://developer.nvidia.com/cuda-downloads"
elif [ "$backend" = hip ]; then
    need hipcc "apt install hipcc"
    need hipconfig "apt install hipcc"
    for header in hipblas/hipblas.h hiprand/hiprand.h hipblaslt/hipblaslt.h hipcub/hipcub.hpp rocblas/rocblas.h; do
        [ -e "$rocm/include/$header" ] || missing+=("$rocm/include/$header: apt install ${header%/*}-dev")
    done
fi
if [ ${#missing[@]} != 0 ]; then
    echo "error: a build for $backend needs more than is here. Install it, then type: $again" >&2
    printf '  %s\n' "${missing[@]}" >&2
    [ "$backend" != hip ] || echo "  The packages are those of ROCm 6 and 7; newer ROCm has all in amdrocm-core-sdk." >&2
    exit 1
fi

# Build, probe, install ---------------------------------------------------------------------------------------------
step() {
    printf '+%s\n' "$(printf ' %q' "$@")"
    "$@" || fail "$1 failed, see above. The bitsandbytes that was installed is still there. Mend it, then type: $again"
}
# In a copy: upstream's CMake writes the library into the source. Libraries of earlier builds stay behind.
if [ -e "$origin/bitsandbytes/__init__.py" ]; then
    mkdir "$work/source"
    tar -C "$origin" --exclude=./.git --exclude=./build --exclude='libbitsandbytes*' -cf - . |
        tar -C "$work/source" -xf -
else
    git -c advice.detachedHead=false clone --depth 1 --branch "$tag" "$origin" "$work/source" ||
        fail "cannot clone tag $tag of $origin. Type: FORCE=1 BNB_SOURCE=folder-with-the-source $plain, or BNB_TAG=another"
fi
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$work/source/bitsandbytes/__init__.py")
[ "$version" = "$tag" ] || echo "note: the source is version $version, not $tag"

options=(-DCOMPUTE_BACKEND="$backend")
[ "$backend" != hip ] || options+=(-DBNB_ROCM_ARCH="$arch")
step cmake -S "$work/source" -B "$work/build" "${options[@]}"
step cmake --build "$work/build" --parallel "$jobs"
export BNB_SKIP_CMAKE=1 # what was just compiled is packed, not compiled again
step "$python" -m pip wheel --no-deps --wheel-dir "$work/wheel" "$work/source"
step "$python" -m pip install --no-deps --target "$work/trial" "$work"/wheel/*.whl
probe "$work/trial" ||
    fail "the bitsandbytes just built did not pass the probe. The one that was installed is still there."
step "$python" -m pip install --no-deps --force-reinstall "$work"/wheel/*.whl
back="Back to the release, type: $python -m pip install --no-deps --force-reinstall bitsandbytes==$release"
probe "" || fail "the bitsandbytes just built is installed and does not pass the probe. $back"
echo "Built, installed and probed in $SECONDS s. $back"
