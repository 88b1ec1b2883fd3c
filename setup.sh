#!/usr/bin/env bash
# Builds one of the two environments and the embedded models. Returns at once if both exist.
#
#   bash setup.sh infer|train [cpu|cuda]
#   bash setup.sh train cuda flash
#   bash setup.sh browser
#
#   infer   .venv-infer: vLLM, Ray             requirements-infer.txt, on the CPU requirements-infer-cpu.txt
#   train   .venv-train: TRL, DeepSpeed        requirements-train.txt, on the CPU requirements-train-cpu.txt
#   flash   flash-attn, too: for policies that cannot share prompts. It is compiled, in some ten minutes to an hour, and
#           needs nvcc. A rebuilt environment needs it again.
#   browser Chromium or Chrome for the tests of the pages: finds one, or installs Debian's where it can
#
# The second argument defaults to the one of the first call; in the first call to cuda if nvidia-smi runs, else to cpu.
# On the CPU the environments take 3.0 GB and 2.2 GB and, on a fast network, three to five minutes each. An environment is
# rebuilt after an interruption and when its requirement file or the repository's path changes; pip's cache then saves
# the downloads. Nothing needs to be activated. The settings below can be set in the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# This comes first: the bash of macOS cannot parse the rest of this file.
case "$(uname -s) $(uname -m)" in
    "Linux x86_64") ;;
    *)
        echo "error: setup.sh: this machine is $(uname -s) on $(uname -m), and the environments need Linux on x86_64" \
            "(vLLM's and torch's builds); use such a machine, a container or WSL" >&2
        exit 2
        ;;
esac

# ---- settings ----
# The interpreter to build from; if empty, the first of python3.11, python3.12, python3 that fits.
PYTHON="${PYTHON:-}"
# Used only for torch, and only if pip's configured sources lack the CPU build.
TORCH_CPU_INDEX="${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"
# Compiling flash-attn is given up after this time.
FLASH_ATTN_LIMIT="${FLASH_ATTN_LIMIT:-60m}"
# ------------------

main() {
    parse_arguments "$@"
    local stamp="$VENV/setup-stamp" environment project state
    # Comments do not count. The path does: an environment that is copied with its clone imports from the old path.
    environment="$({ echo "$PWD $DEVICE" && sed 's/ *#.*//; /^$/d' "$REQUIREMENTS"; } | sha256sum | cut -c1-64)"
    project="$(sha256sum <pyproject.toml | cut -c1-64)"
    if ! is_built "$stamp" "$environment $project"; then
        # An environment belongs to one folder: through a link, another clone's would be taken apart.
        [[ ! -L "$VENV" ]] || die 2 "setup.sh: $VENV is a link to $(readlink "$VENV"); remove the link, then run setup.sh again"
        take_lock
        if ! is_built "$stamp" "$environment $project"; then # another set-up may have built it meanwhile
            state="$(cat "$stamp" 2>/dev/null || true)"
            rm -f "$stamp" # before any change: an interrupted environment must not look finished
            if [[ "${state% *}" != "$environment" || ! -x "$VENV/bin/python" ]]; then
                build_environment
            fi
            install_project
            echo "$environment $project" >"$stamp.new"
            mv "$stamp.new" "$stamp"
            say "$VENV is ready: $(du -sh "$VENV" | cut -f1), $SECONDS s"
        fi
    fi
    [[ -z "$FLASH" ]] || install_flash_attn
    "$VENV/bin/python" -m tools.embedded
}

find_browser() { # without one the tests of the pages are skipped, so this never fails
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        if command -v "$name" >/dev/null; then
            say "browser for the tests of the pages: $(command -v "$name")"
            return
        fi
    done
    mkdir -p models
    if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
        say "installing Debian's chromium for the tests of the pages (log: models/browser.log)"
        if { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y chromium; } >models/browser.log 2>&1; then
            say "installed $(command -v chromium)"
            return
        fi
    fi
    say "no Chromium or Chrome on the PATH: the tests of the pages are skipped (Debian: apt install chromium)"
}

parse_arguments() {
    case "${1:-}" in
        -h | --help) usage && exit 0 ;;
        browser) [[ $# == 1 ]] && find_browser && exit 0 ;;&
        infer | train) VENV=".venv-$1" ;;
        *) die 2 "setup.sh: '${1:-}' is no environment; usage: bash setup.sh infer|train [cpu|cuda], bash setup.sh browser" ;;
    esac
    FLASH=""
    [[ "$*" != "train cuda flash" ]] || FLASH=yes
    [[ $# -le 2 || -n "$FLASH" ]] ||
        die 2 "setup.sh: '$3' is one argument too many; usage: bash setup.sh infer|train [cpu|cuda], or train cuda flash"
    DEVICE="${2:-}"
    CHOSEN="as asked"
    # Keep the device of the first call: a login node without a driver must not replace a GPU node's environment.
    DEVICE_FILE="models/.device$VENV"
    if [[ -z "$DEVICE" && -f "$DEVICE_FILE" ]]; then
        DEVICE="$(<"$DEVICE_FILE")" CHOSEN="as the first time; bash setup.sh $1 cpu|cuda changes it"
    elif [[ -z "$DEVICE" ]]; then
        if nvidia-smi -L >/dev/null 2>&1; then
            DEVICE=cuda CHOSEN="nvidia-smi runs"
        else
            DEVICE=cpu CHOSEN="nvidia-smi does not run"
        fi
    fi
    case "$DEVICE" in
        cpu) REQUIREMENTS="requirements-$1-cpu.txt" ;;
        cuda) REQUIREMENTS="requirements-$1.txt" ;;
        *) die 2 "setup.sh: '$DEVICE' is no device; usage: bash setup.sh infer|train [cpu|cuda]" ;;
    esac
}

