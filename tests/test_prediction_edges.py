"""Prediction where something is unusual or goes wrong: tiny images, turned volumes, full disks, damaged files."""

import contextlib
import os
import resource
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile

from unet_fast import checkpoints, inference
from unet_fast.cli import main
from unet_fast.config import TrainConfig
from unet_fast.data import open_stack, write_png, write_tiff
from unet_fast.errors import UserError
from unet_fast.inference import predict_image

rng = np.random.default_rng(0)


class Threshold:
    """Stands for a network of padding "same", 16 pixels a side: class 1 where the first channel is above 0, its middle."""

    padding, depth, upsampling = "same", 1, "transpose2x2"

    def __init__(self, channels=1):
        self.input_shape, self.output_shape = (None, 16, 16, channels), (None, 16, 16, 2)

    def for_prediction(self):
        return self

    def predict_on_batch(self, x):
        return np.stack([np.zeros_like(x[..., 0]), 50 * x[..., 0]], -1)


def a_run(channels=1, dtype="uint8", values=(0, 255)):
    top = float(np.iinfo(dtype).max)
    facts = checkpoints.DataFacts("folder", 2, (0.0, top), (16, 16, channels), dtype, values)
    return checkpoints.Run(Path("a run"), Threshold(channels), TrainConfig(data="unused"), facts)


def test_tiles_of_padding_same_are_averaged_with_gaussian_weights():
    """Each tile gives a constant of its own, so a pixel shows how much each tile counts there."""

    class Constant(Threshold):
        def predict_on_batch(self, x):
            odds = np.where(x[:, 8, 8, 0] < 0, np.log(1 / 9), np.log(3))  # probabilities 0.1 and 0.75
            ones = np.ones((len(x), 16, 16))
            return np.stack([0 * ones, odds[:, None, None] * ones], -1)

    image = np.zeros((16, 24), np.uint8)  # two tiles, from column 0 and from column 8 on
    image[:, 12:] = 255
    actual = predict_image(Constant(), image, value_range=(0, 255), overlap=0.5)[3, :, 1]
    weight = np.exp(-0.5 * ((np.arange(16) - 7.5) / (16 / 8)) ** 2)
    first, second = np.pad(weight, (0, 8)), np.pad(weight, (8, 0))
    np.testing.assert_allclose(actual, (0.1 * first + 0.75 * second) / (first + second), atol=1e-5)


@pytest.mark.parametrize(("highest", "dtype"), [(255, "uint8"), (256, "uint16"), (65535, "uint16")])
def test_labels_have_the_masks_values_in_the_smallest_type_that_holds_them(tmp_path, highest, dtype):
    image = rng.integers(0, 255, (1, 20, 30), endpoint=True).astype("uint8")
    write_tiff(tmp_path / "in.tif", image)
    inference.predict_files(a_run(values=(7, highest)), tmp_path / "in.tif", tmp_path / "out.tif")
    labels = open_stack(tmp_path / "out.tif").rows(0, 0, 20)
    assert labels.dtype == dtype and sorted(np.unique(labels)) == [7, highest]


SUFFIXES = [".tif", ".png", ".nii", ".nii.gz"]
KINDS = [("uint8", 1), ("uint16", 1), ("uint8", 3)]  # RGB of 16 bits is TIFF's alone


