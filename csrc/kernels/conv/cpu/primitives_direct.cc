// Direct convolution and weight gradient. A block of pixels times a block of channels accumulates in registers; NHWC
// makes each step one load of weights (or of dz), and one broadcast of x a pixel. With few channels nothing is packed
// or copied; with many, weights (or x and dz) are packed so that what is read together lies together.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "conv/cpu/buffers.h"
#include "conv/cpu/primitives.h"
#include "conv/cpu/vector.h"

namespace unet_fast::cpu::UNET_FAST_ISA {
namespace {

// y[j .. j + P) of one output row, channels [0, NV * W). Step: floats from an input pixel to the next output pixel's,
// where the compiler is to know it, else 0. Edge: some taps of some pixels may lie left or right of the image, where
// `zeros` takes their place. One function, so that `acc` stays in registers throughout.
template <int W, int NV, int P, int Step, bool Edge>
void Pixels(const ConvArgs& a, int64_t n, int64_t i, int64_t j, const float* zeros) {
  constexpr int kHalf = (P + 1) / 2;  // pixels that share a base: P addresses would not fit the general registers
  const typename Vector<W>::Type zero = {};
  typename Vector<W>::Type acc[P][NV];
  for (int v = 0; v < NV; ++v) {
    const auto b = a.bias != nullptr ? Load<W>(a.bias + v * W) : zero;
    for (int p = 0; p < P; ++p) acc[p][v] = b;
  }
  const int64_t channels = a.x[0].c + a.x[1].c, left = j * a.stride - a.pad_left, inputs = a.x[1].c > 0 ? 2 : 1;
  for (int64_t t = 0; t < inputs * a.kh; ++t) {
    const View<const float>& in = a.x[t / a.kh];
    const int64_t step = Step > 0 ? Step : a.stride * in.pixel, r = t % a.kh, row = i * a.stride + r - a.pad_top;
    if (row < 0 || row >= in.h) continue;
    int64_t offset[kHalf];
    for (int p = 0; p < kHalf; ++p) offset[p] = p * step;
    const float* tap = in.At(n, row, left);
    const float* kernel = a.kernel + (r * a.kw * channels + t / a.kh * a.x[0].c) * a.filters;
    for (int64_t s = 0; s < a.kw; ++s, tap += in.pixel, kernel += channels * a.filters) {
      const float *x = tap, *x2 = tap + kHalf * step, *k = kernel, *at[P];
      if constexpr (Edge) {
        for (int p = 0; p < P; ++p) {
          const int64_t column = left + s + p * a.stride;
          at[p] = column >= 0 && column < in.w ? x + p * step : zeros;
        }
      }
      for (int64_t c = 0; c < in.c; ++c, k += a.filters, ++x, ++x2) {
        typename Vector<W>::Type weights[NV];
        for (int v = 0; v < NV; ++v) weights[v] = Load<W>(k + v * W);
        for (int p = 0; p < P; ++p) {
          const float value = Edge ? at[p][c] : p < kHalf ? x[offset[p]] : x2[offset[p - kHalf]];
          for (int v = 0; v < NV; ++v) acc[p][v] += value * weights[v];
        }
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int v = 0; v < NV; ++v) {
      typename Vector<W>::Type value = acc[p][v];
      if (a.relu) value = value < zero ? zero : value;  // keeps NaN
      if (a.mask.data != nullptr) value = Load<W>(a.mask.At(n, i, j + p) + v * W) > zero ? value : zero;
      Store<W>(a.y.At(n, i, j + p) + v * W, value);
    }
  }
}

using Block = void (*)(const ConvArgs&, int64_t n, int64_t i, int64_t j, const float* zeros);
template <int W, int NV, int Step, bool Edge, int... P>
constexpr std::array<Block, sizeof...(P)> Blocks(std::integer_sequence<int, P...>) {
  return {Pixels<W, NV, P + 1, Step, Edge>...};
}

// Output rows [begin, end), counted through the images, in blocks of nearly equal size: none is mostly empty.
template <int W, int NV, int Step>
void Rows(const ConvArgs& a, int64_t begin, int64_t end, const float* zeros) {
  constexpr int P = NV == 1 ? kRegisters / 2 - 2 : (kRegisters - NV - 1) / NV;  // leaves registers for the weights
  static constexpr auto kInner = Blocks<W, NV, Step, false>(std::make_integer_sequence<int, P>());
  static constexpr auto kEdge = Blocks<W, NV, 0, true>(std::make_integer_sequence<int, P>());
  const int64_t blocks = (a.y.w + P - 1) / P;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t b = 0, j = 0; b < blocks; ++b) {
      const int64_t next = a.y.w * (b + 1) / blocks;
      const bool inside = j * a.stride >= a.pad_left && (next - 1) * a.stride + a.kw - a.pad_left <= a.x[0].w;
      (inside ? kInner : kEdge)[next - j - 1](a, row / a.y.h, row % a.y.h, j, zeros);
      j = next;
    }
  }
}

template <int W>
void Rows(const ConvArgs& a, int64_t begin, int64_t end, const float* zeros) {
  if constexpr (kRegisters == 32) {
    if (a.y.c == 4 * W) return Rows<W, 4, 0>(a, begin, end, zeros);
  }
  if (a.y.c == 2 * W) return Rows<W, 2, 0>(a, begin, end, zeros);
  const auto step = [&](const View<const float>& x) { return a.stride * x.pixel; };
  const bool known = step(a.x[0]) == W && (a.x[1].c == 0 || step(a.x[1]) == W);
  known ? Rows<W, 1, W>(a, begin, end, zeros) : Rows<W, 1, 0>(a, begin, end, zeros);
}

// dkernel[0 .. C)[0 .. NV * W) += sum over `count` points of x[0 .. C) outer dz; rows of dkernel are co floats apart.
template <int W, int NV, int C>
void Outer(const float* x, int64_t x_pixel, const float* dz, int64_t dz_pixel, int64_t count, float* dkernel,
           int64_t co) {
  typename Vector<W>::Type acc[C][NV];
  for (int c = 0; c < C; ++c) {
    for (int v = 0; v < NV; ++v) acc[c][v] = Load<W>(dkernel + c * co + v * W);
  }
  for (int64_t j = 0; j < count; ++j, x += x_pixel, dz += dz_pixel) {
    typename Vector<W>::Type d[NV];
    for (int v = 0; v < NV; ++v) d[v] = Load<W>(dz + v * W);
    for (int c = 0; c < C; ++c) {
      for (int v = 0; v < NV; ++v) acc[c][v] += x[c] * d[v];
    }
  }
  for (int c = 0; c < C; ++c) {
    for (int v = 0; v < NV; ++v) Store<W>(dkernel + c * co + v * W, acc[c][v]);
  }
}

using OuterBlock = void (*)(const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);
template <int W, int NV, int... C>
constexpr std::array<OuterBlock, sizeof...(C)> OuterBlocks(std::integer_sequence<int, C...>) {
  return {Outer<W, NV, C + 1>...};
}

// Channels of x whose products one call of Outer accumulates.
template <int NV>
constexpr int kOuter = kRegisters == 32 ? 14 : 12 / NV / 2 * 2;

// The same for `ci` channels of x, in blocks of nearly equal size.
template <int W, int NV>
void OuterInputs(const float* x, int64_t x_pixel, int64_t ci, const float* dz, int64_t dz_pixel, int64_t count,
                 float* dkernel, int64_t co) {
  constexpr int C = kOuter<NV>;
  static constexpr auto kBlocks = OuterBlocks<W, NV>(std::make_integer_sequence<int, C>());
  const int64_t blocks = (ci + C - 1) / C;
  for (int64_t b = 0, c = 0; b < blocks; ++b) {
    const int64_t next = ci * (b + 1) / blocks;
    kBlocks[next - c - 1](x + c, x_pixel, dz, dz_pixel, count, dkernel + c * co, co);
    c = next;
  }
}

// And for all channels of dz.
template <int W>
void OuterChannels(const WgradArgs& a, const float* x, const float* dz, int64_t count, float* dkernel) {
  const int64_t co = a.dz.c;
  int64_t d = 0;
  for (; d + 2 * W <= co; d += 2 * W) {
    OuterInputs<W, 2>(x, a.x.pixel, a.x.c, dz + d, a.dz.pixel, count, dkernel + d, co);
  }
  for (; d < co; d += W) OuterInputs<W, 1>(x, a.x.pixel, a.x.c, dz + d, a.dz.pixel, count, dkernel + d, co);
}

// Points of dz, and of x as each tap of a kernel row sees it, gathered until there are enough of them to be worth a
// pass over dkernel: with many channels the pixels of an image are too far apart for the first-level cache, and a small
// image's rows too short. As panels side by side, each of some channels and all points.
template <int W>
class Panels {
 public:
  // For `channels` channels of x from `first` on; dkernel is that of the kernel row.
  Panels(const WgradArgs& a, int64_t first, int64_t channels, float* dkernel)
      : a_(a), first_(first), channels_(channels), dkernel_(dkernel), dz_(kPoints * Padded(a.dz.c, kDz)) {
    for (int64_t s = 0; s < a.kw; ++s) x_.emplace_back(kPoints * Padded(channels, kX));
  }
  // Row i of dz, which sees row `source` of x.
  void Add(int64_t n, int64_t i, int64_t source) {
    for (int64_t j = 0; j < a_.dz.w;) {
      const int64_t count = std::min(a_.dz.w - j, kPoints - points_);
      Copy<kDz>(a_.dz, n, i, j, count, 0, a_.dz.c, dz_.get());
      for (int64_t s = 0; s < a_.kw; ++s)
        Copy<kX>(a_.x, n, source, j + s - a_.pad, count, first_, channels_, x_[s].get());
      points_ += count, j += count;
      if (points_ == kPoints) Flush();
    }
  }
  void Flush() {
    const int64_t co = a_.dz.c;
    for (int64_t d = 0; d < co; d += kDz) {
      const float* dz = dz_.get() + d * kPoints;
      const auto outer = co - d >= kDz ? OuterInputs<W, 2> : OuterInputs<W, 1>;
      for (int64_t s = 0; s < a_.kw; ++s) {
        for (int64_t c = 0; c < channels_; c += kX) {
          float* target = dkernel_ + (s * a_.channels + first_ + c) * co + d;
          outer(x_[s].get() + c * kPoints, kX, std::min(kX, channels_ - c), dz, kDz, points_, target, co);
        }
      }
    }
    points_ = 0;
  }

