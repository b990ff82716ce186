// Two shapes of the same sum. Few slabs: a thread adds four neighbouring elements of them all, and the slabs stream by
// at the speed of memory. Many slabs of few elements: a block takes 32 elements and splits the slabs over its 16 warps,
// each of which adds every 16th, and the 16 sums are added in order. Which numbers meet in which order depends on the
// slabs' count and size alone.
#include "conv/reduce.h"

#include "common/cuda.cuh"

namespace unet_fast::gpu {
namespace {

constexpr int kThreads = 256, kWide = 4, kWarps = 16;

// The sum that a block is for, and its number among the blocks of that sum.
struct Work {
  SlabSum sum;
  unsigned block;
  __device__ Work(const SlabSum& first, const SlabSum& second, unsigned first_blocks)
      : sum(blockIdx.x < first_blocks ? first : second),
        block(blockIdx.x < first_blocks ? blockIdx.x : blockIdx.x - first_blocks) {}
};

template <typename T>
__global__ __launch_bounds__(kThreads) void SumFewSlabsKernel(int count, SlabSum first, SlabSum second,
                                                              unsigned first_blocks) {
  const Work work(first, second, first_blocks);
  const int64_t i = (static_cast<int64_t>(work.block) * kThreads + threadIdx.x) * kWide;
  if (i >= work.sum.size) return;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
  for (int s = 0; s < count; ++s) {
    const float4 v = *reinterpret_cast<const float4*>(work.sum.slabs + s * work.sum.size + i);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  T* to = static_cast<T*>(work.sum.target) + i;
  to[0] = FromFloat<T>(sum.x), to[1] = FromFloat<T>(sum.y), to[2] = FromFloat<T>(sum.z), to[3] = FromFloat<T>(sum.w);
}

template <typename T>
__global__ void SumManySlabsKernel(int count, SlabSum first, SlabSum second, unsigned first_blocks) {
  __shared__ float partial[kWarps][32];
  const Work work(first, second, first_blocks);
  const int64_t i = static_cast<int64_t>(work.block) * 32 + threadIdx.x;
  float sum = 0.0f;
  if (i < work.sum.size) {
#pragma unroll 8
    for (int s = threadIdx.y; s < count; s += kWarps) sum += work.sum.slabs[s * work.sum.size + i];
  }
  partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || i >= work.sum.size) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) sum += partial[w][threadIdx.x];
  static_cast<T*>(work.sum.target)[i] = FromFloat<T>(sum);
}

}  // namespace

int SumSlabs(void* stream, DType dtype, int count, const SlabSum& first, const SlabSum& second) {
  const int64_t second_size = second.target != nullptr ? second.size : 0;
  const bool few =
      first.size % kWide == 0 && second_size % kWide == 0 && first.size >= 1024 * static_cast<int64_t>(count);
  const int64_t per_block = few ? kThreads * kWide : 32;
  const unsigned blocks = static_cast<unsigned>(CeilDiv(first.size, per_block));
  const unsigned all = blocks + static_cast<unsigned>(CeilDiv(second_size, per_block));
  return Dispatch16(dtype, [&](auto type) -> int {
    using T = decltype(type);
    return few ? Launch(SumFewSlabsKernel<T>, all, kThreads, 0, stream, count, first, second, blocks)
               : Launch(SumManySlabsKernel<T>, all, dim3(32, kWarps), 0, stream, count, first, second, blocks);
  });
}

}  // namespace unet_fast::gpu
