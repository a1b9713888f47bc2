#!/usr/bin/env bash
# Makes the base policy that ships in r1re_jax/base/miniworld, from miniworld alone: see docs/base.md.
# Everything goes to build/base; a second call goes on where the first was interrupted.
#
#   bash run/base.sh [smoke]    smoke: two steps a stage, to see that it works
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1

[ -d build/base/fresh ] || "$python" -m run.miniworld --fresh=build/base/fresh
for stage in short full; do
  [ -d "build/base/$stage" ] && continue
  "$python" -m run.train --config="configs/miniworld_base.py:$stage${1:+,$1}" \
    --workdir="build/base/run-$stage"
  "$python" -m run.export --workdir="build/base/run-$stage" --out="build/base/$stage" \
    --license=apache-2.0
done
echo "the base policy is in build/base/full, the logs in build/base/run-*/metrics.jsonl"
