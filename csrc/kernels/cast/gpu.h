// float32 arrays to float16 or bfloat16 on an NVIDIA GPU, many in one launch. Contract as in conv/gpu.h; no workspace.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace unet_fast::gpu {

struct CastArray {
  const void* from;  // float32
  void* to;          // of the type asked for
  int64_t elements;
};
int Cast(void* stream, DType type, const std::vector<CastArray>& arrays);

}  // namespace unet_fast::gpu
