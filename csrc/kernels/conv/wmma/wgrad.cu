// The weight gradient: dweights[(tap, c), n] = sum over pixels of source[pixel + offset(tap), c] * dz[pixel, n], a
// matrix product whose rows are all (tap, channel) pairs and whose sum runs over the pixels of the whole batch. Both
// operands are read as they lie, pixel by pixel, and turned by ldmatrix. Where each pixel of the next steps lies is
// worked out once a block, a pixel a thread, into a small table in shared memory. There are few result tiles (64 > 64
// channels: five) and millions of pixels, so the pixels are split over blocks; each leaves its partial sum in a slab of
// float32 and reduce.cu adds the slabs in order. With one split the result is stored at once.
#include "conv/gemm.h"
#include "conv/reduce.h"
#include "conv/wmma/config.h"
#include "conv/wmma/engine.h"
#include "conv/wmma/fragment.cuh"

namespace unet_fast::gpu::wmma {
namespace {

template <int kTileM_, int kTileN_, int kWarpM_, int kWarpN_, int kDepth_, int kStages_>
struct WgradShape {
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kDepth = kDepth_, kStages = kStages_;  // pixels a step, steps in shared memory
  static constexpr int kWarpsM = kTileM / kWarpM, kThreads = kWarpsM * (kTileN / kWarpN) * 32;
  static constexpr int kLdA = kTileM + 8, kLdB = kTileN + 8, kA = kDepth * kLdA, kB = kDepth * kLdB;
  static constexpr int kLdStrip = kWarpN + 4;
  static constexpr size_t kPipeline = static_cast<size_t>(kStages) * (kA + kB) * 2;
  static constexpr size_t kStrips = static_cast<size_t>(kThreads / 32) * 16 * kLdStrip * 4;
  static constexpr size_t kSharedBytes = kPipeline > kStrips ? kPipeline : kStrips;
  // The same tile before sm_80, where there is no asynchronous copy and less shared memory.
  using Turing = WgradShape<kTileM, kTileN, kWarpM, kWarpN, 32, 2>;
};

// A pixel of the sum in the source: its image, row and column, times the stride. Beyond the pixels, a row that is
// outside.
struct alignas(16) Place {
  uint32_t image;
  int row, col, unused;
};
constexpr int kNowhere = -(1 << 24);

// Where the element (tap, channel) of a row of the result comes from.
template <typename T>
struct Origin {
  const T* data;
  uint32_t image_stride;
  int row_stride, pixel_stride, row, col;

