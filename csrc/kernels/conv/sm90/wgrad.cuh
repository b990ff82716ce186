// The weight gradient of conv/gemm.h on Hopper. A block has 192 rows of the result, 64 a warpgroup: a row is a (tap,
// channel) pair, its sum runs over positions, 64 a stage, and both operands lie as they are in memory, position by
// position, which wgmma takes as MN-major. Positions are walked over as in implicit_gemm.cuh; where kShare is 3, the
// three warpgroups take the three taps of a row of the kernel from one load of 66 positions, each beginning one row
// further in shared memory, and dz is zero in the columns beyond its right edge because TMA fills with zeros.
//
// Positions are split over blocks; each leaves a slab. The sum of dz over the positions, the bias gradient, is taken by
// the three idle warps of the loading warpgroup from the tiles in shared memory.
#pragma once

#include "common/cuda.cuh"
#include "conv/gemm.h"
#include "conv/sm90/implicit_gemm.cuh"

namespace unet_fast::gpu::sm90 {

struct WgradKernelArgs {
  CUtensorMap source[2], dz;
  int chunks[2];  // of 64 channels, a source
  int groups;
  TapGroup group[9];
  int first_row, first_col, row_step, col_step, second[2];  // as in KernelArgs
  Divisor positions_per_image, positions_per_row;
  int channels[2], n, rows;             // rows: of dz, in an image
  int tiles_n, steps, steps_per_split;  // steps: of 64 positions
  void* dweights;                       // where there is one split
  float *slabs, *bias_slabs;            // bias_slabs [splits, n], or null
};

template <int kRounds_, int kTileN_, int kShare_, int kStages_>
struct WgradShape {
  static constexpr int kRounds = kRounds_;  // of 64 rows of the result, a warpgroup
  static constexpr int kTileN = kTileN_, kShare = kShare_, kStages = kStages_;
  // Registers of a thread that multiplies and of one that loads or sums, where 128 for all are not enough.
  static constexpr int kSums = kRounds * kTileN / 2;
  static constexpr int kMultiplying = kSums > 96 ? 160 : kSums > 64 ? 136 : 128, kLoading = 512 - 3 * kMultiplying;
  static constexpr int kTilesA = kShare == 3 ? kRounds : 3 * kRounds;  // of 64 channels, a stage
  static constexpr int kBox = 64 + kShare - 1;
  static constexpr int kA = (kBox * 128 + 1023) / 1024 * 1024, kB = kTileN * 128;
  static constexpr int kStage = kTilesA * kA + kB;
  static constexpr size_t kSharedBytes = 1024 + kStages * kStage + kStages * 16;
};
constexpr int kWgradThreads = 512;

// The tile of 64 channels with number `unit`, of all groups of taps and all sources.
struct Unit {
  int group, source, chunk;
  bool exists;
};
__device__ inline Unit LocateUnit(const WgradKernelArgs& g, int unit) {
  const int chunks = g.chunks[0] + g.chunks[1], group = unit / chunks, chunk = unit - group * chunks;
  const int source = chunk >= g.chunks[0];
  if (group >= g.groups) return {0, 0, 0, false};
  return {group, source, chunk - (source ? g.chunks[0] : 0), true};
}

// What one load of pixels of every step needs, looked up in shared memory because a loading thread has few registers.
struct alignas(16) UnitLoad {
  int source, channel;
  uint16_t row, col;
};

template <typename S>
__device__ void LoadSteps(const WgradKernelArgs& g, uint32_t stages, uint32_t full, uint32_t empty, UnitLoad* units,
                          int first_unit, int n, int first_step, int last_step) {
  for (int u = 0; u < S::kTilesA; ++u) {
    const Unit unit = LocateUnit(g, first_unit + u);
    const TapGroup& group = g.group[unit.group];
    units[u] = {unit.source, unit.chunk * 64 + (group.second ? g.second[unit.source] : 0), group.row, group.col};
  }
  Ring<S::kStages> ring;
#pragma unroll 1
  for (int step = first_step; step < last_step; ++step, ring.Next()) {
    uint32_t in_image, col;
    const int image = g.positions_per_image.Divide(step * 64, &in_image);
    const int row = g.positions_per_row.Divide(in_image, &col);
    const uint32_t to = stages + ring.stage * S::kStage, barrier = full + ring.stage * 8;
    ptx::BarrierWait(empty + ring.stage * 8, ring.parity ^ 1);
    ptx::BarrierArriveExpect(barrier, S::kTilesA * S::kBox * 128 + S::kB);
    const int source_col = static_cast<int>(col) * g.col_step + g.first_col,
              source_row = row * g.row_step + g.first_row;
#pragma unroll 1
    for (int u = 0; u < S::kTilesA; ++u) {
      const UnitLoad load = units[u];
      ptx::LoadPixels(to + u * S::kA, &g.source[load.source], barrier, load.channel, source_col, source_row, image,
                      load.col, load.row);
    }
#pragma unroll 1
    for (int i = 0; i < S::kTileN / 64; ++i) {
      ptx::LoadPixels(to + S::kTilesA * S::kA + i * 8192, &g.dz, barrier, n + i * 64, static_cast<int>(col), row, image,
                      0, 0);
    }
  }
}

template <typename T, typename S>
__device__ void SumDz(const WgradKernelArgs& g, uint32_t stages, uint32_t full, uint32_t empty, float* partial, int n,
                      int steps) {
  constexpr int kColumns = S::kTileN / kPack, kRows = 96 / kColumns;
  const int thread = threadIdx.x - 32, column = thread % kColumns, first_row = thread / kColumns;
  float sum[kPack] = {};
  Ring<S::kStages> ring;
  for (int step = 0; step < steps; ++step, ring.Next()) {
    ptx::BarrierWait(full + ring.stage * 8, ring.parity);
    const uint32_t from = stages + ring.stage * S::kStage + S::kTilesA * S::kA + column / 8 * 8192;
    // Several loads on their way at once keep up with the products, as far as there are registers to receive them.
#pragma unroll(S::kLoading > 64 ? 4 : 1)
    for (int row = first_row; row < 64; row += kRows) {
      const uint4 bits = ptx::LoadShared16(from + row * 128 + (((column % 8) ^ (row & 7)) << 4));
      const Pack<T> dz = reinterpret_cast<const Pack<T>&>(bits);
#pragma unroll
      for (int e = 0; e < kPack; ++e) sum[e] += ToFloat(dz.v[e]);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::BarrierArrive(empty + ring.stage * 8);
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) partial[thread * kPack + e] = sum[e];
  ptx::NamedBarrier(1, 96);
  if (thread >= kColumns || n + column * kPack >= g.n) return;
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    for (int r = 1; r < kRows; ++r) sum[e] += partial[(r * kColumns + column) * kPack + e];
    g.bias_slabs[static_cast<int64_t>(blockIdx.y) * g.n + n + column * kPack + e] = sum[e];
  }
}

template <typename T, typename S>
__device__ void MultiplySteps(const WgradKernelArgs& g, uint32_t stages, uint32_t full, uint32_t empty, int group_index,
                              int first_unit, int n, int steps) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  float sum[S::kRounds][S::kTileN / 2];
  Ring<S::kStages> ring, done;
  for (int step = 0; step < steps; ++step) {
    ptx::BarrierWait(full + ring.stage * 8, ring.parity);
    const uint32_t from = stages + ring.stage * S::kStage;
    const uint32_t a = from + (S::kShare == 3 ? group_index * 128 : group_index * S::kRounds * S::kA);
    const uint64_t a_matrix = ptx::Descriptor(a, 8192), b_matrix = ptx::Descriptor(from + S::kTilesA * S::kA, 8192);
    ptx::WgmmaFence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int r = 0; r < S::kRounds; ++r) {
        ptx::Wgmma<T, S::kTileN, 1, 1>(sum[r], a_matrix + ((r * S::kA + k * 2048) >> 4), b_matrix + (k * 2048 >> 4),
                                       step > 0 || k > 0);
      }
    }
    ptx::WgmmaCommit();
    ring.Next();
    ptx::WgmmaWait<1>();
    if (step > 0) {
      if (lane == 0) ptx::BarrierArrive(empty + done.stage * 8);
      done.Next();
    }
  }
  ptx::WgmmaWait<0>();

  const int channels = g.channels[0] + g.channels[1];
