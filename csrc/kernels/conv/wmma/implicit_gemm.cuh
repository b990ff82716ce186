// The implicit GEMM kernel; gemm.h says what it computes. Patches are never laid out in memory: a step of the sum is
// (32 or 64 channels, one tap), and the copy into shared memory gathers, for each pixel of the tile, those channels of
// its neighbour there. Taps are the inner loop, so that most copies of a pixel after the first come from the
// first-level cache; fewer stages, which leave more of it, are faster than many. Rows are padded by 16 bytes, which
// keeps ldmatrix free of bank conflicts. With 64x64 results a warp has few instructions left to issue beside its matrix
// products, so whatever a step needs - offsets of taps, masks of the border, addresses of stages - is worked out
// beforehand or a constant. The epilogue passes each warp's accumulators through shared memory, a strip at a time,
// because WMMA does not say which lane holds what; a lane then owns a 2x2 quad of pixels times eight channels, to which
// it adds the bias and which it masks, pools, and stores in 16 bytes.
#pragma once

#include "conv/gemm.h"
#include "conv/wmma/config.h"
#include "conv/wmma/fragment.cuh"

namespace unet_fast::gpu::wmma {

template <int kTileM_, int kTileN_, int kWarpM_, int kWarpN_, int kDepth_, int kStages_, bool kTransposed_>
struct GemmShape {
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kDepth = kDepth_, kStages = kStages_;  // channels a step, steps in shared memory
  static constexpr bool kTransposed = kTransposed_;
  static constexpr int kWarpsM = kTileM / kWarpM, kThreads = kWarpsM * (kTileN / kWarpN) * 32;
  static constexpr int kLdDepth = kDepth + 8, kLdA = kLdDepth, kLdB = kTransposed ? kLdDepth : kTileN + 8;
  static constexpr int kA = kTileM * kLdA;  // elements of shared memory a stage
  static constexpr int kB = (kTransposed ? kTileN : kDepth) * kLdB;
  static constexpr int kStrip = 16 * 64 / kWarpN;  // rows of an epilogue strip: 32 lanes of a quad and 8 columns
  static constexpr int kLdStrip = kWarpN + 4;
  static constexpr size_t kPipeline = static_cast<size_t>(kStages) * (kA + kB) * 2;
  static constexpr size_t kStrips = static_cast<size_t>(kThreads / 32) * kStrip * kLdStrip * 4;
  static constexpr size_t kSharedBytes = kPipeline > kStrips ? kPipeline : kStrips;
  // The same tile before sm_80, where there is no asynchronous copy and less shared memory.
  using Turing = GemmShape<kTileM, kTileN, kWarpM, kWarpN, 32, 2, kTransposed>;
};

struct QuadOrigin {
  uint32_t image, row, col;
};
__device__ inline QuadOrigin LocateQuad(const GemmArgs& g, uint32_t quad) {
  QuadOrigin q;
  uint32_t in_image;
  q.image = g.quads_per_image.Divide(quad, &in_image);
  q.row = 2 * g.quads_per_row.Divide(in_image, &q.col);
  q.col *= 2;
  return q;
}

template <typename T, typename Shape, bool kVector>
__device__ void ImplicitGemmBlock(const GemmArgs& g) {
  constexpr int kTileM = Shape::kTileM, kTileN = Shape::kTileN, kWarpM = Shape::kWarpM, kWarpN = Shape::kWarpN;
  constexpr int kDepth = Shape::kDepth, kStages = Shape::kStages, kThreads = Shape::kThreads;
  constexpr bool kTransposed = Shape::kTransposed;
  extern __shared__ __align__(128) unsigned char shared[];
  T* const a_stages = reinterpret_cast<T*>(shared);
  T* const b_stages = a_stages + kStages * Shape::kA;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int tiles_n = (g.n + kTileN - 1) / kTileN;
  const uint32_t first_m = blockIdx.x / tiles_n * kTileM;
  const int first_n = blockIdx.x % tiles_n * kTileN;
  const TapList& taps = g.taps[blockIdx.y];

  // This thread copies chunk `a_chunk` (8 channels) of rows a_row, a_row + kStepA, ... of the tile's pixels. With four
  // chunks a row, eight neighbouring threads store to rows r and r + 4, whose 128 bytes lie in different banks.
  constexpr int kChunks = kDepth / kPack, kStepA = kThreads / kChunks, kRowsA = kTileM / kStepA;
  const int a_chunk = thread % kChunks, slot = thread / kChunks;
  const int a_row = kChunks == 4 ? (slot & ~7) | (slot & 1) << 2 | (slot >> 1 & 3) : slot;
  const uint32_t first_image = LocateQuad(g, first_m / 4).image;
  uint32_t offset[kRowsA];            // of the pixel's first channel, from the tile's first image
  uint32_t inside[(kRowsA + 2) / 3];  // nine bits a row: tap t is inside the source
#pragma unroll
  for (int r = 0; r < kRowsA; ++r) {
    const uint32_t m = first_m + a_row + r * kStepA;
    const QuadOrigin quad = LocateQuad(g, m / 4);
    const int row = quad.row + m % 4 / 2, col = quad.col + m % 2, i = row * g.stride, j = col * g.stride;
    uint32_t bits = 0;
    if (quad.image < g.batch && row < g.out_h && col < g.out_w) {
      bits = 511;
      if (i + taps.first_row < 0 || i + taps.last_row >= g.source_h || j + taps.first_col < 0 ||
          j + taps.last_col >= g.source_w) {
        bits = 0;
#pragma unroll 1
        for (int t = 0; t < taps.count; ++t) {
          const int ii = i + taps.tap[t].row, jj = j + taps.tap[t].col;
          bits |= static_cast<uint32_t>(ii >= 0 && ii < g.source_h && jj >= 0 && jj < g.source_w) << t;
        }
      }
    }
    inside[r / 3] = r % 3 == 0 ? bits : inside[r / 3] | bits << 9 * (r % 3);
  }

  // Of the weights: chunk and row of this thread, and how many rows are left from there on. Plain: rows are channels;
  // transposed: columns of the result.
  constexpr int kChunksB = kTransposed ? kChunks : kTileN / kPack, kStepB = kThreads / kChunksB;
  constexpr int kRowsB = (kTransposed ? kTileN : kDepth) / kStepB;
  const int b_chunk = kTransposed ? a_chunk : thread % kChunksB, b_row = kTransposed ? a_row : thread / kChunksB;
  const int64_t b_step = static_cast<int64_t>(kStepB) * g.ld;
  const uint32_t a_target = SharedAddress(a_stages + a_row * Shape::kLdDepth + a_chunk * kPack);
  const uint32_t b_target = SharedAddress(b_stages + b_row * Shape::kLdB + b_chunk * kPack);

  // State of the next copy: source, tap, and what follows from them.
  int source = -1, tap = 0, channels_left = 0;
  const T *a = nullptr, *b = nullptr;  // at this step's channels
  const auto enter_source = [&](int s) {
    source = s;
    const GemmSource& in = g.source[s];
    channels_left = in.channels;
    a = static_cast<const T*>(in.data) + first_image * in.image_stride + a_chunk * kPack;
    const int64_t column = first_n + (kTransposed ? b_row : b_chunk * kPack);
    const int64_t channel = (s == 0 ? 0 : g.source[0].channels) + (kTransposed ? b_chunk * kPack : b_row);
    b = static_cast<const T*>(g.weights) + (kTransposed ? column * g.ld + channel : channel * g.ld + column);
#pragma unroll
    for (int r = 0; r < kRowsA; ++r) {
      const uint32_t m = first_m + a_row + r * kStepA;
      const QuadOrigin quad = LocateQuad(g, m / 4);
      offset[r] = static_cast<uint32_t>((quad.image - first_image) * in.image_stride) +
                  (quad.row + m % 4 / 2) * g.stride * in.row_stride + (quad.col + m % 2) * g.stride * in.channels;
    }
  };
  enter_source(0);
  int a_offset = taps.source_offset[0][0], b_offset = taps.weight_offset[0];

  const auto copy_step = [&](int stage) {
    const T* from = a + a_offset;
    const int a_count = channels_left - a_chunk * kPack;
    const uint32_t bit = a_count > 0 ? 1u << tap : 0;
#pragma unroll
    for (int r = 0; r < kRowsA; ++r) {
      const uint32_t target = a_target + (stage * Shape::kA + r * kStepA * Shape::kLdDepth) * 2;
      if constexpr (kVector) {
        CopyAsync<Cache::kAll>(target, Advance(from, offset[r]), inside[r / 3] & bit << 9 * (r % 3));
      } else {
        StoreShared(target, LoadPack<false>(from + offset[r], inside[r / 3] & bit << 9 * (r % 3) ? a_count : 0));
      }
    }
    const T* weights = b + b_offset;
    const int columns_left = g.n - first_n - (kTransposed ? b_row : b_chunk * kPack);
    const int b_left = kTransposed ? (a_count > 0 ? columns_left : 0) : (columns_left > 0 ? channels_left - b_row : 0);
#pragma unroll
    for (int r = 0; r < kRowsB; ++r) {
      const uint32_t target = b_target + (stage * Shape::kB + r * kStepB * Shape::kLdB) * 2;
      const bool valid = r * kStepB < b_left;
      if constexpr (kVector) {
        CopyAsync<Cache::kL2>(target, weights + r * b_step, valid);
      } else {
        StoreShared(target, LoadPack<false>(weights + r * b_step, !valid ? 0 : kTransposed ? a_count : columns_left));
      }
    }
    if (++tap == taps.count) {
      tap = 0;
      channels_left -= kDepth;
      a += kDepth;
      b += kTransposed ? kDepth : static_cast<int64_t>(kDepth) * g.ld;
      if (channels_left <= 0 && source + 1 < g.sources) enter_source(source + 1);
    }
    a_offset = taps.source_offset[source][tap];
    b_offset = taps.weight_offset[tap];
  };

  int steps = 0;
  for (int s = 0; s < g.sources; ++s) steps += (g.source[s].channels + kDepth - 1) / kDepth * taps.count;

  constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 16;
  Accumulator sum[kFragmentsM][kFragmentsN];
#pragma unroll
  for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
    for (int j = 0; j < kFragmentsN; ++j) nvcuda::wmma::fill_fragment(sum[i][j], 0.0f);
  }
  const int warp_m = warp % Shape::kWarpsM * kWarpM, warp_n = warp / Shape::kWarpsM * kWarpN;
  const T* const a_warp = a_stages + warp_m * Shape::kLdDepth;
  const T* const b_warp = b_stages + (kTransposed ? warp_n * Shape::kLdDepth : warp_n);

#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) copy_step(s);
    CommitCopies();
  }
