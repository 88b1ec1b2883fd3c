#!/usr/bin/env bash
# The whole method on the embedded models and data, on a laptop without a GPU: candidates, ranking, alignment, and the
# aligned model's answers to prompts that it never saw.
#
#   bash quickstart.sh [key=value ...] [--dry-run]
#
# Takes minutes after the set-up. After an interruption the same command continues and repeats no finished work.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- settings ----
RECIPE=configs/quickstart.yaml
source ./environment.sh
# ------------------

# Both environments first, so that the time printed at the end is only the method's.
bash setup.sh infer
bash setup.sh train
start=$SECONDS
bash gene.sh "$RECIPE" "$@"
bash run.sh "$RECIPE" "$@"
bash evaluate.sh "$RECIPE" "$@"
case " $* " in *" --dry-run "*) exit 0 ;; esac
echo
.venv-train/bin/python -m evaluation.summary "$RECIPE" "$@"
echo "quickstart: $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s after the set-up"
