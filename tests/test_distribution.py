"""Data-parallel training on CPU devices: in one process, in two, what happens when a worker dies, and what is refused."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rich.console

from unet_fast import distribution, training
from unet_fast.config import TrainConfig
from unet_fast.distribution import Cluster, Distribution, WorkerLost
from unet_fast.errors import UserError

HERE = Path(__file__).parent
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("TF_CPP_MIN_LOG_LEVEL", "TF_CONFIG")}
ENVIRONMENT |= {"PYTHONPATH": str(HERE.parent), "CUDA_VISIBLE_DEVICES": ""}

# A step's gradients of some 1e-2 differ in the order of their sums; Adam divides them by their own size, so that a step
# of lr moves by lr * 1e-7 or so more or less, and where a gradient is almost zero by more.
ROUNDING = {"rtol": 1e-4, "atol": 2e-6}


def state(run):
    """Weights, optimizer and dropout of a run, and how far it is."""
    with np.load(run / "last" / "state.npz") as arrays:
        arrays = dict(arrays)
    return arrays, json.loads(str(arrays.pop("progress")))


def losses(run):
    with (run / "history.csv").open(newline="") as file:
        return [[float(row[key]) for key in ("step", "loss", "val_loss")] for row in csv.DictReader(file)]


def assert_same_training(one, two, **tolerance):
    ours, theirs = state(two)[0], state(one)[0]
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], err_msg=name, **tolerance)
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Folder that tests/two_devices.py filled."""
    folder = tmp_path_factory.mktemp("local")
    program = [sys.executable, HERE / "two_devices.py", folder]
    done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("backend", ["stock", "fused"])
def test_two_devices_are_one_with_the_doubled_batch(local, backend):
    """In graphs with stock ops, and with fused ops under XLA."""
    assert_same_training(local / f"{backend}-one", local / f"{backend}-two", **ROUNDING)
    assert state(local / f"{backend}-two")[1]["replicas"] == 2


def test_an_overflow_on_one_replica_is_left_out_by_all(local):
    with np.load(local / "overflow.npz") as result:
        for after in result["after"]:
            np.testing.assert_array_equal(after, result["before"])
        assert result["scales"].tolist() == [512.0, 512.0]


def test_replicas_drop_out_differently_and_stay_the_same(local):
    with np.load(local / "dropout.npz") as result:
        first, second = result["weights"]
        np.testing.assert_array_equal(first, second)
        ours, theirs = result["states"]
        assert ours[0] != theirs[0] and ours[1] == theirs[1] > 0


def test_two_devices_resume_exactly(local):
    assert_same_training(local / "dropout", local / "dropout-resumed", rtol=0)


def test_devices_that_are_refused(local):
    errors = json.loads((local / "result.json").read_text())
    for name, given in (("devices", "CPU:0, CPU:5"), ("twice", "CPU:0, CPU:0"), ("order", "CPU:1, CPU:0")):
        assert f"of CPU:0, CPU:1; got {given}" in errors[name]
    assert "trained by 1 replicas, got 2" in errors["replicas"]


# Two workers


SMALL = {
    "filters": 2,
    "depth": 1,
    "padding": "same",
    "size": 32,
    "lr": 1e-2,
    "dropout": 0.0,
    "steps": 9,
    "eval_every": 3,
}


def free_ports():
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in (first, second)]


def hosts(ports):
    return ",".join(f"127.0.0.1:{port}" for port in ports)


def start(index, ports, out, *options, at=None, signum=None, environment=None):
    """A worker; with `at` it sends itself a signal while the step of this number is under way."""
    program = """
import signal, sys
from unet_fast.cli import main
from unet_fast.step_loop import StepLoop
at, signum, *arguments = sys.argv[1:]
advance, left = StepLoop.advance, [int(at)]
def counting(self, most):
    losses = advance(self, most if left[0] <= 0 else min(most, left[0]))
    left[0] -= len(losses)
    if left[0] == 0:
        left[0] = -1
        import os
        os.kill(os.getpid(), int(signum))
    return losses
if int(at):
    StepLoop.advance = counting
sys.exit(main(arguments))
"""
    chosen = ["--hosts", hosts(ports), "--host-index", str(index)] if environment is None else []
    arguments = ["train", "--out", str(out), *chosen, *options]
    return subprocess.Popen(
        [sys.executable, "-c", program, str(at or 0), str(int(signum or 0)), *arguments],
        env=ENVIRONMENT | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(workers):
    """(status, standard output, standard error) of each."""
    try:
        printed = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(worker.returncode, *texts) for worker, texts in zip(workers, printed, strict=True)]


def the_line(text):
    """The only line of what a worker printed to standard error."""
    (line,) = text.splitlines()
    return line


