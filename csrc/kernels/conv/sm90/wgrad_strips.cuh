// The weight gradient of a 3x3 convolution on Hopper, of step 1 or, for transposed convolutions, of 2. The kernel of
// wgrad.cuh waits for its loads, of three rows of pixels for each of positions, and for shared memory, which gives as
// many bytes for each product of 64 by 64 as it can.
//
// Here a block has 64 results, 64 channels and all nine taps, and walks down strips of 64 positions: a row of pixels is
// loaded once and serves all the steps whose results it reaches. Each of three warpgroups takes a row of the kernel,
// whose three taps are one product: results are its rows, and its 192 columns are the channels of three neighbouring
// pixels. These lie 128 bytes apart in shared memory, which is what the descriptor says of columns 64 apart, so that
// the same pixels are read three times, one row further each. With a step of 2, the pixels of a row lie in two slots,
// the firsts of all pairs in one and the seconds in the other: the first and the third tap read the one, one row apart,
// the second tap the other.
//
// Positions are those of a row of all images, side by side, each with the two columns beyond its right edge, where dz
// is zero because TMA fills with zeros; so few images leave little of a strip unused. To TMA, images are the rows of a
// picture, and rows the pictures.
#pragma once

#include "conv/sm90/wgrad.cuh"

namespace unet_fast::gpu::sm90 {

namespace strips {

constexpr int kBox = 66;  // pixels of a slot: those of 64 positions and their neighbours
constexpr int kPixels = (kBox * 128 + 1023) / 1024 * 1024, kPixelSlots = 16;
constexpr int kRegisters = 136;  // of a thread that multiplies

// The ring of dz, as SumDz takes it.
struct Dz {
  static constexpr int kTileN = 64, kTilesA = 0, kA = 0, kStages = 8, kStage = 64 * 128;
  static constexpr int kLoading = 512 - 3 * kRegisters;
};

constexpr int kBarriers = 2 * (kPixelSlots + Dz::kStages);
constexpr size_t kSharedBytes = 1024 + kPixelSlots * kPixels + Dz::kStages * Dz::kStage + kBarriers * 8;
static_assert(kSharedBytes <= 224 << 10 && kPixelSlots % 2 == 0);  // the slots of a row lie side by side

struct Shared {
  uint32_t pixels, dz, barriers;
  __device__ explicit Shared(const void* memory) {
    pixels = (ptx::SharedAddress(memory) + 1023) & ~1023u;  // the swizzle repeats every 1024 bytes
    dz = pixels + kPixelSlots * kPixels, barriers = dz + Dz::kStages * Dz::kStage;
  }
  __device__ uint32_t PixelsFull(int slot) const { return barriers + slot * 8; }
  __device__ uint32_t PixelsEmpty(int slot) const { return barriers + (kPixelSlots + slot) * 8; }
  __device__ uint32_t DzFull() const { return barriers + 2 * kPixelSlots * 8; }
  __device__ uint32_t DzEmpty() const { return DzFull() + Dz::kStages * 8; }
};

// Where a block is: step `step` of its steps, in row `row` of a strip, and which of all the rows of pixels that it
// loads is the first of the three that the step needs. kStep: of the convolution.
template <int kStep>
struct Walk {
  int step, last_step, rows, row, pixels = 0;
  __device__ Walk(const WgradKernelArgs& g)
      : step(blockIdx.y * g.steps_per_split), last_step(min(g.steps, step + g.steps_per_split)), rows(g.rows) {
    row = step % rows;
  }
  __device__ bool More() const { return step < last_step; }
  __device__ bool Last() const { return step + 1 == last_step || row + 1 == rows; }  // of the strip, or of all
  __device__ void Next() { pixels += Last() ? 3 : kStep, row = row + 1 == rows ? 0 : row + 1, ++step; }
};

template <int kStep>
__device__ void Load(const WgradKernelArgs& g, const Shared& shared, int source, int channel, int n) {
  Ring<Dz::kStages> ring;
  int image = 0, col = 0, load = 0;
  bool first = true;
  for (Walk<kStep> walk(g); walk.More(); first = walk.Last(), walk.Next(), ring.Next()) {
    if (first) {
      uint32_t in_image;
      image = static_cast<int>(g.positions_per_row.Divide(walk.step / walk.rows * 64, &in_image));
      col = static_cast<int>(in_image);
    }
    for (int i = first ? 0 : (3 - kStep) * kStep; i < 3 * kStep; ++i, ++load) {
      const int slot = load % kPixelSlots;
      ptx::BarrierWait(shared.PixelsEmpty(slot), load / kPixelSlots % 2 ^ 1);
      ptx::BarrierArriveExpect(shared.PixelsFull(slot), kBox * 128);
      ptx::LoadPixels(shared.pixels + slot * kPixels, &g.source[source], shared.PixelsFull(slot),
                      channel + (i % kStep ? g.second[source] : 0), col + g.first_col, image,
                      walk.row * kStep + g.first_row + i / kStep, 0, 0);
    }
    const uint32_t full = shared.DzFull() + ring.stage * 8;
    ptx::BarrierWait(shared.DzEmpty() + ring.stage * 8, ring.parity ^ 1);
    ptx::BarrierArriveExpect(full, Dz::kStage);
    ptx::LoadPixels(shared.dz + ring.stage * Dz::kStage, &g.dz, full, n, col, image, walk.row, 0, 0);
  }
}

// What a step has read, given back.
template <int kStep>
__device__ void Release(const Shared& shared, const Walk<kStep>& walk, int dz_stage) {
  if (threadIdx.x % 32 != 0) return;
  ptx::BarrierArrive(shared.DzEmpty() + dz_stage * 8);
  // No later step needs the first of its rows of pixels, or any of them.
  const int count = (walk.Last() ? 3 : kStep) * kStep;
  for (int i = 0; i < count; ++i) ptx::BarrierArrive(shared.PixelsEmpty((walk.pixels * kStep + i) % kPixelSlots));
}

template <typename T, int kStep>
__device__ void Multiply(const WgradKernelArgs& g, const Shared& shared, int group_index, int source, int chunk,
                         int n) {
  const TapGroup& group = g.group[group_index];
  constexpr int kTogether = kStep == 1 ? 3 : 2;  // taps, of the pixels of a slot
  float sum[kTogether * 32], second[32];         // second: of the second tap, where it has a slot of its own
  Ring<Dz::kStages> ring, done;
  Walk<kStep> walk(g), behind = walk;
  for (int accumulate = 0; walk.More(); walk.Next(), ring.Next()) {
    const int load = (walk.pixels + group.row) * kStep, slot = load % kPixelSlots;
#pragma unroll
    for (int i = 0; i < kStep; ++i) ptx::BarrierWait(shared.PixelsFull(slot + i), load / kPixelSlots % 2);
    ptx::BarrierWait(shared.DzFull() + ring.stage * 8, ring.parity);
    const uint64_t a = ptx::Descriptor(shared.dz + ring.stage * Dz::kStage);
    const uint64_t b = ptx::Descriptor(shared.pixels + slot * kPixels, 128);
    ptx::WgmmaFence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      ptx::Wgmma<T, kTogether * 64, 1, 1>(sum, a + (k * 2048 >> 4), b + (k * 2048 >> 4), accumulate);
      if constexpr (kStep == 2) {
        ptx::Wgmma<T, 64, 1, 1>(second, a + (k * 2048 >> 4), b + ((kPixels + k * 2048) >> 4), accumulate);
      }
      accumulate = 1;
    }
    ptx::WgmmaCommit();
    ptx::WgmmaWait<1>();
    if (walk.step > behind.step) {
      Release(shared, behind, done.stage);
      behind.Next(), done.Next();
    }
  }
  ptx::WgmmaWait<0>();

