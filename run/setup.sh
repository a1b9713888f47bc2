#!/usr/bin/env bash
# Makes .venv beside this folder and installs the pinned packages and this checkout into it.
# Run it as often as you like: it does nothing while .venv fits the lock.
#
#   bash run/setup.sh              R1RE_PYTHON=/path/to/python3.11 names the interpreter to build on
#   bash run/setup.sh --tpu        the extra `tpu` in place of tests and tools, for a TPU VM
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/r1re-setup.stamp
case "${1:-}" in
  "") extra=dev what="test packages" hashes=() ;;
  --tpu) extra=tpu what="TPU packages, by hash" hashes=(--require-hashes) ;;
  *) printf '[setup] error: unknown argument %s: --tpu, or none\n' "$1" >&2 && exit 2 ;;
esac

say() { printf '[setup] %s\n' "$*"; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

# What the environment is made from. The path counts too, since scripts in .venv/bin carry it.
fingerprint() {
  (cd "$root" && printf '%s\n' "$root" &&
    cat run/setup.sh setup.cfg pyproject.toml requirements/runtime.txt "requirements/$extra.txt") |
    cksum
}

is_python311() { "$@" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${R1RE_PYTHON:+"$R1RE_PYTHON"} python3.11 python3 python; do
    if is_python311 "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
    [ "$candidate" != "${R1RE_PYTHON:-}" ] || die "R1RE_PYTHON=$R1RE_PYTHON is no Python 3.11"
  done
  die "no Python 3.11 found (looked for python3.11, python3, python on PATH). Install it, for" \
    "example by 'apt-get install python3.11 python3.11-venv', or set R1RE_PYTHON to its path."
}

# Usable: the right Python, with pip, made for this very folder.
venv_works() {
  is_python311 "$python" && "$python" -m pip --version >/dev/null 2>&1 &&
    grep -qF "$venv" "$venv/bin/activate"
}

make_venv() {
  local base
  base=$(find_python)
  "$base" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$base lacks the venv module (on Debian: apt-get install python3.11-venv)"
  "$base" -m venv --clear "$venv"
}

install() {
  "$python" -m pip install --quiet --disable-pip-version-check --no-input "$@" ||
    die "pip failed (above). Check the connection to the package index, then run this again."
}

# A second set-up of the same checkout waits here for the first.
mkdir -p "$root/.cache"
exec 9>"$root/.cache/setup.lock"
if command -v flock >/dev/null; then flock 9; fi

if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ]; then
  say "$venv is up to date"
  exit 0
fi
start=$SECONDS
rm -f "$stamp"
if venv_works; then
  say "1/4 Python environment: $venv is there"
else
  say "1/4 Python environment: making $venv"
  make_venv
fi
say "2/4 run-time packages, by hash: requirements/runtime.txt (about 300 MB to fetch)"
install --require-hashes -r "$root/requirements/runtime.txt"
say "3/4 $what: requirements/$extra.txt"
install ${hashes[@]+"${hashes[@]}"} -r "$root/requirements/$extra.txt"
say "4/4 this checkout, editable"
install --no-deps --no-build-isolation --editable "$root"
fingerprint >"$stamp"
say "done in $((SECONDS - start)) s"