  __device__ Origin(const WgradArgs& g, uint32_t m) {
    uint32_t channel;
    const Tap tap = g.taps.tap[g.channels.Divide(m, &channel)];
    const bool second = g.sources == 2 && channel >= g.source[0].channels;
    const GemmSource& s = g.source[second ? 1 : 0];
    row = tap.row, col = tap.col;
    row_stride = s.row_stride, pixel_stride = s.channels, image_stride = static_cast<uint32_t>(s.image_stride);
    data = static_cast<const T*>(s.data) + static_cast<int64_t>(row) * row_stride + col * pixel_stride +
           (second ? channel - g.source[0].channels : channel);
  }
  __device__ bool Inside(const WgradArgs& g, const Place& p) const {
    return static_cast<uint32_t>(p.row + row) < static_cast<uint32_t>(g.source_h) &&
           static_cast<uint32_t>(p.col + col) < static_cast<uint32_t>(g.source_w);
  }
  __device__ const T* At(const Place& p) const {
    return Advance(data + static_cast<uint64_t>(p.image) * image_stride,
                   static_cast<uint32_t>(p.row) * row_stride + p.col * pixel_stride);
  }
};

template <typename T, typename S, bool kVector>
__device__ void WgradBlock(const WgradArgs& g) {
  constexpr int kTileM = S::kTileM, kTileN = S::kTileN, kWarpM = S::kWarpM, kWarpN = S::kWarpN;
  constexpr int kDepth = S::kDepth, kStages = S::kStages, kThreads = S::kThreads;
  static_assert(kStages * kDepth <= kThreads);
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ Place places[2][kStages * kDepth];  // of the pixels of kStages steps, and of the kStages after them
  T* const a_stages = reinterpret_cast<T*>(shared);
  T* const b_stages = a_stages + kStages * S::kA;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int rows = g.taps.count * g.channels.d;
  const int tiles_n = (g.n + kTileN - 1) / kTileN;
  const int first_m = blockIdx.x / tiles_n * kTileM, first_n = blockIdx.x % tiles_n * kTileN;
  const uint32_t pixels = g.pixels_per_image.d * g.batch;
  const uint32_t first_pixel = blockIdx.y * g.pixels_per_split;
  const uint32_t last_pixel = min(pixels, first_pixel + g.pixels_per_split);
  const int steps = (last_pixel - first_pixel + kDepth - 1) / kDepth;

  const auto find_places = [&](int first_step) {
    if (thread >= kStages * kDepth) return;
    const uint32_t p = first_pixel + first_step * kDepth + thread;
    uint32_t in_image, j;
    Place place;
    place.image = g.pixels_per_image.Divide(p, &in_image);
    place.row = g.pixels_per_row.Divide(in_image, &j) * g.stride;
    place.col = j * g.stride;
    place.unused = 0;
    if (p >= last_pixel) place = {0, kNowhere, 0, 0};
    places[first_step / kStages % 2][thread] = place;
  };

  // This thread copies one chunk of 8 columns of every kStep-th pixel of each operand.
  constexpr int kChunksA = kTileM / kPack, kStepA = kThreads / kChunksA, kRowsA = kDepth / kStepA;
  constexpr int kChunksB = kTileN / kPack, kStepB = kThreads / kChunksB, kRowsB = kDepth / kStepB;
  const int a_chunk = thread % kChunksA, a_row = thread / kChunksA;
  const int b_chunk = thread % kChunksB, b_row = thread / kChunksB;
  const int a_m = first_m + a_chunk * kPack, b_n = first_n + b_chunk * kPack;
  const bool a_valid = a_m < rows;
  const Origin<T> origin(g, a_valid ? a_m : 0);
  const uint32_t a_target = SharedAddress(a_stages + a_row * S::kLdA + a_chunk * kPack);
  const uint32_t b_target = SharedAddress(b_stages + b_row * S::kLdB + b_chunk * kPack);
  const T* b = static_cast<const T*>(g.dz) + static_cast<int64_t>(first_pixel + b_row) * g.n + b_n;
  int b_left = last_pixel - first_pixel - b_row;  // pixels from this thread's first one on
  const int64_t b_step = static_cast<int64_t>(kStepB) * g.n;

  // Of a step whose stage, and half of the table, are those.
  const auto copy_step = [&](int stage, int half) {
#pragma unroll
    for (int r = 0; r < kRowsA; ++r) {
      const Place place = places[half][stage * kDepth + a_row + r * kStepA];
      const uint32_t target = a_target + (stage * S::kA + r * kStepA * S::kLdA) * 2;
      if constexpr (kVector) {
        CopyAsync<Cache::kAll>(target, origin.At(place), a_valid && origin.Inside(g, place));
      } else {
        Pack<T> pack;
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          pack.v[e] = FromFloat<T>(0.0f);
          if (a_m + e >= rows) continue;
          const Origin<T> element(g, a_m + e);
          if (element.Inside(g, place)) pack.v[e] = *element.At(place);
        }
        StoreShared(target, pack);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsB; ++r) {
      const uint32_t target = b_target + (stage * S::kB + r * kStepB * S::kLdB) * 2;
      const bool valid = r * kStepB < b_left;
      if constexpr (kVector) {
        CopyAsync<Cache::kAll>(target, b + r * b_step, valid && b_n < g.n);
      } else {
        StoreShared(target, LoadPack<false>(b + r * b_step, valid ? g.n - b_n : 0));
      }
    }
    b += static_cast<int64_t>(kDepth) * g.n;
    b_left -= kDepth;
  };

  constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 16;
  Accumulator sum[kFragmentsM][kFragmentsN];
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j) nvcuda::wmma::fill_fragment(sum[i][j], 0.0f);
  }
  const int warp_m = warp % S::kWarpsM * kWarpM, warp_n = warp / S::kWarpsM * kWarpN;

  const T* const a_warp = a_stages + warp_m;
  const T* const b_warp = b_stages + warp_n;

  find_places(0);
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) copy_step(s, 0);
    CommitCopies();
  }
#pragma unroll 1
  for (int first = 0; first < steps; first += kStages) {
    const int half = first / kStages % 2;
#pragma unroll
    for (int s = 0; s < kStages; ++s) {  // unrolled, so that the addresses of all stages are constants
      if (first + s >= steps) break;
      WaitForCopies<kStages - 2>();
      __syncthreads();
      // The first step here still copies by this half of the table; the others, behind a barrier, by the next.
      if (s == 0) find_places(first + kStages);
      if (first + s + kStages - 1 < steps) copy_step((s + kStages - 1) % kStages, s == 0 ? half : half ^ 1);
      CommitCopies();
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        Fragment<matrix_a, T, col_major> fa[kFragmentsM];
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
          LoadFragment(fa[i], a_warp + s * S::kA + k * S::kLdA + i * 16, S::kLdA);
        }
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
          Fragment<matrix_b, T, row_major> fb;
          LoadFragment(fb, b_warp + s * S::kB + k * S::kLdB + j * 16, S::kLdB);
#pragma unroll
          for (int i = 0; i < kFragmentsM; ++i) nvcuda::wmma::mma_sync(sum[i][j], fa[i], fb, sum[i][j]);
        }
      }
    }
  }
  WaitForCopies<0>();
  __syncthreads();

  // 16 rows at a time through shared memory; a lane stores 8 columns of a row.
  float* const strip = reinterpret_cast<float*>(shared) + warp * 16 * S::kLdStrip;
  constexpr int kGroups = kWarpN / kPack, kRowsAtOnce = 32 / kGroups;
  const int n = first_n + warp_n + lane % kGroups * kPack;
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j) {
      nvcuda::wmma::store_matrix_sync(strip + j * 16, sum[i][j], S::kLdStrip, nvcuda::wmma::mem_row_major);
    }
    __syncwarp();
    for (int row = lane / kGroups; row < 16; row += kRowsAtOnce) {
      const int m = first_m + warp_m + i * 16 + row;
      if (m >= rows || n >= g.n) continue;
      const float* v = strip + row * S::kLdStrip + lane % kGroups * kPack;
      const int64_t at = static_cast<int64_t>(m) * g.n + n;
      if (gridDim.y == 1) {
        Pack<T> out;
#pragma unroll
        for (int e = 0; e < kPack; ++e) out.v[e] = FromFloat<T>(v[e]);
        StorePack<kVector>(static_cast<T*>(g.dweights) + at, out, g.n - n);
        continue;
      }
      float* slab = g.slabs + static_cast<int64_t>(blockIdx.y) * rows * g.n + at;
      if constexpr (kVector) {
        reinterpret_cast<float4*>(slab)[0] = reinterpret_cast<const float4*>(v)[0];
        reinterpret_cast<float4*>(slab)[1] = reinterpret_cast<const float4*>(v)[1];
      } else {
        for (int e = 0; e < kPack && n + e < g.n; ++e) slab[e] = v[e];
      }
    }
  }
}

