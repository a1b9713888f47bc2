# shellcheck shell=bash
# shellcheck disable=SC2154  # the settings are run/tpu.sh's
# What run/tpu.sh asks of Google Cloud; sourced by it. Functions that others call in a condition
# return their own failures, since bash's errexit is off there.

say() { printf '[tpu] %s\n' "$*" >&2; }
fail() { say "error: $*" && return 1; }
# A signal ends `wait` at once, and a sleep in the foreground only when it is over.
nap() {
  sleep "$1" >/dev/null 2>&1 3>&- &
  wait $!
}
note() { if [ "$dry" = yes ]; then printf '# %s\n' "$*" >&3; else say "$*"; fi; }

# One line that a shell reads back as these words.
quoted() {
  local word line=""
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_./:=@%+,-]* | "")
        # --flag='a value', the way people write it
        if [[ $word =~ ^(--[a-z-]+=)(.*)$ ]]; then
          word=${BASH_REMATCH[1]}${BASH_REMATCH[2]@Q}
        else
          word=${word@Q}
        fi
        ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# gcloud, or with --dry-run the command as text. Without stdin: ssh would read what is not its own.
cloud() {
  if [ "$dry" = yes ]; then
    quoted gcloud "$@" >&3
  else
    gcloud "$@" </dev/null
  fi
}

# Set `answer` to a field of queued-resources or tpu-vm, or to NONE or UNKNOWN, and `detail`.
ask() {
  local what=$1 fields=$2 pretend=$3 line
  detail=""
  if [ "$dry" = yes ]; then
    cloud compute tpus "$what" describe "$name" "${where[@]}" "--format=value($fields)"
    answer=$pretend
  elif line=$(cloud compute tpus "$what" describe "$name" "${where[@]}" \
    "--format=value($fields)" 2>"$scratch/errors"); then
    IFS=$'\t' read -r answer detail <<<"$line" || true
    answer=${answer:-UNKNOWN}
  elif grep -qiE 'NOT_FOUND|was not found' "$scratch/errors"; then
    answer=NONE
  else
    answer=UNKNOWN
    detail=$(tail -n 1 "$scratch/errors" 2>/dev/null || true)
  fi
}
ask_queued() { ask queued-resources state.state,state.failedData.error.message ACTIVE; }
ask_node() { ask tpu-vm 'state,networkEndpoints.len()' READY; }

# Wait before another try: twice as long each time, ten minutes at most.
pause() {
  local seconds=$poll n
  if [ "$dry" = yes ]; then return; fi
  for ((n = 1; n < $1 && seconds < 600; n++)); do seconds=$((seconds * 2)); done
  nap $((seconds < 600 ? seconds : 600))
}

# What exists, what of it costs money, and what ends that. Said after every failure.
report_costs() {
  local queued node
  ask_queued
  queued=$answer
  ask_node
  node=$answer
  say "what exists now in project $project, zone $zone:"
  if [ "$queued" = NONE ] && [ "$node" = NONE ]; then
    say "  nothing named $name: nothing costs money"
    return 0
  fi
  say_part "queued resource" "$queued" queued-resources
  say_part node "$node" tpu-vm
  say "to end that: $(quoted bash run/tpu.sh delete "--name=$name" "${where[@]}" --yes)"
  if [ "$queued" != NONE ]; then
    say "or: $(quoted gcloud compute tpus queued-resources delete "$name" "${where[@]}" \
      --force --quiet)"
  fi
  if [ "$queued" = NONE ] || [ "$node" = UNKNOWN ]; then
    say "or: $(quoted gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet)"
  fi
}

say_part() {
  local costs
  case "$1 $2" in
    *NONE) say "  $1 $name: none" && return ;;
    *UNKNOWN)
      say "  $1 $name: gcloud does not say; it may exist and cost money. To look:" \
        "gcloud compute tpus $3 list $(quoted "${where[@]}")"
      return
      ;;
    node\ PREEMPTED | node\ TERMINATED | node\ STOP* | node\ DELETING)
      costs="its chips are gone, and cost nothing" ;;
    node*) costs="costs money now, until it is deleted" ;;
    *ACTIVE) costs="holds the node" ;;
    *SUSPEND* | *FAILED | *DELETING) costs="gets nothing more" ;;
    *) costs="costs nothing yet, and money as soon as it is granted" ;;
  esac
  say "  $1 $name in state $2: $costs"
}

