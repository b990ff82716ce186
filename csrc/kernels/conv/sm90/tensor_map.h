// Tensor maps: how the tensor memory accelerator walks over an array. Made on the host at each launch, passed by value.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/dtype.h"

namespace unet_fast::gpu::sm90 {

// Positions of an implicit GEMM over an [n, h, w, channels] array, or a window of a larger one (strides in elements).
// Along an axis they are first, first + step, ..., `rows` or `cols` of them; what lies outside the array is zero. A
// load takes `box` positions, row by row and image by image, from a given one on, each moved by an offset of 0 or more,
// and of each 64 channels, 128-byte swizzled.
struct PixelMap {
  const void* data;
  int channels, w, h, n;
  int64_t row_stride, image_stride;
  int first_row, rows, first_col, cols, row_step, col_step, box;
};
int Encode(const PixelMap& map, DType dtype, CUtensorMap* out);

// A window of [n, h, w, channels]; a load takes 64 channels of `box_cols` pixels of `box_rows` rows, zeros where there
// are none, 128-byte swizzled.
struct ImageMap {
  const void* data;
  int channels, w, h, n;
  int64_t row_stride, image_stride;
  int box_cols, box_rows;
};
int Encode(const ImageMap& map, DType dtype, CUtensorMap* out);

// Weights [taps, rows, inner], rows `row_stride` and taps `tap_stride` elements apart; a load takes 64 of `inner` and
// `box_rows` rows, 128-byte swizzled.
struct WeightMap {
  const void* data;
  int inner, rows, taps;
  int64_t row_stride, tap_stride;
  int box_rows;
};
int Encode(const WeightMap& map, DType dtype, CUtensorMap* out);

}  // namespace unet_fast::gpu::sm90
