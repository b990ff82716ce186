// The first layer: one to seven input channels leave nothing for a tensor core to share, and the layer is as fast as
// its output can be written. A thread computes a 2x2 quad of pixels by 8 filters, so that each weight it takes from
// shared memory is used four times, and can pool the quad on the spot. Eight lanes cover 64 filters: 128 bytes a pixel.
//
// Its weight gradient gives a thread all taps of one channel by 8 filters; dz is read once a channel. A block walks
// over pixels, its lanes and warps are added in a fixed order, and blocks leave slabs for reduce.cu.
#include <algorithm>

#include "common/cuda.cuh"
#include "conv/direct.h"
#include "conv/reduce.h"

namespace unet_fast::gpu {
namespace {

constexpr int kThreads = 256, kLanes = 8, kQuads = kThreads / kLanes, kFilters = kLanes * kPack;

struct KernelArgs {
  const void *x, *kernel, *bias, *dz;
  void *y, *pooled;
  float* slabs;
  int h, w, channels, out_h, out_w, filters, pad;
  bool relu;
  Divisor quads_per_image, quads_per_row;
  uint32_t quads;
};

struct Quad {
  int64_t image;
  int row, col;
  __device__ Quad(const KernelArgs& k, uint32_t quad) {
    uint32_t in_image, qj;
    image = k.quads_per_image.Divide(quad, &in_image);
    row = 2 * k.quads_per_row.Divide(in_image, &qj);
    col = 2 * qj;
  }
};

// The (K + 1) x (K + 1) inputs that a quad sees of one channel.
template <int K, typename T>
__device__ void LoadWindow(const KernelArgs& k, const Quad& q, int channel, float (&window)[K + 1][K + 1]) {
  const T* x = static_cast<const T*>(k.x) + q.image * k.h * k.w * k.channels + channel;
#pragma unroll
  for (int r = 0; r <= K; ++r) {
#pragma unroll
    for (int s = 0; s <= K; ++s) {
      const int i = q.row + r - k.pad, j = q.col + s - k.pad;
      const bool inside = i >= 0 && i < k.h && j >= 0 && j < k.w;
      window[r][s] = inside ? ToFloat(x[(static_cast<int64_t>(i) * k.w + j) * k.channels]) : 0.0f;
    }
  }
}

template <typename T, int K, bool kVector>
__global__ __launch_bounds__(kThreads, 2) void ForwardKernel(const __grid_constant__ KernelArgs k) {
  extern __shared__ __align__(16) float weights[];  // [K * K * channels][kFilters]
  const int first = blockIdx.y * kFilters;
  for (int i = threadIdx.x; i < K * K * k.channels * kFilters; i += kThreads) {
    const int f = first + i % kFilters;
    weights[i] = f < k.filters ? ToFloat(static_cast<const T*>(k.kernel)[i / kFilters * k.filters + f]) : 0.0f;
  }
  __syncthreads();
  const int lane = threadIdx.x % kLanes, f = first + lane * kPack, count = k.filters - f;
  if (count <= 0) return;
  const Pack<T> bias = LoadPack<kVector>(static_cast<const T*>(k.bias) + f, count);
  for (uint32_t quad = blockIdx.x * kQuads + threadIdx.x / kLanes; quad < k.quads; quad += gridDim.x * kQuads) {
    const Quad q(k, quad);
    float sum[4][kPack];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) sum[p][e] = ToFloat(bias.v[e]);
    }
    for (int c = 0; c < k.channels; ++c) {
      float window[K + 1][K + 1];
      LoadWindow<K, T>(k, q, c, window);
#pragma unroll
      for (int tap = 0; tap < K * K; ++tap) {
        float w[kPack];
        const float4* from =
            reinterpret_cast<const float4*>(weights + (tap * k.channels + c) * kFilters + lane * kPack);
        *reinterpret_cast<float4*>(w) = from[0];
        *reinterpret_cast<float4*>(w + 4) = from[1];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const float v = window[tap / K + p / 2][tap % K + p % 2];
#pragma unroll
          for (int e = 0; e < kPack; ++e) sum[p][e] = fmaf(v, w[e], sum[p][e]);
        }
      }
    }
    Pack<T> top;
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int i = q.row + p / 2, j = q.col + p % 2;
      Pack<T> out = Rounded<T>(sum[p]);
      if (k.relu) out = Relu(out);
      top = p == 0 ? out : Max(top, out);
      if (i >= k.out_h || j >= k.out_w) continue;
      StorePack<kVector>(static_cast<T*>(k.y) + ((q.image * k.out_h + i) * k.out_w + j) * k.filters + f, out, count);
    }
    if (k.pooled == nullptr || q.row + 1 >= k.out_h || q.col + 1 >= k.out_w) continue;
    const int64_t pixel = (q.image * (k.out_h / 2) + q.row / 2) * (k.out_w / 2) + q.col / 2;
    StorePack<kVector>(static_cast<T*>(k.pooled) + pixel * k.filters + f, top, count);
  }
}

template <typename T, int K, bool kVector>
__global__ __launch_bounds__(kThreads, 2) void WgradKernel(const __grid_constant__ KernelArgs k) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float partial[kWarps][K * K][kFilters];
  const int lane = threadIdx.x % kLanes, f = blockIdx.y * kFilters + lane * kPack, channel = blockIdx.z;
  const int count = k.filters - f;
  float sum[K * K][kPack];
