// The one element-wise pass of a gradient. The matrix products cannot mask as they load - asynchronous copies never see
// registers, and dz is read nine times by each - so dz is stored once, and its sum over the pixels, the bias gradient,
// is taken on the way. Where dy is dz already, only the sum is left. A thread takes 8 channels of quads of 2x2 pixels,
// which are the pooling windows.
#include "conv/mask.h"

#include <algorithm>

#include "common/cuda.cuh"
#include "conv/reduce.h"

namespace unet_fast::gpu {
namespace {

constexpr int kThreads = 256;

// Of a gradient that is neither masked nor unpooled, the sum alone. Lanes and slabs as of MaskKernel. Registers for all
// loads in flight are worth more than further blocks on a multiprocessor, which the compiler would go for.
template <typename T, bool kVector>
__global__ __launch_bounds__(kThreads, 4) void SumKernel(const uint16_t* dy, int64_t pixels, int64_t channels,
                                                         float* slabs) {
  constexpr int kWidth = kVector ? kPack : 1, kInFlight = 8;  // channels of a thread, loads that it waits for
  const int64_t c = (blockIdx.y * blockDim.x + threadIdx.x) * kWidth, step = gridDim.x * blockDim.y;
  float sum[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) sum[e] = 0.0f;
  const auto add = [&sum](const uint4& words) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sum[e] += ToFloat(reinterpret_cast<const T*>(&words)[e]);
  };
  int64_t pixel = c < channels ? blockIdx.x * blockDim.y + threadIdx.y : pixels;
  const uint16_t* from = dy + pixel * channels + c;
  const int64_t stride = step * channels;
  for (; pixel + (kInFlight - 1) * step < pixels; pixel += kInFlight * step, from += kInFlight * stride) {
    uint4 words[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) words[i] = LoadWords<kVector>(from + i * stride, kWidth);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) add(words[i]);
  }
  for (; pixel < pixels; pixel += step, from += stride) add(LoadWords<kVector>(from, kWidth));
  __shared__ float sums[kThreads * kWidth];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, width = blockDim.x * kWidth;  // of the block
#pragma unroll
  for (int e = 0; e < kWidth; ++e) sums[thread * kWidth + e] = sum[e];
  __syncthreads();
  const int64_t channel = blockIdx.y * width + thread;
  if (thread >= width || channel >= channels) return;
  float total = 0.0f;
  for (int y = 0; y < blockDim.y; ++y) total += sums[y * width + thread];
  slabs[blockIdx.x * channels + channel] = total;
}

struct KernelArgs {
  MaskArgs m;
  Divisor quads_per_image, quads_per_row;
  uint32_t quads;
};

template <typename T, bool kVector>
__global__ __launch_bounds__(kThreads) void MaskKernel(const __grid_constant__ KernelArgs k) {
  const MaskArgs& m = k.m;
  constexpr int kWidth = kVector ? kPack : 1;  // channels of a thread
  const int c = (blockIdx.y * blockDim.x + threadIdx.x) * kWidth;
  float sum[kWidth];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) sum[e] = 0.0f;
  for (uint32_t quad = blockIdx.x * blockDim.y + threadIdx.y; quad < k.quads && c < m.channels;
       quad += gridDim.x * blockDim.y) {
    uint32_t in_image, qj;
    const int64_t image = k.quads_per_image.Divide(quad, &in_image);
    const int64_t qi = k.quads_per_row.Divide(in_image, &qj);
    const bool pools = m.dpooled != nullptr && 2 * qi + 1 < m.h && 2 * qj + 1 < m.w;
    Pack<T> dy[4], y[4], dpooled;
    int64_t at[4];
    bool exists[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int64_t i = 2 * qi + p / 2, j = 2 * qj + p % 2;
      exists[p] = i < m.h && j < m.w;
      at[p] = ((image * m.h + i) * m.w + j) * m.channels + c;
      const int count = exists[p] ? kWidth : 0;
      dy[p] = LoadPack<kVector>(static_cast<const T*>(m.dy) + at[p], count);
      if (m.relu || pools) y[p] = LoadPack<kVector>(static_cast<const T*>(m.y) + at[p], count);
    }
    if (pools) {
      dpooled = LoadPack<kVector>(
          static_cast<const T*>(m.dpooled) + ((image * (m.h / 2) + qi) * (m.w / 2) + qj) * m.channels + c, kWidth);
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      int winner = 4;  // the first of equal maxima
      if (pools) {
        float top = ToFloat(y[0].v[e]);
        winner = 0;
#pragma unroll
        for (int p = 1; p < 4; ++p) {
          const float v = ToFloat(y[p].v[e]);
          if (v > top) top = v, winner = p;
        }
      }
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        float v = ToFloat(dy[p].v[e]);
        if (p == winner) v += ToFloat(dpooled.v[e]);
        if (m.relu && !(ToFloat(y[p].v[e]) > 0.0f)) v = 0.0f;
        sum[e] += v;
        dy[p].v[e] = FromFloat<T>(v);
      }
    }
    if (m.dz == nullptr) continue;
