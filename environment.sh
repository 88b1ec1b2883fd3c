# What every driver sets for its stages, unless the user has set it. Sourced, not run.
# shellcheck shell=bash

# Libraries announce to one another what they will rename; a user can do nothing about it.
export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"
# C++ libraries: errors only. A warning would tell of every engine on a CPU how it binds its memory.
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
# OpenMP's threads spin while they wait for one another. Beside a busy process a thread waits for its core, and the others
# spin that long (docs/performance.md). 10000 turns are some microseconds, then a thread sleeps. Both environments load
# GNU's OpenMP, which torch brings.
[[ -n "${OMP_WAIT_POLICY:-}" ]] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-10000}"
