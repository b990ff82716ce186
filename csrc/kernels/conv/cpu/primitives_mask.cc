// The gradient of what lies under an activation and a 2x2 max pool, with its sums: one pass over dy and y.
#include "conv/cpu/primitives.h"
#include "conv/cpu/vector.h"

namespace unet_fast::cpu::UNET_FAST_ISA {
namespace {

// Channels [0, NV * W), whose sums stay in registers.
template <int W, int NV, bool Masks, bool Stores>
void MaskChannels(const float* dy, const float* y, int64_t pixels, int64_t c, float* dz, float* sums) {
  const typename Vector<W>::Type zero = {};
  typename Vector<W>::Type sum[NV];
  for (int v = 0; v < NV; ++v) sum[v] = Load<W>(sums + v * W);
  for (int64_t j = 0; j < pixels; ++j) {
    for (int v = 0; v < NV; ++v) {
      const int64_t at = j * c + v * W;
      auto d = Load<W>(dy + at);
      if constexpr (Masks) d = Load<W>(y + at) > zero ? d : zero;
      if constexpr (Stores) Store<W>(dz + at, d);
      sum[v] += d;
    }
  }
  for (int v = 0; v < NV; ++v) Store<W>(sums + v * W, sum[v]);
}

template <int W, bool Masks, bool Stores>
void MaskPixels(const float* dy, const float* y, int64_t pixels, int64_t c, float* dz, float* sums) {
  const auto at = [&](auto* p, int64_t k) { return p != nullptr ? p + k : nullptr; };
  int64_t k = 0;
  for (; k + 4 * W <= c; k += 4 * W) {
    MaskChannels<W, 4, Masks, Stores>(dy + k, at(y, k), pixels, c, at(dz, k), sums + k);
  }
  for (; k < c; k += W) MaskChannels<W, 1, Masks, Stores>(dy + k, at(y, k), pixels, c, at(dz, k), sums + k);
}

template <int W>
void Mask(const float* dy, const float* y, int64_t pixels, int64_t c, float* dz, float* sums) {
  if (y == nullptr) {
    dz == nullptr ? MaskPixels<W, false, false>(dy, y, pixels, c, dz, sums)
                  : MaskPixels<W, false, true>(dy, y, pixels, c, dz, sums);
  } else {
    dz == nullptr ? MaskPixels<W, true, false>(dy, y, pixels, c, dz, sums)
                  : MaskPixels<W, true, true>(dy, y, pixels, c, dz, sums);
  }
}

template <int W, bool Relu>
void UnpoolWindows(const UnpooledRows& r) {
  using V = typename Vector<W>::Type;
  const V zero = {};
  const auto masked = [&](V value, V y) -> V {
    if constexpr (Relu) return y > zero ? value : zero;
    return value;
  };
  for (int64_t k = 0; k < r.c; k += W) {
    V sum0 = Load<W>(r.sums[0] + k), sum1 = Load<W>(r.sums[1] + k);
    const auto put = [&](int q, int64_t at, V add, V y, V* sum) {
      const V d = masked(Load<W>(r.dy[q] + at) + add, y);
      Store<W>(r.dz[q] + at, d);
      *sum += d;
    };
    for (int64_t j = 0; j < r.cols; ++j) {
      const int64_t left = 2 * j * r.c + k, right = left + r.c;
      const V a = Load<W>(r.y[0] + left), b = Load<W>(r.y[0] + right);
      const V e = Load<W>(r.y[1] + left), f = Load<W>(r.y[1] + right), d = Load<W>(r.dpooled + j * r.c + k);
      const V top = b > a ? b : a, bottom = f > e ? f : e;
      const V high = bottom > top ? zero : d, low = bottom > top ? d : zero;
      put(0, left, b > a ? zero : high, a, &sum0);
      put(0, right, b > a ? high : zero, b, &sum0);
      put(1, left, f > e ? zero : low, e, &sum1);
      put(1, right, f > e ? low : zero, f, &sum1);
    }
    Store<W>(r.sums[0] + k, sum0);
    Store<W>(r.sums[1] + k, sum1);
  }
}

template <int W>
void Unpool(const UnpooledRows& r) {
  r.relu ? UnpoolWindows<W, true>(r) : UnpoolWindows<W, false>(r);
}

}  // namespace

void MaskGradientRow(const float* dy, const float* y, int64_t pixels, int64_t c, float* dz, float* sums) {
  switch (Width(c)) {
    case 0:
      return Mask<1>(dy, y, pixels, c, dz, sums);
    case 4:
      return Mask<4>(dy, y, pixels, c, dz, sums);
    case 8:
      if constexpr (kWidest >= 8) Mask<8>(dy, y, pixels, c, dz, sums);
      return;
    default:
      if constexpr (kWidest >= 16) Mask<16>(dy, y, pixels, c, dz, sums);
  }
}

void UnpoolGradientRows(const UnpooledRows& r) {
  switch (Width(r.c)) {
    case 0:
      return Unpool<1>(r);
    case 4:
      return Unpool<4>(r);
    case 8:
      if constexpr (kWidest >= 8) Unpool<8>(r);
      return;
    default:
      if constexpr (kWidest >= 16) Unpool<16>(r);
  }
}

}  // namespace unet_fast::cpu::UNET_FAST_ISA
