#!/usr/bin/env bash
# On a fresh machine: set-up, then the main job on the embedded default. See run/quickstart.py;
# --smoke goes through all of it in a minute.
set -euo pipefail
start=$(date +%s)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash run/setup.sh
export R1RE_START="${R1RE_START:-$start}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m run.quickstart "$@"
