// The implicit GEMM of conv/gemm.h on Hopper for 3x3 convolutions of few channels: the layers at full resolution. There
// a tile's weights and pixels are equally small, and reading both from shared memory for every product takes all of its
// bandwidth. So here the product is turned round, results^T = weights^T pixels^T, and each of two warpgroups keeps the
// weights of 64 results, 64 channels and all nine taps in registers for good: shared memory gives the pixels alone.
//
// A tile is kCols pixels of two rows, and tiles follow one another down a strip of that width: two rows of pixels are
// loaded for each, the two before them are those of the last tile. A block takes a part of the sequence of all tiles,
// strip by strip. Pooling windows are neighbouring registers.
//
// The warpgroups take turns: one multiplies while the other sees to its results. What they share out follows from the
// product (Roles). Results leave by TMA from where they were put together; what masks them arrives there by TMA before.
#pragma once

#include "common/cuda.cuh"
#include "conv/gemm.h"
#include "conv/sm90/epilogue.cuh"
#include "ptx/hopper.cuh"
#include "ptx/wgmma.cuh"

namespace unet_fast::gpu::sm90 {

enum class Roles {
  kTiles,     // 64 channels, 64 results: every second tile
  kResults,   // 64 channels, 128 results: 64 results each
  kChannels,  // 128 channels, 64 results a block: 64 channels each; the second adds the first one's sums to its own
};

struct StationaryArgs {
  CUtensorMap source[2], weights;          // source[1] for kChannels
  CUtensorMap result[2], mask[2], pooled;  // result[1] where the second half of kResults goes to an array of its own
  int source_channel[2];                   // where the 64 channels of a warpgroup begin, in the source
  int weight_channel[2];                   // and among the weights
  int result_channel[2];                   // where the 64 results begin, in their array
  int slices, first_slices;                // kChannels: blocks take turns at 64 results each; those of result[0]
  uint8_t weight[9];                       // index of the weights of a tap, row by row
  int first_row, first_col;                // source pixel of the first tap of result (0, 0)
  Divisor tiles_per_image, pairs;          // of rows, in an image
  int n, tiles;
  const void* bias;
  bool relu, masked[2];  // masked: by array of results
};

constexpr int kStationaryThreads = 384;

namespace stationary {

constexpr int kTap = 64 * 128;                             // bytes of a tap's weights
constexpr int kStages = 10, kStage = 17 * 1024;            // two rows of 64 channels of pixels
constexpr int kOut = 2 * 64 * 128, kPooledOut = 32 * 128;  // a warpgroup's results on their way out
constexpr int kSums = 2 * 64 * 64 * 4;                     // a tile's sums in float32
static_assert(2 * (kOut + kPooledOut) <= kSums + kOut + kPooledOut);
constexpr int kBarriers = 2 * kStages + 6;

template <int kCols>
constexpr int kRow = (kCols + 2) * 128;  // bytes of a row of pixels

template <Roles kRoles>
constexpr int kSlots = kRoles == Roles::kChannels ? kStages / 2 : kStages;

struct Shared {
  uint32_t stages, out, barriers;
  __device__ explicit Shared(const void* memory) {
    stages = (ptx::SharedAddress(memory) + 1023) & ~1023u;  // the swizzle repeats every 1024 bytes
    out = stages + kStages * kStage, barriers = out + kSums + kOut + kPooledOut;
  }
  __device__ uint32_t Stage(int i) const { return stages + i * kStage; }
  __device__ uint32_t Full(int i) const { return barriers + i * 8; }
  __device__ uint32_t Empty(int i) const { return barriers + (kStages + i) * 8; }
  __device__ uint32_t Masked(int group) const { return barriers + (2 * kStages + group) * 8; }
  __device__ uint32_t WeightsFull() const { return barriers + (2 * kStages + 2) * 8; }
  __device__ uint32_t WeightsRead() const { return barriers + (2 * kStages + 3) * 8; }
  __device__ uint32_t SumsFull() const { return barriers + (2 * kStages + 4) * 8; }
  __device__ uint32_t SumsEmpty() const { return barriers + (2 * kStages + 5) * 8; }
  // kChannels: only the second warpgroup has results, before which lie the first one's sums.
  __device__ uint32_t Sums() const { return out; }
  template <Roles kRoles>
  __device__ uint32_t Out(int group) const {
    return out + (kRoles == Roles::kChannels ? kSums : group * (kOut + kPooledOut));
  }
};
constexpr size_t kSharedBytes = 1024 + kStages * kStage + kSums + kOut + kPooledOut + kBarriers * 8;
static_assert(2 * 9 * kTap <= kStages * kStage, "the weights pass through the stages");
static_assert(kSharedBytes <= 227 << 10);

// Rows of pixels in the order of their use, in slots of one or two stages; a number, because registers are short.
template <int kSlots>
struct Ring {
  uint32_t count = 0;
  __device__ int Slot() const { return count % kSlots; }
  __device__ uint32_t Parity() const { return count / kSlots & 1; }
};

struct Tile {
  int image, strip, pair;
  __device__ Tile(const StationaryArgs& g, int tile) {
    uint32_t in_image, row;
    image = static_cast<int>(g.tiles_per_image.Divide(tile, &in_image));
    strip = static_cast<int>(g.pairs.Divide(in_image, &row)), pair = static_cast<int>(row);
  }
};

// A block's part of the sequence of tiles, and the 64 results it computes there.
struct Part {
  int begin, end, slice;
  __device__ Part(int tiles, int slices) {
    const int blocks = gridDim.x / slices, block = blockIdx.x / slices;
    slice = blockIdx.x - block * slices;
    begin = static_cast<int>(static_cast<int64_t>(tiles) * block / blocks);
    end = static_cast<int>(static_cast<int64_t>(tiles) * (block + 1) / blocks);
  }
};

// Where a warpgroup's results go: an array and the channel they begin at.
struct Place {
  int array, channel;
  template <Roles kRoles>
  __device__ static Place Of(const StationaryArgs& g, int group, int slice) {
    if constexpr (kRoles != Roles::kChannels) return {group, g.result_channel[group]};
    const int array = slice >= g.first_slices;
    return {array, (slice - (array ? g.first_slices : 0)) * 64};
  }
};

template <bool kTransposed, Roles kRoles, int kCols>
__device__ void Load(const StationaryArgs& g, const Shared& shared) {
  const Part part(g.tiles, g.slices);
  ptx::BarrierArriveExpect(shared.WeightsFull(), 2 * 9 * kTap);
  for (int group = 0; group < 2; ++group) {
    const int n = (kRoles == Roles::kResults ? group : part.slice) * 64, channel = g.weight_channel[group];
    for (int tap = 0; tap < 9; ++tap) {
      ptx::LoadTile3D(shared.stages + (group * 9 + tap) * kTap, &g.weights, shared.WeightsFull(),
                      kTransposed ? channel : n, kTransposed ? n : channel, g.weight[tap]);
    }
  }
  ptx::BarrierWait(shared.WeightsRead(), 0);
  constexpr int kSources = kRoles == Roles::kChannels ? 2 : 1;
  Ring<kSlots<kRoles>> ring;
  for (int t = part.begin; t < part.end; ++t) {
    const Tile tile(g, t);
    for (int rows = t == part.begin || tile.pair == 0 ? 0 : 2; rows <= 2; rows += 2, ++ring.count) {
#pragma unroll
      for (int s = 0; s < kSources; ++s) {
        const int stage = ring.Slot() * kSources + s;
        ptx::BarrierWait(shared.Empty(stage), ring.Parity() ^ 1);
        ptx::BarrierArriveExpect(shared.Full(stage), 2 * kRow<kCols>);
        ptx::LoadTile4D(shared.Stage(stage), &g.source[s], shared.Full(stage), g.source_channel[s],
                        tile.strip * kCols + g.first_col, tile.pair * 2 + rows + g.first_row, tile.image);
      }
    }
  }
}

// The weights of a warp's 16 results, as fragments.
template <bool kTransposed>
__device__ void LoadWeights(uint32_t weights, int warp, uint32_t (&a)[36][4]) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
#pragma unroll
  for (int i = 0; i < 36; ++i) {
    const int k = i % 4;  // 16 channels of the tap
    int r, chunk;
    if constexpr (kTransposed) {  // rows of results
      r = warp * 16 + matrix % 2 * 8 + row, chunk = k * 2 + matrix / 2;
    } else {
      r = k * 16 + matrix / 2 * 8 + row, chunk = warp * 2 + matrix % 2;
    }
    ptx::LoadMatrix<!kTransposed>(weights + i / 4 * kTap + r * 128 + ((chunk ^ row) << 4), a[i]);
  }
}

// Products of a row of pixels with the three taps of a row of the kernel; the first ones of a row of results are with
// kernel row 0.
template <typename T, int kCols>
__device__ void MultiplyTaps(float (&sum)[kCols / 2], const uint32_t (&a)[36][4], int kernel_row, uint32_t pixels) {
#pragma unroll
  for (int tap = 0; tap < 3; ++tap) {
    const uint64_t b = ptx::Descriptor(pixels + tap * 128);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      ptx::WgmmaA<T, kCols>(sum, a[(kernel_row * 3 + tap) * 4 + k], b + (k * 32 >> 4), kernel_row + tap + k > 0);
    }
  }
}