@pytest.mark.parametrize(
    ("suffix", "dtype", "channels"), [(s, *kind) for s in SUFFIXES for kind in KINDS] + [(".tif", "uint16", 3)]
)
def test_files_of_any_size_and_type(tmp_path, suffix, dtype, channels):
    for size in ((1, 1), (1, 37), (41, 1), (19, 33)):
        image = rng.integers(0, np.iinfo(dtype).max, (*size, channels), endpoint=True).astype(dtype)
        source, target = (tmp_path / f"{name}-{size[0]}-{size[1]}{suffix}" for name in ("in", "out"))
        if suffix == ".tif":
            tifffile.imwrite(
                source, image if channels == 3 else image[..., 0], photometric="rgb" if channels == 3 else None
            )
        elif suffix == ".png":
            write_png(source, image if channels == 3 else image[..., 0])
        else:
            rgb = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
            pixels = np.ascontiguousarray(image).view(rgb)[..., 0] if channels == 3 else image[..., 0]
            nibabel.save(nibabel.Nifti1Image(pixels.T, np.eye(4)), source)
        inference.predict_files(a_run(channels, dtype), source, target)
        stack = open_stack(target)
        assert (stack.shape, stack.dtype) == ((1, *size, 1), np.uint8)
        np.testing.assert_array_equal(stack.page(0)[..., 0], np.where(image[..., 0] > np.iinfo(dtype).max / 2, 255, 0))


@pytest.mark.parametrize(
    "axes",
    [
        [[0, 0, 2], [-0.5, 0, 0], [0, 0.25, 0]],  # slices across the body's x, as sagittal series come
        [[0.3, -0.4, 0], [0.4, 0.3, 0], [0, 0, -3]],  # oblique, and from head to foot
    ],
)
def test_a_volume_of_any_orientation_stays_in_its_place(tmp_path, axes):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, (10, -20, 5)
    volume = rng.integers(0, 256, (9, 7, 3)).astype(np.uint8)
    image = nibabel.Nifti1Image(volume, affine)
    image.set_sform(affine, "scanner")
    image.set_qform(affine, "aligned")
    nibabel.save(image, tmp_path / "in.nii.gz")
    inference.predict_files(a_run(), tmp_path / "in.nii.gz", tmp_path / "out.nii.gz")
    result = nibabel.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(result.dataobj), np.where(volume > 127, 255, 0))
    np.testing.assert_allclose(result.affine, affine, atol=1e-6)
    assert (int(result.header["sform_code"]), int(result.header["qform_code"])) == (1, 2)
    assert nibabel.aff2axcodes(result.affine) == nibabel.aff2axcodes(affine)


@contextlib.contextmanager
def full_disk(size):
    """No file can grow beyond `size` bytes, as on a disk that is full; the system's word for it is another one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_no_half_file(tmp_path, suffix):
    """In a folder, of whose files the first still fits: its result stays, and nothing else does."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, side in (("a", 8), ("b", 400)):
        image = rng.integers(0, 256, (side, side)).astype(np.uint8)
        if suffix == ".tif":
            write_tiff(source / f"{name}.tif", image[None])
        elif suffix == ".png":
            write_png(source / f"{name}.png", image)
        else:
            nibabel.save(nibabel.Nifti1Image(image.T, np.eye(4)), source / f"{name}{suffix}")
    with full_disk(6000), pytest.raises(OSError) as caught:
        inference.predict_files(a_run(), source, target)
    assert caught.value.filename == str(target / f"b{suffix}") and caught.value.strerror
    assert [file.name for file in target.iterdir()] == [f"a{suffix}"]
    assert open_stack(target / f"a{suffix}").page(0).shape == (8, 8, 1)


def test_a_full_disk_is_one_line(crossval_folder, stacks, tmp_path, capsys):
    large = tmp_path / "large.tif"
    write_tiff(large, rng.integers(0, 256, (1, 300, 300)).astype(np.uint8))
    with full_disk(6000):
        status = main(["predict", "--run", str(crossval_folder / "fold0"), *files(large, tmp_path / "out.tif")])
    assert (status, capsys.readouterr().err) == (2, f"unet-fast: error: {tmp_path / 'out.tif'}: File too large\n")
    assert [file.name for file in tmp_path.iterdir()] == ["large.tif"]


def files(source, target):
    return ["--input", str(source), "--output", str(target)]


