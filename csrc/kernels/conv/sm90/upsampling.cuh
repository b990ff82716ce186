// A 3x3 transposed convolution of stride 2 with up to 128 channels and 64 results, in the way of stationary.cuh: at
// full resolution its sums are so short that another kernel spends its time on loads and on storing.
//
// A tile is kCols pixels of a row of the source, which make two rows of 2 kCols results: the even row has taps r = 0 of
// the source's row and r = 2 of the row above, the odd one r = 1; columns likewise. Tiles follow one another down a
// strip, so one row of pixels is loaded for each.
//
// Three warpgroups keep a third of the weights each, of six taps and 64 channels: the first two the even row's, and the
// first one adds up what both gave and stores it; the third one has the odd row's three taps for all 128 channels. So
// while some put results together, others keep the tensor cores busy. Of a warpgroup's weights five taps are in
// registers, and one, for which there are none left, in shared memory.
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

constexpr int kCols = 40;  // 200 columns without a rest, and sums that fit beside the weights
constexpr int kThreads = 512;
constexpr int kSlots = 8, kStage = 6 * 1024;  // of a row of pixels; two stages a slot, of 64 channels each
constexpr int kOut = 2 * kCols * 128, kSums = 2 * kCols * 64 * 4;  // of a row of results; two of each
constexpr int kBarriers = 4 * kSlots + 6;
constexpr int kPieces = 20;  // of 16 channels, of a tap: those in registers, of 24
constexpr int kData = 2 * (kSlots * kStage + kOut + kSums), kKept = 3 * kTap;
constexpr size_t kSharedBytes = 1024 + kData + kKept + kBarriers * 8;
static_assert((kCols + 1) * 128 <= kStage);
static_assert(2 * 9 * kTap <= kData, "the weights pass through, before there are data");
static_assert(kSharedBytes <= 227 << 10);

using Ring = stationary::Ring<kSlots>;
using Sum = float[2][kCols / 2];  // of even and of odd columns

struct Shared {
  uint32_t stages, barriers;
  __device__ explicit Shared(const void* memory) {
    stages = (ptx::SharedAddress(memory) + 1023) & ~1023u;  // the swizzle repeats every 1024 bytes
    barriers = stages + kData + kKept;
  }
  __device__ uint32_t Stage(int i) const { return stages + i * kStage; }
  __device__ uint32_t Out(int odd) const { return stages + 2 * kSlots * kStage + odd * kOut; }
  __device__ uint32_t Sums(int i) const { return stages + 2 * (kSlots * kStage + kOut) + i * kSums; }
  __device__ uint32_t Kept(int group) const { return stages + kData + group * kTap; }
  __device__ uint32_t Full(int i) const { return barriers + i * 8; }
  __device__ uint32_t Empty(int i) const { return barriers + (2 * kSlots + i) * 8; }
  __device__ uint32_t WeightsFull() const { return barriers + 4 * kSlots * 8; }
  __device__ uint32_t WeightsRead() const { return barriers + (4 * kSlots + 1) * 8; }
  __device__ uint32_t SumsFull(int i) const { return barriers + (4 * kSlots + 2 + i) * 8; }
  __device__ uint32_t SumsEmpty(int i) const { return barriers + (4 * kSlots + 4 + i) * 8; }
};

struct Tile {
  int image, strip, row;
  __device__ Tile(const UpsamplingArgs& g, int tile) {
    uint32_t in_image, in_strip;
    image = static_cast<int>(g.tiles_per_image.Divide(tile, &in_image));
    strip = static_cast<int>(g.rows.Divide(in_image, &in_strip)), row = static_cast<int>(in_strip);
  }
};

// A block's tile, and what of the ring it takes.
struct Turn {
  bool first, last;  // of a strip, as this block sees it
  __device__ Turn(const UpsamplingArgs& g, const stationary::Part& part, int t) {
    const Tile tile(g, t);
    first = t == part.begin || tile.row == 0;
    last = t + 1 == part.end || tile.row + 1 == static_cast<int>(g.rows.d);
  }
};

// Of a warpgroup's weights: the first taps of its two rows of the kernel, of 18, those of the last 64 channels behind.
struct FirstTaps {
  int row[2];
  __device__ static FirstTaps Of(int group) {
    if (group == 2) return {{3, 9 + 3}};
    return {{group * 9 + 6, group * 9}};
  }
};

__device__ void LoadTap(const UpsamplingArgs& g, const Shared& shared, int tap, uint32_t to) {
  ptx::LoadTile3D(to, &g.weights, shared.WeightsFull(), tap / 9 * 64, 0, tap % 9);
}

