#!/usr/bin/env bash
# Tests the base, what `pip install fastle` brings without an extra, with an old torch: tests/kernels, tests/method, and
# what tests/test_packaging.py asks of it. Makes an environment for it and deletes it: 6 GB in $TMPDIR, 15 minutes.
#
#   scripts/oldest_torch.sh [VERSION]    by default the oldest torch that setup.py declares
#
# The Python must be one for which that torch has wheels, for 2.4 up to 3.12; PYTHON=/path/to/python3 names one.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

version=${1:-$(sed -n 's/^BASE_TORCH.*"torch>=\([0-9.]*\)", .*/\1/p' setup.py)}
python=$(find_python)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m venv "$scratch"
"$scratch/bin/pip" install --quiet --quiet --no-compile --disable-pip-version-check \
    "torch==$version" --editable . pytest hypothesis
"$scratch/bin/python" -m pytest -p no:cacheprovider tests/kernels tests/method \
    tests/test_packaging.py::test_operators_need_torch_alone_and_load_no_compiler \
    tests/test_packaging.py::test_the_base_loads_models_and_names_the_extra_of_the_rest