 private:
  static constexpr int64_t kPoints = 128, kX = kWgradChannels, kDz = 2 * W;
  static int64_t Padded(int64_t channels, int64_t to) { return (channels + to - 1) / to * to; }
  // Appends the columns [left, left + count) of a row, zeros where there are none.
  template <int64_t Width>
  void Copy(const View<const float>& v, int64_t n, int64_t i, int64_t left, int64_t count, int64_t first,
            int64_t channels, float* panels) {
    for (int64_t j = 0; j < count; ++j) {
      const bool inside = left + j >= 0 && left + j < v.w;
      const float* source = inside ? v.At(n, i, left + j) + first : nullptr;
      float* target = panels + (points_ + j) * Width;
      for (int64_t c = 0; c < channels; c += Width, target += kPoints * Width) {
        const int64_t width = std::min(Width, channels - c);
        if (!inside) {
          std::fill_n(target, width, 0.0f);
        } else if (width == Width) {
          std::memcpy(target, source + c, Width * sizeof(float));
        } else {
          std::copy_n(source + c, width, target);
        }
      }
    }
  }
  const WgradArgs& a_;
  const int64_t first_, channels_;
  float* const dkernel_;
  Buffer dz_;
  std::vector<Buffer> x_;
  int64_t points_ = 0;
};

constexpr int kNarrowest = kWidest < 8 ? kWidest : 8;  // narrower vectors are slower than Eigen

}  // namespace

