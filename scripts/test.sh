#!/usr/bin/env bash
# All checks, as CI runs them: style, types, tests. Arguments go to pytest: scripts/test.sh -k sigreg
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# tests of one file share what they prepare, so a file stays with one process
exec .venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 20 "$@"
