// Passes at the speed of memory, 16 bytes a thread. But for the last they move 16 bits without looking at them.
//
// Filters are turned from [tap, c, n] to [n, tap, c], and their gradients back, by tiles of 64 x 64 in shared memory,
// which are read and written in 16 bytes. A tile's rows are one word longer than they need be: so what a warp writes
// lies in banks of its own, and of what it reads no more than two words share one.
#include "conv/cudnn/layout.h"

#include "common/cuda.cuh"

namespace unet_fast::gpu::cudnn {
namespace {

constexpr int kThreads = 256, kTile = 64;

unsigned Blocks(int64_t threads) { return static_cast<unsigned>(CeilDiv(threads, kThreads)); }

struct ConcatenateArgs {
  const uint16_t* source[2];
  int64_t image_stride[2];
  int row_stride[2], channels[2];
  uint16_t* to;
  uint32_t packs;              // of 8 channels
  Divisor pixels, cols, rows;  // packs of a pixel, pixels of a row, rows of an image
};

__global__ __launch_bounds__(kThreads) void ConcatenateKernel(const __grid_constant__ ConcatenateArgs k) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= k.packs) return;
  uint32_t pack, row, col;
  const uint32_t image = k.rows.Divide(k.cols.Divide(k.pixels.Divide(i, &pack), &col), &row);
  const int s = pack * kPack < k.channels[0] ? 0 : 1, c = pack * kPack - (s == 0 ? 0 : k.channels[0]);
  const int64_t at = image * k.image_stride[s] + static_cast<int64_t>(row) * k.row_stride[s];
  *reinterpret_cast<uint4*>(k.to + static_cast<int64_t>(i) * kPack) =
      LoadWords<true>(k.source[s] + at + static_cast<int64_t>(col) * k.channels[s] + c, kPack);
}

__global__ __launch_bounds__(kThreads) void CopyKernel(const __grid_constant__ Matrices m, const uint16_t* from,
                                                       uint16_t* to, Divisor packs) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  uint32_t pack;
  const int64_t row = packs.Divide(i, &pack);
  if (row >= m.rows) return;
  *reinterpret_cast<uint4*>(to + m.to.offset[blockIdx.y] + row * m.to.ld + pack * kPack) =
      LoadWords<true>(from + m.from.offset[blockIdx.y] + row * m.from.ld + pack * kPack, kPack);
}

__global__ __launch_bounds__(kThreads) void TransposeKernel(const __grid_constant__ Matrices m, const uint16_t* from,
                                                            uint16_t* to) {
  constexpr int kPacks = kTile / kPack;
  __shared__ uint32_t tile[kTile][kTile / 2 + 1];
  const int first_row = blockIdx.x * kTile, first_col = blockIdx.y * kTile;
  from += m.from.offset[blockIdx.z], to += m.to.offset[blockIdx.z];
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kPacks; i += kThreads) {
    const int row = i / kPacks, col = i % kPacks * kPack;
    const bool exists = first_row + row < m.rows && first_col + col < m.cols;
    const uint4 words = LoadWords<true>(from + (first_row + row) * m.from.ld + first_col + col, exists ? kPack : 0);
#pragma unroll
    for (int w = 0; w < 4; ++w) tile[row][col / 2 + w] = Word(words, w);
  }
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kPacks; i += kThreads) {
    const int col = i / kPacks, row = i % kPacks * kPack;
    if (first_row + row >= m.rows || first_col + col >= m.cols) continue;
    const uint32_t halves = col % 2 == 0 ? 0x5410 : 0x7632;  // the lower or the upper ones of two words
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      words[w] = __byte_perm(tile[row + 2 * w][col / 2], tile[row + 2 * w + 1][col / 2], halves);
    }
    *reinterpret_cast<uint4*>(to + (first_col + col) * m.to.ld + first_row + row) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
}

struct FinishKernelArgs {
  FinishArgs args;
  int channels;
  uint32_t packs;
  Divisor pixels, cols, rows;  // as in ConcatenateArgs
};

template <typename T>
__global__ __launch_bounds__(kThreads) void FinishKernel(const __grid_constant__ FinishKernelArgs k) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= k.packs) return;
  uint32_t pack, row, col;
  const uint32_t image = k.rows.Divide(k.cols.Divide(k.pixels.Divide(i, &pack), &col), &row);
  T* const data = static_cast<T*>(k.args.data) + static_cast<int64_t>(i) * kPack;
  Pack<T> v = LoadPack<true>(data, kPack);
  if (k.args.epilogue & kBias) {
    const Pack<T> bias = LoadPack<true>(static_cast<const T*>(k.args.bias) + pack * kPack, kPack);
    float sum[kPack];
#pragma unroll
    for (int e = 0; e < kPack; ++e) sum[e] = ToFloat(v.v[e]) + ToFloat(bias.v[e]);
    v = Rounded<T>(sum);
  }
  if (k.args.epilogue & kRelu) v = Relu(v);
  if (k.args.epilogue & kMask) {
    const int64_t at = image * k.args.mask_image_stride + row * k.args.mask_row_stride;
    v = Masked(
        v, LoadPack<true>(
               static_cast<const T*>(k.args.mask) + at + static_cast<int64_t>(col) * k.channels + pack * kPack, kPack));
  }
  StorePack<true>(data, v, kPack);
}

}  // namespace

int Concatenate(void* stream, const GemmSource (&source)[2], int batch, int h, int w, void* to) {
  ConcatenateArgs k = {};
  for (int s = 0; s < 2; ++s) {
    k.source[s] = static_cast<const uint16_t*>(source[s].data), k.image_stride[s] = source[s].image_stride;
    k.row_stride[s] = source[s].row_stride, k.channels[s] = source[s].channels;
  }
  const int packs = (source[0].channels + source[1].channels) / kPack;
  k.to = static_cast<uint16_t*>(to), k.packs = static_cast<uint32_t>(static_cast<int64_t>(batch) * h * w * packs);
  k.pixels = Divisor(packs), k.cols = Divisor(w), k.rows = Divisor(h);
  return Launch(ConcatenateKernel, Blocks(k.packs), kThreads, 0, stream, k);
}

int Copy(void* stream, const Matrices& m, const void* from, void* to) {
  const int packs = m.cols / kPack;
  const dim3 grid(Blocks(static_cast<int64_t>(m.rows) * packs), m.count);
  return Launch(CopyKernel, grid, kThreads, 0, stream, m, static_cast<const uint16_t*>(from),
                static_cast<uint16_t*>(to), Divisor(packs));
}

int Transpose(void* stream, const Matrices& m, const void* from, void* to) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(m.rows, kTile)), static_cast<unsigned>(CeilDiv(m.cols, kTile)),
                  m.count);
  return Launch(TransposeKernel, grid, kThreads, 0, stream, m, static_cast<const uint16_t*>(from),
                static_cast<uint16_t*>(to));
}

int Finish(void* stream, DType dtype, int batch, const Image& image, const FinishArgs& args) {
  const int packs = image.channels / kPack;
  FinishKernelArgs k = {};
  k.args = args, k.channels = image.channels;
  k.packs = static_cast<uint32_t>(static_cast<int64_t>(batch) * image.h * image.w * packs);
  k.pixels = Divisor(packs), k.cols = Divisor(image.w), k.rows = Divisor(image.h);
  return Dispatch16(dtype, [&](auto type) -> int {
    return Launch(FinishKernel<decltype(type)>, Blocks(k.packs), kThreads, 0, stream, k);
  });
}

}  // namespace unet_fast::gpu::cudnn