bool DirectConvServes(const ConvArgs& a) {
  // With 16 registers Eigen wins from 64 x 64 channels on.
  const bool small = a.kh * a.kw * (a.x[0].c + a.x[1].c) * a.y.c <= 9 * 32 * 32;
  return a.y.c <= kWidest || (Width(a.y.c) >= kNarrowest && (kRegisters == 32 || small));
}

namespace {

// For fewer channels than a vector has, or a number that no vector divides: with a kernel padded by zero channels, row
// by row.
template <int W>
void PaddedConv(ThreadPool& pool, const ConvArgs& a, const float* zeros) {
  const int64_t taps = a.kh * a.kw * (a.x[0].c + a.x[1].c), c = a.y.c;
  Buffer kernel(taps * W);
  for (int64_t t = 0; t < taps; ++t) {
    std::fill_n(std::copy_n(a.kernel + t * a.filters, c, kernel.get() + t * W), W - c, 0.0f);
  }
  float bias[W] = {};
  if (a.bias != nullptr) std::copy_n(a.bias, c, bias);
  ParallelFor(pool, a.n * a.y.h, [&](int64_t row) {
    Buffer y(a.y.w * W);
    ConvArgs b = a;
    b.kernel = kernel.get(), b.filters = W, b.bias = bias, b.mask = {};
    b.y = View<float>{y.get(), a.y.h, a.y.w, W, W, 0, 0};
    Rows<W>(b, row, row + 1, zeros);
    const int64_t n = row / a.y.h, i = row % a.y.h;
    for (int64_t j = 0; j < a.y.w; ++j) {
      const float* m = a.mask.data != nullptr ? a.mask.At(n, i, j) : nullptr;
      for (int64_t k = 0; k < c; ++k) {
        const float value = y.get()[j * W + k];
        a.y.At(n, i, j)[k] = m == nullptr || m[k] > 0.0f ? value : 0.0f;
      }
    }
  });
}

}  // namespace

