// Direct convolution and weight gradient for few channels, where Eigen's blocks are mostly padding: the layers at full
// resolution, whose weights stay in cache. A block of pixels times a block of channels accumulates in registers; NHWC
// makes each step one load of weights (or of dz), and one broadcast of x a pixel. Nothing is packed or copied.
#include <algorithm>
#include <cstring>

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

// y[j .. j + P) of one output row, channels [first, first + NV * W). Ci: the input channels where the compiler may know
// them, which turns the addresses of P pixels into constants; else 0.
template <int W, int NV, int P, int Ci>
void Pixels(const ConvArgs& a, const float* x_image, int64_t i, int64_t j, int64_t first, float* y, const float* mask) {
  typename Vector<W>::Type acc[P][NV];
  for (int v = 0; v < NV; ++v) {
    typename Vector<W>::Type b = {};
    if (a.bias != nullptr) b = Load<W>(a.bias + first + v * W);
    for (int p = 0; p < P; ++p) acc[p][v] = b;
  }
  const int64_t ci = Ci > 0 ? Ci : a.ci, left = j - a.pad_left;
  // A block of several pixels lies where every tap is inside; a single one may not.
  const int64_t s0 = P > 1 ? 0 : std::max<int64_t>(0, -left), s1 = P > 1 ? a.kw : std::min(a.kw, a.w - left);
  for (int64_t r = 0; r < a.kh; ++r) {
    const int64_t row = i + r - a.pad_top;
    if (row < 0 || row >= a.h) continue;
    for (int64_t s = s0; s < s1; ++s) {
      const float* x = x_image + (row * a.w + left + s) * ci;
      const float* k = a.kernel + (r * a.kw + s) * ci * a.co + first;
      for (int64_t c = 0; c < ci; ++c, k += a.co) {
        typename Vector<W>::Type weights[NV];
        for (int v = 0; v < NV; ++v) weights[v] = Load<W>(k + v * W);
        for (int p = 0; p < P; ++p) {
          const float value = x[p * ci + c];
          for (int v = 0; v < NV; ++v) acc[p][v] += value * weights[v];
        }
      }
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int v = 0; v < NV; ++v) {
      const typename Vector<W>::Type zero = {};
      typename Vector<W>::Type value = acc[p][v];
      if (a.relu) value = value < zero ? zero : value;  // keeps NaN
      if (mask != nullptr) {
        const auto m = Load<W>(mask + p * a.co + v * W);
        value = m > zero ? value : zero;
      }
      Store<W>(y + p * a.co + v * W, value);
    }
  }
}

template <int W, int NV, int Ci>
void Row(const ConvArgs& a, const float* x_image, int64_t i, int64_t first, float* y, const float* mask) {
  constexpr int P = NV == 1 ? kRegisters / 2 - 2 : (kRegisters - NV - 1) / NV;
  const auto at = [&](const float* row, int64_t j) { return row != nullptr ? row + j * a.co + first : nullptr; };
  const int64_t inside = std::clamp<int64_t>(a.pad_left, 0, a.ow());
  const int64_t outside = std::clamp<int64_t>(a.w + a.pad_left - a.kw + 1, inside, a.ow());
  const auto single = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      Pixels<W, NV, 1, Ci>(a, x_image, i, j, first, y + j * a.co + first, at(mask, j));
    }
  };
  single(0, inside);
  if (outside - inside < P) {
    single(inside, outside);
  } else {
    for (int64_t j = inside; j < outside; j += P) {
      const int64_t begin = std::min(j, outside - P);  // the last block overlaps the one before and repeats its values
      Pixels<W, NV, P, Ci>(a, x_image, i, begin, first, y + begin * a.co + first, at(mask, begin));
    }
  }
  single(outside, a.ow());
}

template <int W, int Ci>
void RowAllChannels(const ConvArgs& a, const float* x_image, int64_t i, float* y, const float* mask) {
  int64_t first = 0;
  if constexpr (kRegisters == 32) {
    for (; first + 4 * W <= a.co; first += 4 * W) Row<W, 4, Ci>(a, x_image, i, first, y, mask);
  }
  for (; first + 2 * W <= a.co; first += 2 * W) Row<W, 2, Ci>(a, x_image, i, first, y, mask);
  for (; first + W <= a.co; first += W) Row<W, 1, Ci>(a, x_image, i, first, y, mask);
}

template <int W>
void OutputRow(const ConvArgs& a, const float* x_image, int64_t i, float* y, const float* mask) {
  switch (a.ci) {
    case 16:
      return RowAllChannels<W, 16>(a, x_image, i, y, mask);
    case 32:
      return RowAllChannels<W, 32>(a, x_image, i, y, mask);
    case 64:
      return RowAllChannels<W, 64>(a, x_image, i, y, mask);
    default:
      return RowAllChannels<W, 0>(a, x_image, i, y, mask);
  }
}

