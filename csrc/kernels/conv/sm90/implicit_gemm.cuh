// The implicit GEMM of conv/gemm.h on Hopper: TMA loads, wgmma products. One warp loads, two warpgroups multiply, and a
// block goes from tile to tile until none is left.
//
// Rows of the product are positions in the order in which TMA's im2col mode walks over the pixels, so nothing is wasted
// at the edges of an image. Where taps lie three in a row (kShare 3), the walk also covers the two columns beyond the
// right edge of the results: then the neighbour of a position is the next row in shared memory, one load of pixels
// serves three taps, and two positions a row of the image are computed for nothing. (The swizzle is a function of the
// address, so a matrix may start at any row.)
//
// kPairs: one warpgroup has even rows of the image, the other the odd ones below them, each read through a map of every
// second row. Then a 2x2 pooling window is two neighbouring positions of both.
//
// Shared memory holds two rings of stages, since a load of pixels lasts longer than one of weights where it is shared.
// kSplit: the sum is too long, and the tiles too few, for one block a tile. A cluster of blocks takes a share of the
// sum each, then a share of the tile each, which it adds up from all of them through shared memory, in order.
//
// The epilogue sends 16 x 64 results of a warp at a time through shared memory, so that a lane stores 16 bytes and
// eight lanes a line.
#pragma once

#include "common/cuda.cuh"
#include "conv/gemm.h"
#include "conv/sm90/epilogue.cuh"
#include "ptx/hopper.cuh"
#include "ptx/wgmma.cuh"

