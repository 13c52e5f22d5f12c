#!/usr/bin/env bash
# Make an environment and align the embedded model: images and a report in runs/quickstart, on a laptop, in minutes.
set -euo pipefail
. "$(dirname "$0")/environment.sh" ""
exec diffusion-align train quickstart "$@"
