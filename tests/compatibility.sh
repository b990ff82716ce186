#!/bin/bash
# One row of docs/compatibility.md: bash tests/compatibility.sh PYTHON [TENSORFLOW] [--no-build | --refused]
#
# Makes an environment of its own in a temporary folder with that Python and TensorFlow (default: 2.21), builds and installs
# unet_fast for the CPU into it, which takes minutes of all cores, and runs from outside the source folder what a user
# would: `info`, a training and export, and the tests of the ops, the model, fuse and export. With --no-build it runs on
# the sources as they are, without the compiled ops. With --refused it runs on them beside the libraries that lie in
# the source folder, built for another TensorFlow, and prints with which mend they are refused.
set -eu
python=$1; tensorflow=${2:-2.21}; how=${3:-}
source=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
bin=$work/venv/bin
"$bin/pip" install --quiet --upgrade pip
"$bin/pip" install --quiet "tensorflow==$tensorflow.*"
export TF_CPP_MIN_LOG_LEVEL=3 UNET_FAST_CUDA=0
if [ "$how" = --refused ]; then
    echo "refusal: $(PYTHONPATH=$source "$bin/python" -c 'from unet_fast import _library; print(_library.status().reason)' 2>/dev/null)"
    echo "stock: $(PYTHONPATH=$source "$bin/python" -c 'import numpy; from unet_fast import FusedUNet; print(FusedUNet((32, 32, 1), filters=2, depth=1, padding="same")(numpy.zeros((1, 32, 32, 1))).shape)' 2>/dev/null)"
    exit
fi
"$bin/pip" install --quiet "setuptools>=77" numpy "pybind11>=2.13" "cmake>=3.24" ninja packaging tomli  # the last two for supply_chain.py
if [ "$how" = --no-build ]; then
    cp -r "$source/unet_fast" "$source/tests" "$source/setup.py" "$source/pyproject.toml" "$work"
    rm -f "$work"/unet_fast/*.so
    "$bin/python" "$work/tests/supply_chain.py" requirements > "$work/needs"
    "$bin/pip" install --quiet -r "$work/needs"
else
    "$bin/pip" install --quiet --no-build-isolation "$source[dev]"
    cp -r "$source/tests" "$work"
fi
cd "$work"
run="$bin/python -m unet_fast"
$run info || [ "$how" = --no-build ]
$run train --data synthetic --out run --filters 2 --depth 1 --padding same --size 64 --steps 4 --batch 1
$run export --run run --format onnx --output model.onnx
fused_only=tests/test_export.py::test_savedmodel_of_fused_ops_needs_the_library_and_nothing_else
if [ "$how" = --no-build ]; then
    "$bin/python" -m pytest -q -p no:cacheprovider tests/test_fuse.py tests/test_export.py --deselect "$fused_only"
else
    "$bin/python" -m pytest -q -p no:cacheprovider tests/test_conv2d_bias_relu.py tests/test_conv2d_transpose_bias_relu.py \
        tests/test_max_pool2d.py tests/test_dice_cross_entropy.py tests/test_graph_gradients.py tests/test_layers.py \
        tests/test_model.py tests/test_library.py tests/test_fuse.py tests/test_export.py
fi
"$bin/python" -c 'import sys, keras, tensorflow; print("passed: Python", sys.version.split()[0], "TensorFlow", tensorflow.__version__, "Keras", keras.__version__)'
