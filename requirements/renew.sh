#!/usr/bin/env bash
# Makes requirements/runtime.txt and requirements/tpu.txt (with hashes) and requirements/dev.txt
# (without) from setup.cfg.
#
#   bash requirements/renew.sh                        keeps the pinned versions that still fit
#   bash requirements/renew.sh --upgrade              takes the newest that fit
#   bash requirements/renew.sh --upgrade-package jax  takes the newest jax that fits
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

compile() {
  # The lock must not depend on this machine's settings: PyPI alone, no configuration file.
  env -u UV_DEFAULT_INDEX -u UV_INDEX -u UV_INDEX_URL -u UV_EXTRA_INDEX_URL -u UV_FIND_LINKS \
    .venv/bin/uv pip compile setup.cfg --quiet --no-config --no-header --annotation-style line \
    --python-version 3.11 --python-platform x86_64-manylinux_2_31 "$@"
}

header() {
  printf '# %s\n' "$1" "Made from setup.cfg by \`bash requirements/renew.sh\`; do not edit."
}

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

cp requirements/runtime.txt "$tmp/runtime.txt" 2>/dev/null || true
compile --generate-hashes --output-file "$tmp/runtime.txt" "$@" >/dev/null

# torch serves as a CPU oracle in the tests. The CUDA libraries that its Linux release asks for
# would add gigabytes, so they are left out of the resolution.
printf '%s\n' cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 \
  nvidia-nccl-cu13 nvidia-nvshmem-cu13 triton >"$tmp/excludes.txt"
cp requirements/dev.txt "$tmp/dev.txt" 2>/dev/null || true
compile --extra dev --constraint "$tmp/runtime.txt" --excludes "$tmp/excludes.txt" \
  --no-annotate --output-file "$tmp/dev.txt" "$@" >/dev/null

# setuptools builds the editable install, as it does for dev.txt.
echo setuptools >"$tmp/build.in"
cp requirements/tpu.txt "$tmp/tpu.txt" 2>/dev/null || true
compile "$tmp/build.in" --extra tpu --constraint "$tmp/runtime.txt" --constraint "$tmp/dev.txt" \
  --generate-hashes --no-annotate --output-file "$tmp/tpu.txt" "$@" >/dev/null

{
  header "Run-time packages for Python 3.11 on Linux, pinned with the hashes of PyPI."
  cat "$tmp/runtime.txt"
} >requirements/runtime.txt
{
  header "What the tests and tools need beyond runtime.txt, pinned."
  grep -oE '^[A-Za-z0-9._-]+==[^ ]+' "$tmp/runtime.txt" | grep -vxFf - "$tmp/dev.txt"
} >requirements/dev.txt
{
  header "What a TPU VM needs beyond runtime.txt, pinned with the hashes of PyPI."
  awk 'NR == FNR { if (/==/) seen[$1]; next }
    /^[A-Za-z0-9]/ { own = !($1 in seen) }
    own' "$tmp/runtime.txt" "$tmp/tpu.txt"
} >requirements/tpu.txt
wc -l requirements/runtime.txt requirements/dev.txt requirements/tpu.txt