  const int lane = threadIdx.x % 32, row = n + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const int channels = g.channels[0] + g.channels[1];
  float* slab = g.slabs + static_cast<int64_t>(blockIdx.y) * 9 * channels * g.n;
#pragma unroll
  for (int s = 0; s < 3; ++s) {
    const int first = group.weight[s] * channels + (source ? g.channels[0] : 0);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = row + e / 2 * 8, channel = chunk * 64 + j * 8 + lane % 4 * 2 + e % 2;
        if (column >= g.n || channel >= g.channels[source]) continue;
        const int64_t at = static_cast<int64_t>(first + channel) * g.n + column;
        const float value = kStep == 2 && s == 1 ? second[j * 4 + e] : sum[((kStep == 2 ? s / 2 : s) * 8 + j) * 4 + e];
        if (gridDim.y == 1) {
          static_cast<T*>(g.dweights)[at] = FromFloat<T>(value);
        } else {
          slab[at] = value;
        }
      }
    }
  }
}

}  // namespace strips

template <typename T, int kStep>
__global__ __launch_bounds__(kWgradThreads, 1) void WgradStripsKernel(const __grid_constant__ WgradKernelArgs g) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace strips;
  extern __shared__ unsigned char memory[];
  __shared__ float partial[96 * kPack];  // sums of dz
  const Shared shared(memory);
  const int unit = blockIdx.x / g.tiles_n, n = static_cast<int>(blockIdx.x) % g.tiles_n * 64;
  const int source = unit >= g.chunks[0], chunk = unit - (source ? g.chunks[0] : 0);
  const bool sums = unit == 0 && g.bias_slabs != nullptr;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPixelSlots; ++i) {
      ptx::BarrierInit(shared.PixelsFull(i), 1);
      ptx::BarrierInit(shared.PixelsEmpty(i), 12);
    }
    for (int i = 0; i < Dz::kStages; ++i) {
      ptx::BarrierInit(shared.DzFull() + i * 8, 1);
      ptx::BarrierInit(shared.DzEmpty() + i * 8, sums ? 15 : 12);  // warps that read a stage
    }
    ptx::BarrierInitFence();
    ptx::PrefetchTensorMap(&g.dz);
    ptx::PrefetchTensorMap(&g.source[source]);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    ptx::ShrinkRegisters<Dz::kLoading>();
    if (threadIdx.x == 0) {
      Load<kStep>(g, shared, source, chunk * 64, n);
    } else if (threadIdx.x >= 32 && sums) {
      const Walk<kStep> walk(g);
      SumDz<T, Dz>(g, shared.dz, shared.DzFull(), shared.DzEmpty(), partial, n, walk.last_step - walk.step);
    }
  } else {
    ptx::GrowRegisters<kRegisters>();
    Multiply<T, kStep>(g, shared, __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, source, chunk, n);
  }
#endif
}

}  // namespace unet_fast::gpu::sm90
