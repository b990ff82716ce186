// The last layer: a 1x1 convolution to at most eight classes. It is as fast as its input can be read, and its gradient
// as the input can be read and its gradient written, if the arithmetic costs next to nothing: all of it is products on
// tensor cores whose operands go from global memory to registers in 16 bytes a thread.
//
// Forward: rows are 16 pixels, columns the filters, the sum runs over the channels. Channels are dealt to the places of
// the sum such that the 8 neighbours that a thread loads are its share of two products.
//
// Backward: one kernel, which reads the input once. A thread holds 8 channels of 4 pixels. Paired over the pixels they
// are its share of the weight gradient: rows are channels, columns filters, the sum runs over 16 pixels. The input
// gradient - rows are channels again, columns pixels, the sum runs over the filters - comes out as 8 channels of the
// same 4 pixels, and is masked by them. Bias gradient: rows of ones times dz. Warps of a block are added in a fixed
// order, and blocks leave slabs for reduce.cu.
#include <algorithm>

#include "common/cuda.cuh"
#include "conv/direct.h"
#include "conv/reduce.h"
#include "ptx/mma.cuh"

namespace unet_fast::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kMostFilters = 8, kMostChannels = 1024;
constexpr int kSpan = 64;                             // channels at a time
constexpr int kForwardPixels = 32, kGradPixels = 16;  // of a warp at a time
constexpr int kForwardBlocks = 3;                     // on a multiprocessor at a time

struct KernelArgs {
  const void *x, *kernel, *bias, *dz;
  void *y, *dx;               // dx null: not wanted
  float *slabs, *bias_slabs;  // bias_slabs null: not wanted
  uint32_t pixels;
  int channels, filters;
  bool relu, mask;
};

// kernel[c, f], zero beyond channels and filters.
__device__ uint32_t Weight(const KernelArgs& k, int c, int f) {
  const bool exists = c < k.channels && f < k.filters;
  return exists ? __ldg(static_cast<const uint16_t*>(k.kernel) + c * k.filters + f) : 0;
}

// The way from pixel 0 to another.
template <typename T>
__device__ T* At(T* data, uint32_t pixel, int elements) {
  return data + static_cast<uint64_t>(pixel) * static_cast<uint32_t>(elements);
}

// How many of `count` pixels from `first` on exist.
__device__ int Left(const KernelArgs& k, uint32_t first, int count) {
  return first < k.pixels ? static_cast<int>(min(k.pixels - first, static_cast<uint32_t>(count))) : 0;
}

// Rows g and g + 8 of a product are pixels; its place 2t + e of the sum is channel 8t + e of 32, place 2t + 8 + e is
// channel 8t + 2 + e, and in the next product 4 further on.
template <typename T, bool kVector>
__global__ __launch_bounds__(kThreads, kForwardBlocks) void ForwardKernel(const __grid_constant__ KernelArgs k) {
  extern __shared__ __align__(8) uint2 weights[];  // [products][lanes]
  for (int i = threadIdx.x; i < (k.channels + kSpan - 1) / kSpan * 4 * 32; i += kThreads) {
    const int c = i / 64 * 32 + i % 4 * 8 + i / 32 % 2 * 4, f = i % 32 / 4;
    weights[i] = make_uint2(ptx::LowerHalves(Weight(k, c, f), Weight(k, c + 1, f)),
                            ptx::LowerHalves(Weight(k, c + 2, f), Weight(k, c + 3, f)));
  }
  __syncthreads();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float bias[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    bias[e] = 2 * t + e < k.filters ? ToFloat(static_cast<const T*>(k.bias)[2 * t + e]) : 0.0f;
  }
  for (uint32_t first = (blockIdx.x * kWarps + threadIdx.x / 32) * kForwardPixels; first < k.pixels;
       first += gridDim.x * kWarps * kForwardPixels) {
    float sum[2][4];  // of pixels first ... first + 15 and the next 16
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i / 4][i % 4] = bias[i % 2];
    const uint16_t* x = At(static_cast<const uint16_t*>(k.x), first, k.channels);
    const int left = Left(k, first, kForwardPixels);
    for (int from = 0; from < k.channels; from += kSpan) {
      uint4 v[2][4];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int pixel = i % 4 * 8 + g, c = from + i / 4 * 32 + t * kPack;
        v[i / 4][i % 4] = LoadWords<kVector>(Advance(x, pixel * k.channels + c), pixel < left ? k.channels - c : 0);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4(&span)[4] = v[i / 2];
        const uint2 w = weights[(from / 16 + i) * 32 + lane];
        const uint32_t b[2] = {w.x, w.y};
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const uint32_t a[4] = {Word(span[2 * u], i % 2 * 2), Word(span[2 * u + 1], i % 2 * 2),
                                 Word(span[2 * u], i % 2 * 2 + 1), Word(span[2 * u + 1], i % 2 * 2 + 1)};
          ptx::Mma<T>(sum[u], a, b);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int pixel = i / 2 * 8 + g, f = 2 * t + i % 2;
      const float v = sum[i / 4][i % 4];
      if (pixel < left && f < k.filters) {
        At(static_cast<T*>(k.y), first, k.filters)[pixel * k.filters + f] = FromFloat<T>(k.relu ? Relu(v) : v);
      }
    }
  }
}

