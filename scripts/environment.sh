# Sourced by the other scripts: enter the project's root and a virtual environment with this package.
#   . environment.sh EXTRAS [VERSIONS [FOLDER [PACKAGE...]]]
# EXTRAS is e.g. "[dev]"; VERSIONS names a file in constraints/ and is "tested" when not given. With FOLDER the
# environment is the one there; without it one that is already active is used, otherwise .venv is made.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="$1" versions="constraints/${2:-tested}.txt" folder="${3:-}"
shift $(($# < 3 ? $# : 3))
if [ -n "$folder" ] || [ -z "${VIRTUAL_ENV:-}" ]; then
  folder="${folder:-.venv}"
  [ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
  # shellcheck disable=SC1091
  . "$folder/bin/activate"
fi
# The stamp says for which requirements this environment was made, so that a second start takes no time.
stamp="$VIRTUAL_ENV/.diffusion-align-$extras"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ "$versions" -nt "$stamp" ]; then
  echo "installing diffusion-align$extras at the versions in $versions (1 to 3 minutes the first time)"
  # Of these gigabytes little is ever imported: a module is compiled when it is, not here.
  pip=(python -m pip install --quiet --disable-pip-version-check --no-compile -c "$versions")
  # uv takes a fifth of pip's time, but is not there for every machine and does not read pip's settings (an index of
  # your own, say): then pip installs.
  { "${pip[@]}" uv && python -m uv pip install --quiet -c "$versions" -e ".$extras" "$@"; } ||
    "${pip[@]}" -e ".$extras" "$@"
  touch "$stamp"
fi
