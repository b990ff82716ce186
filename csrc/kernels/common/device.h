// What the CUDA runtime says of this machine's GPUs. Without CUDA in the build, nothing.
#pragma once

#include <string>
#include <vector>

namespace unet_fast {

// What the GPU kernels take, for the message where they were asked for something else.
inline constexpr char kGpuServes[] =
    "the GPU kernels take float16, and bfloat16 from compute capability 8.0 on, of images below 2^31 elements and "
    "batches below 65536 images and 2^31 pixels; cast, or use stock TensorFlow (backend='stock')";

struct GpuDevice {
  std::string name;
  int compute_capability;  // 90 for 9.0
  long long memory_bytes;
};

// The GPUs, and in `error` why there are none.
std::vector<GpuDevice> GpuDevices(std::string* error);
// Version of the driver's CUDA, e.g. 13000; 0 without a driver.
int CudaDriverVersion();
// What a cudaError_t means.
const char* CudaErrorString(int error);
// Whether the error is the kernels' own word that they do not serve a problem (cudaErrorNotSupported).
bool IsCudaNotSupported(int error);

}  // namespace unet_fast