#pragma unroll 1
  for (int first = 0; first < steps; first += kStages) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {  // unrolled, so that the addresses of all stages are constants
      if (first + s >= steps) break;
      WaitForCopies<kStages - 2>();
      __syncthreads();
      if (first + s + kStages - 1 < steps) copy_step((s + kStages - 1) % kStages);
      CommitCopies();
#pragma unroll
      for (int k = 0; k < kDepth; k += 16) {
        Fragment<matrix_a, T, row_major> fa[kFragmentsM];
#pragma unroll
        for (int i = 0; i < kFragmentsM; ++i) {
          LoadFragment(fa[i], a_warp + s * Shape::kA + i * 16 * Shape::kLdDepth + k, Shape::kLdDepth);
        }
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
          Fragment<matrix_b, T, std::conditional_t<kTransposed, col_major, row_major>> fb;
          LoadFragment(fb,
                       b_warp + s * Shape::kB + (kTransposed ? j * 16 * Shape::kLdDepth + k : k * Shape::kLdB + j * 16),
                       Shape::kLdB);
#pragma unroll
          for (int i = 0; i < kFragmentsM; ++i) nvcuda::wmma::mma_sync(sum[i][j], fa[i], fb, sum[i][j]);
        }
      }
    }
  }
  WaitForCopies<0>();
  __syncthreads();

  float* const strip = reinterpret_cast<float*>(shared) + warp * Shape::kStrip * Shape::kLdStrip;
  constexpr int kGroups = kWarpN / kPack;
  const int group = lane % kGroups, lane_quad = lane / kGroups;
  const int n = first_n + warp_n + group * kPack;
  const int count = g.n - n;  // columns of this lane that exist, if less than 8
  float bias[kPack];
