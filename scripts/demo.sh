#!/usr/bin/env bash
# From a fresh clone to a picture: trains a small self-teaching autoencoder on drawn shapes, in about three minutes on
# two CPU cores once .venv is there, and says where its newest picture is.
# Arguments go to fastle-train: scripts/demo.sh --steps 2000
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment train
# the last --run counts: the picture below is this run's
.venv/bin/fastle-train shapes "$@" --run runs/shapes

newest=
for picture in runs/shapes/grids/*.png; do
    # names hold the step, so the last is the newest; without a match the pattern itself is what the loop sees
    [[ ! -e $picture ]] || newest=$picture
done
[[ -z $newest ]] || echo "newest picture: $PWD/$newest"