namespace unet_fast::gpu::sm90 {

struct TapGroup {
  uint8_t row, col;   // offset of the first tap from the first position
  uint8_t second;     // whether it takes the second of a pair of pixels
  uint8_t weight[3];  // indices of the weights of the group's taps
};

struct KernelArgs {
  CUtensorMap source[2][2];  // of the first and second source; kPairs: of its even and its odd rows
  CUtensorMap weights;
  int chunks[2];         // of 64 channels, a source
  int first_channel[2];  // of a source, among the weights'
  int groups[4], lists;
  TapGroup group[4][9];
  int64_t result_offset[4];
  int first_row, first_col, row_step, col_step;  // source pixel of position (0, 0), and of a position to the next
  int second[2];                                 // channel of a source where the second of a pair of pixels begins
  Divisor positions_per_image, positions_per_row;
  int batch, out_h, out_w, n;
  int tiles_m, tiles_n, tiles;
  int splits;  // blocks of a cluster
  GemmResult result[2];
  int64_t mask_image_stride, mask_row_stride;  // of the second result's mask
  int split;                                   // columns from here on belong to the second result
  const void* bias;
  bool relu;
  void* pooled;
};

template <int kWarpM_, int kTileN_, int kShare_, bool kPairs_, bool kTransposed_, int kStagesA_, int kStagesB_,
          int kBlocks_, bool kSplit_ = false>
struct Shape {
  static constexpr int kWarpM = kWarpM_;  // rows of the product of a warpgroup: 64 or 128
  static constexpr int kTileN = kTileN_, kShare = kShare_, kStagesA = kStagesA_, kStagesB = kStagesB_;
  static constexpr bool kPairs = kPairs_, kTransposed = kTransposed_, kSplit = kSplit_;
  static constexpr int kBlocks = kBlocks_;  // at once on a multiprocessor
  // Two warpgroups multiply, and a warp loads; three more keep it company where registers are to move, which takes a
  // warpgroup.
  static constexpr int kThreads = kBlocks == 2 ? 288 : 384;
  static constexpr int kBox = kWarpM + kShare - 1;
  static constexpr int kA = (kBox * 128 + 1023) / 1024 * 1024;  // bytes of shared memory of a warpgroup's stage
  static constexpr int kB = kTileN * 128;
  static constexpr int kStrip = 16 * 128;
  static constexpr size_t kSharedBytes =
      1024 + kStagesA * 2 * kA + kStagesB * kB + 8 * kStrip + (kStagesA + kStagesB) * 16;
};

struct TileIndex {
  int list, n;
  uint32_t m;
};
template <typename S>
__device__ TileIndex LocateTile(const KernelArgs& g, int tile) {
  const int rest = tile / g.tiles_n;
  constexpr int kRows = S::kPairs ? S::kWarpM : 2 * S::kWarpM;
  return {rest / g.tiles_m, (tile - rest * g.tiles_n) * S::kTileN, static_cast<uint32_t>(rest % g.tiles_m) * kRows};
}

// A block's tiles, and its share of the loads of each.
template <typename S>
struct Schedule {
  int tile, step, rank = 0;
  __device__ explicit Schedule(const KernelArgs& g) : tile(blockIdx.x), step(gridDim.x) {
    if constexpr (S::kSplit) rank = static_cast<int>(ptx::ClusterRank()), tile = blockIdx.x / g.splits, step = g.tiles;
  }
  // The tile of turn `t`, which goes from `tile` on in steps. Where tiles differ, as those of several lists do, the
  // longest of which come first, every second round is in reverse: else blocks that begin with a long one would have
  // one more.
  __device__ int Turn(const KernelArgs& g, int t) const {
    if (S::kShare == 1 && S::kBlocks == 1 && !S::kSplit && g.lists > 1 && t / step % 2 == 1)
      return t + step - 1 - 2 * tile;
    return t;
  }
  __device__ int First(const KernelArgs& g, int loads) const { return S::kSplit ? loads * rank / g.splits : 0; }
  __device__ int Last(const KernelArgs& g, int loads) const {
    return S::kSplit ? loads * (rank + 1) / g.splits : loads;
  }
};
__device__ inline int Loads(const KernelArgs& g, int list) { return (g.chunks[0] + g.chunks[1]) * g.groups[list]; }

// The next of `kStages` stages; the parity of its barriers flips with each turn of the ring.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void Next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

struct Barriers {
  uint32_t a_full, a_empty, b_full, b_empty;  // 8 bytes a stage
};

template <typename S>
__device__ void LoadTiles(const KernelArgs& g, uint32_t a_shared, uint32_t b_shared, const Barriers& barriers) {
  Ring<S::kStagesA> a;
  Ring<S::kStagesB> b;
  const Schedule<S> schedule(g);
  for (int t = schedule.tile; schedule.Turn(g, t) < g.tiles; t += schedule.step) {
    const TileIndex tile = LocateTile<S>(g, schedule.Turn(g, t));
    int load = 0;
    const int first = schedule.First(g, Loads(g, tile.list)), last = schedule.Last(g, Loads(g, tile.list));
    Position at[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      at[w] = Locate(g, tile.m + (S::kPairs ? 0 : w * S::kWarpM));
      at[w].row = at[w].row * g.row_step + (S::kPairs ? g.first_row >> 1 : g.first_row);
      at[w].col = at[w].col * g.col_step + g.first_col;
    }
    for (int s = 0; s < 2; ++s) {
      for (int chunk = 0; chunk < g.chunks[s]; ++chunk) {
        for (int i = 0; i < g.groups[tile.list]; ++i, ++load) {
          if (S::kSplit && (load < first || load >= last)) continue;
          const TapGroup& group = g.group[tile.list][i];
          const uint32_t a_full = barriers.a_full + a.stage * 8;
          ptx::BarrierWait(barriers.a_empty + a.stage * 8, a.parity ^ 1);
          ptx::BarrierArriveExpect(a_full, 2 * S::kBox * 128);
          const int channel = chunk * 64 + (group.second ? g.second[s] : 0);
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            int row = group.row, odd = 0;
            if (S::kPairs) {  // of the rows of one parity
              const int source_row = w + group.row + g.first_row;
              odd = source_row & 1, row = (source_row >> 1) - (g.first_row >> 1);
            }
            ptx::LoadPixels(a_shared + (a.stage * 2 + w) * S::kA, &g.source[s][odd], a_full, channel, at[w].col,
                            at[w].row, at[w].image, group.col, static_cast<uint16_t>(row));
          }
          a.Next();
#pragma unroll
          for (int tap = 0; tap < S::kShare; ++tap) {
            const uint32_t b_full = barriers.b_full + b.stage * 8, to = b_shared + b.stage * S::kB;
            const int channel = g.first_channel[s] + chunk * 64, weight = group.weight[tap];
            ptx::BarrierWait(barriers.b_empty + b.stage * 8, b.parity ^ 1);
            ptx::BarrierArriveExpect(b_full, S::kB);
            if constexpr (S::kTransposed) {
              ptx::LoadTile3D(to, &g.weights, b_full, channel, tile.n, weight);
            } else {
#pragma unroll
              for (int n = 0; n < S::kTileN / 64; ++n) {
                ptx::LoadTile3D(to + n * 8192, &g.weights, b_full, tile.n + n * 64, channel, weight);
              }
            }
            b.Next();
          }
        }
      }
    }
  }
}

