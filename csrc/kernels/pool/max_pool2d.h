// 2x2 max pooling, stride 2; a last odd row or column is left out.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/thread_pool.h"

namespace unet_fast::cpu {

// x [n, h, w, c] -> y [n, h / 2, w / 2, c]
void MaxPool2D(ThreadPool& pool, DType type, int64_t n, int64_t h, int64_t w, int64_t c, const void* x, void* y);
// dx [n, h, w, c]: the first of equal maxima, row by row, gets dy [n, h / 2, w / 2, c]; all else is zero.
void MaxPool2DGrad(ThreadPool& pool, DType type, int64_t n, int64_t h, int64_t w, int64_t c, const void* x,
                   const void* dy, void* dx);

}  // namespace unet_fast::cpu
