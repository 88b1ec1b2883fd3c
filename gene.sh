#!/usr/bin/env bash
# Prompts to ranked candidates: every prompt gets K responses (vLLM), every response a reward.
#
#   bash gene.sh [RECIPE] [key=value ...] [--dry-run]
#
# RECIPE defaults to configs/quickstart.yaml. After a kill at any moment the same command continues. Several devices run
# as actors of Ray; RAY_ADDRESS names a cluster.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- settings ----
PYTHON=.venv-infer/bin/python
source ./environment.sh
# ------------------

bash setup.sh infer
"$PYTHON" -m pipeline.preflight gene "$@"
case " $* " in *" --dry-run "*) exit 0 ;; esac
"$PYTHON" -m generation.generate "$@"
"$PYTHON" -m annotation.annotate "$@"
