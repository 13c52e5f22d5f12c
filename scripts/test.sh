#!/usr/bin/env bash
# Everything that is checked: style, types, tests. Arguments go to pytest, e.g. `-m slow` for the long ones.
set -euo pipefail
. "$(dirname "$0")/environment.sh" "[dev]"
ruff check .
ruff format --check .
mypy
# Tests use one thread each; those of one file share what is costly to build. Files start in the order of conftest.py.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
