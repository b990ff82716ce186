// Two shapes of the same sum. Few slabs: a thread adds four neighbouring elements of them all, and the slabs stream by
// at the speed of memory. Many slabs of few elements: a block takes 32 elements and splits the slabs over its 16 warps,
// each of which adds every 16th, and the 16 sums are added in order. Which numbers meet in which order depends on the
// slabs' count and size alone.
#include "conv/reduce.h"

#include "common/cuda.cuh"

namespace unet_fast::gpu {
namespace {

constexpr int kThreads = 256, kWide = 4, kWarps = 16;

template <typename T>
__global__ __launch_bounds__(kThreads) void SumFewSlabsKernel(const float* slabs, int count, int64_t size, T* target) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWide;
  if (i >= size) return;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (int s = 0; s < count; ++s) {
    const float4 v = *reinterpret_cast<const float4*>(slabs + s * size + i);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  T* to = target + i;
  to[0] = FromFloat<T>(sum.x), to[1] = FromFloat<T>(sum.y), to[2] = FromFloat<T>(sum.z), to[3] = FromFloat<T>(sum.w);
}

template <typename T>
__global__ void SumManySlabsKernel(const float* slabs, int count, int64_t size, T* target) {
  __shared__ float partial[kWarps][32];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0.0f;
  if (i < size) {
#pragma unroll 8
    for (int s = threadIdx.y; s < count; s += kWarps) sum += slabs[s * size + i];
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= size) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += partial[w][threadIdx.x];
  target[i] = FromFloat<T>(sum);
}

}  // namespace

int SumSlabs(void* stream, DType dtype, const float* slabs, int count, int64_t size, void* target) {
  const bool few = size % kWide == 0 && size >= 1024 * static_cast<int64_t>(count);
  return Dispatch16(dtype, [&](auto type) -> int {
    using T = decltype(type);
    T* to = static_cast<T*>(target);
    if (few) {
      const unsigned blocks = static_cast<unsigned>(CeilDiv(size, kThreads * kWide));
      return Launch(SumFewSlabsKernel<T>, blocks, kThreads, 0, stream, slabs, count, size, to);
    }
    const unsigned blocks = static_cast<unsigned>(CeilDiv(size, 32));
    return Launch(SumManySlabsKernel<T>, blocks, dim3(32, kWarps), 0, stream, slabs, count, size, to);
  });
}

}  // namespace unet_fast::gpu
