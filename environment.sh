# What every driver shares: --help, and what it sets for its stages unless the user has set it. Sourced, not run.
# shellcheck shell=bash

# Deprecation warnings between libraries; a user can do nothing about them.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"
# C++ libraries: errors only. A warning would tell of every engine on a CPU how it binds its memory.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
# OpenMP's threads spin while they wait for one another. Beside a busy process a thread waits for its core, and the others
# burn theirs (docs/operations.md, "Speed"). After 10000 turns, some microseconds, a thread sleeps. Both environments
# load torch's GNU OpenMP.
[[ -n "${OMP_WAIT_POLICY:-}" ]] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"

case " $* " in *" -h "* | *" --help "*) # the comment at the top of the driver
    sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${0##*/}"
    exit 0
    ;;
esac
