// Max pooling, as fast as memory: a thread takes a 2x2 window by 8 channels, 16 bytes an access, or by one channel
// where their number is no multiple of 8. The gradient also visits the windows cut off by an odd last row or column,
// whose pixels get zeros.
#include "common/cuda.cuh"
#include "pool/gpu.h"

namespace unet_fast::gpu {
namespace {

constexpr int kThreads = 256;

struct KernelArgs {
  const void *x, *dy;
  void *y, *dx;
  int64_t h, w, c;
  Divisor groups, cols, rows;  // threads are [image, row of windows, column of windows, group of channels]
  int64_t threads;
};

struct Window {
  int64_t image;
  uint32_t row, col, channel;
  // The channel group goes first, on 64 bits, so that only windows need fit into 31 bits.
  __device__ Window(const KernelArgs& k, int64_t thread, int width) {
    const uint32_t window = static_cast<uint32_t>(thread / k.groups.d);
    channel = static_cast<uint32_t>(thread - static_cast<int64_t>(window) * k.groups.d) * width;
    image = k.rows.Divide(k.cols.Divide(window, &col), &row);
  }
};

template <typename T, bool kVector>
__global__ __launch_bounds__(kThreads) void ForwardKernel(const __grid_constant__ KernelArgs k) {
  constexpr int kWidth = kVector ? kPack : 1;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= k.threads) return;
  const Window q(k, thread, kWidth);
  Pack<T> top;
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int64_t pixel = (q.image * k.h + 2 * q.row + p / 2) * k.w + 2 * q.col + p % 2;
    const Pack<T> v = LoadPack<kVector>(static_cast<const T*>(k.x) + pixel * k.c + q.channel, kWidth);
    top = p == 0 ? v : Max(top, v);
  }
  const int64_t pixel = (q.image * k.rows.d + q.row) * k.cols.d + q.col;
  StorePack<kVector>(static_cast<T*>(k.y) + pixel * k.c + q.channel, top, kWidth);
}

template <typename T, bool kVector>
__global__ __launch_bounds__(kThreads) void GradKernel(const __grid_constant__ KernelArgs k) {
  constexpr int kWidth = kVector ? kPack : 1;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= k.threads) return;
  const Window q(k, thread, kWidth);
  const bool whole = 2 * q.row + 1 < k.h && 2 * q.col + 1 < k.w;
  Pack<T> x[4], dy;
  int64_t at[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    at[p] = ((q.image * k.h + 2 * q.row + p / 2) * k.w + 2 * q.col + p % 2) * k.c + q.channel;
    x[p] = LoadPack<kVector>(static_cast<const T*>(k.x) + at[p], whole ? kWidth : 0);
  }
  const int64_t pixel = (q.image * (k.h / 2) + q.row) * (k.w / 2) + q.col;
  dy = LoadPack<kVector>(static_cast<const T*>(k.dy) + pixel * k.c + q.channel, whole ? kWidth : 0);
  Pack<T> dx[4];
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    int winner = 0;
    float top = ToFloat(x[0].v[e]);
#pragma unroll
    for (int p = 1; p < 4; ++p) {
      const float v = ToFloat(x[p].v[e]);
      if (v > top) top = v, winner = p;
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) dx[p].v[e] = p == winner ? dy.v[e] : FromFloat<T>(0.0f);
  }
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const bool exists = 2 * q.row + p / 2 < k.h && 2 * q.col + p % 2 < k.w;
    StorePack<kVector>(static_cast<T*>(k.dx) + at[p], dx[p], exists ? kWidth : 0);
  }
}

// A thread for each of rows x cols windows and each group of channels.
template <typename F>
int LaunchPool(void* stream, DType type, int64_t n, int64_t rows, int64_t cols, KernelArgs k, F kernel_of) {
  const bool vector = k.c % kPack == 0;
  const int64_t groups = vector ? k.c / kPack : k.c;
  k.threads = n * rows * cols * groups;
  const int64_t blocks = CeilDiv(k.threads, kThreads);
  if (blocks == 0) return 0;
  if (n * rows * cols >= int64_t{1} << 31 || blocks >= int64_t{1} << 31) return cudaErrorNotSupported;
  k.groups = Divisor(groups), k.cols = Divisor(cols), k.rows = Divisor(rows);
  return Dispatch16(type, [&](auto value) -> int {
    return Launch(kernel_of(value, vector), static_cast<unsigned>(blocks), kThreads, 0, stream, k);
  });
}

}  // namespace

int MaxPool2D(void* stream, DType type, int64_t n, int64_t h, int64_t w, int64_t c, const void* x, void* y) {
  KernelArgs k = {};
  k.x = x, k.y = y, k.h = h, k.w = w, k.c = c;
  return LaunchPool(stream, type, n, h / 2, w / 2, k, [](auto value, bool vector) {
    using T = decltype(value);
    return vector ? ForwardKernel<T, true> : ForwardKernel<T, false>;
  });
}

int MaxPool2DGrad(void* stream, DType type, int64_t n, int64_t h, int64_t w, int64_t c, const void* x, const void* dy,
                  void* dx) {
  KernelArgs k = {};
  k.x = x, k.dy = dy, k.dx = dx, k.h = h, k.w = w, k.c = c;
  return LaunchPool(stream, type, n, CeilDiv(h, 2), CeilDiv(w, 2), k, [](auto value, bool vector) {
    using T = decltype(value);
    return vector ? GradKernel<T, true> : GradKernel<T, false>;
  });
}

}  // namespace unet_fast::gpu
