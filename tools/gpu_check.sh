#!/usr/bin/env bash
# The proof that needs a GPU: engines of TensorRT, TensorRT-RTX, Inductor and ONNX Runtime built and run, the tests marked gpu,
# compute-sanitizer on the kernels, a bench of each precision and each engine, the kernels against the copy rate, a video from
# file to file, several streams, PyTorch and the peers' encoders. At most 250 seconds; each step has a limit of its own and
# its result is written at once. One summary says which targets were met, as a table and as JSON with the machine's description.
#
#   tools/gpu_check.sh [--wheels DIR] [--bundle B.bundle] [--checkpoint W.safetensors] [--out DIR]
#                        [--only STEP]... [--dry-run]
#
# --wheels DIR      install the wheels of DIR beside the machine's own packages first, without a network
# --bundle          FP16 and INT8 graphs to measure, from calibrate; what it lacks is measured of the weights that came
#                   with the program: fundus at 1024 x 1024 in FP32
# --checkpoint      the weights the bundle was exported from, which PyTorch runs; default: those that came along
# --out DIR         default: gpu-check; results of an earlier run there are removed
# --only            engines, builds, tests, sanitizer, bench, compare, kernels, video, streams or peers; several times
# --dry-run         say what would be run; needs no GPU
# PYTHON            the interpreter; otherwise .venv/bin/python if there is one, else python3
#
# Ends with 0 if every step passed, 1 if one failed or was left out, 2 if there is no GPU or the options are wrong.
set -u -o pipefail
here="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

wheels="" dry="" options=()
wrong() {
    echo "gpu_check: $1" >&2
    exit 2
}
absolute() {
    [[ "$1" == /* ]] && echo "$1" || echo "$here/$1"
}
while (($#)); do
    case "$1" in
        --dry-run) dry=1 options+=("$1") ;;
        --wheels) wheels="$(absolute "${2-}")" && [[ -n "${2-}" && -d "$wheels" ]] || wrong "--wheels takes a folder, not '${2-}'" ;;
        --bundle | --checkpoint) [[ -n "${2-}" && -e "$(absolute "$2")" ]] || wrong "$1: there is no '${2-}'" ;;&
        --bundle | --checkpoint | --out) [[ -n "${2-}" ]] || wrong "$1 takes a path" ;;&
        --bundle | --checkpoint | --out) options+=("$1" "$(absolute "$2")") ;;
        --only)
            [[ "${2-}" =~ ^(engines|builds|tests|sanitizer|bench|compare|kernels|video|streams|peers)$ ]] || wrong "--only takes the name of a step, not '${2-}'"
            options+=("$1" "$2")
            ;;
        *) wrong "unknown option $1" ;;
    esac
    [[ "$1" == --dry-run ]] || shift
    shift
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

if [[ -z "$dry" ]]; then
    if ! "$python" -c 'import sys; from espmedsam_edge.runtime.cuda.driver import unavailable; sys.exit(unavailable())'; then
        echo "gpu_check: nothing was checked: this machine has no usable GPU." >&2
        exit 2
    fi
    command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
fi
"$python" tools/gpu_check.py --spent "$SECONDS" "${options[@]}"
