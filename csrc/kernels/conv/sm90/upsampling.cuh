// A 3x3 transposed convolution of stride 2 with up to 128 channels and 64 results, in the way of stationary.cuh: at
// full resolution its sums are so short that another kernel spends its time on loads and on storing. Each of two
// warpgroups keeps the weights of 64 channels and all taps in registers. Of each tile the first one stores the even row
// of results and the second one the odd row, to which it adds what the other one's channels gave.
//
// A tile is kCols pixels of a row of the source, which make two rows of 2 kCols results: the even row has taps r = 0 of
// the source's row and r = 2 of the row above, the odd one r = 1; columns likewise. Tiles follow one another down a
// strip, so one row of pixels is loaded for each.
#pragma once

#include "conv/sm90/stationary.cuh"

namespace unet_fast::gpu::sm90 {

struct UpsamplingArgs {
  CUtensorMap source, weights, result;
  Divisor tiles_per_image, rows;  // of the source, in an image
  int n, tiles;
  const void* bias;
  bool relu;
};

namespace upsampling {

using stationary::kTap;
using stationary::LoadWeights;

constexpr int kSlots = 5, kStage = 9 * 1024;  // of a row of pixels; two stages a slot, of 64 channels each
constexpr int kOut = 128 * 128, kSums = 2 * 64 * 64 * 4;
constexpr int kBarriers = 4 * kSlots + 6;
constexpr int kData = 2 * (kSlots * kStage + kOut + kSums);
constexpr size_t kSharedBytes = 1024 + kData + kBarriers * 8;
static_assert(2 * 9 * kTap <= kData, "the weights pass through, before there are data");

using Ring = stationary::Ring<kSlots>;

struct Shared {
  uint32_t stages, barriers;
  __device__ explicit Shared(const void* memory) {
    stages = (ptx::SharedAddress(memory) + 1023) & ~1023u;  // the swizzle repeats every 1024 bytes
    barriers = stages + kData;
  }
  __device__ uint32_t Stage(int i) const { return stages + i * kStage; }
  // Of the warpgroup that stores: its results, and the other one's sums.
  __device__ uint32_t Out(int group) const { return stages + 2 * kSlots * kStage + group * kOut; }
  __device__ uint32_t Sums(int group) const { return stages + 2 * (kSlots * kStage + kOut) + group * kSums; }
  __device__ uint32_t Full(int i) const { return barriers + i * 8; }
  __device__ uint32_t Empty(int i) const { return barriers + (2 * kSlots + i) * 8; }
  __device__ uint32_t WeightsFull() const { return barriers + 4 * kSlots * 8; }
  __device__ uint32_t WeightsRead() const { return barriers + (4 * kSlots + 1) * 8; }
  __device__ uint32_t SumsFull(int group) const { return barriers + (4 * kSlots + 2 + group) * 8; }
  __device__ uint32_t SumsEmpty(int group) const { return barriers + (4 * kSlots + 4 + group) * 8; }
};

struct Tile {
  int image, strip, row;
  __device__ Tile(const UpsamplingArgs& g, int tile) {
    uint32_t in_image, in_strip;
    image = static_cast<int>(g.tiles_per_image.Divide(tile, &in_image));
    strip = static_cast<int>(g.rows.Divide(in_image, &in_strip)), row = static_cast<int>(in_strip);
  }
};

template <int kCols>
__device__ void Load(const UpsamplingArgs& g, const Shared& shared) {
  ptx::BarrierArriveExpect(shared.WeightsFull(), 2 * 9 * kTap);
  for (int i = 0; i < 18; ++i) {
    ptx::LoadTile3D(shared.stages + i * kTap, &g.weights, shared.WeightsFull(), i / 9 * 64, 0, i % 9);
  }
  ptx::BarrierWait(shared.WeightsRead(), 0);
  Ring ring;
  const stationary::Part part(g.tiles, 1);
  for (int t = part.begin; t < part.end; ++t) {
    const Tile tile(g, t);
    for (int row = t == part.begin || tile.row == 0 ? -1 : 0; row <= 0; ++row, ++ring.count) {
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        const int stage = ring.Slot() * 2 + group;
        ptx::BarrierWait(shared.Empty(stage), ring.Parity() ^ 1);
        ptx::BarrierArriveExpect(shared.Full(stage), (kCols + 1) * 128);
        ptx::LoadTile4D(shared.Stage(stage), &g.source, shared.Full(stage), group * 64, tile.strip * kCols - 1,
                        tile.row + row, tile.image);
      }
    }
  }
}

// Products of a row of pixels, from the one left of the tile on, with row r of the kernel: to even and odd columns.
template <typename T, int kCols>
__device__ void MultiplyRow(float (&sum)[2][kCols / 2], const uint32_t (&a)[36][4], int r, uint32_t pixels,
                            bool first) {
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const uint64_t b = ptx::Descriptor(pixels + (s == 2 ? 0 : 128));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      ptx::WgmmaA<T, kCols>(sum[s % 2], a[(r * 3 + s) * 4 + k], b + (k * 32 >> 4), first && s < 2 && k == 0 ? 0 : 1);
    }
  }
}

