#!/usr/bin/env bash
# A table of the paper beside ours: does the missing runs, writes results/<scale>/tableN.{json,md,tex,png,html}.
#
#   bash reproduce.sh table2|table4|...|table8|gamma|negatives|noise|... [--scale testbed|paper] [--dry-run]
#   bash reproduce.sh pilot        # the learning rate of each method: results/testbed/pilot.{json,md}
#   bash reproduce.sh theory       # the methods in a world whose reward and optimum are exact: results/theory/
#
# --scale testbed (default): a 135M model on a CPU; paper: the paper's settings. configs/matrix.yaml has the tables of
# each scale. With --only TEXT only runs whose name contains it. Finished runs are found by their files in results/. A
# run that fails is listed, and the others go on. After an interruption the same command continues.
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
