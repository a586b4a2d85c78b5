#!/usr/bin/env bash
# All checks, as CI runs them: style, types, tests. Arguments go to pytest: scripts/test.sh -k sigreg
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# mypy has work for one core only: it checks while the tests run, and says among their dots what it found, faults or none
.venv/bin/mypy &
types=$!
trap 'kill "$types" 2>/dev/null || true' EXIT
# tests of one file share what they prepare, so a file stays with one process
status=0
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 20 "$@" || status=$?
wait "$types" || {
    echo "error: mypy found faults; they are above, where it ended" >&2
    ((status)) || status=1
}
trap - EXIT
exit "$status"