template <typename T, typename S, bool kVector>
__global__ __launch_bounds__(S::kThreads, kBlocksAtOnce<S>) void WgradKernel(const __grid_constant__ WgradArgs g) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  if constexpr (kHasTensorCores<T>) WgradBlock<T, typename S::Turing, kVector>(g);
#else
  WgradBlock<T, S, kVector>(g);
#endif
}

int64_t Channels(const WgradArgs& g) { return g.source[0].channels + (g.sources == 2 ? g.source[1].channels : 0); }
int64_t Rows(const WgradArgs& g) { return g.taps.count * Channels(g); }
WgradPlan Plan(const WgradArgs& g, int forced_tile, int forced_splits) {
  return PlanWgrad(Rows(g), g.n, static_cast<int64_t>(g.batch) * g.out_h * g.out_w, g.vector, forced_tile,
                   forced_splits);
}

template <typename T, typename S, bool kVector>
int LaunchTile(void* stream, const WgradArgs& g, int splits) {
  const int64_t rows = g.taps.count * static_cast<int64_t>(g.channels.d);
  const dim3 grid(static_cast<unsigned>(CeilDiv(rows, S::kTileM) * CeilDiv(g.n, S::kTileN)), splits);
  const size_t shared = ComputeCapability() < 80 ? S::Turing::kSharedBytes : S::kSharedBytes;
  return Launch(WgradKernel<T, S, kVector>, grid, S::kThreads, shared, stream, g);
}

}  // namespace

size_t WgradSlabBytes(const WgradArgs& g, int forced_tile, int forced_splits) {
  const WgradPlan plan = Plan(g, forced_tile, forced_splits);
  return plan.splits == 1 ? 0 : static_cast<size_t>(plan.splits) * Rows(g) * g.n * sizeof(float);
}

int Wgrad(void* stream, DType dtype, WgradArgs g, int forced_tile, int forced_splits) {
  const int64_t per_image = static_cast<int64_t>(g.out_h) * g.out_w, pixels = per_image * g.batch;
  g.pixels_per_image = Divisor(per_image);
  g.pixels_per_row = Divisor(g.out_w);
  g.channels = Divisor(Channels(g));
  // The last step of the last split may count a little beyond the pixels.
  if (pixels + kPixelStep >= int64_t{1} << 31) return cudaErrorNotSupported;
  for (int s = 0; s < g.sources; ++s) {
    if (g.source[s].image_stride >= int64_t{1} << 31) return cudaErrorNotSupported;
  }
  const WgradPlan plan = Plan(g, forced_tile, forced_splits);
  g.pixels_per_split = plan.pixels_per_split;
  const int status = Dispatch16(dtype, [&](auto type) -> int {
    using T = decltype(type);
    if (!g.vector) return LaunchTile<T, WgradShape<64, 64, 32, 32, 32, 3>, false>(stream, g, plan.splits);
    switch (plan.tile) {  // in the order of kWgradTiles
      case 0:
        return LaunchTile<T, WgradShape<128, 128, 64, 64, 64, 2>, true>(stream, g, plan.splits);
      case 1:
        return LaunchTile<T, WgradShape<128, 64, 64, 32, 32, 3>, true>(stream, g, plan.splits);
      default:
        return LaunchTile<T, WgradShape<64, 64, 32, 32, 32, 3>, true>(stream, g, plan.splits);
    }
  });
  if (status != 0 || plan.splits == 1) return status;
  return SumSlabs(stream, dtype, plan.splits, {g.slabs, Rows(g) * g.n, g.dweights});
}

}  // namespace unet_fast::gpu::wmma