void DirectConv(ThreadPool& pool, const ConvArgs& a) {
  const std::vector<float> zeros(std::max(a.x[0].c, a.x[1].c), 0.0f);
  if (Width(a.y.c) < kNarrowest) {
    if (a.y.c <= 4) return PaddedConv<4>(pool, a, zeros.data());
    if constexpr (kWidest >= 8) {
      if (a.y.c <= 8) return PaddedConv<8>(pool, a, zeros.data());
    }
    if constexpr (kWidest >= 16) PaddedConv<16>(pool, a, zeros.data());
    return;
  }
  constexpr int64_t kRows = 4, kPackAbove = 128;
  constexpr int64_t kWeightBytes = 1400000;
  const int64_t rows = a.n * a.y.h, groups = (rows + kRows - 1) / kRows, w = Width(a.y.c);
  const int64_t taps = a.kh * a.kw * (a.x[0].c + a.x[1].c);
  // Blocks of output channels: the weights of one stay in the second-level cache from group to group of rows.
  std::vector<ConvArgs> blocks;
  for (int64_t first = 0; first < a.y.c;) {
    int64_t count = w * (kRegisters == 32 && taps * 4 * w * 4 <= kWeightBytes ? 4 : 2);
    while (first + count > a.y.c) count /= 2;
    ConvArgs b = a;
    b.kernel += first, b.y.data += first, b.y.c = count;
    if (a.bias != nullptr) b.bias += first;
    if (a.mask.data != nullptr) b.mask.data += first;
    blocks.push_back(b);
    first += count;
  }
  // Rows of a wide kernel are too far apart for the caches, which would find place for few of them.
  Buffer packed;
  if (a.filters > kPackAbove) {
    packed = Buffer(taps * a.y.c);
    constexpr int64_t kTaps = 256;
    const int64_t strips = (taps + kTaps - 1) / kTaps;
    ParallelFor(pool, strips * blocks.size(), [&](int64_t task) {
      const ConvArgs& b = blocks[task / strips];
      float* target = packed.get() + (b.kernel - a.kernel) * taps;
      for (int64_t t = task % strips * kTaps; t < std::min(taps, (task % strips + 1) * kTaps); ++t) {
        std::memcpy(target + t * b.y.c, b.kernel + t * a.filters, b.y.c * sizeof(float));
      }
    });
    for (ConvArgs& b : blocks) b.kernel = packed.get() + (b.kernel - a.kernel) * taps, b.filters = b.y.c;
  }
  ParallelFor(pool, groups * blocks.size(), [&](int64_t task) {
    const ConvArgs& b = blocks[task / groups];
    const int64_t begin = task % groups * kRows, end = std::min(rows, begin + kRows);
    switch (w) {
      case 4:
        return Rows<4>(b, begin, end, zeros.data());
      case 8:
        if constexpr (kWidest >= 8) Rows<8>(b, begin, end, zeros.data());
        return;
      default:
        if constexpr (kWidest >= 16) Rows<16>(b, begin, end, zeros.data());
    }
  });
}

