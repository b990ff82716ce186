// Direct convolution and weight gradient for few channels, where Eigen's blocks are mostly padding: the layers at full
// resolution, whose weights stay in cache. A block of pixels times a block of channels accumulates in registers; NHWC
// makes each step one load of weights (or of dz), and one broadcast of x a pixel. Nothing is packed or copied.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "conv/cpu/primitives.h"

namespace unet_fast::cpu::UNET_FAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRegisters = 32, kWidest = 16;
#elif defined(__AVX2__)
constexpr int kRegisters = 16, kWidest = 8;
#else
constexpr int kRegisters = 16, kWidest = 4;
#endif

template <int W>
struct Vector {
  typedef float Type __attribute__((vector_size(W * sizeof(float))));
};
template <int W>
typename Vector<W>::Type Load(const float* p) {
  typename Vector<W>::Type v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <int W>
void Store(float* p, typename Vector<W>::Type v) {
  std::memcpy(p, &v, sizeof(v));
}

// y[j .. j + P) of one output row, channels [first, first + NV * W). Ci: the channels of each input where the compiler
// may know them, which turns the addresses of P pixels into constants; else 0. Edge: some taps of some pixels may lie
// outside the image, where `zeros` takes their place. One function, so that `acc` stays in registers throughout.
template <int W, int NV, int P, int Ci, bool Edge>
void Pixels(const ConvArgs& a, int64_t n, int64_t i, int64_t j, int64_t first, const float* zeros) {
  const typename Vector<W>::Type zero = {};
  typename Vector<W>::Type acc[P][NV];
  for (int v = 0; v < NV; ++v) {
    const auto b = a.bias != nullptr ? Load<W>(a.bias + first + v * W) : zero;
    for (int p = 0; p < P; ++p) acc[p][v] = b;
  }
  const int64_t channels = a.x[0].c + a.x[1].c, left = j - a.pad_left, inputs = a.x[1].c > 0 ? 2 : 1;
  for (int64_t t = 0; t < inputs * a.kh; ++t) {
    const View<const float>& in = a.x[t / a.kh];
    const int64_t ci = Ci > 0 ? Ci : in.c, pixel = Ci > 0 ? Ci : in.pixel, r = t % a.kh, row = i + r - a.pad_top;
    if (row < 0 || row >= in.h) continue;
    for (int64_t s = 0; s < a.kw; ++s) {
      const float* x = in.At(n, row, left + s);
      const float* at[P];
      if constexpr (Edge) {
        for (int p = 0; p < P; ++p) {
          const int64_t column = left + s + p;
          at[p] = column >= 0 && column < in.w ? x + p * pixel : zeros;
        }
      }
      const float* k = a.kernel + ((r * a.kw + s) * channels + t / a.kh * a.x[0].c) * a.filters + first;
      for (int64_t c = 0; c < ci; ++c, k += a.filters) {
        typename Vector<W>::Type weights[NV];
        for (int v = 0; v < NV; ++v) weights[v] = Load<W>(k + v * W);
        for (int p = 0; p < P; ++p) {
          const float value = Edge ? at[p][c] : x[p * pixel + c];
          for (int v = 0; v < NV; ++v) acc[p][v] += value * weights[v];
        }
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int v = 0; v < NV; ++v) {
      typename Vector<W>::Type value = acc[p][v];
      if (a.relu) value = value < zero ? zero : value;  // keeps NaN
      if (a.mask.data != nullptr) value = Load<W>(a.mask.At(n, i, j + p) + first + v * W) > zero ? value : zero;
      Store<W>(a.y.At(n, i, j + p) + first + v * W, value);
    }
  }
}

template <int W, int NV, int Ci>
void Row(const ConvArgs& a, int64_t n, int64_t i, int64_t first, const float* zeros) {
  constexpr int P = NV == 1 ? kRegisters / 2 - 2 : (kRegisters - NV - 1) / NV;
  const auto block = [&](int64_t j, auto size) {
    constexpr int Size = decltype(size)::value;
    const bool inside = j >= a.pad_left && j + Size + a.kw - 1 - a.pad_left <= a.x[0].w;
    inside ? Pixels<W, NV, Size, Ci, false>(a, n, i, j, first, zeros)
           : Pixels<W, NV, Size, 0, true>(a, n, i, j, first, zeros);
  };
  if (a.y.w < P) {
    for (int64_t j = 0; j < a.y.w; ++j) block(j, std::integral_constant<int, 1>());
    return;
  }
  for (int64_t j = 0; j < a.y.w; j += P) {
    // The last block overlaps the one before and repeats its values.
    block(std::min(j, a.y.w - P), std::integral_constant<int, P>());
  }
}

template <int W, int Ci>
void OutputRowOf(const ConvArgs& a, int64_t n, int64_t i, const float* zeros) {
  int64_t first = 0;
  if constexpr (kRegisters == 32) {
    for (; first + 4 * W <= a.y.c; first += 4 * W) Row<W, 4, Ci>(a, n, i, first, zeros);
  }
  for (; first + 2 * W <= a.y.c; first += 2 * W) Row<W, 2, Ci>(a, n, i, first, zeros);
  for (; first + W <= a.y.c; first += W) Row<W, 1, Ci>(a, n, i, first, zeros);
}

template <int W>
void OutputRow(const ConvArgs& a, int64_t n, int64_t i, const float* zeros) {
  const auto known = [&](int64_t ci) {
    return a.x[0].c == ci && a.x[0].pixel == ci && (a.x[1].c == 0 || (a.x[1].c == ci && a.x[1].pixel == ci));
  };
  if (known(16)) return OutputRowOf<W, 16>(a, n, i, zeros);
  if (known(32)) return OutputRowOf<W, 32>(a, n, i, zeros);
  if (known(64)) return OutputRowOf<W, 64>(a, n, i, zeros);
  OutputRowOf<W, 0>(a, n, i, zeros);
}

// dkernel[c .. c + C)[first .. first + NV * W) += sum over `count` points of x[c] * dz[first].
template <int W, int NV, int C>
void Outer(const WgradArgs& a, const float* x, const float* dz, int64_t count, float* dkernel) {
  const int64_t co = a.dz.c;
  typename Vector<W>::Type acc[C][NV];
  for (int c = 0; c < C; ++c) {
    for (int v = 0; v < NV; ++v) acc[c][v] = Load<W>(dkernel + c * co + v * W);
  }
  for (int64_t j = 0; j < count; ++j, x += a.x.pixel, dz += a.dz.pixel) {
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

template <int W, int NV>
void OuterAllInputs(const WgradArgs& a, const float* x, const float* dz, int64_t count, float* dkernel) {
  constexpr int C = kRegisters == 32 ? 8 : 12 / NV / 2 * 2;
  int64_t c = 0;
  for (; c + C <= a.x.c; c += C) Outer<W, NV, C>(a, x + c, dz, count, dkernel + c * a.dz.c);
  for (; c < a.x.c; ++c) Outer<W, NV, 1>(a, x + c, dz, count, dkernel + c * a.dz.c);
}

template <int W>
void OuterAllChannels(const WgradArgs& a, const float* x, const float* dz, int64_t count, float* dkernel) {
  int64_t first = 0;
  for (; first + 2 * W <= a.dz.c; first += 2 * W) OuterAllInputs<W, 2>(a, x, dz + first, count, dkernel + first);
  for (; first + W <= a.dz.c; first += W) OuterAllInputs<W, 1>(a, x, dz + first, count, dkernel + first);
}

// The widest vector that divides the channels; 0 where none does.
int Width(int64_t channels) {
  for (int w = kWidest; w >= 4; w /= 2) {
    if (channels % w == 0) return w;
  }
  return 0;
}
constexpr int kNarrowest = kWidest < 8 ? kWidest : 8;  // narrower vectors are slower than Eigen

}  // namespace

bool DirectConvServes(const ConvArgs& a) {
  // Weights stay in the second-level cache of a core, with room for rows of x and y. Measured with 2 MiB of it: 256 x
  // 128 channels are faster here than in Eigen, 256 x 256 half as fast. With 16 registers Eigen wins from 64 x 64 on.
  static const int64_t l2_bytes = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 256 << 10);
  static const int64_t weight_floats = kRegisters == 32 ? l2_bytes * 5 / 8 / 4 : 9 * 32 * 32;
  return a.stride == 1 && Width(a.y.c) >= kNarrowest && a.kh * a.kw * (a.x[0].c + a.x[1].c) * a.y.c <= weight_floats;
}

void DirectConv(ThreadPool& pool, const ConvArgs& a) {
  const int64_t rows = a.n * a.y.h;
  constexpr int64_t kRows = 4;
  const std::vector<float> zeros(std::max(a.x[0].c, a.x[1].c), 0.0f);
  ParallelFor(pool, (rows + kRows - 1) / kRows, [&](int64_t task) {
    for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row) {
      const int64_t n = row / a.y.h, i = row % a.y.h;
      switch (Width(a.y.c)) {
        case 4:
          OutputRow<4>(a, n, i, zeros.data());
          break;
        case 8:
          if constexpr (kWidest >= 8) OutputRow<8>(a, n, i, zeros.data());
          break;
        default:
          if constexpr (kWidest >= 16) OutputRow<16>(a, n, i, zeros.data());
      }
    }
  });
}

bool DirectWgradServes(const WgradArgs& a) {
  constexpr int64_t kTileFloats = 64 * 64;  // one tap's gradient stays in the first-level cache
  return Width(a.dz.c) >= kNarrowest && a.x.c * a.dz.c <= kTileFloats;
}

void DirectWgrad(ThreadPool& pool, const WgradArgs& a) {
  constexpr int64_t kStrip = 64;  // points whose x and dz stay in the first-level cache while all taps read them
  const int64_t all_rows = a.n * a.dz.h;
  ParallelFor(pool, a.slabs * a.kh, [&](int64_t task) {
    const int64_t slab = task / a.kh, r = task % a.kh;
    float* dkernel = a.dkernel + slab * a.slab_stride + r * a.kw * a.channels * a.dz.c;
    for (int64_t row = all_rows * slab / a.slabs; row < all_rows * (slab + 1) / a.slabs; ++row) {
      const int64_t n = row / a.dz.h, i = row % a.dz.h, source = i + r - a.pad;
      if (source < 0 || source >= a.x.h) continue;
      for (int64_t strip = 0; strip < a.dz.w; strip += kStrip) {
        for (int64_t s = 0; s < a.kw; ++s) {
          // Points whose tap lies inside x.
          const int64_t begin = std::max(strip, a.pad - s);
          const int64_t end = std::min({strip + kStrip, a.dz.w, a.x.w + a.pad - s});
          if (begin >= end) continue;
          const float* x = a.x.At(n, source, begin + s - a.pad);
          const float* dz = a.dz.At(n, i, begin);
          float* tap = dkernel + s * a.channels * a.dz.c;
          switch (Width(a.dz.c)) {
            case 4:
              OuterAllChannels<4>(a, x, dz, end - begin, tap);
              break;
            case 8:
              if constexpr (kWidest >= 8) OuterAllChannels<8>(a, x, dz, end - begin, tap);
              break;
            default:
              if constexpr (kWidest >= 16) OuterAllChannels<16>(a, x, dz, end - begin, tap);
          }
        }
      }
    }
  });
}

namespace {

template <int W>
void AddUnpooledPixels(const float* y0, const float* y1, const float* dpooled, int64_t cols, int64_t c, float* dz0,
                       float* dz1) {
  using V = typename Vector<W>::Type;
  const V zero = {};
  const auto add = [&](float* p, V v) { Store<W>(p, Load<W>(p) + v); };
  for (int64_t j = 0; j < cols; ++j, y0 += 2 * c, y1 += 2 * c, dz0 += 2 * c, dz1 += 2 * c, dpooled += c) {
    for (int64_t k = 0; k < c; k += W) {
      const V a = Load<W>(y0 + k), b = Load<W>(y0 + c + k), e = Load<W>(y1 + k), f = Load<W>(y1 + c + k);
      const V top = b > a ? b : a, bottom = f > e ? f : e, d = Load<W>(dpooled + k);
      const V high = bottom > top ? zero : d, low = bottom > top ? d : zero;
      add(dz0 + k, b > a ? zero : high);
      add(dz0 + c + k, b > a ? high : zero);
      add(dz1 + k, f > e ? zero : low);
      add(dz1 + c + k, f > e ? low : zero);
    }
  }
}

}  // namespace

void AddUnpooled(const float* y0, const float* y1, const float* dpooled, int64_t cols, int64_t c, float* dz0,
                 float* dz1) {
  switch (Width(c)) {
    case 0:
      return AddUnpooledPixels<1>(y0, y1, dpooled, cols, c, dz0, dz1);
    case 4:
      return AddUnpooledPixels<4>(y0, y1, dpooled, cols, c, dz0, dz1);
    case 8:
      if constexpr (kWidest >= 8) return AddUnpooledPixels<8>(y0, y1, dpooled, cols, c, dz0, dz1);
      break;
    default:
      if constexpr (kWidest >= 16) return AddUnpooledPixels<16>(y0, y1, dpooled, cols, c, dz0, dz1);
  }
}

}  // namespace unet_fast::cpu::UNET_FAST_ISA