#pragma unroll
  for (int r = 0; r < S::kRounds; ++r) {
    const Unit unit = LocateUnit(g, first_unit + (S::kShare == 3 ? r : group_index * S::kRounds + r));
    if (!unit.exists) continue;
    const int tap = g.group[unit.group].weight[S::kShare == 3 ? group_index : 0];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int channel = unit.chunk * 64 + warp * 16 + h * 8 + lane / 4;
      if (channel >= g.channels[unit.source]) continue;
      const int64_t row = (static_cast<int64_t>(tap) * channels + (unit.source ? g.channels[0] : 0) + channel) * g.n;
#pragma unroll
      for (int j = 0; j < S::kTileN / 8; ++j) {
        const int column = n + j * 8 + lane % 4 * 2;
        if (column >= g.n) continue;
        const float a = sum[r][j * 4 + h * 2], b = sum[r][j * 4 + h * 2 + 1];
        if (gridDim.y == 1) {
          *reinterpret_cast<uint32_t*>(static_cast<T*>(g.dweights) + row + column) = PackPair<T>(a, b, false);
        } else {
          float* slab =
              g.slabs + static_cast<int64_t>(blockIdx.y) * g.groups * (S::kShare == 3 ? 3 : 1) * channels * g.n;
          *reinterpret_cast<float2*>(slab + row + column) = make_float2(a, b);
        }
      }
    }
  }
}