bool DirectWgradServes(const WgradArgs& a) {
  return Width(a.dz.c) >= kNarrowest && (kRegisters == 32 || a.x.c * a.dz.c <= kNarrowWgrad);
}

namespace {

// Zeroes a kernel row's gradient of x's channels [first, first + count).
void ZeroTaps(const WgradArgs& a, int64_t first, int64_t count, float* dkernel) {
  for (int64_t s = 0; s < a.kw; ++s) std::fill_n(dkernel + (s * a.channels + first) * a.dz.c, count * a.dz.c, 0.0f);
}

// One tap's gradient stays in the first-level cache: all taps of a kernel row read a strip of points while it is there.
template <int W>
void NarrowWgrad(ThreadPool& pool, const WgradArgs& a) {
  constexpr int64_t kStrip = 64;
  const int64_t all_rows = a.n * a.dz.h;
  ParallelFor(pool, a.slabs * a.kh, [&](int64_t task) {
    const int64_t slab = task / a.kh, r = task % a.kh;
    float* dkernel = a.dkernel + slab * a.slab_stride + r * a.kw * a.channels * a.dz.c;
    if (!a.add) ZeroTaps(a, 0, a.x.c, dkernel);
    for (int64_t row = SlabBegin(all_rows, slab, a.slabs); row < SlabBegin(all_rows, slab + 1, a.slabs); ++row) {
      const int64_t n = row / a.dz.h, i = row % a.dz.h, source = i + r - a.pad;
      if (source < 0 || source >= a.x.h) continue;
      for (int64_t strip = 0; strip < a.dz.w; strip += kStrip) {
        for (int64_t s = 0; s < a.kw; ++s) {
          // Points whose tap lies inside x.
          const int64_t begin = std::max(strip, a.pad - s);
          const int64_t end = std::min({strip + kStrip, a.dz.w, a.x.w + a.pad - s});
          if (begin >= end) continue;
          OuterChannels<W>(a, a.x.At(n, source, begin + s - a.pad), a.dz.At(n, i, begin), end - begin,
                           dkernel + s * a.channels * a.dz.c);
        }
      }
    }
  });
}

// A task is a kernel row and some channels of x.
template <int W>
void WideWgrad(ThreadPool& pool, const WgradArgs& a) {
  const int64_t all_rows = a.n * a.dz.h, parts = (a.x.c + kWgradChannels - 1) / kWgradChannels;
  ParallelFor(pool, a.slabs * a.kh * parts, [&](int64_t task) {
    const int64_t slab = task / (a.kh * parts), r = task / parts % a.kh, part = task % parts;
    const int64_t first = a.x.c * part / parts, channels = a.x.c * (part + 1) / parts - first;
    float* dkernel = a.dkernel + slab * a.slab_stride + r * a.kw * a.channels * a.dz.c;
    if (!a.add) ZeroTaps(a, first, channels, dkernel);
    Panels<W> panels(a, first, channels, dkernel);
    for (int64_t row = SlabBegin(all_rows, slab, a.slabs); row < SlabBegin(all_rows, slab + 1, a.slabs); ++row) {
      const int64_t i = row % a.dz.h, source = i + r - a.pad;
      if (source >= 0 && source < a.x.h) panels.Add(row / a.dz.h, i, source);
    }
    panels.Flush();
  });
}

template <int W>
void Wgrad(ThreadPool& pool, const WgradArgs& a) {
  a.x.c* a.dz.c <= kNarrowWgrad ? NarrowWgrad<W>(pool, a) : WideWgrad<W>(pool, a);
}

}  // namespace

void DirectWgrad(ThreadPool& pool, const WgradArgs& a) {
  switch (Width(a.dz.c)) {
    case 4:
      return Wgrad<4>(pool, a);
    case 8:
      if constexpr (kWidest >= 8) Wgrad<8>(pool, a);
      return;
    default:
      if constexpr (kWidest >= 16) Wgrad<16>(pool, a);
  }
}

}  // namespace unet_fast::cpu::UNET_FAST_ISA