is_built() { # stamp file, what it must hold
    [[ -x "$VENV/bin/python" && "$(cat "$1" 2>/dev/null)" == "$2" ]]
}

take_lock() { # one set-up of an environment at a time; the lock ends with this process
    mkdir -p models
    exec 9>"models/.setup$VENV.lock"
    if ! flock -n 9; then
        say "waiting for another set-up of $VENV"
        flock 9
    fi
}

build_environment() {
    find_python
    say "building $VENV for $DEVICE ($CHOSEN) with $("$PYTHON" -V) from $REQUIREMENTS"
    echo "$DEVICE" >"$DEVICE_FILE"
    if [[ -e "$VENV" ]]; then
        say "removing the unfinished or outdated $VENV"
        rm -rf "$VENV"
    fi
    "$PYTHON" -m venv "$VENV"
    if [[ "$DEVICE" == cpu ]]; then
        install_cpu
    else
        install_cuda
    fi
}

find_python() {
    local candidate found=""
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null ||
                die 1 "$candidate has no venv module; install it (Debian and Ubuntu: apt install $("$candidate" -c \
                    'import sys; print("python3.%d-venv" % sys.version_info[1])')), then run setup.sh again"
            PYTHON="$candidate"
            return
        fi
        found+=" $candidate: $("$candidate" -V 2>/dev/null || echo missing);"
    done
    die 1 "Python 3.11 or 3.12 is needed (found:${found%;}); install one, or name it: PYTHON=/path/to/it bash setup.sh"
}

install_cpu() { # the file is a complete lock: --no-deps
    local torch sources=()
    torch="$(grep -o '^torch==[^ ]*' "$REQUIREMENTS" || true)"
    if [[ -n "$torch" ]]; then
        # An unreachable index costs seconds for each package, so only this one uses it.
        if ! "$VENV/bin/python" -m pip install --dry-run --no-deps "$torch" >>"$VENV/setup.log" 2>&1; then
            say "pip's sources have no $torch: taking it from $TORCH_CPU_INDEX"
            sources=(--extra-index-url "$TORCH_CPU_INDEX")
        fi
        pip_install "$torch" --no-deps "${sources[@]}" "$torch"
    fi
    pip_install "$REQUIREMENTS" --no-deps -r "$REQUIREMENTS"
}

install_cuda() {
    local rest="$VENV/requirements.txt"
    grep -v '^flash-attn' "$REQUIREMENTS" >"$rest"
    pip_install "$REQUIREMENTS" -r "$rest"
}

install_flash_attn() { # after torch, which its build imports
    local python="$VENV/bin/python" log="$VENV/setup.log" pin architectures
    pin="$(grep -o '^flash-attn==[^ ]*' "$REQUIREMENTS")"
    ! "$python" -c 'import flash_attn' 2>/dev/null || return 0
    take_lock
    # Its default compiles for every generation of cards, each in as much time. 8.9 runs what 8.0 does.
    architectures="$({ nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true; } |
        sed 's/\..*/0/' | sort -u | paste -sd ';')"
    [[ -z "$architectures" ]] || export FLASH_ATTN_CUDA_ARCHS="${FLASH_ATTN_CUDA_ARCHS:-$architectures}"
    say "$pin: compiling for at most $FLASH_ATTN_LIMIT (log: $log)"
    if timeout --foreground --signal=INT "$FLASH_ATTN_LIMIT" \
        "$python" -m pip install --no-build-isolation "$pin" >>"$log" 2>&1 &&
        "$python" -c 'import flash_attn' >>"$log" 2>&1; then
        say "$pin installed"
    else
        # transformers would choose an installed one even if it cannot be imported.
        "$python" -m pip uninstall -y flash-attn >>"$log" 2>&1
        die 1 "$pin cannot be built or imported here (the end of $log says why); $VENV works without it"
    fi
}

install_project() { # with the environment's setuptools: no isolated build, no network
    # `compat` puts the whole folder on the path: workers and actors start elsewhere and import the stages, of which
    # the wheel has none.
    pip_install "this repository, editable" --no-deps --no-build-isolation --config-settings editable_mode=compat \
        --editable .
}

pip_install() { # name for the screen, arguments of pip install; the log has all output, the screen the main lines
    local name="$1" log="$VENV/setup.log" start=$SECONDS
    shift
    say "installing $name"
    if ! PYTHONUNBUFFERED=1 "$VENV/bin/python" -m pip install "$@" 2>&1 | tee -a "$log" | awk "$PIP_PROGRESS"; then
        tail -n 20 "$log" >&2
        die 1 "pip could not install $name (above: the end of $log); run setup.sh again once the cause is gone"
    fi
    say "installed $name in $((SECONDS - start)) s"
}

# From pip's several hundred lines: a count, the big downloads, and a word before the long silence at the end.
# shellcheck disable=SC2016  # awk's variables, not the shell's
PIP_PROGRESS='
    /^(Collecting|Processing|Requirement already)/ && ++n % 25 == 0 { print "[setup]   " n " packages found" }
    /^ +(Downloading|Using cached)/ && ($NF == "GB)" || $NF == "MB)" && substr($(NF - 1), 2) + 0 >= 20) {
        print "[setup] " $0
    }
    /^Installing collected packages/ && NF > 20 { print "[setup]   unpacking " NF - 3 " packages, a minute or two" }
    { fflush() }'

usage() { sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]##*/}"; }

say() { echo "[setup] $*"; }

die() { # exit status, message
    echo "error: $2" >&2
    exit "$1"
}

main "$@"
