# Shared by all drivers: --help, and the environment variables that the user has not set. Sourced, not run.
# shellcheck shell=bash

# Deprecation warnings between libraries; users cannot act on them.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"
# C++ libraries: errors only. Otherwise every engine on a CPU warns how it binds its memory.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
# OpenMP's threads spin while they wait for each other. When another process takes a core, one thread waits for its turn
# and the others burn their cores (docs/operations.md, "Speed"). After 10000 turns, a few microseconds, a thread sleeps.
# Both environments load torch's GNU OpenMP.
[[ -n "${OMP_WAIT_POLICY:-}" ]] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"

case " $* " in *" -h "* | *" --help "*) # the comment at the top of the driver
    sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${0##*/}"
    exit 0
    ;;
esac
