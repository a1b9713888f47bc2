#!/usr/bin/env bash
# Runs a training on a slice of Cloud TPU VMs: docs/tpu.md goes through it.
#
#   bash run/tpu.sh VERB [--name=r1re] [--project=P] [--zone=Z] [--dry-run] …
#
#   create   asks for a slice and waits for it: --type=v5litepod-16, --spot (or --on-demand,
#            --reserved), --runtime=VERSION (follows the type), --valid-until-duration=6h,
#            --wait=SECONDS (0: leaves it in the queue)
#   setup    copies a commit's code to all workers and makes .venv there: --commit=HEAD
#   launch   starts a command on all workers, in tmux: -- COMMAND (run.train on semeval_7b, with
#            its work directory in $R1RE_TPU_WORKDIR), --env=NAME (again and again), --replace
#   logs     prints the log: --worker=0 (or all), --lines=100, --follow
#   status   says what exists, what costs money and how the run is
#   watch    makes a preempted slice anew, sets it up and starts the same command, which resumes:
#            --max-recreations=20, --delete-after
#   delete   ends it all: queued resource and node; --yes (or --force) asks nothing
#
# --dry-run prints the gcloud commands and does nothing; it needs neither gcloud nor a project.
# Project and zone: from the flag, else what `create` remembered, else R1RE_TPU_PROJECT and
# R1RE_TPU_ZONE, else CLOUDSDK_CORE_PROJECT and CLOUDSDK_COMPUTE_ZONE.
# R1RE_DATA, HF_TOKEN, WANDB_API_KEY and what --env names go to the workers from this environment,
# in a file and never on a command line. A launch is remembered in R1RE_TPU_STATE (.tpu), without
# their values. R1RE_TPU_POLL (30): seconds between looks; R1RE_TPU_PATIENCE (8): how many may fail.
set -euo pipefail
here=${BASH_SOURCE[0]%/*} # and not dirname: a dry run needs nothing but bash
if [ ! -d "$here" ]; then here=.; fi
root=$(cd "$here/.." && pwd)
# shellcheck source=run/tpu_cloud.sh
. "$root/run/tpu_cloud.sh"
exec 3>&1

verbs=(create setup launch logs status watch delete)
worker_script=r1re/code/run/tpu_worker.sh
name=r1re project="" zone="" dry=no touched=no
type=v5litepod-16 capacity=spot runtime="" valid="" wait=${R1RE_TPU_WAIT:-86400}
commit=HEAD command=() passed=(R1RE_DATA HF_TOKEN WANDB_API_KEY) replace=""
worker=0 lines=100 follow="" max_recreations=20 delete_after=no yes=no
poll=${R1RE_TPU_POLL:-30} patience=${R1RE_TPU_PATIENCE:-8} workers=1 scratch=""

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$root/run/tpu.sh"; }

# Print the word of a list that needs the fewest changes to become this one.
nearest() {
  local word=$1 best="" least=99 candidate i j cost row before
  shift
  for candidate in "$@"; do
    for ((row = 0, j = 0; j <= ${#candidate}; j++)); do row[j]=$j; done
    for ((i = 1; i <= ${#word}; i++)); do
      before=("${row[@]}") row=("$i")
      for ((j = 1; j <= ${#candidate}; j++)); do
        cost=$((before[j - 1] + 1))
        if [ "${word:i-1:1}" = "${candidate:j-1:1}" ]; then cost=$((before[j - 1])); fi
        if [ $((before[j] + 1)) -lt "$cost" ]; then cost=$((before[j] + 1)); fi
        if [ $((row[j - 1] + 1)) -lt "$cost" ]; then cost=$((row[j - 1] + 1)); fi
        row[j]=$cost
      done
    done
    if [ "${row[${#candidate}]}" -lt "$least" ]; then
      least=${row[${#candidate}]} best=$candidate
    fi
  done
  printf '%s\n' "$best"
}

misuse() {
  say "error: $*"
  say "usage: bash run/tpu.sh VERB [FLAGS], where VERB is one of: ${verbs[*]}; --help says more"
  exit 2
}

flags_of() {
  local common="--name --project --zone --dry-run --help"
  case $1 in
    create)
      echo "$common --type --spot --on-demand --reserved --runtime --valid-until-duration --wait" ;;
    setup) echo "$common --commit" ;;
    launch) echo "$common --env --replace" ;;
    logs) echo "$common --worker --lines --follow" ;;
    watch) echo "$common --max-recreations --delete-after" ;;
    delete) echo "$common --yes --force" ;;
    *) echo "$common" ;;
  esac
}

# A flag without its value: that might be a secret in the wrong place.
set_flag() {
  case $1 in
    --name) name=$2 ;;
    --project) project=$2 ;;
    --zone) zone=$2 ;;
    --type) type=$2 ;;
    --runtime) runtime=$2 ;;
    --valid-until-duration) valid=$2 ;;
    --wait) wait=$2 ;;
    --commit) commit=$2 ;;
    --env) passed+=("$2") ;;
    --worker) worker=$2 ;;
    --lines) lines=$2 ;;
    --max-recreations) max_recreations=$2 ;;
    *) return 1 ;;
  esac
}

set_switch() {
  case $1 in
    --dry-run) dry=yes ;;
    --help) usage && exit 0 ;;
    --spot | --on-demand | --reserved) capacity=${1#--} ;;
    --replace) replace=--replace ;;
    --follow) follow=-F ;;
    --delete-after) delete_after=yes ;;
    --yes | --force) yes=yes ;;
    *) return 1 ;;
  esac
}

parse() {
  local allowed flag
  read -r -a allowed < <(flags_of "$verb")
  while [ $# -gt 0 ]; do
    flag=${1%%=*}
    if [ "$1" = -- ] && [ "$verb" = launch ]; then
      shift
      if [ $# -eq 0 ]; then misuse "no command after --"; fi
      command=("$@")
      return
    fi
    case $flag in
      --?*) ;;
      *) misuse "an argument that is no flag; a command follows --, and that in launch alone" ;;
    esac
    case " ${allowed[*]} " in
      *" $flag "*) ;;
      *) misuse "$verb takes no $flag; the nearest is $(nearest "$flag" "${allowed[@]}")" ;;
    esac
    if [ "$1" = "$flag" ] && set_switch "$flag"; then
      shift
    elif [ "$1" != "$flag" ] && set_flag "$flag" "${1#*=}"; then
      shift
    elif [ $# -gt 1 ] && [ "$1" = "$flag" ] && set_flag "$flag" "$2"; then
      shift 2
    else
      misuse "$flag takes $(if set_flag "$flag" x; then echo a; else echo no; fi) value"
    fi
  done
}

check() {
  local number variable
  [[ $name =~ ^[a-z][a-z0-9-]{0,61}$ ]] ||
    misuse "--name: small letters, digits and -, beginning with a letter"
  for number in wait lines max_recreations poll patience; do
    [[ ${!number} =~ ^[0-9]+$ ]] || misuse "$number must be a whole number, not '${!number}'"
  done
  [[ $worker =~ ^(all|[0-9]+)$ ]] || misuse "--worker: a number or all, not '$worker'"
  for variable in "${passed[@]}"; do
    [[ $variable =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] ||
      misuse "--env takes the name of a variable; its value comes from the environment alone"
  done
}

# The runtime's image follows the chip: cloud.google.com/tpu/docs/runtimes.
choose_runtime() {
  if [ -n "$runtime" ]; then return; fi
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    *) misuse "unknown type '$type': v5litepod-N, v5p-N or v6e-N; another one needs --runtime" ;;
  esac
}

remember() {
  mkdir -p "$state"
  printf '%s\n' "name=$name" "project=$project" "zone=$zone" "type=$type" "capacity=$capacity" \
    "runtime=$runtime" "commit=$commit" "passed=${passed[*]}" >"$state/settings.new"
  mv "$state/settings.new" "$state/settings"
  if [ ${#command[@]} -gt 0 ]; then printf '%s\0' "${command[@]}" >"$state/command"; fi
}

recall() {
  local key value
  if [ ! -f "$state/settings" ]; then return; fi
  while IFS='=' read -r key value; do
    case $key in
      project | zone) if [ -z "${!key}" ]; then printf -v "$key" %s "$value"; fi ;;
      type | capacity | runtime) if [ "$verb" != create ]; then printf -v "$key" %s "$value"; fi ;;
      commit) if [ "$verb" != setup ]; then commit=$value; fi ;;
      passed) if [ "$verb" = watch ]; then read -r -a passed <<<"$value"; fi ;;
    esac
  done <"$state/settings"
  if [ "$verb" = watch ] && [ -f "$state/command" ]; then
    mapfile -d '' -t command <"$state/command"
  fi
}

# Where it all happens. What is remembered comes before the environment: a slice that was made in
# one zone is not to be looked for in another.
settle() {
  state=${R1RE_TPU_STATE:-$root/.tpu}/$name
  recall
  project=${project:-${R1RE_TPU_PROJECT:-${CLOUDSDK_CORE_PROJECT:-PROJECT}}}
  zone=${zone:-${R1RE_TPU_ZONE:-${CLOUDSDK_COMPUTE_ZONE:-ZONE}}}
  where=("--project=$project" "--zone=$zone")
  choose_runtime
  if [ ${#command[@]} -eq 0 ]; then
    command=(python -m run.train --config=configs/semeval_7b.py
      "--workdir=${R1RE_TPU_WORKDIR:-gs://BUCKET/runs/$name}")
  fi
  if [ "$dry" = yes ]; then return; fi
  if [ "$project" = PROJECT ]; then misuse "no project: give --project or R1RE_TPU_PROJECT"; fi
  if [ "$zone" = ZONE ]; then misuse "no zone: give --zone or R1RE_TPU_ZONE"; fi
}

finish() {
  local status=$?
  trap - EXIT INT TERM HUP
  if [ "$status" -ne 0 ] && [ "$touched" = yes ]; then report_costs || true; fi
  if [ -n "$scratch" ]; then rm -rf "$scratch"; fi
  exit "$status"
}

# shellcheck source=run/tpu_verbs.sh
. "$root/run/tpu_verbs.sh"

verb=${1:-}
case $verb in
  "") misuse "no verb" ;;
  -h | --help | help) usage && exit 0 ;;
esac
case " ${verbs[*]} " in
  *" $verb "*) ;;
  *) misuse "unknown verb '$verb'; the nearest is $(nearest "$verb" "${verbs[@]}")" ;;
esac
shift
parse "$@"
check
settle
if [ "$dry" = no ]; then
  umask 077
  scratch=$(mktemp -d)
  trap finish EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  trap 'exit 129' HUP
  touched=yes
  command -v gcloud >/dev/null ||
    fail "gcloud is not on the PATH (cloud.google.com/sdk/docs/install); --dry-run needs none"
fi
"do_$verb"
