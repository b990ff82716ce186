"""Data-parallel training on several GPUs and several machines, by tf.distribute.

A replica is a device that trains on its part of each batch, with a copy of the model and of the optimizer, in programs
that are compiled as on a single device, with the fused ops in them; Keras does without XLA under a strategy. On GPUs of one
process a step is one program a replica, and XLA's own all-reduce of each gradient is within it: nothing goes back to
the host. Elsewhere - between CPUs XLA has none, and it knows of no other process - forward and backward pass are one
program and the optimizer's update another. Between the two, gradients and loss go, packed into one array, through one
all-reduce of MirroredStrategy or MultiWorkerMirroredStrategy: a ring between CPUs, NCCL between GPUs. All replicas so
apply the same gradients and stay the same, the loss scale included: a gradient that overflows on one of them is not
finite in the sum, and all leave the step out.

Batches are cut, not drawn anew: N replicas with batch B see what one device with batch N * B sees.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import zlib

import numpy as np
import tensorflow as tf
from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2  # not public, like the context below, which
from tensorflow.python.eager import context  # alone can say how long workers wait for each other

from unet_fast.errors import UserError
from unet_fast.replicas import ReplicaLoop
from unet_fast.step_loop import StepLoop

JOIN_SECONDS = 60  # that a worker waits for the others by default
_HEARTBEAT_SECONDS = 20  # without a sign of a worker, after which it counts as lost
_LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.DeadlineExceededError)


class WorkerLost(UserError):
    """Another worker of the training has ended, or no longer answers."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a training, one a machine, and which of them this process is.

    Attributes:
        hosts: tuple of "host:port", the chief first.
        index: this worker's place in them.
        join_seconds: how long to wait for the others at the start.

    >>> from unet_fast.distribution import Cluster
    >>> Cluster.of(["a:2222", "b:2222"], 1, environment={}).index
    1
    """

    hosts: tuple[str, ...]
    index: int
    join_seconds: float = JOIN_SECONDS

    @classmethod
    def of(cls, hosts=None, index=None, *, join_seconds=JOIN_SECONDS, environment=os.environ):
        """The cluster that options or, without any, the environment variable TF_CONFIG describe.

        Args:
            hosts: list of "host:port", or None.
            index: this worker's place in `hosts`; None to find it by this machine's addresses.
            join_seconds: as the attribute.
            environment: where TF_CONFIG is looked for.

        Returns:
            Cluster, or None where nothing asks for one.

        Raises:
            UserError: what describes no cluster of at least two workers, or not which of them this process is.
        """
        text = environment.get("TF_CONFIG")
        if hosts is None and index is not None:
            raise UserError(f"expected --hosts with --host-index {index}, got none; give all workers' addresses")
        if hosts is not None and text:
            raise UserError("expected either --hosts or the environment variable TF_CONFIG, got both; unset one")
        if text:
            hosts, index = _of_tf_config(text)
        if hosts is None:
            return None
        for host in hosts:
            name, _, port = host.rpartition(":")
            if not name or not port.isdigit() or not 0 < int(port) < 2**16:
                raise UserError(f"expected host:port, such as gpu1:2222, got {host!r}; correct it")
        if len(set(hosts)) < max(len(hosts), 2):
            raise UserError(
                f"expected at least two hosts, each once, got {', '.join(hosts)}; leave --hosts out to train on one"
            )
        if index is None:
            index = _own_index(hosts)
        if not 0 <= index < len(hosts):
            raise UserError(f"expected --host-index from 0 to {len(hosts) - 1}, got {index}; give one of those")
        if not 0 < join_seconds < 1e6:
            raise UserError(f"expected --join-timeout to be a positive number of seconds, got {join_seconds}; give one")
        return cls(tuple(hosts), index, join_seconds)


def _of_tf_config(text):
    """(hosts or None, index) of a TF_CONFIG."""
    try:
        content = json.loads(text)
        cluster, task = content.get("cluster", {}), content.get("task", {})
        hosts = [*cluster.get("chief", []), *cluster.get("worker", [])]
        kind = task.get("type", "worker")
        index = int(task.get("index", 0)) + (len(cluster.get("chief", [])) if kind == "worker" else 0)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"TF_CONFIG: expected JSON with cluster and task, got {text[:80]!r}; correct it") from error
    if kind not in ("chief", "worker") or set(cluster) - {"chief", "worker"}:
        raise UserError(
            f"TF_CONFIG: expected tasks of type chief and worker, got {', '.join({*cluster, kind})}; leave others out"
        )
    return (hosts, index) if len(hosts) > 1 else (None, None)


def _own_index(hosts):
    """Which of the hosts this machine is, by the addresses that it can bind to."""

    def is_here(host):
        with contextlib.suppress(OSError):
            for family, kind, *_, address in socket.getaddrinfo(host.rpartition(":")[0], 0, type=socket.SOCK_STREAM):
                with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                    probe.bind(address)
                    return True
        return False

    here = [index for index, host in enumerate(hosts) if is_here(host)]
    if len(here) != 1:
        found = "none" if not here else " and ".join(hosts[index] for index in here)
        raise UserError(f"expected one of --hosts to be this machine, found {found}; say which one with --host-index")
    return here[0]


class Distribution:
    """The replicas of a training, in this process and in others.

    Makes this process a worker of the cluster, if there is one, which has to come before anything that TensorFlow
    computes. `with distribution:` turns what TensorFlow raises when a worker is lost into a `WorkerLost`.

    Args:
        gpus: how many GPUs to train on here; None for one, or the CPU where there is none.
        devices: logical devices to train on instead, all of one kind and the first of them number 0, such as
            ["CPU:0", "CPU:1"].
        cluster: Cluster, or None.

    Attributes:
        replicas: number of replicas in all workers.
        is_chief: whether this worker is the one that evaluates and writes files.

    Raises:
        UserError: no such devices; a port that is taken.
        WorkerLost: another worker did not come in time.

    >>> from unet_fast.distribution import Distribution
    >>> Distribution().replicas
    1
    """

    def __init__(self, gpus=None, devices=None, cluster=None):
        self._cluster = cluster
        self._devices = _check_devices(devices) if devices else _gpus(gpus)
        self.is_chief = cluster is None or cluster.index == 0
        self._strategy = None
        if cluster is not None:
            if self._devices[0] == "CPU:0" and len(self._devices) > 1:
                raise UserError(f"expected one CPU device a worker, got {len(self._devices)}; start more workers")
            self._strategy = _join(cluster, self._devices)
        elif len(self._devices) > 1:
            self._strategy = tf.distribute.MirroredStrategy(self._devices)
        self.replicas = 1 if self._strategy is None else self._strategy.num_replicas_in_sync
        self._total = None if self._strategy is None else _make_total(self._strategy)

    def __str__(self):
        here = f"{len(self._devices)} x {self._devices[0].partition(':')[0]}"
        if self._cluster is None:
            return here
        return f"{here} here, {self.replicas} replicas on {len(self._cluster.hosts)} hosts"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self._cluster is not None and isinstance(error, _LOST):
            raise self._lost() from error

    def loop(self, model, optimizer, loss_fn, batches, start_step, accumulate=1):
        """A `StepLoop` over all replicas, which start from the chief's model and optimizer.

        Args:
            model, optimizer, loss_fn, start_step, accumulate: as `StepLoop`; the model and optimizer become the first
                replica's.
            batches: `unet_fast.data.TrainingBatches` of all replicas' batches together.
        """
        if self._strategy is None:
            return StepLoop(model, optimizer, loss_fn, batches, start_step, accumulate)
        return ReplicaLoop(self, self._strategy, model, optimizer, loss_fn, batches, start_step, accumulate)

    def gather(self, number):
        """Every worker's number, a list of ints; all workers have to ask for it.

        >>> from unet_fast.distribution import Distribution
        >>> Distribution().gather(7)
        [7]
        """
        if self._cluster is None:
            return [number]
        numbers = np.zeros(len(self._cluster.hosts), np.int64)
        numbers[self._cluster.index] = number
        return self._sum(numbers).tolist()

    def any(self, flag):
        """Whether it is so on any worker; all workers have to ask for it."""
        return any(self.gather(int(bool(flag))))

    def check_same(self, content, what):
        """Raises UserError on all workers unless all have the same content, which JSON can take."""
        sums = self.gather(zlib.crc32(json.dumps(content, sort_keys=True, default=str).encode()))
        others = [host for host, own in zip(self._hosts, sums, strict=True) if own != sums[0]]
        if others:
            raise UserError(
                f"expected all hosts to have the same {what}, got others on {', '.join(others)} than on "
                f"{self._hosts[0]}; start all with the same command"
            )

    def from_chief(self, arrays):
        """The chief's arrays on every worker.

        Args:
            arrays: list of NumPy arrays, float32 or of integers, of the same shapes on all workers.
        """
        if self._cluster is None:
            return arrays
        received = [None] * len(arrays)
        for dtype, is_kind in ((np.float32, "f".__contains__), (np.int64, "iub".__contains__)):
            chosen = [i for i, array in enumerate(arrays) if is_kind(array.dtype.kind)]
            if not chosen:
                continue
            flat = np.concatenate([arrays[i].ravel().astype(dtype) for i in chosen])
            flat = self._sum(flat if self.is_chief else np.zeros_like(flat))
            ends = np.cumsum([arrays[i].size for i in chosen])[:-1]
            for i, part in zip(chosen, np.split(flat, ends), strict=True):
                received[i] = part.reshape(arrays[i].shape).astype(arrays[i].dtype)
        return received

    def interruptibly(self, function, *arguments):
        """What the function returns, waiting for it such that signals are handled meanwhile.

        A worker that waits for the others waits within TensorFlow, where Python would handle no signal.
        """
        if self._cluster is None:
            return function(*arguments)
        outcome = {}

        def call():
            try:
                outcome["value"] = function(*arguments)
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
        if "error" in outcome:
            raise outcome["error"]
        return outcome["value"]

    @property
    def _hosts(self):
        return self._cluster.hosts if self._cluster else ("this machine",)

    def _sum(self, array):
        """The sum over all workers of a NumPy array."""
        rest = [np.zeros_like(array)] * (len(self._devices) - 1)
        return self.interruptibly(lambda: self._total([array, *rest]).numpy())

    def _lost(self):
        return WorkerLost(
            "lost a worker: it ended or no longer answers. See what it printed, then start all of "
            f"{', '.join(self._cluster.hosts)} again with --resume"
        )


def _check_devices(devices):
    known = [device.name.removeprefix("/device:") for device in tf.config.list_logical_devices()]
    kind = devices[0].partition(":")[0]
    bad = len(set(devices)) < len(devices) or any(d not in known or not d.startswith(f"{kind}:") for d in devices)
    if bad or devices[0] != f"{kind}:0":
        raise UserError(
            f"expected logical devices of one kind, each once and number 0 first, of {', '.join(known)}; "
            f"got {', '.join(devices)}"
        )
    return list(devices)


def _gpus(count):
    found = len(tf.config.list_physical_devices("GPU"))
    if count is None:
        return ["GPU:0"] if found else ["CPU:0"]
    if count > found:
        raise UserError(
            f"expected {count} GPUs for --gpus {count}, found {found or 'none'}; give at most what is there"
        )
    return [f"GPU:{i}" for i in range(count)]


def _join(cluster, devices):
    """The strategy of a worker, once all have come."""
    own, chief = cluster.hosts[cluster.index], cluster.hosts[0]
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else the last training's port seems taken
            probe.bind(("", int(own.rpartition(":")[2])))
    except OSError as error:
        raise UserError(
            f"{own}: cannot listen there ({error.strerror}); end what uses the port, or choose another"
        ) from error
    gpus = sum(device.startswith("GPU") for device in devices)
    tf.config.set_visible_devices(tf.config.list_physical_devices("GPU")[:gpus], "GPU")
    milliseconds = int(1000 * cluster.join_seconds)
    context.context().configure_coordination_service(
        service_type="standalone",
        service_leader="/job:worker/replica:0/task:0",
        cluster_register_timeout_in_ms=milliseconds,
        heartbeat_timeout_in_ms=1000 * _HEARTBEAT_SECONDS,
        shutdown_barrier_timeout_in_ms=0,
        coordinated_jobs=[coordination_config_pb2.CoordinatedJob(name="worker", num_tasks=len(cluster.hosts))],
    )
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec({"worker": list(cluster.hosts)}),
        task_type="worker",
        task_id=cluster.index,
        num_accelerators={"GPU": gpus},
        rpc_layer="grpc",
    )
    kind = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(implementation=kind.NCCL if gpus else kind.RING)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver, communication_options=options)
    except tf.errors.OpError as error:
        missing = "the others" if cluster.index == 0 else f"{chief} and the others"
        raise WorkerLost(
            f"{own}: expected {missing} of {', '.join(cluster.hosts)} within {cluster.join_seconds:g} s, but not all "
            f"came; see what they printed, and start all within that time"
        ) from error


def _make_total(strategy):
    """A tf.function of a list of arrays, one a replica here: their sum over all replicas of all workers."""
    index = strategy.experimental_distribute_values_from_function(lambda at: at.replica_id_in_sync_group)
    first = strategy.experimental_local_results(index)[0]

    @tf.function(autograph=False, reduce_retracing=True)
    def total(arrays):
        def step(i):
            return tf.distribute.get_replica_context().all_reduce(
                tf.distribute.ReduceOp.SUM, tf.identity(arrays[i - first])
            )

        return strategy.experimental_local_results(strategy.run(step, args=(index,)))[0]

    return total
