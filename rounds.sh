#!/usr/bin/env bash
# Sample, rank and train several times: in each round the policy of the round before writes the candidates.
#
#   bash rounds.sh [RECIPE] [key=value ...] [--dry-run]      # schedule.rounds=3 and more: docs/methods.md, "Rounds"
#
# RECIPE defaults to configs/quickstart.yaml. The first round is gene.sh, run.sh and evaluate.sh with the same arguments,
# the others are below its run's folder. A finished round returns at once. After a kill at any moment the same command
# continues. Ends with a table of reward and KL by round.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- settings ----
PYTHON=.venv-train/bin/python
source ./environment.sh
# ------------------

bash setup.sh infer
bash setup.sh train
todo=$("$PYTHON" -m evaluation.rounds "$@" --todo)
case " $* " in *" --dry-run "*)
    "$PYTHON" -m evaluation.rounds "$@"
    todo=${todo%% *} # what the next round needs; the later ones need its checkpoint
    ;;
esac
for round in $todo; do
    echo "rounds: round $round"
    bash gene.sh "$@" "round=$round"
    case " $* " in *" --dry-run "*)
        # The recipe stands above, and what an earlier driver of this round will make is not missing.
        for driver in run.sh evaluate.sh; do
            bash "$driver" "$@" "round=$round" |
                sed -n -e 's/MISSING: \(.*\); run .bash [a-z]*\.sh. with this recipe first.*$/not yet: \1/' -e '/^plan: /p'
        done
        continue
        ;;
    esac
    bash run.sh "$@" "round=$round"
    bash evaluate.sh "$@" "round=$round"
done
case " $* " in *" --dry-run "*) exit 0 ;; esac
"$PYTHON" -m evaluation.rounds "$@"
