// What every kernel needs: 16-bit types, eight of them as one 16-byte access, division by a run-time constant,
// launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

namespace unet_fast::gpu {

__device__ inline float ToFloat(__half v) { return __half2float(v); }
__device__ inline float ToFloat(__nv_bfloat16 v) { return __bfloat162float(v); }
template <typename T>
__device__ T FromFloat(float v) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(v);
  } else {
    return __float2bfloat16_rn(v);
  }
}

// NaN stays NaN, so that an overflow upstream is seen downstream.
__device__ inline float Relu(float v) { return v < 0.0f ? 0.0f : v; }

constexpr int kPack = 8;
template <typename T>
struct alignas(16) Pack {
  T v[kPack];
};

// Arithmetic on pairs, which is one instruction a pair.
template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
template <typename T>
__device__ Pair<T>& PairAt(Pack<T>& pack, int pair) {
  return reinterpret_cast<Pair<T>*>(&pack)[pair];
}
template <typename T>
__device__ Pair<T> RoundedPair(float a, float b) {
  if constexpr (std::is_same_v<T, __half>) {
    return __floats2half2_rn(a, b);
  } else {
    return __floats2bfloat162_rn(a, b);
  }
}
template <typename T>
__device__ Pack<T> Rounded(const float (&v)[kPack]) {
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kPack / 2; ++i) PairAt(pack, i) = RoundedPair<T>(v[2 * i], v[2 * i + 1]);
  return pack;
}
// NaN where either is.
template <typename T>
__device__ Pack<T> Max(Pack<T> a, Pack<T> b) {
#if __CUDA_ARCH__ >= 800
#pragma unroll
  for (int i = 0; i < kPack / 2; ++i) PairAt(a, i) = __hmax2_nan(PairAt(a, i), PairAt(b, i));
#else
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    if (ToFloat(b.v[e]) > ToFloat(a.v[e]) || isnan(ToFloat(b.v[e]))) a.v[e] = b.v[e];
  }
#endif
  return a;
}
template <typename T>
__device__ Pack<T> Relu(Pack<T> a) {
  Pack<T> zero;
  *reinterpret_cast<uint4*>(&zero) = make_uint4(0, 0, 0, 0);
  return Max(a, zero);
}
// a where mask > 0, else zero.
template <typename T>
__device__ Pack<T> Masked(Pack<T> a, Pack<T> mask) {
  Pack<T> zero;
  *reinterpret_cast<uint4*>(&zero) = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kPack / 2; ++i) {
    reinterpret_cast<uint32_t*>(&a)[i] &= __hgt2_mask(PairAt(mask, i), PairAt(zero, i));
  }
  return a;
}

// The first `count` elements at p, zeros behind them. kVector: count >= 8 or count <= 0, and p is aligned to 16 bytes.
template <bool kVector, typename T>
__device__ Pack<T> LoadPack(const T* p, int count) {
  Pack<T> pack;
  if constexpr (kVector) {
    if (count > 0) return *reinterpret_cast<const Pack<T>*>(p);
    *reinterpret_cast<uint4*>(&pack) = make_uint4(0, 0, 0, 0);
  } else {
#pragma unroll
    for (int e = 0; e < kPack; ++e) pack.v[e] = e < count ? p[e] : FromFloat<T>(0.0f);
  }
  return pack;
}
// The same for what no thread of the kernel writes, in whole registers from the start: of a Pack the compiler makes
// eight halves, and waits for the load to take them apart.
template <bool kVector>
__device__ uint4 LoadWords(const uint16_t* p, int count) {
  uint4 words = make_uint4(0, 0, 0, 0);
  if constexpr (kVector) {
    if (count > 0) words = __ldg(reinterpret_cast<const uint4*>(p));
  } else {
    const auto pair = [p, count](int e) {
      return (e < count ? uint32_t{__ldg(p + e)} : 0) | (e + 1 < count ? uint32_t{__ldg(p + e + 1)} << 16 : 0);
    };
    words = make_uint4(pair(0), pair(2), pair(4), pair(6));
  }
  return words;
}
__device__ inline uint32_t Word(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}
template <bool kVector, typename T>
__device__ void StorePack(T* p, const Pack<T>& pack, int count) {
  if constexpr (kVector) {
    if (count > 0) *reinterpret_cast<Pack<T>*>(p) = pack;
  } else {
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      if (e < count) p[e] = pack.v[e];
    }
  }
}

// n / d for 0 <= n < 2^31 as a multiplication (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t d = 1, multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : d(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1);
  }
  __device__ uint32_t Divide(uint32_t n, uint32_t* remainder) const {
    const uint32_t q = (__umulhi(n, multiplier) + n) >> shift;
    *remainder = n - q * d;
    return q;
  }
};

// p + n. The compiler would rather add up all offsets first, on 64 bits, which takes four instructions.
template <typename T>
__device__ const T* Advance(const T* p, uint32_t n) {
  static_assert(sizeof(T) == 2);
  uint64_t result;
  asm("mad.wide.u32 %0, %1, 2, %2;" : "=l"(result) : "r"(n), "l"(p));
  return reinterpret_cast<const T*>(result);
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 75 for 7.5, of the current device; 0 where there is none.
inline int ComputeCapability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) return 0;
  return major * 10 + minor;
}

// Of the current device.
inline int Multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count;
}

// `cluster` blocks each, from compute capability 9.0 on.
template <typename... Parameters, typename... Arguments>
int LaunchClusters(void (*kernel)(Parameters...), dim3 grid, unsigned cluster, dim3 block, size_t shared_bytes,
                   void* stream, const Arguments&... arguments) {
  if (shared_bytes > 48 << 10) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return status;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}
template <typename... Parameters, typename... Arguments>
int Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           const Arguments&... arguments) {
  return LaunchClusters(kernel, grid, 1, block, shared_bytes, stream, arguments...);
}

// f(T()) with T the 16-bit type that is meant; cudaErrorNotSupported where this device's kernels have no such type.
template <typename F>
int Dispatch16(DType dtype, F f) {
  if (dtype == DType::kFloat16) return f(__half());
  if (dtype == DType::kBFloat16 && ComputeCapability() >= 80) return f(__nv_bfloat16());
  return cudaErrorNotSupported;
}

#define UNET_FAST_CUDA_RETURN_IF_ERROR(call)            \
  do {                                                  \
    const int unet_fast_status = (call);                \
    if (unet_fast_status != 0) return unet_fast_status; \
  } while (false)

}  // namespace unet_fast::gpu