// Adds the bias to 16 x 64 results of a warp, and stores them to shared memory as T.
template <typename T, int kTileN>
__device__ void Stage(const float (&sum)[kTileN / 2], int strip_n, const KernelArgs& g, int n, uint32_t strip) {
  const int lane = threadIdx.x % 32, row = lane % 16, half = lane / 16;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    Pair<T> bias[2] = {};
    if (g.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // past the last column any will do
        bias[i] = static_cast<const Pair<T>*>(g.bias)[min(n + (j + i) * 8, g.n - 8) / 2 + lane % 4];
      }
    }
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = (strip_n * 8 + j + i / 2) * 4 + i % 2 * 2;
      const Pair<T> add = bias[i / 2];
      packed[i] = PackPair<T>(sum[at] + ToFloat(add.x), sum[at + 1] + ToFloat(add.y), g.relu);
    }
    ptx::StoreMatrix(strip + row * 128 + (((j + half) ^ (row & 7)) << 4), packed[0], packed[1], packed[2], packed[3]);
  }
}

// A row's places, and the first touch of what will mask it, which so comes from the second-level cache in the epilogue.
template <typename S>
__device__ Place Locate(const KernelArgs& g, const TileIndex& tile, Position at, int group_index) {
  Place place = {kNowhere, kNowhere, kNowhere};
  if (S::kPairs) at.row = at.row * 2 + group_index;
  if (at.image >= g.batch || at.row >= g.out_h || at.col >= g.out_w) return place;
  const int64_t offset = g.result_offset[tile.list];
  place.first = Units(at, g.result[0].image_stride, g.result[0].row_stride, g.result[0].pixel_stride, offset);
  if (S::kPairs) {
    if (group_index == 0 && at.col % 2 == 0 && at.row + 1 < g.out_h && at.col + 1 < g.out_w) {
      const int64_t image = static_cast<int64_t>(at.image) * (g.out_h / 2);
      place.second = static_cast<uint32_t>(((image + at.row / 2) * (g.out_w / 2) + at.col / 2) * g.n / kPack);
    }
  } else if (g.split < g.n) {
    const GemmResult& second = g.result[1];
    place.second = Units(at, second.image_stride, second.row_stride, second.pixel_stride, offset);
    place.mask = Units(at, g.mask_image_stride, g.mask_row_stride, second.pixel_stride, offset);
  }
#pragma unroll
  for (int s = 0; s < S::kTileN / 64; ++s) {
    const int n = tile.n + s * 64;
    const bool second = n >= g.split;
    const void* mask = g.result[second].mask;
    if (mask != nullptr && n < g.n) {
      const uint32_t unit = (second ? place.mask : place.first) + (n - (second ? g.split : 0)) / kPack;
      asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const uint4*>(mask) + unit));
    }
  }
  return place;
}

// The rank that stores strip `unit` of a warpgroup's 64 x 64 results.
template <typename S>
__device__ int Owner(const KernelArgs& g, int unit) {
  return unit * g.splits / (S::kWarpM / 64 * (S::kTileN / 64));
}

// The sums of a cluster's blocks: each gives the others what they store, into their stages, which are idle by then.
template <typename S>
__device__ void AddUp(const KernelArgs& g, int rank, int group_index, uint32_t stages,
                      float (&sum)[S::kWarpM / 64][S::kTileN / 2]) {
  constexpr int kStrips = S::kTileN / 64, kUnits = S::kWarpM / 64 * kStrips, kUnit = 64 * 64 * 4;
  const int owned = kUnits / g.splits;
  const auto slot = [&](int from, int to, int unit) {  // of what rank `from` gives to another
    return stages + (((from < to ? from : from - 1) * owned + unit % owned) * 2 + group_index) * kUnit +
           threadIdx.x % 128 * 16;
  };
  ptx::ClusterSync();
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const int owner = Owner<S>(g, unit);
    if (owner == rank) continue;
    const uint32_t to = ptx::InCluster(slot(rank, owner, unit), owner);
    const float* v = sum[unit / kStrips] + unit % kStrips * 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) ptx::StoreCluster4(to + i * 2048, v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  }
  ptx::ClusterSync();
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    if (Owner<S>(g, unit) != rank) continue;
    float* v = sum[unit / kStrips] + unit % kStrips * 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int from = 0; from < g.splits; ++from) {
        const float4 w = from == rank ? make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3])
                                      : ptx::LoadShared4(slot(from, rank, unit) + i * 2048);
        total.x += w.x, total.y += w.y, total.z += w.z, total.w += w.w;
      }
      v[4 * i] = total.x, v[4 * i + 1] = total.y, v[4 * i + 2] = total.z, v[4 * i + 3] = total.w;
    }
  }
}