// A row of results to shared memory, pixel by pixel.
template <typename T, int kCols>
__device__ void PutTogether(const UpsamplingArgs& g, const float (&sum)[2][kCols / 2], const float (&bias)[2],
                            uint32_t out) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
  const int chunk = warp * 2 + matrix % 2;
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
    for (int i = 0; i < kCols / 4; i += 4) {  // 16 pixels by 16 results; of an odd number of eights the last one twice
      const bool once = i + 2 < kCols / 4;
      const int pixel = 2 * ((i / 2 + (once ? matrix / 2 : 0)) * 8 + row) + odd;
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 2 * (once ? i + j : i + j % 2);
        v[j] = PackPair<T>(sum[odd][at] + bias[j % 2], sum[odd][at + 1] + bias[j % 2], g.relu);
      }
      ptx::StoreMatrixTransposed(out + pixel * 128 + ((chunk ^ (pixel & 7)) << 4), v[0], v[1], v[2], v[3]);
    }
  }
}

template <typename T, int kCols>
__device__ void Multiply(const UpsamplingArgs& g, int group, const Shared& shared) {
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = thread / 32;
  uint32_t a[36][4];
  ptx::BarrierWait(shared.WeightsFull(), 0);
  LoadWeights<true>(shared.stages + group * 9 * kTap, warp, a);
  __syncwarp();
  if (lane == 0) ptx::BarrierArrive(shared.WeightsRead());

  float bias[2] = {0.0f, 0.0f};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int n = warp * 16 + h * 8 + lane / 4;
    if (g.bias != nullptr && n < g.n) bias[h] = ToFloat(static_cast<const T*>(g.bias)[n]);
  }
  // Named barriers.
  const int turn = 1 + group, others_turn = 2 - group, own_results = 3 + group;
  if (group == 1) ptx::NamedBarrierArrive(others_turn, 256);
  Ring ring;  // at the row above the tile's
  const stationary::Part part(g.tiles, 1);
  for (int t = part.begin; t < part.end; ++t, ++ring.count) {
    const uint32_t parity = t - part.begin & 1;  // each tile takes the sums' barriers through a phase
    const Tile at(g, t);
    const bool first = t == part.begin || at.row == 0;
    const bool last = t + 1 == part.end || at.row + 1 == static_cast<int>(g.rows.d);
    const Ring next = {ring.count + 1};
    const int above = ring.Slot() * 2 + group, own = next.Slot() * 2 + group;
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {  // rows of results
      const bool end = odd == 1 && t + 1 == part.end;
      float sum[2][kCols / 2];
      ptx::NamedBarrier(turn, 256);
      if (odd == 0) {
        ptx::BarrierWait(shared.Full(above), ring.Parity());
        ptx::WgmmaFence();
        MultiplyRow<T, kCols>(sum, a, 2, shared.Stage(above), true);
        ptx::BarrierWait(shared.Full(own), next.Parity());
        ptx::WgmmaFence();
        MultiplyRow<T, kCols>(sum, a, 0, shared.Stage(own), false);
      } else {
        ptx::WgmmaFence();
        MultiplyRow<T, kCols>(sum, a, 1, shared.Stage(own), true);
      }
      ptx::WgmmaCommit();
      if (group == 0 || !end) ptx::NamedBarrierArrive(others_turn, 256);  // unless it was the other's last turn
      ptx::WgmmaWait<0>();
      if (lane == 0) {
        if (odd == 0) {
          ptx::BarrierArrive(shared.Empty(above), first ? 2 : 1);
        } else {
          ptx::BarrierArrive(shared.Empty(own), last ? 2 : 1);
        }
      }
      const uint32_t sums = shared.Sums(odd) + thread * 16;
      if (group != odd) {
        ptx::BarrierWait(shared.SumsEmpty(odd), parity ^ 1);
#pragma unroll
        for (int i = 0; i < kCols; i += 4) {
          const float* v = sum[i / (kCols / 2)] + i % (kCols / 2);
          ptx::StoreShared4(sums + i / 4 * 2048, v[0], v[1], v[2], v[3]);
        }
        __syncwarp();
        if (lane == 0) ptx::BarrierArrive(shared.SumsFull(odd));
        continue;
      }
      ptx::BarrierWait(shared.SumsFull(odd), parity);
#pragma unroll
      for (int i = 0; i < kCols; i += 4) {
        float* v = sum[i / (kCols / 2)] + i % (kCols / 2);
        const float4 w = ptx::LoadShared4(sums + i / 4 * 2048);
        v[0] += w.x, v[1] += w.y, v[2] += w.z, v[3] += w.w;
      }
      __syncwarp();
      if (lane == 0) ptx::BarrierArrive(shared.SumsEmpty(odd));
      ptx::NamedBarrier(own_results, 128);  // the last row of results has left shared memory
      PutTogether<T, kCols>(g, sum, bias, shared.Out(group));
      ptx::StoreFence();
      ptx::NamedBarrier(own_results, 128);
      if (thread == 0) {
        const Tile tile(g, t);
        ptx::StoreTile4D(&g.result, shared.Out(group), 0, tile.strip * 2 * kCols, tile.row * 2 + odd, tile.image);
        ptx::StoreCommit();
        ptx::StoreWaitRead();
      }
      __syncwarp();
    }
    ring.count += last;
  }
}

}  // namespace upsampling