template <typename T, typename S>
__global__ __launch_bounds__(kWgradThreads, 1) void WgradKernel(const __grid_constant__ WgradKernelArgs g) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  const uint32_t stages = (ptx::SharedAddress(shared) + 1023) & ~1023u;
  const uint32_t full = stages + S::kStages * S::kStage, empty = full + S::kStages * 8;
  __shared__ float partial[96 * kPack];  // sums of dz
  __shared__ UnitLoad units[S::kTilesA];
  const int tile = blockIdx.x / g.tiles_n, n = static_cast<int>(blockIdx.x) % g.tiles_n * S::kTileN;
  const int first_unit = tile * S::kTilesA, first_step = blockIdx.y * g.steps_per_split;
  const int last_step = min(g.steps, first_step + g.steps_per_split);
  const bool sums = tile == 0 && g.bias_slabs != nullptr;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      ptx::BarrierInit(full + i * 8, 1);
      ptx::BarrierInit(empty + i * 8, sums ? 15 : 12);  // warps that read a stage
    }
    ptx::BarrierInitFence();
    ptx::PrefetchTensorMap(&g.dz);
    ptx::PrefetchTensorMap(&g.source[0]);
    if (g.chunks[1] > 0) ptx::PrefetchTensorMap(&g.source[1]);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    if constexpr (S::kLoading < 128) ptx::ShrinkRegisters<S::kLoading>();
    if (threadIdx.x == 0) {
      LoadSteps<S>(g, stages, full, empty, units, first_unit, n, first_step, last_step);
    } else if (threadIdx.x >= 32 && sums) {
      SumDz<T, S>(g, stages, full, empty, partial, n, last_step - first_step);
    }
  } else {
    if constexpr (S::kMultiplying > 128) ptx::GrowRegisters<S::kMultiplying>();
    MultiplySteps<T, S>(g, stages, full, empty, __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, first_unit, n,
                        last_step - first_step);
  }
#endif
}

}  // namespace unet_fast::gpu::sm90
