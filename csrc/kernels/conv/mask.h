// What lies before the matrix products of a gradient.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace unet_fast::gpu {

// dz = (dy + unpool(dpooled)) * (y > 0) and dbias = its sum over the pixels.
struct MaskArgs {
  const void* dy;       // [batch, h, w, channels]
  const void* dpooled;  // [batch, h / 2, w / 2, channels]; null: none
  const void* y;        // like dy
  int64_t batch, h, w, channels;
  bool relu;     // mask by y > 0
  void* dz;      // like dy; null: not stored, where dz is dy
  float* slabs;  // MaskSlabBytes
  void* dbias;   // [channels]
};
size_t MaskSlabBytes(int64_t pixels, int64_t channels);
int MaskGradient(void* stream, DType dtype, const MaskArgs& args);

// Zeros in data [batch, h, w, channels] outside of the window of rows x cols at (top, left).
int ZeroOutside(void* stream, void* data, int64_t batch, int64_t h, int64_t w, int64_t channels, int64_t top,
                int64_t left, int64_t rows, int64_t cols);

// The weight gradient of an empty batch.
int ZeroWeightGradient(void* stream, void* dkernel, int64_t kernel_elements, void* dbias, int64_t filters);

}  // namespace unet_fast::gpu