// What a warp needs of 16 pixels: this thread's 8 channels of pixels 2t, 2t + 1, 2t + 8, 2t + 9, and filters 2t, 2t + 1
// of dz of pixels g and g + 8. Zeros beyond the pixels.
struct Load {
  uint4 x[4];
  uint32_t dz[2][2];

  template <bool kVector>
  __device__ void From(const KernelArgs& k, uint32_t first, int g, int t, int c) {
    const int left = Left(k, first, kGradPixels);
    const uint16_t* from = At(static_cast<const uint16_t*>(k.x), first, k.channels);
    const uint16_t* dz_from = At(static_cast<const uint16_t*>(k.dz), first, k.filters);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pixel = 2 * t + i / 2 * 8 + i % 2;
      x[i] = LoadWords<kVector>(Advance(from, pixel * k.channels + c), pixel < left ? k.channels - c : 0);
      const int of_dz = i / 2 * 8 + g, f = 2 * t + i % 2;
      dz[i / 2][i % 2] = of_dz < left && f < k.filters ? __ldg(Advance(dz_from, of_dz * k.filters + f)) : 0;
    }
  }
};

// Rows g and g + 8 of product m with channels in rows are channels 8g + 2m and 8g + 2m + 1 of 64.
template <typename T, bool kVector>
__global__ __launch_bounds__(kThreads, 2) void GradKernel(const __grid_constant__ KernelArgs k) {
  constexpr int kInFlight = 2;  // loads that a warp waits for
  __shared__ __align__(8) float partial[kWarps][kSpan * kMostFilters];
  __shared__ float bias_partial[kWarps][kMostFilters];
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int span = blockIdx.y * kSpan, c = span + g * kPack, count = k.channels - c;
  // Of the input gradient's sum over the filters, places 2t and 2t + 1.
  uint32_t weights[4][2];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    weights[i / 2][i % 2] = ptx::LowerHalves(Weight(k, c + i, 2 * t), Weight(k, c + i, 2 * t + 1));
  }
  Pack<T> one;
#pragma unroll
  for (int e = 0; e < kPack; ++e) one.v[e] = FromFloat<T>(1.0f);
  const uint32_t two_ones = *reinterpret_cast<const uint32_t*>(&one),
                 ones[4] = {two_ones, two_ones, two_ones, two_ones};
  float sum[4][4] = {}, bias_sum[4] = {};

  const uint32_t step = gridDim.x * kWarps * kGradPixels, begin = (blockIdx.x * kWarps + warp) * kGradPixels;
  Load load[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) load[u].From<kVector>(k, begin + u * step, g, t, c);
  for (uint32_t turn = begin; turn < k.pixels; turn += kInFlight * step) {
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const uint32_t first = turn + u * step;
      const uint4(&x)[4] = load[u].x;
      const uint32_t dz[2] = {ptx::LowerHalves(load[u].dz[0][0], load[u].dz[0][1]),
                              ptx::LowerHalves(load[u].dz[1][0], load[u].dz[1][1])};
      const uint32_t by_pixel[2] = {ptx::Transposed(dz[0]), ptx::Transposed(dz[1])};
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const uint32_t a[4] = {
            ptx::LowerHalves(Word(x[0], m), Word(x[1], m)), ptx::UpperHalves(Word(x[0], m), Word(x[1], m)),
            ptx::LowerHalves(Word(x[2], m), Word(x[3], m)), ptx::UpperHalves(Word(x[2], m), Word(x[3], m))};
        ptx::Mma<T>(sum[m], a, by_pixel);
      }
      ptx::Mma<T>(bias_sum, ones, by_pixel);
      if (k.dx != nullptr) {
        T* dx = At(static_cast<T*>(k.dx), first, k.channels) + c;
        const int left = Left(k, first, kGradPixels);
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // of the pixels
          Pack<T> out[2];
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const uint32_t a[4] = {weights[m][0], weights[m][1], 0, 0}, b[2] = {dz[half], 0};
            float d[4] = {};
            ptx::Mma<T>(d, a, b);
#pragma unroll
            for (int e = 0; e < 2; ++e) PairAt(out[e], m) = RoundedPair<T>(d[e], d[2 + e]);
          }
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int pixel = 2 * t + half * 8 + e;
            if (k.mask) out[e] = Masked(out[e], *reinterpret_cast<const Pack<T>*>(&x[2 * half + e]));
            StorePack<kVector>(dx + pixel * k.channels, out[e], pixel < left ? count : 0);
          }
        }
      }
      load[u].From<kVector>(k, first + kInFlight * step, g, t, c);
    }
  }

