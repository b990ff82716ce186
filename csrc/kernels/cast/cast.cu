// The weights of a network are some fifty arrays, most of them small: cast one by one, launches are what they cost.
// Here the arrays are laid end to end in blocks, and a block finds its array in a table that comes with the launch.
#include <algorithm>

#include "cast/gpu.h"
#include "common/cuda.cuh"

namespace unet_fast::gpu {
namespace {

constexpr int kThreads = 256, kPacks = 4;  // eight elements a pack
constexpr int kBlockElements = kThreads * kPacks * kPack;
constexpr int kArrays = 100;  // a launch; its parameters have to stay below 4 KiB

struct Table {
  const float* from[kArrays];
  void* to[kArrays];
  int64_t elements[kArrays];
  int first_block[kArrays + 1];
  int arrays;
};

template <typename T>
__global__ __launch_bounds__(kThreads) void CastKernel(const __grid_constant__ Table g) {
  const int block = blockIdx.x;
  int low = 0, high = g.arrays - 1;  // the last array that begins no later than this block
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (g.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = static_cast<int64_t>(block - g.first_block[low]) * kBlockElements;
  const int64_t left = g.elements[low] - begin;
  const float* from = g.from[low] + begin;
  T* to = static_cast<T*>(g.to[low]) + begin;
  float4 v[kPacks][2];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = (i * kThreads + threadIdx.x) * kPack;
    if (at + kPack > left) continue;
    v[i][0] = __ldg(reinterpret_cast<const float4*>(from + at));
    v[i][1] = __ldg(reinterpret_cast<const float4*>(from + at) + 1);
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = (i * kThreads + threadIdx.x) * kPack;
    if (at + kPack <= left) {
      const float values[kPack] = {v[i][0].x, v[i][0].y, v[i][0].z, v[i][0].w,
                                   v[i][1].x, v[i][1].y, v[i][1].z, v[i][1].w};
      *reinterpret_cast<Pack<T>*>(to + at) = Rounded<T>(values);
    } else {
      for (int64_t e = at; e < left; ++e) to[e] = FromFloat<T>(from[e]);
    }
  }
}

}  // namespace

int Cast(void* stream, DType type, const std::vector<CastArray>& arrays) {
  for (size_t first = 0; first < arrays.size(); first += kArrays) {
    Table table = {};
    int64_t blocks = 0;
    for (size_t i = first; i < std::min(arrays.size(), first + kArrays); ++i) {
      const CastArray& array = arrays[i];
      if (array.elements == 0) continue;
      table.from[table.arrays] = static_cast<const float*>(array.from), table.to[table.arrays] = array.to;
      table.elements[table.arrays] = array.elements;
      table.first_block[table.arrays++] = static_cast<int>(blocks);
      blocks += CeilDiv(array.elements, kBlockElements);
    }
    if (blocks == 0) continue;
    if (blocks >= int64_t{1} << 31) return cudaErrorNotSupported;
    UNET_FAST_CUDA_RETURN_IF_ERROR(Dispatch16(type, [&](auto t) -> int {
      return Launch(CastKernel<decltype(t)>, static_cast<unsigned>(blocks), kThreads, 0, stream, table);
    }));
  }
  return 0;
}

}  // namespace unet_fast::gpu
