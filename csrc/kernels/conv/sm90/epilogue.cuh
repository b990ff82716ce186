// What the kernels of the forward product share: where positions lie and results go, and arithmetic on 16-bit results.
#pragma once

#include "common/cuda.cuh"
#include "conv/gemm.h"

namespace unet_fast::gpu::sm90 {

struct Position {
  int image, row, col;
};
// Of position m in the order of the walk of `args`.
template <typename Args>
__device__ Position Locate(const Args& args, uint32_t m) {
  uint32_t in_image, col;
  const uint32_t image = args.positions_per_image.Divide(m, &in_image);
  const uint32_t row = args.positions_per_row.Divide(in_image, &col);
  return {static_cast<int>(image), static_cast<int>(row), static_cast<int>(col)};
}

// Where a row of the product goes, in units of 16 bytes: in the first result, and in the second, or of the first row of
// a pooling window in `pooled`; and where the second result's mask lies, the first's lying like its data. As numbers of
// 32 bits they are worked out once a tile and cost the epilogue little.
struct Place {
  uint32_t first, second, mask;
};
constexpr uint32_t kNowhere = ~0u;

__device__ inline uint32_t Units(const Position& at, int64_t image_stride, int64_t row_stride, int64_t pixel_stride,
                                 int64_t offset) {
  return static_cast<uint32_t>((at.image * image_stride + at.row * row_stride + at.col * pixel_stride + offset) /
                               kPack);
}

// Two results as one 32-bit register.
template <typename T>
__device__ uint32_t PackPair(float a, float b, bool relu) {
  Pair<T> pair = RoundedPair<T>(a, b);
  if (relu) pair = __hmax2_nan(pair, Pair<T>{});
  return reinterpret_cast<const uint32_t&>(pair);
}

// The maximum of the four numbers of two pairs, for two such twos, as a pair.
template <typename T>
__device__ uint32_t PoolPair(uint32_t a0, uint32_t a1, uint32_t b0, uint32_t b1) {
  const auto pair = [](const uint32_t& bits) { return reinterpret_cast<const Pair<T>&>(bits); };
  const Pair<T> a = __hmax2_nan(pair(a0), pair(a1)), b = __hmax2_nan(pair(b0), pair(b1));
  const Pair<T> low = {a.x, b.x}, high = {a.y, b.y};
  const Pair<T> top = __hmax2_nan(low, high);
  return reinterpret_cast<const uint32_t&>(top);
}

// All bits of each of two numbers that is above zero.
template <typename T>
__device__ uint32_t Positive(uint32_t pair) {
  return __hgt2_mask(reinterpret_cast<const Pair<T>&>(pair), Pair<T>{});
}

// v where mask > 0, else zero; eight elements as bits.
template <typename T>
__device__ uint4 MaskedBits(uint4 v, uint4 mask) {
  return {v.x & Positive<T>(mask.x), v.y & Positive<T>(mask.y), v.z & Positive<T>(mask.z), v.w & Positive<T>(mask.w)};
}

}  // namespace unet_fast::gpu::sm90
