#!/usr/bin/env bash
# Ranked candidates to an aligned model: the plan, the training, the held-out margins, a page that shows them.
#
#   bash run.sh [RECIPE] [key=value ...] [--dry-run]
#
# RECIPE defaults to configs/quickstart.yaml. After an interruption the same command continues from the last checkpoint.
# With several GPUs or a DeepSpeed file in the recipe, torchrun starts the training.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- settings ----
PYTHON=.venv-train/bin/python
source ./environment.sh
# ------------------

bash setup.sh train
"$PYTHON" -m pipeline.preflight run "$@"
case " $* " in *" --dry-run "*) exit 0 ;; esac
"$PYTHON" -m alignment.plan "$@"
"$PYTHON" -m alignment.launch "$@"
"$PYTHON" -m alignment.merge "$@"
"$PYTHON" -m evaluation.margins "$@"
"$PYTHON" -m report.run "$@"
