#!/usr/bin/env bash
# The proof that needs a GPU: the tests marked gpu, then compute-sanitizer on the kernels. One summary at the end.
#
#   scripts/gpu_check.sh [--wheels DIR] [--only tests|sanitizer]
#
# --wheels DIR  install the wheels of DIR beside the machine's own packages first, without a network
# PYTHON        the interpreter; otherwise .venv/bin/python if there is one, else python3
#
# Ends with 0 if every step passed, 1 if one failed, 2 if there is no GPU or the options are wrong.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

only="" wheels=""
wrong() {
    echo "gpu_check: $1" >&2
    exit 2
}
while (($#)); do
    case "$1" in
        --wheels) wheels="${2-}" && [[ -d "$wheels" ]] || wrong "--wheels takes a folder, not '${2-}'" ;;
        --only) only="${2-}" && [[ "$only" == tests || "$only" == sanitizer ]] || wrong "--only takes tests or sanitizer" ;;
        *) wrong "unknown option $1" ;;
    esac
    shift 2
done

python="${PYTHON:-}"
[[ -z "$python" && -x .venv/bin/python ]] && python=.venv/bin/python
python="${python:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
if [[ -n "$wheels" ]]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$wheels"/*.whl || exit 2
    export PYTHONPATH="$work/site:$PYTHONPATH"
fi

if ! "$python" -c 'import sys; from espmedsam_edge.runtime.cuda_api import unavailable; sys.exit(unavailable())'; then
    echo "gpu_check: nothing was checked: this machine has no usable GPU." >&2
    exit 2
fi
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

summary=() failed=0
step() { # name, command...
    local name="$1" begin=$SECONDS
    shift
    echo "== $name"
    if "$@"; then summary+=("passed  $name ($((SECONDS - begin)) s)"); else
        summary+=("FAILED  $name ($((SECONDS - begin)) s)")
        failed=1
    fi
}

# The caches of pytest and hypothesis belong to whoever develops, not to this check.
tests=("$python" -m pytest -m gpu -p no:cacheprovider -rs)

if [[ "$only" != sanitizer ]]; then
    step "tests on the GPU" "${tests[@]}" tests/gpu
fi

if [[ "$only" != tests ]]; then
    if command -v compute-sanitizer > /dev/null; then
        # Each tool slows kernels down by up to a hundred times: fewer random cases, and no camera-sized ones.
        export ESPMEDSAM_KERNEL_EXAMPLES="${ESPMEDSAM_KERNEL_EXAMPLES:-12}"
        for tool in memcheck racecheck initcheck; do
            step "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
                "${tests[@]}" -x -k "not camera" tests/gpu/test_gpu_kernels.py
        done
    else
        summary+=("LEFT OUT  compute-sanitizer: it is not on the PATH; the CUDA toolkit has it")
        failed=1
    fi
fi

echo "== summary"
printf '%s\n' "${summary[@]}"
exit "$failed"
