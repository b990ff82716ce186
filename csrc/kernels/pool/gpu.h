// 2x2 max pooling, stride 2, on an NVIDIA GPU; float16 and bfloat16. Contract as in conv/gpu.h; no workspace.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace unet_fast::gpu {

// x [n, h, w, c] -> y [n, h / 2, w / 2, c]
int MaxPool2D(void* stream, DType type, int64_t n, int64_t h, int64_t w, int64_t c, const void* x, void* y);
// dx [n, h, w, c]: the first of equal maxima, row by row, gets dy [n, h / 2, w / 2, c]; all else is zero.
int MaxPool2DGrad(void* stream, DType type, int64_t n, int64_t h, int64_t w, int64_t c, const void* x, const void* dy,
                  void* dx);

}  // namespace unet_fast::gpu