template <typename T, typename S>
__device__ void Multiply(const KernelArgs& g, int group_index, uint32_t a_shared, uint32_t b_shared, uint32_t strips,
                         const Barriers& barriers, Place* places) {
  constexpr int kRounds = S::kWarpM / 64, kStrips = S::kTileN / 64;
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const uint32_t strip = strips + (group_index * 4 + warp) * S::kStrip;
  Ring<S::kStagesA> a, a_done;
  Ring<S::kStagesB> b, b_done;
  const Schedule<S> schedule(g);
  for (int t = schedule.tile; schedule.Turn(g, t) < g.tiles; t += schedule.step) {
    const TileIndex tile = LocateTile<S>(g, schedule.Turn(g, t));
    if (lane < kRounds * 16) {  // the rows of this warp, one a lane
      const int row = lane / 16 * 64 + warp * 16 + lane % 16;
      const uint32_t m = tile.m + row + (S::kPairs ? 0 : group_index * S::kWarpM);
      places[group_index * S::kWarpM + row] = Locate<S>(g, tile, Locate(g, m), group_index);
    }
    __syncwarp();
    float sum[kRounds][S::kTileN / 2];
    const int all_loads = Loads(g, tile.list), loads = schedule.Last(g, all_loads) - schedule.First(g, all_loads);
    int accumulate = 0;
#pragma unroll 1
    for (int load = 0; load < loads; ++load) {
      ptx::BarrierWait(barriers.a_full + a.stage * 8, a.parity);
#pragma unroll
      for (int tap = 0; tap < S::kShare; ++tap) {
        ptx::BarrierWait(barriers.b_full + b.stage * 8, b.parity);
        const uint64_t a_matrix = ptx::Descriptor(a_shared + (a.stage * 2 + group_index) * S::kA + tap * 128);
        const uint64_t b_matrix = S::kTransposed ? ptx::Descriptor(b_shared + b.stage * S::kB)
                                                 : ptx::Descriptor(b_shared + b.stage * S::kB, 8192);
        ptx::WgmmaFence();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int r = 0; r < kRounds; ++r) {
            // 16 channels further: 32 bytes along a row, or 16 rows.
            ptx::Wgmma<T, S::kTileN, 0, S::kTransposed ? 0 : 1>(sum[r], a_matrix + ((r * 8192 + k * 32) >> 4),
                                                                b_matrix + (k * (S::kTransposed ? 32 : 2048) >> 4),
                                                                accumulate);
          }
          accumulate = 1;
        }
        ptx::WgmmaCommit();
        b.Next();
        // The products before these are done: their stages are free.
        ptx::WgmmaWait<1>();
        if (load + tap > 0 && lane == 0) {
          ptx::BarrierArrive(barriers.b_empty + b_done.stage * 8);
          if (tap == 0) ptx::BarrierArrive(barriers.a_empty + a_done.stage * 8);
        }
        if (load + tap > 0) {
          b_done.Next();
          if (tap == 0) a_done.Next();
        }
      }
      a.Next();
    }
    ptx::WgmmaWait<0>();
    if (lane == 0) {
      ptx::BarrierArrive(barriers.b_empty + b_done.stage * 8);
      ptx::BarrierArrive(barriers.a_empty + a_done.stage * 8);
    }
    a_done.Next(), b_done.Next();
    if constexpr (S::kSplit) AddUp<S>(g, schedule.rank, group_index, a_shared, sum);

#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      // Of this lane: 16 bytes of every fourth row.
      const Place* rows = places + group_index * S::kWarpM + r * 64 + warp * 16 + lane / 8;
