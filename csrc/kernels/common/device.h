// What the CUDA runtime says of this machine's GPUs. Without CUDA in the build, nothing.
#pragma once

#include <string>
#include <vector>

namespace unet_fast {

struct GpuDevice {
  std::string name;
  int compute_capability;  // 90 for 9.0
  long long memory_bytes;
};

// The GPUs, and in `error` why there are none.
std::vector<GpuDevice> GpuDevices(std::string* error);
// Version of the driver's CUDA, e.g. 13000; 0 without a driver.
int CudaDriverVersion();
int CudaRuntimeVersion();

}  // namespace unet_fast
