"""`unet-fast tune` as far as it goes without a GPU: which timing is chosen, and the file. tests/gpu has the rest."""

import json
import pathlib
import types

import pytest

from unet_fast import FusedUNet, _native, tuning
from unet_fast.cli import main
from unet_fast.errors import UserError

CUDA = pytest.mark.skipif(not _native.cuda, reason="the library was built without CUDA")


def timing(engine, config, microseconds, splits=0):
    return types.SimpleNamespace(engine=engine, config=config, splits=splits, microseconds=microseconds)


def network():
    return FusedUNet((32, 32, 1), filters=8, depth=1, padding="same", backend="fused")


@CUDA
@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ([], ("sm90", 3)),
        ([timing("cudnn", 1, 90.0), timing("cudnn", 2, 95.0)], ("cudnn", 1)),
        ([timing("cudnn", 1, 99.0)], ("sm90", 3)),  # 1 % may be noise
    ],
)
def test_the_fastest_is_chosen_unless_it_gains_next_to_nothing(monkeypatch, others, chosen):
    def measured(problem):
        products = [timing("sm90", 3, 100.0, splits=4), *others]
        return [types.SimpleNamespace(product="forward", key=f"{problem.filters} filters", timings=products)]

    monkeypatch.setattr(_native.gpu, "measure_conv2d", measured)
    monkeypatch.setattr(_native.gpu, "measure_conv2d_transpose", lambda problem: [])
    seen = []
    rows = tuning.measure(network(), [2], "float16", on_progress=lambda *counts: seen.append(counts))
    assert {(row["engine"], row["config"]) for row in rows} == {chosen}
    assert all(row["us"] == 100.0 and row["batch"] == 2 for row in rows)
    fastest = {"sm90": 100.0} | ({"cudnn": min(other.microseconds for other in others)} if others else {})
    assert all(row["by_engine"] == fastest and len(row["timings"]) == 1 + len(others) for row in rows)
    assert {row["key"] for row in rows} == {"8 filters", "16 filters", "2 filters"}  # of equal products once
    assert seen[-1][0] == seen[-1][1] == len(seen)


@CUDA
def test_a_measurement_that_fails_names_the_layer(monkeypatch):
    def out_of_memory(problem):
        raise RuntimeError("CUDA error 2")

    monkeypatch.setattr(_native.gpu, "measure_conv2d", out_of_memory)
    with pytest.raises(UserError, match=r"down1_conv1 at batch 8 .*CUDA error 2.*smaller --batch"):
        tuning.measure(network(), [8], "float16")


def row(key, engine="cudnn", config=2, splits=0):
    return {"key": key, "engine": engine, "config": config, "splits": splits}


def test_choices_of_several_measurements_stay_beside_each_other(tmp_path):
    file = tmp_path / "new" / "card.tsv"
    tuning.record([row("a"), row("b")], file)
    tuning.record([row("b", "sm90", 1, 3)], file)
    assert tuning.read(file) == {"a": ("cudnn", 2, 0), "b": ("sm90", 1, 3)}
    assert file.read_text().splitlines() == ["unet_fast tuning 1", "a\tcudnn\t2\t0", "b\tsm90\t1\t3"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"another format\na\tcudnn\t2\t0\n",
        b"unet_fast tuning 1\na\tcudnn\n",
        b"\xff\xfe",
        b"a\tcudnn\tx\ty",
        # What the kernels ignore is not shown as chosen either.
        b"unet_fast tuning 1\nb\tcudnn\t2\t0\na\tnone\t2\t0\n",
        b"unet_fast tuning 1\na\tcudnn\t1025\t0\n",
        b"unet_fast tuning 1\na\tcudnn\t2\t-1\n",
    ],
)
def test_a_damaged_file_has_no_choices_and_is_replaced(tmp_path, content):
    file = tmp_path / "card.tsv"
    file.write_bytes(content)
    assert tuning.read(file) == {}
    tuning.record([row("a")], file)
    assert tuning.read(file) == {"a": ("cudnn", 2, 0)}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="UNET_FAST_CACHE"):
        tuning.record([row("a")], tmp_path / "file" / "cache" / "card.tsv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "RUN", "--filters", "8"], "--run or options of a network"),
        (["--batch", "0"], "--batch of at least 1"),
        (["--run", "no/such/run"], "no/such/run"),
    ],
)
def test_arguments_that_make_no_sense(capsys, arguments, message):
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_table_that_comes_with_the_package_is_of_the_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    import measured_table

    products = measured_table.mean([json.loads(path.read_text()) for path in measured_table.PRODUCTS])
    assert measured_table.TABLE.read_text() == measured_table.table(products)
    assert len({row["key"] for row in products["products"]}) == len(products["products"])
