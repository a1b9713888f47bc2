"""Several processes that run one program: who they are, and what they tell each other.

All run the same steps in the same order. `exchange`, `agreed`, `meet` and `on_host` wait for the
others: all must call them at the same place. With one process nothing waits and nothing is sent.
"""

import contextlib
import functools
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# As jax.distributed reads them; on Cloud TPU it finds out by itself.
COORDINATOR, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TPU_HOSTS, TPU_NUMBER, PORT = "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", 8476
TIMEOUT = "R1RE_HOSTS_TIMEOUT"


class HostsError(RuntimeError):
    """The processes of a run did not find each other; the message names who is missing."""


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes of the run, if there are any; before anything else of jax.

    Args:
        environment: JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and
            JAX_PROCESS_ID, or what a TPU VM of a slice of several hosts has.
            R1RE_HOSTS_TIMEOUT: seconds to wait for the others, 300.

    Raises:
        HostsError: some but not all of the variables, or a process that does not come.
    """
    given = [name for name in (COORDINATOR, COUNT, NUMBER) if environment.get(name)]
    hosts = [name for name in environment.get(TPU_HOSTS, "").split(",") if name]
    if not given and len(hosts) < 2:
        return
    if given and len(given) < 3:
        missing = {COORDINATOR, COUNT, NUMBER} - set(given)
        raise HostsError(
            f"{', '.join(given)} is set, but {', '.join(sorted(missing))} is not; give all three,"
            " or none for a run of one process"
        )
    seconds, known = int(environment.get(TIMEOUT, 300)), {}
    if given:
        count, number = int(environment[COUNT]), int(environment[NUMBER])
        if not 0 <= number < count:
            raise HostsError(f"{NUMBER} is {number}; there are {count} processes, from 0 on")
        address = environment[COORDINATOR]
        known = {"coordinator_address": address, "num_processes": count, "process_id": number}
    else:
        count, number = len(hosts), int(environment[TPU_NUMBER])
        address = f"{hosts[0]}:{PORT}"
    _wait_for_all(address, count, number, hosts, seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(initialization_timeout=seconds, **known)


def _wait_for_all(
    address: str, count: int, number: int, hosts: Sequence[str], seconds: int
) -> None:
    """Wait until all processes are there: jax ends those that wait in vain, and names nobody.

    Process 0 listens at the port behind the coordinator's; the others tell it their numbers.

    Raises:
        HostsError: somebody does not come in time.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds
    if number == 0:
        missing = _gather(int(port) + 1, count, until)
    else:
        missing = _report((host, int(port) + 1), number, until)
    if missing:
        named = (f"{n} ({hosts[n]})" if n < len(hosts) else f"{n}" for n in sorted(missing))
        at = f", which is to listen at {address}" if missing == {0} else ""
        raise HostsError(
            f"waited {seconds} s for process {', '.join(named)} of {count}{at}, in vain. Is the"
            f" same command running there, and can it be reached? {TIMEOUT} sets how long is waited"
        )


def _gather(port: int, count: int, until: float) -> set[int]:
    """Hear of all others, and tell them who is missing; return that.

    Raises:
        HostsError: somebody else listens at the port.
    """
    missing, there = set(range(1, count)), []
    with contextlib.ExitStack() as opened:
        try:
            server = opened.enter_context(socket.create_server(("", port)))
        except OSError as error:
            raise HostsError(
                f"cannot listen at port {port}: {error}. It is the one behind {COORDINATOR}'s; give"
                " that another port on all hosts"
            ) from error
        while missing and time.monotonic() < until:
            server.settimeout(max(0.1, until - time.monotonic()))
            try:
                other = opened.enter_context(server.accept()[0])
                other.settimeout(5)
                number = other.recv(16)
            except OSError:  # nobody in time, or nobody of ours
                continue
            if number.isdigit():
                missing.discard(int(number))
                there.append(other)
        for other in there:
            with contextlib.suppress(OSError):
                other.sendall(json.dumps(sorted(missing)).encode())
    return missing


def _report(address: tuple[str, int], number: int, until: float) -> set[int]:
    """Tell process 0 that this one is there; return who is missing, as it says."""
    while time.monotonic() < until:
        try:
            with socket.create_connection(address, timeout=5) as first:
                first.sendall(str(number).encode())
                first.settimeout(until - time.monotonic() + 5)
                return set(json.loads(first.recv(2**16) or b"[0]"))
        except (OSError, ValueError):  # not there yet, or nobody of ours
            time.sleep(0.2)
    return {0}


def is_first() -> bool:
    """Whether this process is the one that writes for all."""
    return jax.process_index() == 0


def mine(count: int) -> range:
    """Return this process's share of so many things, whole and in order."""
    processes, index = jax.process_count(), jax.process_index()
    return range(count * index // processes, count * (index + 1) // processes)


def exchange(values: Sequence[Any]) -> list[Any]:
    """Return what all processes give, in their order; all must call it.

    Args:
        values: plain JSON values. They travel as arrays of bytes.
    """
    if jax.process_count() == 1:
        return list(values)
    text = np.frombuffer(json.dumps(values).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([text.size], np.int32)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    rows = multihost_utils.process_allgather(padded)
    parts = (json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True))
    return [value for part in parts for value in part]


def agreed(number: int) -> int:
    """Return the largest of all processes' numbers; all must call it."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.array([number], np.int32)).max())


def meet(name: str) -> None:
    """Wait until all processes are here; `name` must be the same for all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_host(tree: Any) -> Any:
    """Return arrays as numpy on this host; what other hosts hold of them is gathered.

    Where there are several processes, all must call it for the same arrays.
    """

    def one(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(one, tree)


def everywhere(keys: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Return typed keys that every process has made alike, as one array of them all."""
    if mesh is None or jax.process_count() == 1:
        return keys
    data = np.asarray(jax.random.key_data(keys))
    return _wrapped(mesh, str(jax.random.key_impl(keys)))(data)


@functools.cache
def _wrapped(mesh: Mesh, kind: str) -> Callable[[np.ndarray], jax.Array]:
    """Return what makes keys of a kind from their words, on all devices; compiled once a shape."""
    make = functools.partial(jax.random.wrap_key_data, impl=kind)
    return jax.jit(make, out_shardings=NamedSharding(mesh, PartitionSpec()))
