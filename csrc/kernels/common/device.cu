#include <cuda_runtime.h>

#include "common/device.h"

namespace unet_fast {

std::vector<GpuDevice> GpuDevices(std::string* error) {
  std::vector<GpuDevice> devices;
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  for (int i = 0; i < count && status == cudaSuccess; ++i) {
    cudaDeviceProp properties;
    status = cudaGetDeviceProperties(&properties, i);
    if (status != cudaSuccess) break;
    devices.push_back(
        {properties.name, properties.major * 10 + properties.minor, static_cast<long long>(properties.totalGlobalMem)});
  }
  if (status != cudaSuccess) *error = cudaGetErrorString(status);
  return devices;
}

int CudaDriverVersion() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* CudaErrorString(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

bool IsCudaNotSupported(int error) { return error == cudaErrorNotSupported; }

}  // namespace unet_fast