// A tile's results to shared memory, pixel by pixel, where what masks them may be already.
template <typename T, int kCols, bool kPooled>
__device__ void PutTogether(const StationaryArgs& g, const float (&sum)[2][kCols / 2], const float (&bias)[2],
                            bool masked, uint32_t out) {
  constexpr int kBlocks = kCols / 8;  // of 8 pixels
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
  const int chunk = warp * 2 + matrix % 2;
  uint32_t packed[2][2 * kBlocks + 2] = {};  // [rows][blocks of pixels, rounded up to two][halves of 16 results]
#pragma unroll
  for (int q = 0; q < 2; ++q) {
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      packed[q][i] = PackPair<T>(sum[q][2 * i] + bias[i % 2], sum[q][2 * i + 1] + bias[i % 2], g.relu);
    }
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; i += 4) {  // 16 pixels by 16 results
      // Of an odd number of eights the last one is stored twice.
      const bool odd = i + 2 == 2 * kBlocks;
      const int pixel = (i / 2 + (odd ? 0 : matrix / 2)) * 8 + row;
      const uint32_t at = out + (q * kCols + pixel) * 128 + ((chunk ^ row) << 4);
      uint32_t v[4] = {packed[q][i], packed[q][i + 1], packed[q][odd ? i : i + 2], packed[q][odd ? i + 1 : i + 3]};
      if (masked) {
        uint32_t mask[4];
        ptx::LoadMatrix<true>(at, mask);
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] &= Positive<T>(mask[j]);
        if (odd) __syncwarp();  // twice read before it is written
      }
      ptx::StoreMatrixTransposed(at, v[0], v[1], v[2], v[3]);
    }
  }
  if constexpr (kPooled) {
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; i += 8) {  // 16 windows by 16 results
      uint32_t top[4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // two blocks of pixels, a half of the results
        const int at = i + j / 2 * 4 + j % 2;
        if (at < 2 * kBlocks) top[j] = PoolPair<T>(packed[0][at], packed[1][at], packed[0][at + 2], packed[1][at + 2]);
      }
      // The two numbers of a register are four windows apart.
      const int window = (i / 4 + matrix / 2) * 8 + row % 2 * 4 + row / 2;
      ptx::StoreMatrixTransposed(out + kOut + window * 128 + ((chunk ^ (window & 7)) << 4), top[0], top[1], top[2],
                                 top[3]);
    }
  }
}