def test_two_workers_one_killed_one_interrupted_end_as_one_device(tmp_path):
    """Kill a worker, resume; interrupt the other, resume: the weights are those of one device with the doubled batch."""
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    options = [text for key, value in SMALL.items() for text in (f"--{key.replace('_', '-')}", str(value))]
    options += ["--data", "synthetic", "--batch", "2", "--backend", "stock"]

    ports = free_ports()
    chief = start(0, ports, out, *options)
    other = start(1, ports, elsewhere, *options, at=5, signum=signal.SIGKILL)
    other.wait(300)
    killed = time.monotonic()
    (status, printed, errors), (_, silent, _) = finish([chief, other])
    assert time.monotonic() - killed < 60
    assert other.returncode == -signal.SIGKILL
    assert status == 2 and "lost a worker" in the_line(errors) and "--resume" in errors
    assert "step 3/9" in printed and "2 replicas on 2 hosts" in printed and silent == ""
    assert state(out)[1]["step"] == 3
    assert not elsewhere.exists(), "a worker that is not the chief wrote files"

    ports = free_ports()
    cluster = {"cluster": {"worker": hosts(ports).split(",")}}
    tasks = [{"TF_CONFIG": json.dumps({**cluster, "task": {"type": "worker", "index": i}})} for i in range(2)]
    workers = [
        start(0, ports, out, "--resume", environment=tasks[0]),
        start(1, ports, out, "--resume", environment=tasks[1], at=2, signum=signal.SIGINT),
    ]
    for status, _, errors in finish(workers):
        assert status in (128 + signal.SIGINT, 128 + signal.SIGTERM)
        assert "stopped at step" in the_line(errors) and "--resume" in errors
    stopped = state(out)[1]["step"]
    assert 5 <= stopped < 9

    ports = free_ports()
    workers = [start(index, ports, out, "--resume") for index in range(2)]
    for status, _, errors in finish(workers):
        assert (status, errors) == (0, "")
    training.train(
        TrainConfig(data="synthetic", batch=4, backend="stock", **SMALL),
        tmp_path / "one",
        console=rich.console.Console(quiet=True),
    )
    assert_same_training(tmp_path / "one", out, **ROUNDING)


def test_a_worker_without_the_others_gives_up(tmp_path):
    ports = free_ports()
    options = ["--data", "synthetic", "--join-timeout", "3"]
    ((status, _, errors),) = finish([start(1, ports, tmp_path / "run", *options)])
    assert status == 2
    assert "within 3 s" in the_line(errors) and hosts(ports[:1]) in errors


# What is refused


def test_a_taken_port(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        host = f"127.0.0.1:{taken.getsockname()[1]}"
        cluster = Cluster.of([host, "127.0.0.1:1"], 0, environment={})
        with pytest.raises(UserError, match=rf"{host}: cannot listen there \(Address already in use\).*another"):
            training.train(TrainConfig(data="synthetic"), tmp_path / "run", cluster=cluster)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("hosts", "index", "message"),
    [
        (["a:1"], 0, "at least two hosts, each once, got a:1"),
        (["a:1", "a:1"], 0, "at least two hosts, each once, got a:1, a:1"),
        (["a:1", "b"], 0, "expected host:port, such as gpu1:2222, got 'b'"),
        (["a:1", "b:99999"], 0, "got 'b:99999'"),
        (["a:1", "b:2"], 2, "--host-index from 0 to 1, got 2"),
        (["127.0.0.1:1", "127.0.0.1:2"], None, "found 127.0.0.1:1 and 127.0.0.1:2; say which one with --host-index"),
        (None, 1, "expected --hosts with --host-index 1"),
    ],
)
def test_hosts_that_are_refused(hosts, index, message):
    with pytest.raises(UserError, match=message):
        Cluster.of(hosts, index, environment={})


def test_this_machine_is_found_among_the_hosts():
    assert Cluster.of(["192.0.2.1:1", "127.0.0.1:2"], environment={}).index == 1
    with pytest.raises(UserError, match="found none"):
        Cluster.of(["192.0.2.1:1", "192.0.2.2:2"], environment={})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 1}}, 1),
        ({"cluster": {"chief": ["a:1"], "worker": ["b:2"]}, "task": {"type": "worker", "index": 0}}, 1),
        ({"cluster": {"chief": ["a:1"], "worker": ["b:2"]}, "task": {"type": "chief", "index": 0}}, 0),
        ({"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}, None),
        ({}, None),
    ],
)
def test_tf_config(content, expected):
    cluster = Cluster.of(environment={"TF_CONFIG": json.dumps(content)})
    assert (cluster and (cluster.hosts, cluster.index)) == (
        expected if expected is None else (("a:1", "b:2"), expected)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "TF_CONFIG: expected JSON"),
        ('{"cluster": {"ps": ["a:1"], "worker": ["b:1"]}}', "expected tasks of type chief and worker"),
    ],
)
def test_a_tf_config_that_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        Cluster.of(environment={"TF_CONFIG": text})
    with pytest.raises(UserError, match="either --hosts or the environment variable TF_CONFIG"):
        Cluster.of(["a:1", "b:1"], 0, environment={"TF_CONFIG": text})


def test_more_gpus_than_there_are(tmp_path):
    with pytest.raises(UserError, match="expected 99 GPUs for --gpus 99, found"):
        training.train(TrainConfig(data="synthetic", gpus=99), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_lost_worker_is_one_line():
    """What TensorFlow raises becomes one line in a cluster, and stays what it is without."""
    lost = distribution.tf.errors.UnavailableError(None, None, "Socket closed")
    with pytest.raises(distribution.tf.errors.UnavailableError), Distribution():
        raise lost
    alone = Distribution()
    alone._cluster = Cluster(("a:1", "b:1"), 0)
    with pytest.raises(WorkerLost, match="start all of a:1, b:1 again with --resume"), alone:
        raise lost
