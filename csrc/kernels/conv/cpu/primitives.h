// The float32 arithmetic of the CPU engine, compiled once an instruction set from the same sources and chosen at run
// time. Everything is float32 and contiguous here; the drivers (conv2d.cc, conv2d_transpose.cc) convert, crop and pad.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/thread_pool.h"

namespace unet_fast::cpu {

// Part of an image tensor [n, h, w, c]: the centre of a skip input, every second pixel of an output. Strides in floats;
// the channels of a pixel are consecutive.
template <class Float>
struct View {
  Float* data = nullptr;
  int64_t h = 0, w = 0, c = 0;
  int64_t pixel = 0, row = 0, image = 0;  // strides

  static View Contiguous(Float* data, int64_t h, int64_t w, int64_t c) { return {data, h, w, c, c, w * c, h * w * c}; }
  Float* At(int64_t n, int64_t i, int64_t j) const { return data + n * image + i * row + j * pixel; }
};

// y = epilogue(conv(x, kernel)) where x is the one or two inputs side by side, read in place.
struct ConvArgs {
  int64_t n = 0;
  View<const float> x[2];         // the second is absent where its c is 0
  const float* kernel = nullptr;  // [kh, kw, channels of x, filters], filters >= y.c: its first y.c are used
  int64_t kh = 0, kw = 0, filters = 0;
  int64_t pad_top = 0, pad_left = 0;  // may be negative, which crops
  int64_t stride = 1;
  View<float> y;
  const float* bias = nullptr;  // [y.c], added when given
  bool relu = false;
  View<const float> mask;  // when given, y is zeroed where it is <= 0
};

// dkernel[r, s] = sum over n, i, j of x[n, i + r - pad, j + s - pad] outer dz[n, i, j], x being zero outside. As
// slabs: partial sums, each over a fixed part of the rows, so that the result does not depend on the number of threads.
struct WgradArgs {
  int64_t n = 0;
  View<const float> x, dz;
  int64_t kh = 0, kw = 0, pad = 0;
  int64_t slabs = 1, slab_stride = 0;
  float* dkernel = nullptr;  // [slabs, kh, kw, channels >= x.c, dz.c], of which the first x.c channels are written
  bool add = false;          // to what dkernel holds, rather than in its place
  int64_t channels = 0;
};
// How many slabs the weight gradient of that size is split into by the direct engine, else by Eigen's.
int64_t WgradSlabs(bool direct, int64_t kh, int64_t kw, int64_t ci, int64_t co);
// Where a slab of the direct engine begins among `rows`: each is smaller than the one before, the last a third of the
// first, so that threads of unequal speed end together.
inline int64_t SlabBegin(int64_t rows, int64_t slab, int64_t slabs) {
  return rows * slab * (3 * slabs - slab) / (2 * slabs * slabs);
}
// Where a tap's gradient has no more floats than that it stays in the first-level cache, and all taps of a kernel row
// are one task.
constexpr int64_t kNarrowWgrad = 64 * 64;
// Channels of x a task of the direct weight gradient, beyond.
constexpr int64_t kWgradChannels = 64;

// Two rows of dz = (dy + unpooled) * (y > 0), the mask only if `relu`, over `cols` windows of 2x2 pixels: dpooled
// [cols, c] goes to the largest y of its window, to the first of equal ones, as in TensorFlow. sums[q][c] += the sum
// over row q.
struct UnpooledRows {
  const float *dy[2], *y[2], *dpooled;
  int64_t cols, c;
  bool relu;
  float *dz[2], *sums[2];
};

struct Primitives {
  const char* isa;
  // Any views, where it serves. See primitives_direct.cc.
  bool (*direct_conv_serves)(const ConvArgs& args);
  void (*direct_conv)(ThreadPool& pool, const ConvArgs& args);
  bool (*direct_wgrad_serves)(const WgradArgs& args);
  void (*direct_wgrad)(ThreadPool& pool, const WgradArgs& args);
  // Any channels: one input, contiguous views, all of a kernel's filters. See primitives_conv.cc.
  void (*eigen_conv)(ThreadPool& pool, const ConvArgs& args);
  // Any channels: x and dz share one contiguous grid, x's padding included (pad 0), and dz is zero where it has no
  // gradient: in the last kh - 1 rows and kw - 1 columns. See primitives_gemm.cc.
  void (*eigen_wgrad)(ThreadPool& pool, const WgradArgs& args);
  // dz = dy * (y > 0), or dy where y is null, for pixels of c channels; written unless dz is null. sums[c] += its sum.
  void (*mask_gradient_row)(const float* dy, const float* y, int64_t pixels, int64_t c, float* dz, float* sums);
  void (*unpool_gradient_rows)(const UnpooledRows& rows);
  void (*to_float)(const void* source, DType type, float* target, int64_t count);
  void (*from_float)(const float* source, DType type, void* target, int64_t count);
};

// The best set that this processor has and this build includes; UNET_FAST_CPU_ISA (baseline, avx2 or avx512) lowers it.
const Primitives& GetPrimitives();

// The faster of the two, for views that either can take.
inline void Conv(ThreadPool& pool, const ConvArgs& a) {
  GetPrimitives().direct_conv_serves(a) ? GetPrimitives().direct_conv(pool, a) : GetPrimitives().eigen_conv(pool, a);
}

}  // namespace unet_fast::cpu
