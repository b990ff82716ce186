#pragma once

#include <pybind11/pybind11.h>

namespace unet_fast {

// The raw GPU kernels on addresses of device memory, for tests and benchmarks that hold arrays of another framework.
void BindGpuKernels(pybind11::module_& m);

}  // namespace unet_fast
