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

// dkernel[r, s] += sum over n, i, j of x[n, i + r - pad, j + s - pad] outer dz[n, i, j], x being zero outside. As
// slabs: partial sums, each over a fixed part of the rows, so that the result does not depend on the number of threads.
struct WgradArgs {
  int64_t n = 0;
  View<const float> x, dz;
  int64_t kh = 0, kw = 0, pad = 0;
  int64_t slabs = 1, slab_stride = 0;
  float* dkernel = nullptr;  // [slabs, kh, kw, channels >= x.c, dz.c], the first x.c channels are added to
  int64_t channels = 0;
};
// How many slabs the weight gradient of that size is split into by the direct engine, else by Eigen's.
int64_t WgradSlabs(bool direct, int64_t kh, int64_t kw, int64_t ci, int64_t co);
// Where a tap's gradient has no more floats than that it stays in the first-level cache, and all taps of a kernel row
// are one task.
constexpr int64_t kNarrowWgrad = 64 * 64;
// Channels of x a task of the direct weight gradient, beyond.
constexpr int64_t kWgradChannels = 64;

struct Primitives {
  const char* isa;
  // Few channels: any views. See primitives_direct.cc.
  bool (*direct_conv_serves)(const ConvArgs& args);
  void (*direct_conv)(ThreadPool& pool, const ConvArgs& args);
  bool (*direct_wgrad_serves)(const WgradArgs& args);
  void (*direct_wgrad)(ThreadPool& pool, const WgradArgs& args);
  // Any channels: one input, contiguous views, all of a kernel's filters. See primitives_conv.cc.
  void (*eigen_conv)(ThreadPool& pool, const ConvArgs& args);
  // Any channels: x and dz share one contiguous grid, x's padding included (pad 0), and dz is zero where it has no
  // gradient: in the last kh - 1 rows and kw - 1 columns. See primitives_gemm.cc.
  void (*eigen_wgrad)(ThreadPool& pool, const WgradArgs& args);
  // dz[2i, 2j] .. dz[2i + 1, 2j + 1] += dpooled[i, j] where y is the largest of the four, for one row i of `cols`
  // windows of c channels: y0, y1, dz0, dz1 are the rows 2i and 2i + 1. The first of equal maxima is taken, as in
  // TensorFlow.
  void (*add_unpooled)(const float* y0, const float* y1, const float* dpooled, int64_t cols, int64_t c, float* dz0,
                       float* dz1);
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