__device__ void Load(const UpsamplingArgs& g, const Shared& shared) {
  ptx::BarrierArriveExpect(shared.WeightsFull(), (18 + 3) * kTap);
  for (int tap = 0; tap < 18; ++tap) LoadTap(g, shared, tap, shared.stages + tap * kTap);
  for (int group = 0; group < 3; ++group) LoadTap(g, shared, FirstTaps::Of(group).row[1] + 2, shared.Kept(group));
  ptx::BarrierWait(shared.WeightsRead(), 0);
  Ring ring;
  const stationary::Part part(g.tiles, 1);
  for (int t = part.begin; t < part.end; ++t) {
    const Tile tile(g, t);
    for (int row = t == part.begin || tile.row == 0 ? -1 : 0; row <= 0; ++row, ++ring.count) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int stage = ring.Slot() * 2 + half;
        ptx::BarrierWait(shared.Empty(stage), ring.Parity() ^ 1);
        ptx::BarrierArriveExpect(shared.Full(stage), (kCols + 1) * 128);
        ptx::LoadTile4D(shared.Stage(stage), &g.source, shared.Full(stage), half * 64, tile.strip * kCols - 1,
                        tile.row + row, tile.image);
      }
    }
  }
}

// The weights as the A operand: pieces of 16 channels, four a tap.
using Weights = uint32_t[kPieces][4];

__device__ void LoadWeights(const Shared& shared, const FirstTaps& taps, Weights& a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, matrix = lane / 8, row = lane % 8;
  const int r = warp * 16 + matrix % 2 * 8 + row;
  ptx::BarrierWait(shared.WeightsFull(), 0);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int chunk = i % 4 * 2 + matrix / 2;
    const uint32_t tap = shared.stages + (taps.row[i / 12] + i % 12 / 4) * kTap;
    ptx::LoadMatrix<false>(tap + r * 128 + ((chunk ^ row) << 4), a[i]);
  }
  // All have read before any writes over them, be it a sum or, through the thread that loads, a pixel.
  ptx::BarrierArrive(shared.WeightsRead());
  ptx::BarrierWait(shared.WeightsRead(), 0);
}

template <typename T>
__device__ void LoadBias(const UpsamplingArgs& g, float (&bias)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int n = threadIdx.x % 128 / 32 * 16 + h * 8 + threadIdx.x % 32 / 4;
    bias[h] = g.bias != nullptr && n < g.n ? ToFloat(static_cast<const T*>(g.bias)[n]) : 0.0f;
  }
}

// Products of a row of pixels, from the one left of the tile on, with one of the two rows of the kernel: to even and
// odd columns.
template <typename T>
__device__ void MultiplyRow(Sum& sum, const Weights& a, uint32_t kept, int row, uint32_t pixels) {
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const uint64_t b = ptx::Descriptor(pixels + (s == 2 ? 0 : 128));
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int piece = (row * 3 + s) * 4 + k, accumulate = row == 0 && s < 2 && k == 0 ? 0 : 1;
      if (piece < kPieces) {
        ptx::WgmmaA<T, kCols>(sum[s % 2], a[piece % kPieces], b + (k * 32 >> 4), accumulate);
      } else {
        ptx::Wgmma<T, kCols, 0, 0>(sum[s % 2], ptx::Descriptor(kept) + (k * 32 >> 4), b + (k * 32 >> 4), accumulate);
      }
    }
  }
}

