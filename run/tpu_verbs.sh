# shellcheck shell=bash
# shellcheck disable=SC2154  # the settings are run/tpu.sh's
# The verbs of run/tpu.sh; sourced by it.

# A name stands for one slice: what it stood for before must not be lost sight of.
check_name() {
  local here="$project $zone"
  project="" zone=""
  recall
  if [ -z "$project" ] || [ "$project $zone" = "$here" ]; then
    read -r project zone <<<"$here"
    return 0
  fi
  where=("--project=$project" "--zone=$zone")
  fail "$name is remembered in project $project, zone $zone: delete it, or choose another --name"
}

do_create() {
  if [ "$dry" = no ]; then
    check_name || return
    command=()
    remember # first: what is created must be found again
    rm -f "$state/command"
  fi
  request_slice || return
  if [ "$wait" -eq 0 ]; then
    say "$name is in the queue; costs begin when it is granted. setup waits for it"
    return
  fi
  await_slice || return
  note "$name is up, and costs money until: bash run/tpu.sh delete --name=$name"
}

# The commit by its hash; the copy is of that and of nothing that is not committed.
resolve_commit() {
  local found
  if ! git -C "$root" rev-parse --git-dir >/dev/null 2>&1; then
    if [ "$dry" = yes ]; then return 0; fi
    fail "$root is no git repository: setup copies a commit" || return 1
  fi
  found=$(git -C "$root" rev-parse --verify --quiet "$commit^{commit}") ||
    fail "there is no commit '$commit' here" || return 1
  commit=$found
  if [ "$dry" = no ] && [ -n "$(git -C "$root" status --porcelain)" ]; then
    say "warning: there are uncommitted changes; ${commit:0:12} is copied without them"
  fi
}

copy_code() {
  local archive="${scratch:-SCRATCH}/code.tar.gz" code=r1re/code
  note "the code of $commit"
  if [ "$dry" = yes ]; then
    quoted git archive --format=tar.gz "--output=$archive" "$commit" >&3
  else
    git -C "$root" archive --format=tar.gz "--output=$archive" "$commit" || return 1
  fi
  to_workers "$archive" r1re/code.tar.gz || return 1
  # .venv and .cache stay, so that another commit with the same lock is set up in seconds.
  remote all "if tmux has-session -t =r1re 2>/dev/null; then\
 echo 'a run goes on here' >&2; exit 1; fi; mkdir -p $code &&\
 find $code -mindepth 1 -maxdepth 1 ! -name .venv ! -name .cache -exec rm -rf {} + &&\
 tar -xzf r1re/code.tar.gz -C $code && bash $worker_script setup"
}

prepare() {
  await_slice || return
  await_ssh || return
  copy_code || fail "the set-up failed on a worker (gcloud, above); it may be repeated"
}

do_setup() {
  resolve_commit || return
  prepare || return
  if [ "$dry" = no ]; then remember; fi
  note "all workers have ${commit:0:12}"
}

# Refuse what would not resume, and values of secrets in the command, which ends up in logs.
check_command() {
  local line=${command[*]} variable
  for variable in "${passed[@]}"; do
    case $variable in
      *KEY* | *TOKEN* | *SECRET* | *PASS*)
        if [[ -n ${!variable:-} && $line == *"${!variable}"* ]]; then
          fail "the command holds the value of $variable; leave it out: the run has the variable" ||
            return 1
        fi
        ;;
    esac
  done
  if [ "$dry" = yes ]; then return 0; fi
  case $line in
    *gs://BUCKET*)
      fail "no work directory: give R1RE_TPU_WORKDIR=gs://…, or the command after --" || return 1 ;;
    *--workdir[=\ ]gs://*) ;;
    *) say "warning: no --workdir on gs://: a preempted slice takes the workers' disks with it" ;;
  esac
}

# The variables in a file that only its owner reads; the worker reads it once and removes it.
send_variables() {
  local variable file="${scratch:-SCRATCH}/env"
  if [ "$dry" = yes ]; then
    for variable in "${passed[@]}"; do
      if [ -n "${!variable:-}" ]; then
        note "from this environment, in a file: $variable=****"
      else
        note "not set in this environment: $variable"
      fi
    done
  else
    for variable in "${passed[@]}"; do
      if [ -n "${!variable:-}" ]; then printf 'export %s=%q\n' "$variable" "${!variable}"; fi
    done >"$file"
  fi
  to_workers "$file" r1re/env || return 1
  if [ "$dry" = no ]; then rm -f "$file"; fi
}

