#!/usr/bin/env bash
# A table of the paper beside ours: does the missing runs, writes results/<scale>/tableN.{json,md,tex,png,html}.
#
#   bash reproduce.sh table2|table4|table5|table6|table7|table8|ablation [--scale quickstart|paper] [--dry-run]
#   bash reproduce.sh theory [--dry-run]
#
# --scale quickstart (default): a 135M model on a CPU; paper: the paper's settings. Finished runs are found by their
# files in results/. A run that fails is listed, and the others go on. After an interruption the same command continues.
#
# theory: the methods in a world whose reward, divergence and optimum are exact, without a model; writes results/theory/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- settings ----
PYTHON=.venv-train/bin/python
source ./environment.sh
# ------------------

if [[ "${1:-}" == theory ]]; then
    bash setup.sh train
    exec "$PYTHON" -m theory.reproduce "${@:2}"
fi
bash setup.sh infer
bash setup.sh train
"$PYTHON" -m evaluation.reproduce "$@"