template <typename T, int kCols>
__global__ __launch_bounds__(kStationaryThreads, 1) void UpsamplingKernel(const __grid_constant__ UpsamplingArgs g) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace upsampling;
  extern __shared__ unsigned char memory[];
  const Shared shared(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * kSlots; ++i) {
      ptx::BarrierInit(shared.Full(i), 1);
      ptx::BarrierInit(shared.Empty(i), 8);  // the four warps that multiply with it, twice
    }
    ptx::BarrierInit(shared.WeightsFull(), 1);
    ptx::BarrierInit(shared.WeightsRead(), 8);
    for (int group = 0; group < 2; ++group) {
      ptx::BarrierInit(shared.SumsFull(group), 4);
      ptx::BarrierInit(shared.SumsEmpty(group), 4);
    }
    ptx::BarrierInitFence();
    ptx::PrefetchTensorMap(&g.source);
    ptx::PrefetchTensorMap(&g.weights);
    ptx::PrefetchTensorMap(&g.result);
  }
  __syncthreads();
  if (threadIdx.x >= 256) {
    ptx::ShrinkRegisters<24>();
    if (threadIdx.x == 256) Load<kCols>(g, shared);
  } else {
    ptx::GrowRegisters<240>();
    Multiply<T, kCols>(g, __shfl_sync(~0u, threadIdx.x / 128, 0), shared);
  }
#endif
}

}  // namespace unet_fast::gpu::sm90