request_slice() {
  local tier=()
  case $capacity in
    spot) tier=(--spot) ;;
    reserved) tier=(--reserved) ;;
  esac
  note "asking for $type ($capacity) as $name in project $project, zone $zone"
  cloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}" \
    "--accelerator-type=$type" "--runtime-version=$runtime" ${tier[@]+"${tier[@]}"} \
    ${valid:+"--valid-until-duration=$valid"} || fail "$name was not created (gcloud, above)"
}

# How the slice is: up, waiting, lost (preempted or refused), gone or unknown, and `why`.
look() {
  ask_queued
  why="queued resource $answer${detail:+: $detail}"
  case $answer in
    ACTIVE) ;;
    NONE) slice=gone && return ;;
    UNKNOWN) slice=unknown && return ;;
    FAILED | SUSPENDING | SUSPENDED) slice=lost && return ;;
    *) slice=waiting && return ;;
  esac
  ask_node
  why="node $answer"
  case $answer in
    READY) slice=up workers=${detail:-1} ;;
    PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING | NONE) slice=lost ;;
    UNKNOWN) slice=unknown why+=": $detail" ;;
    *) slice=waiting ;;
  esac
}

# Wait until the slice is up; a queue may take hours.
await_slice() {
  local start=$SECONDS said="" unknown=0
  while :; do
    look
    case $slice in
      up) return 0 ;;
      lost | gone) fail "there is no slice: $why" || return 1 ;;
      unknown) unknown=$((unknown + 1)) ;;
      waiting) unknown=0 ;;
    esac
    if [ "$unknown" -ge "$patience" ]; then fail "gcloud does not answer: $why" || return 1; fi
    if [ "$why" != "$said" ]; then say "waiting: $why" && said=$why; fi
    if [ $((SECONDS - start)) -ge "$wait" ]; then
      fail "waited $wait s in vain: $why. It stays in the queue" || return 1
    fi
    pause "$unknown"
  done
}

remote() {
  cloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" --quiet "--command=$2"
}
to_workers() {
  cloud compute tpus tpu-vm scp "$1" "$name:$2" "${where[@]}" --worker=all --quiet
}

# ssh comes up some minutes after the node is READY.
await_ssh() {
  local try
  for ((try = 1; try <= patience; try++)); do
    if remote all 'mkdir -p -m 700 r1re'; then return 0; fi
    say "no ssh to all workers yet (try $try of $patience)"
    look
    if [ "$slice" = lost ]; then fail "the slice is lost: $why" || return 1; fi
    if [ "$try" -lt "$patience" ]; then pause "$try"; fi
  done
  fail "not all workers of $name can be reached by ssh. Is the key in the agent?" \
    "ssh-add ~/.ssh/google_compute_engine"
}

# Remove queued resource and node. What is not there is no failure.
remove_slice() {
  local try
  for ((try = 1; try <= 3; try++)); do
    if [ "$try" -gt 1 ]; then pause "$try"; fi
    if remove queued-resources --force && remove tpu-vm; then return 0; fi
  done
  fail "$name could not be deleted"
}

remove() {
  local what=$1
  shift
  if [ "$what" = tpu-vm ]; then
    note "and the node, where it is still there:"
    ask_node
  else
    ask_queued
  fi
  case $answer in
    NONE) return 0 ;;
    UNKNOWN) say "gcloud does not answer: $detail" && return 1 ;;
  esac
  cloud compute tpus "$what" delete "$name" "${where[@]}" "$@" --quiet
}

# How the run is on the workers: running, done, failed or silent, and `why`.
ask_run() {
  local lines answered
  if [ "$dry" = yes ]; then
    remote all "bash $worker_script state"
    run=running why="" && return
  fi
  lines=$(remote all "bash $worker_script state" 2>"$scratch/errors") || true
  lines=$(grep '^r1re-worker ' <<<"$lines" | sort) || true
  answered=$(grep -c . <<<"$lines") || true
  why=$(sed 's/^r1re-worker //' <<<"$lines" | paste -s -d ';' | sed 's/;/; /g')
  if [ "$answered" -lt "$workers" ]; then
    run=silent why="$((workers - answered)) of $workers workers do not answer${why:+ ($why)}"
  elif grep -qE ' (lost|idle|ended [1-9][0-9]*)$' <<<"$lines"; then
    run=failed
  elif grep -q ' running$' <<<"$lines"; then
    run=running
  else
    run=done
  fi
}
