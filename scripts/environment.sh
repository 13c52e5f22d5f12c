# Sourced by the other scripts: enter the project's root and a virtual environment with this package and "$1" (extras).
# An environment that is already active is used as it is; otherwise .venv is made.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  # shellcheck disable=SC1091
  . .venv/bin/activate
fi
# The stamp says for which requirements this environment was made, so that a second start takes no time.
stamp="$VIRTUAL_ENV/.diffusion-align-$1"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
  echo "installing diffusion-align$1 (about 3 minutes the first time)"
  # Of these gigabytes little is ever imported: a module is compiled when it is, not here.
  python -m pip install --quiet --disable-pip-version-check --no-compile -e ".$1"
  touch "$stamp"
fi
