# r1re_jax for a TPU VM: the pinned packages by hash, the extra `tpu`, and this checkout.
#
#   docker build -t r1re_jax .
#   docker run --rm --privileged --network=host --env HF_TOKEN --env R1RE_DATA r1re_jax \
#     bash run/tpu_worker.sh exec -- python -m run.train --config=F --workdir=gs://BUCKET/runs/x
#
# On a slice of several hosts the same command runs on all of them. --privileged shows the chips and
# --network=host the other workers. Secrets come with `docker run`; none is in the image.
FROM python:3.11-slim-bookworm

# curl asks the metadata server who the other workers are.
RUN apt-get update && apt-get install -y --no-install-recommends curl && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --shell /bin/bash r1re

WORKDIR /srv/r1re_jax
RUN python -m venv .venv
ENV PATH=/srv/r1re_jax/.venv/bin:$PATH PYTHONUNBUFFERED=1

# Before the code, so that a change of that installs nothing anew.
COPY requirements/runtime.txt requirements/tpu.txt requirements/
RUN pip install --no-cache-dir --require-hashes \
    -r requirements/runtime.txt -r requirements/tpu.txt

COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY r1re_jax r1re_jax
COPY run run
COPY configs configs
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .

USER r1re
CMD ["python", "-m", "run.train", "--help"]
