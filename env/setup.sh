#!/usr/bin/env bash
# Makes the Python environment for the accelerator of this machine. `make setup` calls it, with what it is to do in the
# environment: BACKEND, PYTHON, VENV, TORCH_INDEX, TORCH_VERSION. Each command is printed before it runs. Without
# success, however it ends, the environment that was there comes back, at the next call if not before.
#   --dry-run   only print them
#   --remove    remove the environment
#   --root DIR  look for device files and tools in DIR, as if it were /
set -euo pipefail

dry="" remove="" root=""
while [ $# -gt 0 ]; do
	case "$1" in
		--dry-run) dry=yes ;;
		--remove) remove=yes ;;
		--root) root=${2%/}; shift ;;
	esac
	shift
done
fail() { echo "error: $*" >&2; exit 1; }
run() {
	printf '+%s\n' "$(printf ' %q' "$@")"
	[ ! "$dry" ] || return 0
	# Behind this shell, so that a signal is heard at once, in a process group that can be ended as a whole.
	set -m; PIP_NO_INPUT=1 "$@" < /dev/null & set +m
	wait $!
}
write() { # TEXT FILE
	echo "+ echo $1 > $2"
	[ "$dry" ] || echo "$1" > "$2"
}

# Environment ----------------------------------------------------------------------------------------------------------
# It cannot be moved, as its scripts hold its path: the one that is there waits at $VENV.old while another is made in
# its place. Whole is what has `installed`, which is written last and removed first.
VENV=${VENV%/} here=$(pwd -P) back=""
[ "$VENV" ] || fail "VENV names no folder of its own. Name one: make VENV=.venv"
for folder in "$VENV" "$VENV.old"; do
	[ -L "$folder" ] || [ "$(ls -A "$folder" 2> /dev/null)" ] || continue
	[ -e "$folder/checkout" ] || [ -e "$folder/backend" ] ||
		fail "$folder is there and was not made by this Makefile. Remove it, or name another: make VENV=.venv-2"
	maker=$(cat "$folder/checkout" 2> /dev/null) || maker="another checkout"
	# A checkout that was moved has its environment inside, and is no longer where it was.
	[ "${maker:-$here}" = "$here" ] || [[ ! -e $maker && $(CDPATH="" cd "$folder" && pwd -P) = "$here"/* ]] ||
		fail "$folder was made from $maker, and this is $here. Name another: make VENV=.venv-2, or type: rm -r $folder"
done
discard() { # what says that it is ours goes last
	local GLOBIGNORE=$1/backend:$1/checkout
	[ -L "$1" ] || rm -rf "${1:?}/installed" "${1:?}"/*
	rm -rf "$1"
}
settle() { # keeps what is whole, the new one if both are
	[ -e "$VENV/installed" ] || discard "$VENV"
	if [ ! -e "$VENV" ] && [ -e "$VENV.old/installed" ]; then
		mv "$VENV.old" "$VENV"
		back=yes
		echo "$VENV is again what it was before. Where the disk has no room for two, type: rm -r $VENV" >&2
	fi
	[ ! -e "$VENV/installed" ] && [ -e "$VENV.old/installed" ] || discard "$VENV.old"
}
leave() {
	trap '' HUP INT TERM PIPE
	local group=-$(jobs -p)
	if kill -INT -- "$group"; then # pip has five seconds to clean up
		for _ in {1..50}; do ! kill -0 -- "$group" || sleep 0.1; done
		kill -KILL -- "$group" || true
		wait
	fi 2> /dev/null
	settle
}
if [ ! "$dry" ]; then
	mkdir -p "$(dirname "$VENV")"
	exec 9> "$VENV.lock" # held until this process and those it began have ended, however they end
	! command -v flock > /dev/null || flock -n 9 ||
		fail "another process is making $VENV. Wait for its end, and type the same command again."
	trap leave EXIT
	trap 'exit 130' HUP INT TERM
	[ ! "$remove" ] || { discard "$VENV.old"; discard "$VENV"; rm -f "$VENV.lock"; exit; }
	settle
fi
settings="PYTHON=$PYTHON BACKEND=$BACKEND TORCH_INDEX=$TORCH_INDEX TORCH_VERSION=$TORCH_VERSION"
[ ! "$back" ] || [ "$(< "$VENV/installed")" != "$settings" ] ||
	[ "$(find env/setup.sh env/locks/{cpu,cuda,rocm,packages}.txt -newer "$VENV/installed")" ] || exit 0

# Python ---------------------------------------------------------------------------------------------------------------
command -v "$PYTHON" > /dev/null ||
	fail "no $PYTHON. Type: apt install python3 python3-venv, or name a Python: make PYTHON=/path/to/python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
	fail "$("$PYTHON" --version) is too old, 3.10 or newer is needed. Name one: make PYTHON=python3.12"
"$PYTHON" -c 'import venv, ensurepip' 2> /dev/null || fail "$PYTHON has no venv module. Type: apt install python3-venv"

# Hardware -------------------------------------------------------------------------------------------------------------
tools="$root/usr/bin:$root/opt/rocm/bin"
[ "$root" ] || tools="$PATH:/opt/rocm/bin"
works() {
	local tool
	tool=$(PATH="$tools"; type -P "$1") && timeout 30 "$tool" "${@:2}" > /dev/null 2>&1
}
amd="" nvidia=""
! works nvidia-smi -L || nvidia="an NVIDIA accelerator, by nvidia-smi"
if [ -e "$root/dev/kfd" ]; then
	if works amd-smi list; then amd="an AMD accelerator, by /dev/kfd and amd-smi"
	elif works rocminfo; then amd="an AMD accelerator, by /dev/kfd and rocminfo"
	# PCI class 0x12 is an Instinct. The graphics of an AMD processor have a /dev/kfd too.
	elif grep -qs ^0x12 "$root"/sys/bus/pci/devices/*/class; then
		amd="an AMD accelerator, by /dev/kfd and the PCI bus: neither amd-smi nor rocminfo works"
	fi
fi
found=cpu
[ ! "$nvidia" ] || found=cuda
[ ! "$amd" ] || found=rocm
hardware="${amd:-$nvidia}${amd:+${nvidia:+; $nvidia}}"
hardware=${hardware:-no accelerator, by nvidia-smi, amd-smi, rocminfo and the PCI bus}
echo "Found: $hardware (BACKEND=auto takes $found; others: cpu, cuda, rocm, preinstalled)"

refuse_wrong() { # KIND WHAT
	if [ "$1" = cuda ] && [ "$amd" ] && [ ! "$nvidia" ]; then
		fail "$2 is for CUDA, and the accelerator here is AMD's. Type: make setup BACKEND=rocm"
	elif [ "$1" = rocm ] && [ "$nvidia" ] && [ ! "$amd" ]; then
		fail "$2 is for ROCm, and the accelerator here is NVIDIA's. Type: make setup BACKEND=cuda"
	fi
}
case "$BACKEND" in
	auto) backend=$found ;;
	cpu | cuda | rocm | preinstalled) backend=$BACKEND ;;
	*) fail "BACKEND=$BACKEND is unknown. Type: make setup BACKEND=auto, cpu, cuda, rocm or preinstalled" ;;
