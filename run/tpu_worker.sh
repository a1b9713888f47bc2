#!/usr/bin/env bash
# What each worker of a TPU slice does. run/tpu.sh calls it over ssh, run/sky.yaml by itself.
#
#   setup                           .venv with the extra `tpu`, and tmux
#   start [--replace] -- COMMAND…   in tmux, so that a lost ssh does not matter
#   state                           one line: r1re-worker HOST idle, running, ended N or lost
#   exec -- COMMAND…                in the foreground
#
# `start` reads variables from ~/r1re/env, and removes it; the log is ~/r1re/log.
set -euo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
home=${R1RE_WORKER_HOME:-$HOME/r1re}
session=r1re

die() { printf '[worker] %s: error: %s\n' "$(hostname)" "$*" >&2; exit 1; }

running() { tmux has-session -t "=$session" 2>/dev/null; }

# TPU VMs come with Python 3.10. uv needs no root and none of apt's locks, which a fresh VM holds.
bring_python() {
  local pin
  if python3.11 -c 'import ensurepip, venv' 2>/dev/null; then return; fi
  pin=$(grep -E '^uv==' "$code/requirements/dev.txt")
  python3 -m pip install --quiet --disable-pip-version-check --user "$pin"
  python3 -m uv python install --quiet 3.11
  R1RE_PYTHON=$(python3 -m uv python find 3.11)
  export R1RE_PYTHON
}

setup() {
  if ! command -v tmux >/dev/null; then
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y tmux
  fi
  bring_python
  bash "$code/run/setup.sh" --tpu
}

metadata() {
  curl --silent --fail --max-time 10 --retry 3 --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

# Tell the processes of the slice about each other. On a TPU VM the metadata server knows, and not
# the environment, which is what r1re_jax.hosts reads.
find_others() {
  local listed number entries
  if [ -n "${JAX_COORDINATOR_ADDRESS:-}" ]; then return; fi
  listed=$(metadata worker-network-endpoints 2>/dev/null) || return 0
  IFS=, read -r -a entries <<<"$listed"
  if [ ${#entries[@]} -lt 2 ]; then return; fi
  number=$(metadata agent-worker-number) ||
    die "the metadata server does not say which worker this is"
  # An entry is a host's name, or NAME:ID:ADDRESS.
  export JAX_COORDINATOR_ADDRESS=${entries[0]##*:}:8476
  export JAX_NUM_PROCESSES=${#entries[@]} JAX_PROCESS_ID=$number
}

enter() {
  local name
  cd "$code"
  export PATH=$code/.venv/bin:$PATH PYTHONUNBUFFERED=1
  # SkyPilot passes what was not given as an empty string.
  for name in HF_TOKEN WANDB_API_KEY R1RE_DATA; do
    if [ -z "${!name:-}" ]; then unset "$name"; fi
  done
  find_others
}

start() {
  local pid
  if running; then
    if [ "$1" != --replace ]; then
      rm -f "$home/env"
      die "a run goes on here already; --replace ends it first, with its state saved"
    fi
    pid=$(cat "$home/pid" 2>/dev/null) && kill -TERM "$pid" 2>/dev/null || true
    for _ in $(seq "${R1RE_WORKER_PATIENCE:-300}"); do
      if ! running; then break; fi
      sleep 1
    done
    tmux kill-session -t "=$session" 2>/dev/null || true
  fi
  shift
  mkdir -p "$home"
  rm -f "$home/status" "$home/pid"
  printf '%s\0' "$@" >"$home/command"
  tmux new-session -d -s "$session" "bash $(printf %q "$code/run/tpu_worker.sh") run"
}

run() {
  local command status=0
  mapfile -d '' -t command <"$home/command"
  if [ -f "$home/env" ]; then
    # shellcheck disable=SC1091
    . "$home/env"
    rm -f "$home/env"
  fi
  enter
  printf '== %s %s\n' "$(date -u +%FT%TZ)" "${command[*]}" >>"$home/log"
  # A pipe, whose end is waited for: when the session goes, it takes what still writes with it.
  {
    "${command[@]}" &
    printf '%s\n' $! >"$home/pid"
    wait $! || status=$?
    printf '%s\n' "$status" >"$home/status.new"
  } 2>&1 | tee -a "$home/log"
  mv "$home/status.new" "$home/status"
}

state() {
  local word
  if running; then
    word=running
  elif [ -f "$home/status" ]; then
    word="ended $(cat "$home/status")"
  elif [ -f "$home/command" ]; then
    word=lost # the session went, and nobody wrote a status: the VM was started anew
  else
    word=idle
  fi
  printf 'r1re-worker %s %s\n' "$(hostname)" "$word"
}

case "${1:-}" in
  setup | run | state) "$1" ;;
  start)
    shift
    replace=no
    if [ "${1:-}" = --replace ]; then replace=--replace && shift; fi
    if [ "${1:-}" != -- ] || [ $# -lt 2 ]; then die "start needs -- and a command"; fi
    shift
    start "$replace" "$@"
    ;;
  exec)
    if [ "${2:-}" != -- ] || [ $# -lt 3 ]; then die "exec needs -- and a command"; fi
    shift 2
    enter
    exec "$@"
    ;;
  *) die "unknown '${1:-}': setup, start, state or exec" ;;
esac