// A row of results to shared memory, pixel by pixel.
template <typename T>
__device__ void PutTogether(const UpsamplingArgs& g, const Sum& sum, const float (&bias)[2], uint32_t out) {
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

template <typename T>
__device__ void Store(const UpsamplingArgs& g, const Shared& shared, int t, int odd, const Sum& sum,
                      const float (&bias)[2]) {
  const int thread = threadIdx.x % 128, named_barrier = 1 + odd;
  if (thread == 0) ptx::StoreWaitRead();  // the last row of results has left shared memory
  ptx::NamedBarrier(named_barrier, 128);
  PutTogether<T>(g, sum, bias, shared.Out(odd));
  ptx::StoreFence();
  ptx::NamedBarrier(named_barrier, 128);
  if (thread == 0) {
    const Tile tile(g, t);
    ptx::StoreTile4D(&g.result, shared.Out(odd), 0, tile.strip * 2 * kCols, tile.row * 2 + odd, tile.image);
    ptx::StoreCommit();
  }
  __syncwarp();
}

// The even rows, from 64 channels; half 0 stores.
template <typename T>
__device__ void MultiplyEven(const UpsamplingArgs& g, int half, const Shared& shared) {
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  Weights a;
  LoadWeights(shared, FirstTaps::Of(half), a);
  float bias[2];
  LoadBias<T>(g, bias);
  Ring ring;  // at the row above the tile's
  const stationary::Part part(g.tiles, 1);
  for (int t = part.begin; t < part.end; ++t, ++ring.count) {
    const Turn turn(g, part, t);
    const Ring next = {ring.count + 1};
    const int above = ring.Slot() * 2 + half, own = next.Slot() * 2 + half;
    Sum sum;
    ptx::BarrierWait(shared.Full(above), ring.Parity());
    ptx::WgmmaFence();
    MultiplyRow<T>(sum, a, shared.Kept(half), 0, shared.Stage(above));
    ptx::BarrierWait(shared.Full(own), next.Parity());
    ptx::WgmmaFence();
    MultiplyRow<T>(sum, a, shared.Kept(half), 1, shared.Stage(own));
    ptx::WgmmaCommit();
    ptx::WgmmaWait<0>();
    if (lane == 0) {
      ptx::BarrierArrive(shared.Empty(above), turn.first ? 2 : 1);
      ptx::BarrierArrive(shared.Empty(own), turn.last ? 2 : 1);
    }
    ring.count += turn.last;

    // Two arrays of sums take turns; each time one goes through a phase of its barriers.
    const int array = t - part.begin & 1;
    const uint32_t parity = (t - part.begin) >> 1 & 1, sums = shared.Sums(array) + thread * 16;
    if (half == 1) {
      ptx::BarrierWait(shared.SumsEmpty(array), parity ^ 1);
#pragma unroll
      for (int i = 0; i < kCols; i += 4) {
        const float* v = sum[i / (kCols / 2)] + i % (kCols / 2);
        ptx::StoreShared4(sums + i / 4 * 2048, v[0], v[1], v[2], v[3]);
      }
      ptx::BarrierArrive(shared.SumsFull(array));
      continue;
    }
    ptx::BarrierWait(shared.SumsFull(array), parity);
#pragma unroll
    for (int i = 0; i < kCols; i += 4) {
      float* v = sum[i / (kCols / 2)] + i % (kCols / 2);
      const float4 w = ptx::LoadShared4(sums + i / 4 * 2048);
      v[0] += w.x, v[1] += w.y, v[2] += w.z, v[3] += w.w;
    }
    ptx::BarrierArrive(shared.SumsEmpty(array));
    Store<T>(g, shared, t, 0, sum, bias);
  }
  if (thread == 0) ptx::StoreWaitRead();
}

// The odd rows, from all channels.
template <typename T>
__device__ void MultiplyOdd(const UpsamplingArgs& g, const Shared& shared) {
  const int lane = threadIdx.x % 32;
  Weights a;
  LoadWeights(shared, FirstTaps::Of(2), a);
  float bias[2];
  LoadBias<T>(g, bias);
  Ring ring;
  const stationary::Part part(g.tiles, 1);
  for (int t = part.begin; t < part.end; ++t, ++ring.count) {
    const Turn turn(g, part, t);
    if (turn.first) {  // a row that this warpgroup has no use for; it must be there before it is given back
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        ptx::BarrierWait(shared.Full(ring.Slot() * 2 + half), ring.Parity());
        if (lane == 0) ptx::BarrierArrive(shared.Empty(ring.Slot() * 2 + half));
      }
    }
    const Ring next = {ring.count + 1};
    const int own = next.Slot() * 2;
    Sum sum;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ptx::BarrierWait(shared.Full(own + half), next.Parity());
      ptx::WgmmaFence();
      MultiplyRow<T>(sum, a, shared.Kept(2), half, shared.Stage(own + half));
    }
    ptx::WgmmaCommit();
    ptx::WgmmaWait<0>();
    if (lane == 0) {
      ptx::BarrierArrive(shared.Empty(own));
      ptx::BarrierArrive(shared.Empty(own + 1));
    }
    ring.count += turn.last;
    Store<T>(g, shared, t, 1, sum, bias);
  }
  if (threadIdx.x % 128 == 0) ptx::StoreWaitRead();
}

}  // namespace upsampling

template <typename T>
__global__ __launch_bounds__(upsampling::kThreads, 1) void UpsamplingKernel(const __grid_constant__ UpsamplingArgs g) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace upsampling;
  extern __shared__ unsigned char memory[];
  const Shared shared(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * kSlots; ++i) {
      ptx::BarrierInit(shared.Full(i), 1);
      // Of the warps that multiply with it, four twice and four once.
      ptx::BarrierInit(shared.Empty(i), 12);
    }
    ptx::BarrierInit(shared.WeightsFull(), 1);
    ptx::BarrierInit(shared.WeightsRead(), 384);
    for (int i = 0; i < 2; ++i) {
      ptx::BarrierInit(shared.SumsFull(i), 128);
      ptx::BarrierInit(shared.SumsEmpty(i), 128);
    }
    ptx::BarrierInitFence();
    ptx::PrefetchTensorMap(&g.source);
    ptx::PrefetchTensorMap(&g.weights);
    ptx::PrefetchTensorMap(&g.result);
  }
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == 3) {
    ptx::ShrinkRegisters<24>();
    if (threadIdx.x == 384) Load(g, shared);
  } else {
    ptx::GrowRegisters<160>();
    if (group == 2) {
      MultiplyOdd<T>(g, shared);
    } else {
      MultiplyEven<T>(g, group, shared);
    }
  }
#endif
}

}  // namespace unet_fast::gpu::sm90
