#!/usr/bin/env bash
# Makes the environment of an engine beside $VENV: env/setup_engine.sh serve|export|runtime|benchmark. The Makefile calls it.
#   serve      $VENV-serve: vLLM, whose torch and transformers are others than those of $VENV
#   export     $VENV-export: the converters of llama.cpp, on the packages of $VENV
#   runtime    llama.cpp itself, built into $VENV-export, for the CPU
#   benchmark  $VENV-benchmark: lm-eval, on the packages of $VENV
# What was not made to its end is made anew. Each command is printed before it runs.
set -euo pipefail
fail() { echo "error: $*" >&2; exit 1; }
run() { printf '+%s\n' "$(printf ' %q' "$@")"; PIP_NO_INPUT=1 "$@"; }

engine=$1 venv=$VENV-${1/runtime/export}
backend=$(< "$VENV/backend")
made=$venv/installed
[ "$engine" != runtime ] || made=$venv/runtime
exec 9> "$venv.lock"
! command -v flock > /dev/null || flock -n 9 || fail "another process is making $venv. Wait for its end."
install() { run "$venv/bin/python" -m pip install --disable-pip-version-check "$@"; }
# From another environment: what was installed there is found here, behind what is here.
on_top_of() { # FOLDER
	echo "$1" > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
}
begin() { # PYTHON OPTIONS
	rm -rf "$venv"
	run "$1" -m venv "${@:2}" "$venv"
}

case $engine in
	serve)
		begin "$VENV/bin/python"
		"$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
			fail "vLLM needs Python 3.11 or newer. Type: make setup PYTHON=python3.12"
		case $backend in
			cpu)
				install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu -r env/locks/cpu.txt
				install --no-deps -r env/locks/serve-cpu.txt ;;
			cuda) install --no-deps -r env/locks/serve-cuda.txt ;;
			# ROCm's vLLM comes with its torch in AMD's image rocm/vllm, not on PyPI.
			*)
				from=$("$PYTHON" -c 'import importlib.util as find; print(find.find_spec("vllm").submodule_search_locations[0])' 2> /dev/null) ||
					fail "$PYTHON has no vLLM, and PyPI has none for ROCm. Start AMD's image rocm/vllm, with this folder in it," \
						"and type there: make serve BACKEND=preinstalled"
				on_top_of "$(dirname "$from")" ;;
		esac ;;
	export | benchmark)
		begin "$VENV/bin/python" $(! grep -q 'system-site-packages = true' "$VENV/pyvenv.cfg" || echo --system-site-packages)
		on_top_of "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
		install --no-deps -r "env/locks/$engine.txt"
		if [ "$engine" = export ]; then # the sources of the runtime, with the converters of the same commit
			mkdir "$venv/sources"
			run "$venv/bin/python" -m pip download --no-deps --no-binary :all: --no-build-isolation --dest "$venv" -r env/locks/runtime.txt
			run tar -xzf "$venv"/llama_cpp_python-*.tar.gz -C "$venv/sources" --strip-components 1
			rm "$venv"/llama_cpp_python-*.tar.gz
			ln -s sources/vendor/llama.cpp "$venv/llama.cpp"
		fi ;;
	runtime)
		command -v c++ > /dev/null || fail "no C++ compiler, and llama.cpp is built from its sources. Type: apt install g++"
		install --no-deps --no-build-isolation "$venv/sources" ;;
esac
echo "$backend" > "$made"
