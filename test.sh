#!/usr/bin/env bash
# Lint, types and tests.
#
#   bash test.sh            the repository's behaviour, with both drivers on the real engine
#   bash test.sh fast       the quick subset
#   bash test.sh full       faults, fuzzing, stress, the wheel and lm-evaluation-harness as well
#   bash test.sh gpu        checks on an NVIDIA GPU: random weights, no network, 10 minutes on an H100. PYTHON=/path/to/it
#                           names an interpreter and skips the set-up; what it has not installed is listed as skipped.
#                           Without a GPU it ends with status 1
#
# Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- settings ----
INFER=.venv-infer/bin/python
TRAIN=.venv-train/bin/python
PYTHON="${PYTHON:-}" # of the checks on a GPU
ALL_CARDS=tests/test_gpu.py::test_all_cards_train_as_one
# ------------------

case "${1:-}" in -h | --help)
    sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' test.sh
    exit 0
    ;;
esac

on_gpu() { # interpreter, arguments of pytest
    "$1" -m tests.pins
    # The values that a check measures are what the run is for (-s), and so is what was skipped (-rs).
    # A process that sees several cards would train on all of them at once, so the others are for the last check alone.
    local first="${CUDA_VISIBLE_DEVICES:-0}"
    CUDA_VISIBLE_DEVICES="${first%%,*}" "$1" -m pytest -m gpu -s -rs --durations 10 --deselect "$ALL_CARDS" \
        tests/test_gpu.py "${@:2}"
}

if [[ "${1:-}" == gpu ]]; then
    shift
    source ./environment.sh # the variables that the drivers set
    status=0 # a check that fails does not hide the others
    if [[ -z "$PYTHON" ]]; then
        bash setup.sh train
        bash setup.sh infer
    fi
    on_gpu "${PYTHON:-$TRAIN}" "$@" || status=1
    "${PYTHON:-$TRAIN}" -m pytest -m gpu -s -rs "$ALL_CARDS" || status=1
    [[ -n "$PYTHON" ]] || on_gpu "$INFER" -k "vllm or driver" "$@" || status=1
    "${PYTHON:-$TRAIN}" -c "import torch; exit(not torch.cuda.is_available())" || {
        echo "test.sh gpu: torch sees no GPU on this machine, so nothing was checked" >&2
        status=1
    }
    exit $status
fi

only=" and not full"
case "${1:-}" in
    fast) shift && only=" and not full and not slow" ;;
    full) shift && only="" ;;
esac
bash setup.sh infer
bash setup.sh train
[[ "$only" == *slow ]] || bash setup.sh browser
"$TRAIN" -m ruff check .
"$TRAIN" -m ruff format --check .
.venv-train/bin/ty check hps pipeline --error-on-warning
.venv-train/bin/shellcheck ./*.sh cluster/*.sbatch .ci/run
# GPUs are hidden because the training tests are written for a CPU (bit-equality, fp32). One process per core with one
# thread; all tests of a file run in one process.
CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 "$TRAIN" -m pytest -m "not infer and not gpu$only" --durations 10 \
    --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
# Every test of the inference environment starts an engine or Ray, which use all cores: none is quick.
[[ "$only" == *slow ]] || "$INFER" -m pytest -m "infer$only" --durations 10 "$@"