#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float* two = sum[i / 2] + i % 2 * 2;
    *reinterpret_cast<float2*>(&partial[warp][(g * kPack + i) * kMostFilters + 2 * t]) = make_float2(two[0], two[1]);
  }
  if (g == 0) bias_partial[warp][2 * t] = bias_sum[0], bias_partial[warp][2 * t + 1] = bias_sum[1];
  __syncthreads();
  const int64_t block = blockIdx.x;
  for (int i = threadIdx.x; i < kSpan * kMostFilters; i += kThreads) {
    const int channel = span + i / kMostFilters, f = i % kMostFilters;
    if (channel >= k.channels || f >= k.filters) continue;
    float v = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) v += partial[w][i];
    k.slabs[(block * k.channels + channel) * k.filters + f] = v;
  }
  if (k.bias_slabs == nullptr || blockIdx.y > 0 || threadIdx.x >= k.filters) return;
  float v = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) v += bias_partial[w][threadIdx.x];
  k.bias_slabs[block * k.filters + threadIdx.x] = v;
}

KernelArgs Arguments(const Conv2DProblem& p) {
  KernelArgs k = {};
  k.pixels = static_cast<uint32_t>(p.batch * p.height * p.width), k.channels = p.channels, k.filters = p.filters;
  k.relu = p.relu, k.mask = p.mask_dx;
  return k;
}

bool TooMany(const Conv2DProblem& p) { return p.batch * p.height * p.width >= int64_t{1} << 31; }

int64_t Spans(const Conv2DProblem& p) { return CeilDiv(p.channels, kSpan); }

// Slabs of the gradient: they may not depend on the device. On an H200 (132 multiprocessors) as many blocks of 64
// channels run in whole waves, be it two or three at a time on each.
int Slabs(const Conv2DProblem& p) {
  const int64_t steps = p.batch * p.height * p.width / (2 * kWarps * kGradPixels);
  return static_cast<int>(std::clamp<int64_t>(steps, 1, std::max<int64_t>(792 / Spans(p), 1)));
}

// f(T(), whether channels come in vectors), the latter as a type.
template <typename F>
int DispatchShape(const Conv2DProblem& p, F f) {
  return Dispatch16(p.dtype, [&](auto type) -> int {
    return p.channels % kPack == 0 ? f(type, std::true_type()) : f(type, std::false_type());
  });
}

}  // namespace

bool HasFewFilters(const Conv2DProblem& p) {
  return p.kernel_size == 1 && p.filters <= kMostFilters && p.channels <= kMostChannels && p.skip_channels == 0 &&
         !p.pool;
}

int FewFiltersForward(void* stream, const Conv2DProblem& p, const Conv2DForward& d) {
  if (TooMany(p)) return cudaErrorNotSupported;
  KernelArgs k = Arguments(p);
  k.x = d.x, k.kernel = d.kernel, k.bias = d.bias, k.y = d.y;
  const int64_t resident = Multiprocessors() * kForwardBlocks;
  const int64_t blocks = std::min(resident, CeilDiv(k.pixels, kWarps * kForwardPixels));
  const size_t shared = Spans(p) * 4 * 32 * sizeof(uint2);
  return DispatchShape(p, [&](auto type, auto vector) -> int {
    return Launch(ForwardKernel<decltype(type), vector()>, static_cast<unsigned>(blocks), kThreads, shared, stream, k);
  });
}

size_t FewFiltersGradSlabBytes(const Conv2DProblem& p) {
  return Slabs(p) * static_cast<size_t>(p.kernel_elements() + p.filters) * sizeof(float);
}

int FewFiltersGrad(void* stream, const Conv2DProblem& p, const void* x, const void* dz, const void* kernel, void* dx,
                   void* dkernel, void* dbias, float* slabs) {
  if (TooMany(p)) return cudaErrorNotSupported;
  const int count = Slabs(p);
  KernelArgs k = Arguments(p);
  k.x = x, k.dz = dz, k.kernel = kernel, k.dx = dx, k.slabs = slabs;
  if (dbias != nullptr) k.bias_slabs = slabs + count * p.kernel_elements();
  UNET_FAST_CUDA_RETURN_IF_ERROR(DispatchShape(p, [&](auto type, auto vector) -> int {
    const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(Spans(p)));
    return Launch(GradKernel<decltype(type), vector()>, grid, kThreads, 0, stream, k);
  }));
  return SumSlabs(stream, p.dtype, count, {slabs, p.kernel_elements(), dkernel}, {k.bias_slabs, p.filters, dbias});
}

}  // namespace unet_fast::gpu