#pragma unroll
    for (int p = 0; p < 4; ++p) StorePack<kVector>(static_cast<T*>(m.dz) + at[p], dy[p], exists[p] ? kWidth : 0);
  }
  __shared__ float sums[kThreads][kWidth + 1];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) sums[threadIdx.y * blockDim.x + threadIdx.x][e] = sum[e];
  __syncthreads();
  if (threadIdx.y > 0 || c >= m.channels) return;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    for (int t = 1; t < blockDim.y; ++t) sum[e] += sums[t * blockDim.x + threadIdx.x][e];
    m.slabs[static_cast<int64_t>(blockIdx.x) * m.channels + c + e] = sum[e];
  }
}

__global__ void ZeroKernel(uint16_t* data, int64_t h, int64_t w, int64_t channels, int64_t top, int64_t left,
                           int64_t rows, int64_t cols) {
  const int64_t row = blockIdx.x % h - top, step = static_cast<int64_t>(blockDim.x);
  data += static_cast<int64_t>(blockIdx.x) * w * channels;
  const bool crossed = row >= 0 && row < rows;  // by the window
  const int64_t skip_from = crossed ? left * channels : w * channels;
  const int64_t skip = crossed ? cols * channels : 0;
  for (int64_t i = threadIdx.x; i < w * channels - skip; i += step) data[i < skip_from ? i : i + skip] = 0;
}

}  // namespace

// Blocks that share the pixels; each leaves a partial sum.
static int SumBlocks(int64_t pixels) {
  constexpr int64_t kPixelsPerBlock = 256, kMaxBlocks = 1056;
  return static_cast<int>(std::clamp<int64_t>(pixels / kPixelsPerBlock, 1, kMaxBlocks));
}

size_t MaskSlabBytes(int64_t pixels, int64_t channels) {
  return static_cast<size_t>(SumBlocks(pixels)) * channels * sizeof(float);
}

int MaskGradient(void* stream, DType dtype, const MaskArgs& m) {
  const int64_t rows = CeilDiv(m.h, 2), cols = CeilDiv(m.w, 2), quads = m.batch * rows * cols;
  if (quads >= int64_t{1} << 31) return cudaErrorNotSupported;
  const KernelArgs k{m, Divisor(rows * cols), Divisor(cols), static_cast<uint32_t>(quads)};
  const bool vector = m.channels % kPack == 0;
  const int64_t groups = vector ? m.channels / kPack : m.channels;
  unsigned lanes = 1;
  while (lanes < 32 && lanes < groups) lanes *= 2;
  const int blocks = SumBlocks(m.batch * m.h * m.w);
  const dim3 grid(blocks, static_cast<unsigned>(CeilDiv(groups, lanes))), block(lanes, kThreads / lanes);
  UNET_FAST_CUDA_RETURN_IF_ERROR(Dispatch16(dtype, [&](auto type) -> int {
    using T = decltype(type);
    if (m.dz == nullptr && !m.relu && m.dpooled == nullptr) {
      return Launch(vector ? SumKernel<T, true> : SumKernel<T, false>, grid, block, 0, stream,
                    static_cast<const uint16_t*>(m.dy), m.batch * m.h * m.w, m.channels, m.slabs);
    }
    return Launch(vector ? MaskKernel<T, true> : MaskKernel<T, false>, grid, block, 0, stream, k);
  }));
  return SumSlabs(stream, dtype, m.slabs, blocks, m.channels, m.dbias);
}

int ZeroOutside(void* stream, void* data, int64_t batch, int64_t h, int64_t w, int64_t channels, int64_t top,
                int64_t left, int64_t rows, int64_t cols) {
  return Launch(ZeroKernel, static_cast<unsigned>(batch * h), 128, 0, stream, static_cast<uint16_t*>(data), h, w,
                channels, top, left, rows, cols);
}

int ZeroWeightGradient(void* stream, void* dkernel, int64_t kernel_elements, void* dbias, int64_t filters) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  UNET_FAST_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(dkernel, 0, kernel_elements * sizeof(uint16_t), on));
  return cudaMemsetAsync(dbias, 0, filters * sizeof(uint16_t), on);
}

}  // namespace unet_fast::gpu