start_run() {
  send_variables || return 1
  remote all "bash $worker_script start ${replace:+$replace }-- $(quoted "${command[@]}")" ||
    fail "not all workers have started; once the cause is found: launch --replace"
}

do_launch() {
  local variable set=()
  check_command || return
  for variable in "${passed[@]}"; do
    if [ -n "${!variable:-}" ]; then set+=("$variable"); fi
  done
  if [ "$dry" = no ]; then
    passed=(${set[@]+"${set[@]}"})
    remember
  fi
  start_run || return
  note "started on all workers: $(quoted "${command[@]}")"
  note "it goes on without this shell; next: bash run/tpu.sh watch --name=$name"
}

do_logs() { remote "$worker" "tail -n $lines ${follow:+$follow }r1re/log"; }

do_status() {
  look
  if [ "$slice" = up ]; then
    ask_run
    note "$name is up${why:+: $run: $why}"
  else
    note "$name is $slice: $why"
  fi
  if [ "$slice" = unknown ]; then return 1; fi
  if [ "$dry" = no ]; then report_costs; fi
}

# Make the slice anew and go on there. 2: that may be tried again.
recreate() {
  remove_slice || return 1
  owed=yes
  request_slice || return 2
  owed=no
  if prepare && start_run; then return 0; fi
  look
  if [ "$slice" = lost ]; then return 2; fi
  return 1
}

handle_loss() {
  local status=0
  if [ "$recreations" -ge "$max_recreations" ]; then
    fail "lost again after $recreations re-creations: $why" || return 1
  fi
  recreations=$((recreations + 1))
  say "the slice is lost ($why); re-creation $recreations of $max_recreations"
  if [ "$recreations" -gt 1 ]; then pause "$((recreations - 1))"; fi
  recreate || status=$?
  if [ "$status" -ne 2 ]; then return "$status"; fi
}

check_watch() {
  local variable missing=()
  if [ ! -f "$state/command" ]; then
    fail "nothing is remembered of $name in $state: launch first" || return 1
  fi
  for variable in ${passed[@]+"${passed[@]}"}; do
    if [ -z "${!variable:-}" ]; then missing+=("$variable"); fi
  done
  if [ ${#missing[@]} -gt 0 ]; then
    fail "the run was launched with ${missing[*]}, which a new start needs and is not set here"
  fi
}

dry_watch() {
  note "every $poll s:"
  look
  ask_run
  note "where the slice is preempted, at most $max_recreations times:"
  recreate
}

do_watch() {
  local recreations=0 trouble=0 owed=no
  replace=--replace
  if [ "$dry" = yes ]; then dry_watch && return; fi
  check_watch || return
  while :; do
    look
    if [ "$slice" = gone ] && [ "$owed" = yes ]; then slice=lost; fi
    case $slice in
      gone) fail "$name was deleted; nothing is left to watch" || return ;;
      lost)
        handle_loss || return
        trouble=0
        continue
        ;;
      up) ask_run ;;
      *) run=$slice ;;
    esac
    say "$(date +%H:%M:%S) $name: $run${why:+: $why}"
    case $run in
      done) finish_watch && return ;;
      running | waiting) trouble=0 ;;
      # A preemption ends runs and silences workers before the slice's state says so.
      *) trouble=$((trouble + 1)) ;;
    esac
    if [ "$trouble" -ge "$patience" ]; then
      fail "$name: $run in $trouble looks: $why" || return
    fi
    if [ "$run" = failed ]; then pause 1; else pause "$trouble"; fi
  done
}

finish_watch() {
  say "the run has finished on all workers"
  if [ "$delete_after" = no ]; then report_costs && return; fi
  remove_slice || return
  rm -rf "$state"
  say "nothing named $name is left"
}

do_delete() {
  local reply=""
  if [ "$dry" = no ] && [ "$yes" = no ]; then
    if [ ! -t 0 ]; then
      fail "delete asks before it deletes; without a terminal give --yes" || return
    fi
    read -r -p "[tpu] delete $name in project $project, zone $zone? [y/N] " reply
    case $reply in y | Y | yes) ;; *) fail "nothing was deleted" || return ;; esac
  fi
  remove_slice || return
  if [ "$dry" = no ]; then rm -rf "$state"; fi
  note "nothing named $name is left"
}
