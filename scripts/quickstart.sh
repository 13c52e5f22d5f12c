#!/usr/bin/env bash
# Make an environment and align the embedded model: images and a report in runs/quickstart, on a laptop, in minutes.
set -euo pipefail
here="$PWD" path="$PATH"
. "$(dirname "$0")/environment.sh" ""
# From the caller's folder and with the caller's PATH, so that the commands which are printed can be pasted there.
[ "$here" = "$PWD" ] || set -- "output_dir=$PWD/runs/quickstart" "$@"
cd "$here"
PATH="$path" exec "$VIRTUAL_ENV/bin/diffusion-align" train quickstart "$@"
