"""An engine that fails at run time: the next one takes over, which is said once; or it is an error, where that was asked for."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
COMPILER = shutil.which("g++") or shutil.which("c++")
if COMPILER is None:
    pytest.skip("needs a C++ compiler, to make cuDNN fail", allow_module_level=True)

import native  # noqa: E402

if "cudnn" not in native.tiles(native.load_kernels()):
    pytest.skip("the build has no cudnn engine", allow_module_level=True)

pytestmark = pytest.mark.gpu

# The engine looks cuDNN's functions up by name. Preloaded, this gives it one in place of the one that runs a plan.
FAILING = """
#include <dlfcn.h>
#include <cstring>
extern "C" int FailingExecute(void*, void*, void*) { return 5000; }  // CUDNN_STATUS_EXECUTION_FAILED
extern "C" void* dlsym(void* library, const char* name) noexcept {
  static const auto real = reinterpret_cast<void* (*)(void*, const char*)>(dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5"));
  return std::strcmp(name, "cudnnBackendExecute") == 0 ? reinterpret_cast<void*>(FailingExecute) : real(library, name);
}
"""

PROGRAM = """
import torch, kernels
torch.manual_seed(0)
x, kernel, bias = (torch.randn(shape, device="cuda").half() for shape in ((2, 12, 14, 64), (3, 3, 64, 64), (64,)))
cudnn, wmma = (kernels.tuning(engine=engine) for engine in ("cudnn", "wmma"))
expected = kernels.conv2d_bias_relu(x, kernel, bias, choices=wmma)
for _ in range(2):
    torch.testing.assert_close(kernels.conv2d_bias_relu(x, kernel, bias, choices=cudnn), expected, atol=0.1, rtol=0.01)
print("computed")
"""


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    (folder / "failing.cc").write_text(FAILING)
    library = folder / "failing.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, folder / "failing.cc", "-ldl"], check=True)
    return library


def run(failing, **variables):
    here = pathlib.Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "LD_PRELOAD": str(failing), **variables}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_the_next_engine_takes_over_and_that_is_said_once(failing):
    done = run(failing, UNET_FAST_REQUIRE_KERNELS="0")
    assert done.returncode == 0 and "computed" in done.stdout, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if "unet_fast" in line]
    assert len(said) == 1 and "the engine cudnn failed" in said[0]


def test_it_is_an_error_where_kernels_are_required(failing):
    done = run(failing, UNET_FAST_REQUIRE_KERNELS="1")
    assert done.returncode != 0 and "computed" not in done.stdout
    assert "the engine cudnn failed" not in done.stderr