// What masks the results of a tile, to where they will be.
template <int kCols>
__device__ void LoadMask(const StationaryArgs& g, int t, const Place& place, uint32_t out, uint32_t barrier) {
  const Tile tile(g, t);
  ptx::BarrierArriveExpect(barrier, 2 * kCols * 128);
  ptx::LoadTile4D(out, &g.mask[place.array], barrier, place.channel, tile.strip * kCols, tile.pair * 2, tile.image);
}

template <typename T, bool kTransposed, Roles kRoles, int kCols, bool kPooled>
__device__ void Multiply(const StationaryArgs& g, int group, const Shared& shared) {
  const int thread = threadIdx.x % 128, lane = threadIdx.x % 32, warp = thread / 32;
  uint32_t a[36][4];
  ptx::BarrierWait(shared.WeightsFull(), 0);
  LoadWeights<kTransposed>(shared.stages + group * 9 * kTap, warp, a);
  __syncwarp();
  if (lane == 0) ptx::BarrierArrive(shared.WeightsRead());

  const Part part(g.tiles, g.slices);
  const Place place = Place::Of<kRoles>(g, group, part.slice);
  const bool masked = g.masked[place.array];
  float bias[2] = {0.0f, 0.0f};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int n = (kRoles == Roles::kResults ? group : part.slice) * 64 + warp * 16 + h * 8 + lane / 4;
    if (g.bias != nullptr && n < g.n) bias[h] = ToFloat(static_cast<const T*>(g.bias)[n]);
  }
  // Named barriers.
  const int turn = 1 + group, others_turn = 2 - group, own = 3 + group;
  const bool finishes = kRoles != Roles::kChannels || group == 1;  // has results
  constexpr int kStep = kRoles == Roles::kTiles ? 2 : 1;
  const uint32_t out = shared.template Out<kRoles>(group), sums = shared.Sums() + thread * 16;
  if (group == 1) ptx::NamedBarrierArrive(others_turn, 256);
  {
    const int t = part.begin + (kRoles == Roles::kTiles ? group : 0);
    if (masked && finishes && thread == 0 && t < part.end) LoadMask<kCols>(g, t, place, out, shared.Masked(group));
  }
  Ring<kSlots<kRoles>> ring;  // at the tile's first rows
  uint32_t mask_parity = 0;
  bool mine = group == 0;
  for (int t = part.begin; t < part.end; ++t, ++ring.count) {
    bool first, last;  // of a strip, as this block sees it
    {
      const Tile tile(g, t);
      first = t == part.begin || tile.pair == 0;
      last = t + 1 == part.end || tile.pair + 1 == static_cast<int>(g.pairs.d);
    }
    if (kRoles == Roles::kTiles) {
      mine = !mine;
      if (mine) {
        ring.count += last;
        continue;
      }
    }
    float sum[2][kCols / 2];
    ptx::NamedBarrier(turn, 256);
    // Rows of pixels are used by two tiles but at the ends of a strip.
    const auto stage = [&](int slot) { return kRoles == Roles::kChannels ? slot * 2 + group : slot; };
    const int top = stage(ring.Slot());
    ptx::BarrierWait(shared.Full(top), ring.Parity());
    ptx::WgmmaFence();
    MultiplyTaps<T, kCols>(sum[0], a, 0, shared.Stage(top));
    MultiplyTaps<T, kCols>(sum[1], a, 0, shared.Stage(top) + kRow<kCols>);
    MultiplyTaps<T, kCols>(sum[0], a, 1, shared.Stage(top) + kRow<kCols>);
    ptx::WgmmaCommit();
    const Ring<kSlots<kRoles>> next = {ring.count + 1};
    const int bottom = stage(next.Slot());
    ptx::BarrierWait(shared.Full(bottom), next.Parity());
    ptx::WgmmaFence();
    MultiplyTaps<T, kCols>(sum[1], a, 1, shared.Stage(bottom));
    MultiplyTaps<T, kCols>(sum[0], a, 2, shared.Stage(bottom));
    MultiplyTaps<T, kCols>(sum[1], a, 2, shared.Stage(bottom) + kRow<kCols>);
    ptx::WgmmaCommit();
    ptx::WgmmaWait<1>();
    if (lane == 0) ptx::BarrierArrive(shared.Empty(top), first ? 2 : 1);
    // Unless it was the other's last turn.
    if ((kRoles != Roles::kTiles && group == 0) || t + 1 < part.end) ptx::NamedBarrierArrive(others_turn, 256);
    ptx::WgmmaWait<0>();
    if (lane == 0) ptx::BarrierArrive(shared.Empty(bottom), last ? 2 : 1);
    ring.count += last;

    if constexpr (kRoles == Roles::kChannels) {
      const uint32_t parity = t - part.begin & 1;  // each tile takes the sums' barriers through a phase
      if (group == 0) {
        ptx::BarrierWait(shared.SumsEmpty(), parity ^ 1);
#pragma unroll
        for (int i = 0; i < kCols; i += 4) {
          const float* v = sum[i / (kCols / 2)] + i % (kCols / 2);
          ptx::StoreShared4(sums + i / 4 * 2048, v[0], v[1], v[2], v[3]);
        }
        ptx::BarrierArrive(shared.SumsFull());
        continue;
      }
      ptx::BarrierWait(shared.SumsFull(), parity);
#pragma unroll
      for (int i = 0; i < kCols; i += 4) {
        float* v = sum[i / (kCols / 2)] + i % (kCols / 2);
        const float4 w = ptx::LoadShared4(sums + i / 4 * 2048);
        v[0] += w.x, v[1] += w.y, v[2] += w.z, v[3] += w.w;
      }
      ptx::BarrierArrive(shared.SumsEmpty());
    }
    if (masked) {
      ptx::BarrierWait(shared.Masked(group), mask_parity);
      mask_parity ^= 1;
    } else {
      ptx::NamedBarrier(own, 128);  // the last tile's results have left shared memory
    }
    PutTogether<T, kCols, kPooled>(g, sum, bias, masked, out);
    ptx::StoreFence();
    ptx::NamedBarrier(own, 128);
    if (thread == 0) {
      const Tile tile(g, t);
      ptx::StoreTile4D(&g.result[place.array], out, place.channel, tile.strip * kCols, tile.pair * 2, tile.image);
      if (kPooled) {
        ptx::StoreTile4D(&g.pooled, out + kOut, part.slice * 64, tile.strip * (kCols / 2), tile.pair, tile.image);
      }
      ptx::StoreCommit();
      ptx::StoreWaitRead();
      if (masked && t + kStep < part.end) LoadMask<kCols>(g, t + kStep, place, out, shared.Masked(group));
    }
    __syncwarp();
  }
}

}  // namespace stationary