#pragma unroll
  for (int e = 0; e < kPack; ++e) bias[e] = 0.0f;
  if (g.bias != nullptr) {
    const Pack<T> packed = LoadPack<kVector>(static_cast<const T*>(g.bias) + n, count);
#pragma unroll
    for (int e = 0; e < kPack; ++e) bias[e] = ToFloat(packed.v[e]);
  }
  // Columns below `split` belong to the first result, and a vector of them never to both.
  const int split = g.results == 2 ? g.result[0].channels - n : kPack;
#pragma unroll
  for (int i = 0; i < kWarpM; i += Shape::kStrip) {
    __syncwarp();
#pragma unroll
    for (int ii = 0; ii < Shape::kStrip; ii += 16) {
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j) {
        nvcuda::wmma::store_matrix_sync(strip + ii * Shape::kLdStrip + j * 16, sum[(i + ii) / 16][j], Shape::kLdStrip,
                                        nvcuda::wmma::mem_row_major);
      }
    }
    __syncwarp();
    const QuadOrigin quad = LocateQuad(g, (first_m + warp_m + i) / 4 + lane_quad);
    if (quad.image >= g.batch || count <= 0) continue;
    const int rows = g.out_h - quad.row, cols = g.out_w - quad.col;  // of the quad that exist, if less than 2
    Pack<T> out[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const float* from = strip + (lane_quad * 4 + p) * Shape::kLdStrip + group * kPack;
      float v[kPack];
      *reinterpret_cast<float4*>(v) = reinterpret_cast<const float4*>(from)[0];
      *reinterpret_cast<float4*>(v + 4) = reinterpret_cast<const float4*>(from)[1];
#pragma unroll
      for (int e = 0; e < kPack; ++e) v[e] += bias[e];
      out[p] = Rounded<T>(v);
      if (g.relu) out[p] = Relu(out[p]);
    }
    // Elements [first, last) of the columns; the mask's strides are its own.
    const auto store = [&](const GemmResult& to, int64_t mask_image_stride, int64_t mask_row_stride, int column,
                           int first, int last) {
      const int64_t in_row = static_cast<int64_t>(quad.col) * to.pixel_stride + taps.result_offset + column;
      const int64_t at = quad.image * to.image_stride + quad.row * to.row_stride + in_row;
      const int64_t mask_at = quad.image * mask_image_stride + quad.row * mask_row_stride + in_row;
      Pack<T> mask[4];  // all four on their way before the first is used
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        const bool exists = p / 2 < rows && p % 2 < cols;
        if (to.mask == nullptr || !exists) continue;
        const T* from =
            static_cast<const T*>(to.mask) + mask_at + (p / 2 ? mask_row_stride : 0) + (p % 2 ? to.pixel_stride : 0);
        if constexpr (kVector) {
          mask[p] = *reinterpret_cast<const Pack<T>*>(from);
        } else {
#pragma unroll
          for (int e = 0; e < kPack; ++e) mask[p].v[e] = e >= first && e < last ? from[e] : FromFloat<T>(0.0f);
        }
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        if (p / 2 >= rows || p % 2 >= cols) continue;
        const Pack<T> masked = to.mask != nullptr ? Masked(out[p], mask[p]) : out[p];
        T* target = static_cast<T*>(to.data) + at + (p / 2 ? to.row_stride : 0) + (p % 2 ? to.pixel_stride : 0);
        if constexpr (kVector) {
          *reinterpret_cast<Pack<T>*>(target) = masked;
        } else {
#pragma unroll
          for (int e = 0; e < kPack; ++e) {
            if (e >= first && e < last) target[e] = masked.v[e];
          }
        }
      }
    };
    const int last = count < kPack ? count : kPack;
    if (split > 0) {
      store(g.result[0], g.result[0].image_stride, g.result[0].row_stride, n, 0, split < last ? split : last);
    }
    if (split < last) {
      store(g.result[1], g.mask_image_stride, g.mask_row_stride, n - g.result[0].channels, split > 0 ? split : 0, last);
    }
    if (g.pooled != nullptr && rows > 1 && cols > 1) {
      const int64_t pixel =
          (static_cast<int64_t>(quad.image) * (g.out_h / 2) + quad.row / 2) * (g.out_w / 2) + quad.col / 2;
      StorePack<kVector>(static_cast<T*>(g.pooled) + pixel * g.n + n, Max(Max(out[0], out[1]), Max(out[2], out[3])),
                         count);
    }
  }
}