@contextlib.contextmanager
def not_root():
    """The tests' user, or nobody where that is root, who may write anywhere."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_folder_that_cannot_be_written_to(is_folder):
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        place.chmod(0o755)
        source = place / "in" / "a.tif"
        source.parent.mkdir()
        write_tiff(source, np.zeros((1, 4, 4), np.uint8))
        locked = place / "locked"
        locked.mkdir(mode=0o555)
        with not_root(), pytest.raises(UserError, match=f"{locked}.*: cannot write there; choose another folder"):
            if is_folder:
                inference.predict_files(a_run(), source.parent, locked)
            else:
                inference.predict_files(a_run(), source, locked / "a.tif")
        assert not any(locked.iterdir())


def test_a_damaged_file_in_a_folder_is_told_before_anything_is_computed(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for name in "abc":
        write_tiff(source / f"{name}.tif", np.zeros((1, 40, 40), np.uint8))
    whole = (source / "b.tif").read_bytes()
    (source / "b.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"b\.tif: page 0 is cut short"):
        inference.predict_files(a_run(), source, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def cut(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.fixture
def broken(stacks, tmp_path):
    """Name of what is broken: a data folder, and the file in it that is."""
    made = {}
    for kind in ("tiff", "png", "nifti", "mask"):
        folder = tmp_path / kind
        for name in ("images", "masks"):
            pages = tifffile.imread(stacks / name / "d.tif")
            (folder / name).mkdir(parents=True)
            if kind == "nifti":
                nibabel.save(nibabel.Nifti1Image(pages.transpose(2, 1, 0), np.eye(4)), folder / name / "a.nii.gz")
            elif kind == "png":
                write_png(folder / name / "a.png", pages[0])
            else:
                pages = np.where(pages == 255, 77, pages) if (kind, name) == ("mask", "masks") else pages
                write_tiff(folder / name / "a.tif", pages)
        suffix = {"nifti": ".nii.gz", "png": ".png"}.get(kind, ".tif")
        made[kind] = folder, folder / ("masks" if kind == "mask" else "images") / f"a{suffix}"
        if kind != "mask":
            cut(made[kind][1])
    return made


@pytest.mark.parametrize("kind", ["tiff", "png", "nifti"])
def test_a_damaged_file_is_one_line(crossval_folder, broken, tmp_path, capsys, kind):
    run, (folder, file) = crossval_folder / "fold0", broken[kind]
    target = tmp_path / ("out" + "".join(file.suffixes))
    before = sorted(tmp_path.rglob("*"))
    for arguments in (
        ["predict", "--run", str(run), *files(file, target)],
        ["evaluate", "--run", str(run), "--data", str(folder)],
        ["train", "--data", str(folder), "--out", str(tmp_path / "run"), "--padding", "same"],
        ["crossval", "--data", str(folder), "--out", str(tmp_path / "run"), "--padding", "same"],
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and "Traceback" not in captured.err
        (line,) = captured.err.splitlines()
        assert line.startswith(f"unet-fast: error: {file}: ") and line.endswith((" it again", " the file again"))
    assert sorted(tmp_path.rglob("*")) == before


def test_masks_with_unknown_values_are_one_line(crossval_folder, broken, capsys):
    folder, _ = broken["mask"]
    metrics = (crossval_folder / "fold0" / "metrics.json").read_bytes()
    assert main(["evaluate", "--run", str(crossval_folder / "fold0"), "--data", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "expected mask values 0, 255 like the training's; got 0, 77 (the first that does not fit, 77, in a_000)" in line
    )
    assert (crossval_folder / "fold0" / "metrics.json").read_bytes() == metrics


def test_on_a_terminal_a_bar_is_shown(crossval_folder, stacks, tmp_path, capsys, monkeypatch):
    image = stacks / "images" / "d.tif"
    run = ["predict", "--run", str(crossval_folder / "fold0")]
    assert main([*run, *files(image, tmp_path / "a.tif")]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert main([*run, *files(image, tmp_path / "b.tif")]) == 0
    captured = capsys.readouterr()
    assert "predicting" in captured.err and "100%" in captured.err
    assert captured.out == f"wrote {tmp_path / 'b.tif'}\n", "results go to standard output, the bar does not"
