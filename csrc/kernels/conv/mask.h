// What lies before the matrix products of a gradient.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace unet_fast::gpu {

// dz = (dy + unpool(dpooled)) * (y > 0) and dbias = its sum over the pixels.
struct MaskArgs {
  const void* dy;       // [batch, dy_h, dy_w, channels], a window of y at (dy_top, dy_left); zero outside of it
  const void* dpooled;  // [batch, h / 2, w / 2, channels]; null: none
  const void* y;        // [batch, h, w, channels]
  int64_t batch, h, w, channels;
  int64_t dy_h, dy_w, dy_top, dy_left;
  bool relu;     // mask by y > 0
  void* dz;      // like y; null: not stored, where dz is dy
  float* slabs;  // MaskSlabBytes
  void* dbias;   // [channels]
};
size_t MaskSlabBytes(int64_t pixels, int64_t channels);
int MaskGradient(void* stream, DType dtype, const MaskArgs& args);

// The weight gradient of an empty batch.
int ZeroWeightGradient(void* stream, void* dkernel, int64_t kernel_elements, void* dbias, int64_t filters);

}  // namespace unet_fast::gpu
