// The last layer: a 1x1 convolution to a few classes, which is as fast as its input can be read. Eight lanes share a
// pixel, 8 channels each at a time, and add up their shares of every filter by shuffles; weights lie in shared memory
// as float32. The input gradient writes 8 channels a thread; the weight gradient keeps 8 channels by all filters in a
// thread and adds lanes, warps and then blocks (reduce.cu) in a fixed order.
#include <algorithm>

#include "common/cuda.cuh"
#include "conv/direct.h"
#include "conv/reduce.h"

namespace unet_fast::gpu {
namespace {

constexpr int kThreads = 256, kLanes = 8, kPixels = kThreads / kLanes, kMostFilters = 8, kMostChannels = 1024;
constexpr int kSpan = kLanes * kPack;  // channels that eight lanes cover

// weights [channels, rounded up to a multiple of 8][kFilters] into shared memory, zeros beyond channels and filters.
template <int kFilters, typename T>
__device__ void LoadWeights(const T* kernel, int channels, int filters, float* weights) {
  for (int i = threadIdx.x; i < (channels + kPack - 1) / kPack * kPack * kFilters; i += blockDim.x) {
    const int c = i / kFilters, f = i % kFilters;
    weights[i] = c < channels && f < filters ? ToFloat(kernel[c * filters + f]) : 0.0f;
  }
  __syncthreads();
}

template <typename T, int kFilters, bool kVector>
__global__ __launch_bounds__(kThreads) void ForwardKernel(const T* x, const T* kernel, const T* bias, T* y,
                                                          int64_t pixels, int channels, int filters, bool relu) {
  extern __shared__ float weights[];
  LoadWeights<kFilters>(kernel, channels, filters, weights);
  const int lane = threadIdx.x % kLanes;
  // All lanes of a warp stay in the loop together, for the shuffles.
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPixels;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kPixels; first < pixels; first += step) {
    const int64_t pixel = first + threadIdx.x / kLanes;
    float sum[kFilters];
#pragma unroll
    for (int f = 0; f < kFilters; ++f) sum[f] = 0.0f;
    if (pixel < pixels) {
      for (int c = lane * kPack; c < channels; c += kSpan) {
        const Pack<T> v = LoadPack<kVector>(x + pixel * channels + c, channels - c);
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
#pragma unroll
          for (int f = 0; f < kFilters; ++f) sum[f] = fmaf(ToFloat(v.v[e]), weights[(c + e) * kFilters + f], sum[f]);
        }
      }
    }
    float mine = 0.0f;
#pragma unroll
    for (int f = 0; f < kFilters; ++f) {
#pragma unroll
      for (int offset = 1; offset < kLanes; offset *= 2) sum[f] += __shfl_xor_sync(~0u, sum[f], offset);
      if (f == lane) mine = sum[f];
    }
    if (pixel >= pixels || lane >= filters) continue;
    mine += ToFloat(bias[lane]);
    y[pixel * filters + lane] = FromFloat<T>(relu ? Relu(mine) : mine);
  }
}

template <typename T, int kFilters, bool kVector>
__global__ __launch_bounds__(kThreads) void DgradKernel(const T* dz, const T* kernel, const T* x, T* dx, int64_t pixels,
                                                        int channels, int filters, bool mask) {
  extern __shared__ float weights[];
  LoadWeights<kFilters>(kernel, channels, filters, weights);
  const int lane = threadIdx.x % kLanes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPixels;
  for (int64_t pixel = static_cast<int64_t>(blockIdx.x) * kPixels + threadIdx.x / kLanes; pixel < pixels;
       pixel += step) {
    float d[kFilters];
#pragma unroll
    for (int f = 0; f < kFilters; ++f) d[f] = f < filters ? ToFloat(dz[pixel * filters + f]) : 0.0f;
    for (int c = lane * kPack; c < channels; c += kSpan) {
      Pack<T> v, out;
      if (mask) v = LoadPack<kVector>(x + pixel * channels + c, channels - c);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        float sum = 0.0f;
#pragma unroll
        for (int f = 0; f < kFilters; ++f) sum = fmaf(d[f], weights[(c + e) * kFilters + f], sum);
        out.v[e] = FromFloat<T>(mask && !(ToFloat(v.v[e]) > 0.0f) ? 0.0f : sum);
      }
      StorePack<kVector>(dx + pixel * channels + c, out, channels - c);
    }
  }
}