template <typename T, typename Shape, bool kVector>
__global__ __launch_bounds__(Shape::kThreads,
                             kBlocksAtOnce<Shape>) void ImplicitGemmKernel(const __grid_constant__ GemmArgs g) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  if constexpr (kHasTensorCores<T>) ImplicitGemmBlock<T, typename Shape::Turing, kVector>(g);
#else
  ImplicitGemmBlock<T, Shape, kVector>(g);
#endif
}

template <typename T, typename Shape, bool kVector>
int LaunchGemm(void* stream, const GemmArgs& g) {
  const int64_t m = 4 * static_cast<int64_t>(g.quads_per_image.d) * g.batch;
  const dim3 grid(static_cast<unsigned>(CeilDiv(m, Shape::kTileM) * CeilDiv(g.n, Shape::kTileN)), g.lists);
  const size_t shared = ComputeCapability() < 80 ? Shape::Turing::kSharedBytes : Shape::kSharedBytes;
  return Launch(ImplicitGemmKernel<T, Shape, kVector>, grid, Shape::kThreads, shared, stream, g);
}

// One translation unit a layout of the weights, which halves the time to compile them. In the order of kGemmTiles.
template <bool kTransposed>
int LaunchGemmTile(void* stream, DType dtype, const GemmArgs& g, int tile) {
  return Dispatch16(dtype, [&](auto type) -> int {
    using T = decltype(type);
    if (!g.vector) return LaunchGemm<T, GemmShape<64, 64, 32, 32, 32, 3, kTransposed>, false>(stream, g);
    switch (tile) {
      case 0:
        return LaunchGemm<T, GemmShape<128, 128, 64, 64, 64, 2, kTransposed>, true>(stream, g);
      case 1:
        return LaunchGemm<T, GemmShape<128, 64, 64, 32, 32, 3, kTransposed>, true>(stream, g);
      default:
        return LaunchGemm<T, GemmShape<64, 64, 32, 32, 32, 3, kTransposed>, true>(stream, g);
    }
  });
}
int LaunchGemmPlain(void* stream, DType dtype, const GemmArgs& g, int tile);
int LaunchGemmTransposed(void* stream, DType dtype, const GemmArgs& g, int tile);

}  // namespace unet_fast::gpu::wmma
