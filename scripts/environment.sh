# shellcheck shell=bash
# Sourced by the other scripts: goes to the repository root and gives the environment .venv, made at the first need.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# an interpreter's path when it can make an environment for fastle. asking it, not `command -v`, sees through shims
# (pyenv's `python3` may stand for any version or for none), and debian's python3 has ensurepip only with python3-venv.
usable_python() {
    "$1" -c '
import sys, venv, ensurepip
sys.version_info >= (3, 10) or sys.exit(1)
print(sys.executable)' 2>/dev/null
}

find_python() {
    local candidate wanted="no Python >= 3.10 with venv and ensurepip"
    if [[ -n ${PYTHON:-} ]]; then
        usable_python "$PYTHON" || {
            echo "error: PYTHON=$PYTHON is $wanted" >&2
            return 1
        }
        return
    fi
    for candidate in python3 python python3.{13,12,11,10} /usr/bin/python3; do
        usable_python "$candidate" && return
    done
    echo "error: $wanted was found; install one, or name it: PYTHON=/path/to/python3" >&2
    return 1
}

# pip would say so after minutes, and leave half an environment. PyTorch's directory is there after the first time.
check_space() {
    local free need=7
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1e6) }')
    if ((free < need)) && ! compgen -G ".venv/lib/python*/site-packages/torch" >/dev/null; then
        echo "error: .venv takes $need GB, and $PWD has $free GB free; free some, or clone to another disk" >&2
        return 1
    fi
}

# use_environment EXTRA: .venv holds fastle, editable, with its dependencies and those of EXTRA ("" for no extra).
# FASTLE_VERSIONS chooses their versions: "tested" (constraints/tested.txt, the default), "oldest"
# (constraints/oldest.txt), or "newest" (whatever pip finds).
# Installs only when the stamp is stale: setup.py, the constraints or the choice has changed, or the checkout has moved.
use_environment() {
    local extra=$1 versions=${FASTLE_VERSIONS:-tested} choice python stamp state
    case $versions in
        tested | oldest) choice=(--constraint "constraints/$versions.txt") ;;
        newest) choice=(--upgrade --upgrade-strategy eager) ;;
        *)
            echo "error: FASTLE_VERSIONS=$versions is none of tested, oldest and newest" >&2
            return 1
            ;;
    esac
    stamp=.venv/fastle-installed${extra:+-$extra}
    state="$(cat setup.py constraints/*.txt | cksum) $versions $PWD"
    [[ -f $stamp && $(<"$stamp") == "$state" ]] && return
    check_space
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python)
        echo "making .venv with $python" >&2
        "$python" -m venv .venv
    fi
    echo "installing fastle${extra:+[$extra]} into .venv, $versions versions (several GB the first time)" >&2
    .venv/bin/python -m pip install --quiet --quiet --no-compile --disable-pip-version-check "${choice[@]}" --editable ".${extra:+[$extra]}"
    echo "$state" >"$stamp"
}
