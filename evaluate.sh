#!/usr/bin/env bash
# A trained run to its metrics: answers to the test prompts, their rewards, BLEU, divergence, margins; win rate on request.
#
#   bash evaluate.sh [RECIPE] [key=value ...] [--dry-run]
#
# RECIPE defaults to configs/quickstart.yaml. Run `bash run.sh` with the same arguments first. The model before training
# answers once for all runs of a recipe. After an interruption the same command continues.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- settings ----
INFER=.venv-infer/bin/python
TRAIN=.venv-train/bin/python
source ./environment.sh
# ------------------

bash setup.sh infer
bash setup.sh train
"$INFER" -m pipeline.preflight evaluate "$@"
case " $* " in *" --dry-run "*) exit 0 ;; esac
"$INFER" -m generation.sample_answers "$@"
"$INFER" -m annotation.score_answers "$@"
"$TRAIN" -m evaluation.margins "$@"
"$TRAIN" -m evaluation.divergence "$@"
"$TRAIN" -m evaluation.metrics "$@"
"$INFER" -m evaluation.judge "$@"
"$TRAIN" -m evaluation.win_rate "$@"
"$TRAIN" -m report.run "$@"
