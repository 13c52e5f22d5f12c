#!/usr/bin/env bash
# Everything that is checked: style, types, tests. Arguments go to pytest, e.g. `-m slow` for the long ones.
# With --lowest first: the core tests (tests/core.txt) at the oldest supported versions, in an environment of its own.
set -euo pipefail
if [ "${1:-}" = --lowest ]; then
  shift
  . "$(dirname "$0")/environment.sh" "[datasets,serve,tensorboard]" lowest .venv-lowest pytest pytest-xdist hypothesis
  python scripts/versions.py constraints/lowest.txt
  # shellcheck disable=SC2046
  exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" $(grep -v '^#' tests/core.txt)
fi
. "$(dirname "$0")/environment.sh" "[dev]"
ruff check .
ruff format --check .
mypy
# Tests use one thread each; those of one file share what is costly to build. Files start in the order of conftest.py.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
