// The float32 arithmetic of the CPU engine, compiled once an instruction set from the same sources and chosen at run
// time. Everything is float32 and contiguous here; the drivers (conv2d.cc, conv2d_transpose.cc) convert, crop and pad.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/thread_pool.h"

namespace unet_fast::cpu {

// y = epilogue(conv(x, kernel)); padding may be negative, which crops.
struct ConvArgs {
  const float* x;  // [n, h, w, ci]
  int64_t n, h, w, ci;
  const float* kernel;  // [kh, kw, ci, co]
  int64_t kh, kw, co;
  int64_t stride;
  int64_t pad_top, pad_bottom, pad_left, pad_right;
  float* y;                     // [n, oh, ow, co]
  const float* bias = nullptr;  // [co], added when given
  bool relu = false;
  const float* mask = nullptr;  // [n, oh, ow, co]: y is zeroed where mask <= 0

  int64_t oh() const { return (h + pad_top + pad_bottom - kh) / stride + 1; }
  int64_t ow() const { return (w + pad_left + pad_right - kw) / stride + 1; }
};

// dkernel[r, s] += sum over n, i < rows, j < cols of x[n, i + r, j + s] outer dz[n, i, j].
// x and dz share one grid of h x w; dz must be zero outside rows x cols. As slabs: `slabs` partial sums, each over a
// fixed part of the rows, so that the result does not depend on the number of threads.
struct WgradArgs {
  const float* x;   // [n, h, w, ci]
  const float* dz;  // [n, h, w, co]
  int64_t n, h, w, ci, co;
  int64_t rows, cols;
  int64_t kh, kw;
  int64_t slabs;
  float* dkernel;  // [slabs, kh, kw, ci, co]
};
// How many slabs a weight gradient of that size is split into.
int64_t WgradSlabs(int64_t kh, int64_t kw, int64_t ci, int64_t co);

struct Primitives {
  const char* isa;
  void (*conv)(ThreadPool& pool, const ConvArgs& args);
  void (*wgrad)(ThreadPool& pool, const WgradArgs& args);
  void (*to_float)(const void* source, DType type, float* target, int64_t count);
  void (*from_float)(const float* source, DType type, void* target, int64_t count);
};

// The best set that this processor has and this build includes; UNET_FAST_CPU_ISA (baseline, avx2 or avx512) lowers it.
const Primitives& GetPrimitives();

}  // namespace unet_fast::cpu