template <typename T, bool kTransposed, Roles kRoles, int kCols, bool kPooled>
__global__ __launch_bounds__(kStationaryThreads, 1) void StationaryKernel(const __grid_constant__ StationaryArgs g) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace stationary;
  extern __shared__ unsigned char memory[];
  const Shared shared(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::BarrierInit(shared.Full(i), 1);
      ptx::BarrierInit(shared.Empty(i), kRoles == Roles::kResults ? 16 : 8);  // warps that multiply with it, twice
    }
    for (int group = 0; group < 2; ++group) ptx::BarrierInit(shared.Masked(group), 1);
    ptx::BarrierInit(shared.WeightsFull(), 1);
    ptx::BarrierInit(shared.WeightsRead(), 8);
    // Each thread for itself: racecheck takes no other thread's arrival for it, whatever a warp has agreed on before.
    ptx::BarrierInit(shared.SumsFull(), 128);
    ptx::BarrierInit(shared.SumsEmpty(), 128);
    ptx::BarrierInitFence();
    ptx::PrefetchTensorMap(&g.source[0]);
    ptx::PrefetchTensorMap(&g.weights);
    ptx::PrefetchTensorMap(&g.result[0]);
  }
  __syncthreads();
  if (threadIdx.x >= 256) {
    ptx::ShrinkRegisters<24>();
    if (threadIdx.x == 256) Load<kTransposed, kRoles, kCols>(g, shared);
  } else {
    ptx::GrowRegisters<240>();
    // A shuffle's result is known to be the same throughout a warp, which saves registers.
    Multiply<T, kTransposed, kRoles, kCols, kPooled>(g, __shfl_sync(~0u, threadIdx.x / 128, 0), shared);
  }
#endif
}

}  // namespace unet_fast::gpu::sm90