template <typename T, int kFilters, bool kVector>
__global__ __launch_bounds__(kThreads) void WgradKernel(const T* x, const T* dz, float* slabs, int64_t pixels,
                                                        int channels, int filters) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float partial[kWarps][kSpan][kFilters];
  const int lane = threadIdx.x % kLanes, c = blockIdx.y * kSpan + lane * kPack;
  float sum[kPack][kFilters];
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
#pragma unroll
    for (int f = 0; f < kFilters; ++f) sum[e][f] = 0.0f;
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPixels;
#pragma unroll 4
  for (int64_t pixel = static_cast<int64_t>(blockIdx.x) * kPixels + threadIdx.x / kLanes; pixel < pixels;
       pixel += step) {
    const Pack<T> v = LoadPack<kVector>(x + pixel * channels + c, channels - c);
#pragma unroll
    for (int f = 0; f < kFilters; ++f) {
      const float d = f < filters ? ToFloat(dz[pixel * filters + f]) : 0.0f;
#pragma unroll
      for (int e = 0; e < kPack; ++e) sum[e][f] = fmaf(ToFloat(v.v[e]), d, sum[e][f]);
    }
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
#pragma unroll
    for (int f = 0; f < kFilters; ++f) {
      float v = sum[e][f];
      v += __shfl_xor_sync(~0u, v, 8);
      v += __shfl_xor_sync(~0u, v, 16);
      if (threadIdx.x % 32 < kLanes) partial[threadIdx.x / 32][lane * kPack + e][f] = v;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSpan * kFilters; i += kThreads) {
    const int channel = blockIdx.y * kSpan + i / kFilters, f = i % kFilters;
    if (channel >= channels || f >= filters) continue;
    float v = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) v += partial[warp][i / kFilters][f];
    slabs[(static_cast<int64_t>(blockIdx.x) * channels + channel) * filters + f] = v;
  }
}

int64_t Pixels(const Conv2DProblem& p) { return p.batch * p.height * p.width; }

unsigned Blocks(const Conv2DProblem& p) {
  return static_cast<unsigned>(std::clamp<int64_t>(Pixels(p) / (8 * kPixels), 1, 1056));
}

size_t WeightBytes(const Conv2DProblem& p, int filters) {
  return static_cast<size_t>(CeilDiv(p.channels, kPack)) * kPack * filters * sizeof(float);
}

// f(T(), number of filters to compute, whether channels come in vectors), the last two as types.
template <typename F>
int DispatchShape(const Conv2DProblem& p, F f) {
  return Dispatch16(p.dtype, [&](auto type) -> int {
    const auto with = [&](auto filters) -> int {
      return p.channels % kPack == 0 ? f(type, filters, std::true_type()) : f(type, filters, std::false_type());
    };
    if (p.filters <= 2) return with(std::integral_constant<int, 2>());
    if (p.filters <= 4) return with(std::integral_constant<int, 4>());
    return with(std::integral_constant<int, kMostFilters>());
  });
}

}  // namespace

bool HasFewFilters(const Conv2DProblem& p) {
  return p.kernel_size == 1 && p.filters <= kMostFilters && p.channels <= kMostChannels && p.skip_channels == 0 &&
         !p.pool;
}

int FewFiltersForward(void* stream, const Conv2DProblem& p, const Conv2DForward& d) {
  return DispatchShape(p, [&](auto type, auto filters, auto vector) -> int {
    using T = decltype(type);
    return Launch(ForwardKernel<T, filters(), vector()>, Blocks(p), kThreads, WeightBytes(p, filters()), stream,
                  static_cast<const T*>(d.x), static_cast<const T*>(d.kernel), static_cast<const T*>(d.bias),
                  static_cast<T*>(d.y), Pixels(p), static_cast<int>(p.channels), static_cast<int>(p.filters), p.relu);
  });
}

int FewFiltersDgrad(void* stream, const Conv2DProblem& p, const void* dz, const void* x, const void* kernel, void* dx) {
  return DispatchShape(p, [&](auto type, auto filters, auto vector) -> int {
    using T = decltype(type);
    return Launch(DgradKernel<T, filters(), vector()>, Blocks(p), kThreads, WeightBytes(p, filters()), stream,
                  static_cast<const T*>(dz), static_cast<const T*>(kernel), static_cast<const T*>(x),
                  static_cast<T*>(dx), Pixels(p), static_cast<int>(p.channels), static_cast<int>(p.filters),
                  p.input_is_relu);
  });
}

size_t FewFiltersWgradSlabBytes(const Conv2DProblem& p) {
  return Blocks(p) * static_cast<size_t>(p.kernel_elements()) * sizeof(float);
}

int FewFiltersWgrad(void* stream, const Conv2DProblem& p, const void* x, const void* dz, void* dkernel, float* slabs) {
  UNET_FAST_CUDA_RETURN_IF_ERROR(DispatchShape(p, [&](auto type, auto filters, auto vector) -> int {
    using T = decltype(type);
    return Launch(WgradKernel<T, filters(), vector()>,
                  dim3(Blocks(p), static_cast<unsigned>(CeilDiv(p.channels, kSpan))), kThreads, 0, stream,
                  static_cast<const T*>(x), static_cast<const T*>(dz), slabs, Pixels(p), static_cast<int>(p.channels),
                  static_cast<int>(p.filters));
  }));
  return SumSlabs(stream, p.dtype, slabs, static_cast<int>(Blocks(p)), p.kernel_elements(), dkernel);
}

}  // namespace unet_fast::gpu
