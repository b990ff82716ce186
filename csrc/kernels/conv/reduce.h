// Adding partial sums in a fixed order.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace unet_fast::gpu {

// target[i] = sum over s < count of slabs[s, i], i < size, rounded to dtype.
struct SlabSum {
  const float* slabs;
  int64_t size;
  void* target;  // null: not wanted
};
// Two sums of equally many slabs, in one launch.
int SumSlabs(void* stream, DType dtype, int count, const SlabSum& first, const SlabSum& second = {});

}  // namespace unet_fast::gpu