#pragma unroll
  for (int tap = 0; tap < K * K; ++tap) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) sum[tap][e] = 0.0f;
  }
  for (uint32_t quad = blockIdx.x * kQuads + threadIdx.x / kLanes; quad < k.quads; quad += gridDim.x * kQuads) {
    const Quad q(k, quad);
    float window[K + 1][K + 1];
    LoadWindow<K, T>(k, q, channel, window);
    Pack<T> dz[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int i = q.row + p / 2, j = q.col + p % 2;
      dz[p] = LoadPack<kVector>(static_cast<const T*>(k.dz) + ((q.image * k.out_h + i) * k.out_w + j) * k.filters + f,
                                i < k.out_h && j < k.out_w ? count : 0);
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) {
#pragma unroll
      for (int tap = 0; tap < K * K; ++tap) {
        const float v = window[tap / K + p / 2][tap % K + p % 2];
#pragma unroll
        for (int e = 0; e < kPack; ++e) sum[tap][e] = fmaf(v, ToFloat(dz[p].v[e]), sum[tap][e]);
      }
    }
  }
#pragma unroll
  for (int tap = 0; tap < K * K; ++tap) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      float v = sum[tap][e];
      v += __shfl_xor_sync(~0u, v, 8);
      v += __shfl_xor_sync(~0u, v, 16);
      if (threadIdx.x % 32 < kLanes) partial[threadIdx.x / 32][tap][lane * kPack + e] = v;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < K * K * kFilters; i += kThreads) {
    const int tap = i / kFilters, filter = blockIdx.y * kFilters + i % kFilters;
    if (filter >= k.filters) continue;
    float v = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) v += partial[warp][tap][i % kFilters];
    k.slabs[((static_cast<int64_t>(blockIdx.x) * K * K + tap) * k.channels + channel) * k.filters + filter] = v;
  }
}

KernelArgs Arguments(const Conv2DProblem& p) {
  KernelArgs k = {};
  const int64_t rows = CeilDiv(p.out_height(), 2), cols = CeilDiv(p.out_width(), 2);
  k.h = p.height, k.w = p.width, k.channels = p.channels;
  k.out_h = p.out_height(), k.out_w = p.out_width(), k.filters = p.filters, k.pad = p.pad(), k.relu = p.relu;
  k.quads_per_image = Divisor(rows * cols), k.quads_per_row = Divisor(cols);
  k.quads = static_cast<uint32_t>(p.batch * rows * cols);
  return k;
}

bool TooMany(const Conv2DProblem& p) {
  return p.batch * CeilDiv(p.out_height(), 2) * CeilDiv(p.out_width(), 2) >= int64_t{1} << 31;
}

// Blocks along the pixels; of the weight gradient, also its slabs.
unsigned Blocks(const KernelArgs& k) {
  return static_cast<unsigned>(std::clamp<int64_t>(k.quads / (4 * kQuads), 1, 1056));
}

}  // namespace

bool HasFewChannels(const Conv2DProblem& p) { return p.channels < kPack && p.skip_channels == 0; }

int FewChannelsForward(void* stream, const Conv2DProblem& p, const Conv2DForward& d) {
  if (TooMany(p)) return cudaErrorNotSupported;
  KernelArgs k = Arguments(p);
  k.x = d.x, k.kernel = d.kernel, k.bias = d.bias, k.y = d.y, k.pooled = p.pool ? d.pooled : nullptr;
  const dim3 grid(Blocks(k), static_cast<unsigned>(CeilDiv(p.filters, kFilters)));
  const size_t shared = static_cast<size_t>(p.kernel_size * p.kernel_size * p.channels) * kFilters * sizeof(float);
  return Dispatch16(p.dtype, [&](auto type) -> int {
    using T = decltype(type);
    const bool vector = p.filters % kPack == 0;
    const auto kernel = p.kernel_size == 3 ? (vector ? ForwardKernel<T, 3, true> : ForwardKernel<T, 3, false>)
                                           : (vector ? ForwardKernel<T, 1, true> : ForwardKernel<T, 1, false>);
    return Launch(kernel, grid, kThreads, shared, stream, k);
  });
}

size_t FewChannelsWgradSlabBytes(const Conv2DProblem& p) {
  return Blocks(Arguments(p)) * static_cast<size_t>(p.kernel_elements()) * sizeof(float);
}

int FewChannelsWgrad(void* stream, const Conv2DProblem& p, const void* x, const void* dz, void* dkernel, float* slabs) {
  if (TooMany(p)) return cudaErrorNotSupported;
  KernelArgs k = Arguments(p);
  k.x = x, k.dz = dz, k.slabs = slabs;
  const dim3 grid(Blocks(k), static_cast<unsigned>(CeilDiv(p.filters, kFilters)), static_cast<unsigned>(p.channels));
  UNET_FAST_CUDA_RETURN_IF_ERROR(Dispatch16(p.dtype, [&](auto type) -> int {
    using T = decltype(type);
    const bool vector = p.filters % kPack == 0;
    const auto kernel = p.kernel_size == 3 ? (vector ? WgradKernel<T, 3, true> : WgradKernel<T, 3, false>)
                                           : (vector ? WgradKernel<T, 1, true> : WgradKernel<T, 1, false>);
    return Launch(kernel, grid, kThreads, 0, stream, k);
  }));
  return SumSlabs(stream, p.dtype, slabs, static_cast<int>(Blocks(k)), p.kernel_elements(), dkernel);
}

}  // namespace unet_fast::gpu