esac
refuse_wrong "$backend" "BACKEND=$backend"

# torch ----------------------------------------------------------------------------------------------------------------
# Prints what a Python's torch was built for and where it lies. The file is read, not imported: torch built for CUDA is
# not importable before its libraries are there.
torch_of() {
	"$1" - <<- 'EOF'
	import importlib.util, os, runpy
	spec = importlib.util.find_spec("torch")
	if spec and spec.origin:
	    folder = os.path.dirname(spec.origin)
	    torch = runpy.run_path(os.path.join(folder, "version.py"))
	    print("rocm" if torch["hip"] else "cuda" if torch["cuda"] else "cpu", torch["__version__"], folder)
	EOF
}
pinned=$(sed -n 's/^torch==//p' env/requirements-torch.txt)
rocm=$(sed -n 's/^torch==.*+//p' env/locks/rocm.txt)
case "$TORCH_INDEX" in
	"" | *://*) index=$TORCH_INDEX ;;
	amd) # AMD's own, with ROCm 10, whose torch takes the kernels of a device as an extra
		[ "$backend" = rocm ] || fail "TORCH_INDEX=amd has torch for ROCm. Type: make setup BACKEND=rocm TORCH_INDEX=amd"
		index=https://stable.repo.amd.com/rocm/whl-next/
		gfx=$(cat "$root"/sys/class/kfd/kfd/topology/nodes/*/properties 2> /dev/null |
			awk '/^gfx_target_version / && $2 {print $2; exit}') || true
		gfx=${gfx:-90402} # 9, 4 and 2: an MI300X; 0, which was passed over, is a CPU
		case "$TORCH_VERSION" in
			torch*) ;;
			*) TORCH_VERSION=$(printf 'torch[device-gfx%d%x%x]==%s' $((gfx / 10000)) $((gfx / 100 % 100)) \
				$((gfx % 100)) "${TORCH_VERSION:-2.14.0+rocm10.1.0}") ;;
		esac ;;
	*) index=https://download.pytorch.org/whl/$TORCH_INDEX ;;
esac
case "$backend" in
	# Not --index-url: where PyTorch's index does not answer, pip takes the torch that it sees elsewhere.
	cpu) from=(--extra-index-url "${index:-https://download.pytorch.org/whl/cpu}") ;;
	# Not --extra-index-url: the torch of another index would be the CUDA build.
	rocm) from=(--index-url "${index:-https://download.pytorch.org/whl/$rocm}") ;;
	*) from=(${index:+--index-url "$index"}) ;;
esac
kind="" before="" own=""
if [ "$TORCH_INDEX" ] || [ "${TORCH_VERSION:-$pinned}" != "$pinned" ]; then own=yes; fi
if [ "$backend" = preinstalled ]; then
	[ ! "$own" ] || fail "BACKEND=preinstalled keeps the torch that is there. Leave out TORCH_INDEX and TORCH_VERSION"
	read -r kind version before <<< "$(torch_of "$PYTHON")"
	[ "$kind" ] ||
		fail "$PYTHON has no torch. Type: make setup BACKEND=$found, or name the Python that has it: make setup PYTHON=..."
	refuse_wrong "$kind" "the torch $version of $PYTHON"
	what="beside torch $version for $kind, which stays in $before,"
elif [ "$own" ]; then
	case "$TORCH_VERSION" in
		torch*) torch=("${from[@]}" "$TORCH_VERSION") ;;
		*) torch=("${from[@]}" "torch==${TORCH_VERSION:-$pinned}") ;;
	esac
	what="torch for $backend as asked for, with what it needs, and"
else
	torch=(--no-deps "${from[@]}" -r "env/locks/$backend.txt")
	what="torch $pinned for $backend, pinned in env/locks/$backend.txt, and"
fi
echo "Will install into $VENV: $what the packages of env/locks/packages.txt"

# Installation ---------------------------------------------------------------------------------------------------------
pip=("$VENV/bin/python" -m pip)
[ ! -e "$VENV/installed" ] || run mv "$VENV" "$VENV.old"
run mkdir -p "$VENV"
# Who made it and what torch is for. Written first, so that an interrupted setup is known as ours.
write "$here" "$VENV/checkout"
write "${kind:-$backend}" "$VENV/backend"
if [ "$backend" = preinstalled ]; then
	run "$PYTHON" -m venv --system-site-packages "$VENV"
	# The Python of an image may be one of an environment itself, whose packages are not the system's.
	site=$VENV/lib/$("$PYTHON" -c 'import sys; print("python{}.{}".format(*sys.version_info))')/site-packages
	write "$(dirname "$before")" "$site/preinstalled.pth"
else
	run "$PYTHON" -m venv "$VENV"
	run "${pip[@]}" install "${torch[@]}"
fi
run "${pip[@]}" install --no-deps -r env/locks/packages.txt

[ ! "$dry" ] || kind=$backend after=$before
[ "$dry" ] || read -r kind version after <<< "$(torch_of "$VENV/bin/python")"
if [ "$backend" = preinstalled ]; then
	[ "$after" = "$before" ] || fail "torch came from $before and comes from $after now." \
		"Take what brings it out of env/locks/packages.txt, and type: make setup BACKEND=preinstalled"
elif [ "$backend" != cpu ]; then
	[ "$kind" = "$backend" ] || fail "pip took torch $version for $kind, not for $backend." \
		"See the indexes of pip config list, and type: make setup BACKEND=$backend TORCH_INDEX=..."
elif [ "$kind" = cuda ]; then
	echo "PyTorch's CPU index gave no torch. The CUDA build in its stead runs on the CPU too, with its libraries."
	[ "$own" ] || run "${pip[@]}" install --no-deps -r env/locks/cuda.txt
fi
if ! run "${pip[@]}" check; then
	[ "$own$before" ] || fail "the pinned packages do not fit together. Type: make lock setup"
	echo "warning: this torch, or a package beside it, asks for other versions than those pinned" >&2
fi
# What was asked for, which holds until something else is.
write "$settings" "$VENV/settings"
run mv "$VENV/settings" "$VENV/installed"