#pragma unroll
      for (int s = 0; s < kStrips; ++s) {
        if (S::kSplit && Owner<S>(g, r * kStrips + s) != schedule.rank) continue;
        const int n = tile.n + s * 64 + lane % 8 * 8;
        const bool second = n >= g.split;
        const uint32_t column = (n - (second ? g.split : 0)) / kPack;
        uint4* const to = static_cast<uint4*>(g.result[second].data);
        const uint4* const mask = static_cast<const uint4*>(g.result[second].mask);
        uint32_t unit[4];
        uint4 masks[4];
        const auto load_masks = [&] {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            unit[i] = n >= g.n ? kNowhere : second ? rows[i * 4].second : rows[i * 4].first;
            if (mask != nullptr && unit[i] != kNowhere) {
              masks[i] = mask[(second ? rows[i * 4].mask : unit[i]) + column];
            }
          }
        };
        // Early, where there are registers to wait in; where there are two blocks, the other one is at work meanwhile.
        if constexpr (S::kBlocks == 1) load_masks();
        Stage<T, S::kTileN>(sum[r], s, g, tile.n + s * 64, strip);
        if constexpr (S::kBlocks == 2) load_masks();
        if constexpr (S::kPairs) {
          ptx::NamedBarrier(1, 256);
        } else {
          __syncwarp();
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = i * 4 + lane / 8;
          uint4 v = ptx::LoadShared16(strip + row * 128 + (((lane % 8) ^ (row & 7)) << 4));
          if (mask != nullptr) v = MaskedBits<T>(v, masks[i]);
          if (unit[i] != kNowhere) to[unit[i] + column] = v;
        }
        if constexpr (S::kPairs) {
          // 32 windows of 64 channels: a thread takes 8 channels of one.
          const int window = (group_index * 128 + thread) / 8, first = window * 2 % 16;
          const uint32_t pooled = places[r * 64 + window * 2].second;
          if (pooled != kNowhere && n < g.n) {
            Pack<T> quad[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
              const int row = first + q % 2;
              const uint4 bits = ptx::LoadShared16(strips + (q / 2 * 4 + window / 8) * S::kStrip + row * 128 +
                                                   (((lane % 8) ^ (row & 7)) << 4));
              quad[q] = reinterpret_cast<const Pack<T>&>(bits);
            }
            static_cast<Pack<T>*>(g.pooled)[pooled + n / kPack] = Max(Max(quad[0], quad[1]), Max(quad[2], quad[3]));
          }
          ptx::NamedBarrier(1, 256);
        } else {
          __syncwarp();
        }
      }
    }
  }
}

template <typename T, typename S>
__global__ __launch_bounds__(S::kThreads, S::kBlocks) void ImplicitGemmKernel(const __grid_constant__ KernelArgs g) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  __shared__ Place places[2 * S::kWarpM];
  // The swizzle repeats every 1024 bytes.
  const uint32_t a_shared = (ptx::SharedAddress(shared) + 1023) & ~1023u;
  const uint32_t b_shared = a_shared + S::kStagesA * 2 * S::kA, strips = b_shared + S::kStagesB * S::kB;
  Barriers barriers;
  barriers.a_full = strips + 8 * S::kStrip, barriers.a_empty = barriers.a_full + S::kStagesA * 8;
  barriers.b_full = barriers.a_empty + S::kStagesA * 8, barriers.b_empty = barriers.b_full + S::kStagesB * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStagesA; ++i) {
      ptx::BarrierInit(barriers.a_full + i * 8, 1);
      ptx::BarrierInit(barriers.a_empty + i * 8, 8);  // warps that multiply
    }
    for (int i = 0; i < S::kStagesB; ++i) {
      ptx::BarrierInit(barriers.b_full + i * 8, 1);
      ptx::BarrierInit(barriers.b_empty + i * 8, 8);
    }
    ptx::BarrierInitFence();
    for (int s = 0; s < 2; ++s) {
      for (int odd = 0; odd < (S::kPairs ? 2 : 1); ++odd) {
        if (g.chunks[s] > 0) ptx::PrefetchTensorMap(&g.source[s][odd]);
      }
    }
    ptx::PrefetchTensorMap(&g.weights);
  }
  __syncthreads();
  if (threadIdx.x >= 256) {
    if constexpr (S::kBlocks == 1) ptx::ShrinkRegisters<40>();
    if (threadIdx.x == 256) LoadTiles<S>(g, a_shared, b_shared, barriers);
  } else {
    if constexpr (S::kBlocks == 1) ptx::GrowRegisters<232>();
    Multiply<T, S>(g, __shfl_sync(~0u, threadIdx.x / 128, 0), a_shared, b_shared, strips, barriers, places);
  }
#endif
}

}  // namespace unet_fast::gpu::sm90
