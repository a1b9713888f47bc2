#!/usr/bin/env bash
# Sets up where needed, then checks style and imports and runs the tests on the CPU.
#
#   bash run/test.sh                  everything but the slow tier; coverage must reach its floor
#   bash run/test.sh --all            the slow tier too, with libtpu in .cache for the TPU compiler
#   bash run/test.sh tests/task -x    arguments go to pytest; part of the tests has no floor
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/run/setup.sh" || exit 1
cd "$root" || exit 1
bin=$root/.venv/bin

# Beside the environment and not in it: where libtpu is found jax looks for a TPU at every start.
install_libtpu() {
  local pin
  pin=$(sed -n 's/^ *\(libtpu==[0-9.]*\)$/\1/p' setup.cfg)
  [ "$(cat .cache/tpu/pin 2>/dev/null)" = "$pin" ] && return
  printf '[test] installing %s\n' "$pin"
  rm -rf .cache/tpu
  "$bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps \
    --target .cache/tpu "$pin" && printf '%s\n' "$pin" >.cache/tpu/pin
}

options=(--cov=r1re_jax --cov-report=term)
arguments=()
for argument in "$@"; do
  if [ "$argument" = --all ]; then
    options+=(-m "slow or not slow")
    install_libtpu || printf '[test] no libtpu: tests of the TPU compiler will be skipped\n' >&2
  else
    arguments+=("$argument")
  fi
done
if [ ${#arguments[@]} -eq 0 ]; then
  # A file's tests stay together, for what they share; more processes than that want much memory.
  options+=(--numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder)
else
  options+=(--cov-fail-under=0)
fi

failed=""
check() {
  local name=$1
  shift
  printf '[test] %s\n' "$name"
  "$@" || failed="$failed $name"
}
check style "$bin/python" -m ruff check --quiet --output-format=concise .
check format "$bin/python" -m ruff format --quiet --check .
check imports "$bin/lint-imports" --no-logo --cache-dir .cache/import-linter

# The simulated devices and the cache of compiled programs are set in tests/conftest.py.
printf '[test] tests\n'
JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 \
  "$bin/python" -m pytest "${options[@]}" ${arguments[@]+"${arguments[@]}"}
status=$?

# Said last, and no line where all is well: pytest's summary closes the output.
if [ -n "$failed" ]; then
  printf '[test] failed before the tests (see the top of this output):%s\n' "$failed" >&2
  [ $status -ne 0 ] || status=1
fi
exit $status
