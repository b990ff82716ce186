// Adding partial sums in a fixed order.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace unet_fast::gpu {

// target[i] = sum over s < count of slabs[s, i], i < size, rounded to dtype.
int SumSlabs(void* stream, DType dtype, const float* slabs, int count, int64_t size, void* target);

}  // namespace unet_fast::gpu
