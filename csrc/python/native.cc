// Python module unet_fast._native: what was built, and what this machine has.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "conv/cpu/primitives.h"
#ifdef UNET_FAST_CUDA
#include "common/device.h"
#include "gpu_kernels.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "What this build of unet_fast holds and what it finds on this machine.";
  m.attr("tensorflow_version") = UNET_FAST_TENSORFLOW_VERSION;
  m.attr("compiler") = UNET_FAST_COMPILER;
  m.attr("fingerprint") = UNET_FAST_FINGERPRINT;
#ifdef UNET_FAST_CUDA
  m.attr("cuda") = true;
  m.attr("cuda_version") = UNET_FAST_CUDA_VERSION;
  m.attr("cuda_architectures") = UNET_FAST_CUDA_ARCHITECTURES;
  pybind11::module_ gpu = m.def_submodule("gpu");
  unet_fast::BindGpuKernels(gpu);
#else
  m.attr("cuda") = false;
  m.attr("cuda_version") = "";
  m.attr("cuda_architectures") = "";
#endif
  m.def(
      "cpu_isa", [] { return unet_fast::cpu::GetPrimitives().isa; },
      "Instruction set that the CPU kernels of this process run on: 'baseline', 'avx2' or 'avx512'.");
  m.def(
      "cuda_driver_version",
      [] {
#ifdef UNET_FAST_CUDA
        return unet_fast::CudaDriverVersion();
#else
        return 0;
#endif
      },
      "The CUDA version that the GPU's driver supports, 13000 for 13.0; 0 without a driver.");
  m.def(
      "gpu_devices",
      [] {
        py::list devices;
        std::string error;
#ifdef UNET_FAST_CUDA
        for (const unet_fast::GpuDevice& d : unet_fast::GpuDevices(&error)) {
          py::dict device;
          device["name"] = d.name;
          device["compute_capability"] = d.compute_capability;
          device["memory_bytes"] = d.memory_bytes;
          devices.append(device);
        }
#else
        error = "built without CUDA";
#endif
        return py::make_tuple(devices, error);
      },
      "The GPUs that the CUDA runtime finds, and why there are none: (list of dict, str).");
}
