"""The benchmarks' own logic, and that the peer in PyTorch is the same task; nothing here is timed."""

import doctest
import importlib.util
import json
import pathlib
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from unet_fast import reference, training
from unet_fast.data import pipeline

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"

# Says what step.py expects of a worker, then fails, or ends, or falls silent, as its system's name asks for.
WORKER = """
import json, sys, time
mark, (name, phase, batch) = "step.py worker: ", sys.argv[1:]
def turn(state):
    print("chatter")
    print(mark + state, flush=True)
    sys.stdin.readline()
turn("imported")
if name == "fails":
    print("ValueError: expected a GPU", file=sys.stderr)
    print(mark + "failed ValueError: expected a GPU", flush=True)
elif name == "dies":
    sys.exit("Aborted\\n")
else:
    turn("warm")
    if name == "hangs":
        time.sleep(600)
    print(mark + "row " + json.dumps({"ms": float(batch)}), flush=True)
"""


@pytest.fixture
def step(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    import step

    return step


def row(system, phase, batch, ms, run=1):
    figures = {"ms": ms, "img_s": 1e3 * batch / ms, "peak_mib": 1000, "first_step_s": 20.0, "first_step_peak_mib": 2000}
    figures |= dict.fromkeys(("p50", "p90", "p95", "p99", "mean"), ms)
    return {"system": system, "phase": phase, "batch": batch, **figures, "run": run}


@pytest.fixture
def result(step):
    rows = [
        row(system, phase, batch, (list(step.SYSTEMS).index(system) + 10) * batch)
        for system, phase, batch in step.ordered(list(step.SYSTEMS), ["train", "infer"], [1, 8, 16])
    ]
    runs = [{"driver": "1.0", "versions": {"keras": "3", "torch": None}}]
    return {"card": "a card", "fingerprint": "f", "runs": runs, "rows": rows}


def test_examples(step):
    import step_report
    import timing

    for module in (step, step_report, timing):
        assert doctest.testmod(module).failed == 0


def test_what_fails_is_reported_and_the_rest_goes_on(step, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def start(*job):
        return step.Worker(*job, command=(sys.executable, str(script)))

    jobs = [(name, "train", batch) for batch, name in enumerate(["good", "fails", "dies", "good"])]
    outcomes = list(step.measured(jobs, start=start))
    assert [job for job, _ in outcomes] == jobs
    figures = [value for _, value in outcomes]
    assert [figures[0], figures[3]] == [{"ms": 0.0}, {"ms": 3.0}]
    assert figures[1].args == ("ValueError: expected a GPU", ["ValueError: expected a GPU"])
    assert figures[2].args[0] == "Aborted"


def test_a_time_limit_leaves_the_rest(step, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def start(*job):
        return step.Worker(*job, command=(sys.executable, str(script)))

    deadline = step.time.monotonic() + 5
    jobs = [("hangs", "train", 1), ("good", "train", 1)]
    assert list(step.measured(jobs, deadline, start=start)) == []


def test_a_silent_worker_is_a_failure(step, tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(step, "WORKER_SECONDS", 5)
    worker = step.Worker("hangs", "train", 1, command=(sys.executable, str(script)))
    worker.wait_for("imported")
    worker.go()
    worker.wait_for("warm")
    worker.go()
    with pytest.raises(step.WorkerError, match="no answer within 5 s"):
        worker.wait_for("row")
    worker.close()


def test_rows_of_other_sources_do_not_stay(step, result, tmp_path, capsys):
    path = tmp_path / "rows.json"
    facts = {"card": "a card", "fingerprint": "f"}
    assert step.previous(path, facts) == ([], [])
    step.record.save(path, result)
    assert step.previous(path, facts) == (result["rows"], result["runs"])
    assert step.previous(path, facts | {"fingerprint": "another"}) == ([], [])
    assert f"{len(result['rows'])} rows of another fingerprint are dropped" in capsys.readouterr().err


def test_run_resumes_and_keeps_what_it_has(step, monkeypatch, tmp_path, capsys):
    class Built:
        fingerprint = "f"

        @staticmethod
        def gpu_devices():
            return [{"name": "a card"}], ""

    measured = []

    def fake(jobs, deadline):
        for job in jobs:
            measured.append(job)
            failed = job[0] == "keras tf32 xla"
            yield job, step.WorkerError("no", ["no"]) if failed else row(*job, ms=5.0)

    monkeypatch.setattr(step.record.native, "load_from_package", lambda name: Built)
    monkeypatch.setattr(step, "measured", fake)
    path = tmp_path / "rows.json"
    command = ["step.py", "--json", str(path), "--phases", "train", "--batch", "8", "1"]
    systems = ["--systems", "unet_fast", "torch amp eager"]
    monkeypatch.setattr(sys, "argv", [*command, *systems])
    assert step.main() == 0
    assert measured == [(s, "train", b) for s in ("unet_fast", "torch amp eager") for b in (8, 1)]
    measured.clear()
    monkeypatch.setattr(sys, "argv", [*command, *systems, "keras tf32 xla", "--resume"])
    assert step.main() == 1
    assert measured == [("keras tf32 xla", "train", 8), ("keras tf32 xla", "train", 1)]
    stored = json.loads(path.read_text())
    assert [(r["system"], r["batch"]) for r in stored["rows"]] == [
        (s, b) for b in (1, 8) for s in ("unet_fast", "torch amp eager")
    ]
    assert {r["run"] for r in stored["rows"]} == {1} and stored["fingerprint"] == "f"
    assert "FAILED: no" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--systems", "unet_fast", "keras tf32 xla", "--resume"])
    monkeypatch.setattr(step, "measured", lambda jobs, deadline: ((job, row(*job, ms=5.0)) for job in jobs))
    assert step.main() == 0
    stored = json.loads(path.read_text())
    assert len(stored["rows"]) == 6 and len(stored["runs"]) == 2
    assert {r["run"] for r in stored["rows"] if r["system"] == "keras tf32 xla"} == {2}


def test_table_and_plot(step, result, tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    step.record.save(path, result)
    command = ["step.py", "--json", str(path), "--table", "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", command)
    assert step.main() == 0
    table = capsys.readouterr().out
    assert table.startswith("a card; driver 1.0, keras 3; one run\n")
    assert "| torch amp compile | 8 | 96.00 | 1.20 |" in table and table.count("\n| ") == 2 + 8 * 6 + 2 * 3
    height, width, _ = matplotlib.image.imread(tmp_path / "plot.png").shape
    assert width > height > 500


@pytest.fixture
def train_rate(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    import train_rate

    monkeypatch.setattr(train_rate, "RUN_SECONDS", 0.05)
    monkeypatch.setattr(train_rate, "SECTIONS", 5)
    monkeypatch.setattr(train_rate, "SIDE", 64)
    monkeypatch.setattr(pipeline, "RESIDENT_BYTES", pipeline.RESIDENT_BYTES)  # main sets it; this sets it back
    return train_rate


def test_train_rate(train_rate, monkeypatch, tmp_path, capsys):
    train, configs = training.train, []

    def recorded(config, *args, **kwargs):
        configs.append(config)
        return train(config, *args, **kwargs)

    monkeypatch.setattr(training, "train", recorded)
    sizes = {"filters": 2, "depth": 1, "padding": "same", "size": 32, "batch": 2, "seconds": 0.2, "intervals": 3}
    small = ["--stream", *(f"--{name}={value}" for name, value in sizes.items())]
    assert train_rate.main([*small, "--json", str(tmp_path / "rate.json")]) == 0
    figures = json.loads((tmp_path / "rate.json").read_text())
    (config,) = configs
    assert config.augment and config.data != "synthetic" and config.steps == 3 * config.eval_every == figures["steps"]
    assert figures["streamed"] and len(figures["bare_runs_img_s"]) == 6
    assert figures["ratio"] == pytest.approx(figures["train_img_s"] / figures["bare_img_s"], abs=1e-3)
    runs, told = figures["bare_runs_img_s"], capsys.readouterr().out
    assert figures["bare_spread"] == pytest.approx(max(runs) / min(runs) - 1, rel=1e-2, abs=1e-3)  # of rounded rates
    assert "aim 0.95" in told and ("repeat this" in told) == (figures["bare_spread"] > 0.05)


def test_train_rate_leaves_the_first_interval_and_evaluations_out(train_rate, monkeypatch, tmp_path):
    rows = ["step,images_per_second,seconds", "10,1,100", "20,50,103", "30,70,106", "40,60,110"]
    monkeypatch.setattr(training, "train", lambda *_, **__: (tmp_path / "history.csv").write_text("\n".join(rows)))
    config = train_rate.TrainConfig(data="synthetic", batch=4)
    assert train_rate.train_rates(config, tmp_path) == (60, 30 * 4 / 10)


def test_train_rate_says_what_it_measures_and_what_is_wrong(train_rate, capsys):
    with pytest.raises(SystemExit):
        train_rate.main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for words in ("rate of `unet-fast train`, from images on disk and with augmentation", "aim is 95 %", "--json FILE"):
        assert words in told
    with pytest.raises(SystemExit):
        train_rate.main(["--intervals", "1"])
    assert "expected at least 2" in capsys.readouterr().err
    assert train_rate.main(["--precision", "float8"]) == 2
    assert "precision" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
def test_the_peer_is_the_same_network_and_loss(tmp_path):
    # In a process of its own, since PyTorch and TensorFlow bring CUDA libraries of their own.
    script = f"""
import sys
sys.path.append({str(FOLDER)!r})
import numpy as np, torch, torch_unet
data = np.load("data.npz")
logits = torch.from_numpy(data["logits"]).permute(0, 3, 1, 2)
model = torch_unet.UNet()
with torch.device("meta"):
    shape = torch_unet.UNet()(torch.empty(1, 1, 572, 572)).shape
loss = torch_unet.dice_cross_entropy(logits, torch.from_numpy(data["labels"]))
np.savez("result.npz", loss=loss, shape=shape, sizes=[p.numel() for p in model.parameters()])
"""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3, 17, 19, 2)).astype("float32") * 3
    labels = generator.integers(0, 2, (3, 17, 19)).astype("int32")
    np.savez(tmp_path / "data.npz", logits=logits, labels=labels)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    got = np.load(tmp_path / "result.npz")
    assert got["shape"].tolist() == [1, 2, 388, 388]
    assert got["sizes"].sum() == 34_512_258 and len(got["sizes"]) == 46
    expected = reference.dice_cross_entropy(labels, logits).numpy().mean()
    np.testing.assert_allclose(got["loss"], expected, rtol=1e-6)