// dkernel[c .. c + C)[first .. first + NV * W) += sum over `count` points of x[c] * dz[first].
template <int W, int NV, int C>
void Outer(const WgradArgs& a, const float* x, const float* dz, int64_t count, float* dkernel) {
  typename Vector<W>::Type acc[C][NV];
  for (int c = 0; c < C; ++c) {
    for (int v = 0; v < NV; ++v) acc[c][v] = Load<W>(dkernel + c * a.co + v * W);
  }
  for (int64_t j = 0; j < count; ++j, x += a.ci, dz += a.co) {
    typename Vector<W>::Type d[NV];
    for (int v = 0; v < NV; ++v) d[v] = Load<W>(dz + v * W);
    for (int c = 0; c < C; ++c) {
      for (int v = 0; v < NV; ++v) acc[c][v] += x[c] * d[v];
    }
  }
  for (int c = 0; c < C; ++c) {
    for (int v = 0; v < NV; ++v) Store<W>(dkernel + c * a.co + v * W, acc[c][v]);
  }
}

template <int W, int NV>
void OuterAllInputs(const WgradArgs& a, const float* x, const float* dz, int64_t count, float* dkernel) {
  constexpr int C = kRegisters == 32 ? 8 : 12 / NV / 2 * 2;
  int64_t c = 0;
  for (; c + C <= a.ci; c += C) Outer<W, NV, C>(a, x + c, dz, count, dkernel + c * a.co);
  for (; c < a.ci; ++c) Outer<W, NV, 1>(a, x + c, dz, count, dkernel + c * a.co);
}

template <int W>
void OuterAllChannels(const WgradArgs& a, const float* x, const float* dz, int64_t count, float* dkernel) {
  int64_t first = 0;
  for (; first + 2 * W <= a.co; first += 2 * W) OuterAllInputs<W, 2>(a, x, dz + first, count, dkernel + first);
  for (; first + W <= a.co; first += W) OuterAllInputs<W, 1>(a, x, dz + first, count, dkernel + first);
}

// The widest vector that divides the channels; 0 where none does.
int Width(int64_t channels) {
  for (int w = kWidest; w >= 4; w /= 2) {
    if (channels % w == 0) return w;
  }
  return 0;
}

}  // namespace

bool DirectConvServes(const ConvArgs& a) {
  // Measured on one core: with 32 registers up to 128 x 128 channels are faster here than in Eigen, with 16 up to 32
  // x 32.
  constexpr int64_t kWeightFloats = kRegisters == 32 ? 9 * 128 * 128 : 9 * 32 * 32;
  return a.stride == 1 && Width(a.co) >= std::min(8, kWidest) && a.kh * a.kw * a.ci * a.co <= kWeightFloats;
}

void DirectConv(ThreadPool& pool, const ConvArgs& a) {
  const int64_t rows = a.n * a.oh();
  constexpr int64_t kRows = 4;
  ParallelFor(pool, (rows + kRows - 1) / kRows, [&](int64_t task) {
    for (int64_t row = task * kRows; row < std::min(rows, (task + 1) * kRows); ++row) {
      const float* x = a.x + row / a.oh() * a.h * a.w * a.ci;
      float* y = a.y + row * a.ow() * a.co;
      const float* mask = a.mask != nullptr ? a.mask + row * a.ow() * a.co : nullptr;
      const int64_t i = row % a.oh();
      switch (Width(a.co)) {
        case 4:
          OutputRow<4>(a, x, i, y, mask);
          break;
        case 8:
          if constexpr (kWidest >= 8) OutputRow<8>(a, x, i, y, mask);
          break;
        default:
          if constexpr (kWidest >= 16) OutputRow<16>(a, x, i, y, mask);
      }
    }
  });
}

bool DirectWgradServes(const WgradArgs& a) {
  constexpr int64_t kTileFloats = 64 * 64;  // one tap's gradient stays in the first-level cache
  return Width(a.co) >= std::min(8, kWidest) && a.ci * a.co <= kTileFloats;
}

void DirectWgrad(ThreadPool& pool, const WgradArgs& a) {
  constexpr int64_t kStrip = 64;  // points whose x and dz stay in the first-level cache while all taps read them
  const int64_t all_rows = a.n * a.rows;
  ParallelFor(pool, a.slabs * a.kh, [&](int64_t task) {
    const int64_t slab = task / a.kh, r = task % a.kh;
    float* dkernel = a.dkernel + task * a.kw * a.ci * a.co;
    for (int64_t row = all_rows * slab / a.slabs; row < all_rows * (slab + 1) / a.slabs; ++row) {
      const int64_t image = row / a.rows, i = row % a.rows;
      for (int64_t j = 0; j < a.cols; j += kStrip) {
        const int64_t count = std::min(kStrip, a.cols - j);
        const float* dz = a.dz + ((image * a.h + i) * a.w + j) * a.co;
        for (int64_t s = 0; s < a.kw; ++s) {
          const float* x = a.x + ((image * a.h + i + r) * a.w + j + s) * a.ci;
          float* tap = dkernel + s * a.ci * a.co;
          switch (Width(a.co)) {
            case 4:
              OuterAllChannels<4>(a, x, dz, count, tap);
              break;
            case 8:
              if constexpr (kWidest >= 8) OuterAllChannels<8>(a, x, dz, count, tap);
              break;
            default:
              if constexpr (kWidest >= 16) OuterAllChannels<16>(a, x, dz, count, tap);
          }
        }
      }
    }
  });
}

}  // namespace unet_fast::cpu::UNET_FAST_ISA
