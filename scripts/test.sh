#!/usr/bin/env bash
# Everything that is checked: style, types, tests. Arguments go to pytest, e.g. `-m slow` for the long ones.
set -euo pipefail
. "$(dirname "$0")/environment.sh" "[dev]"
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
