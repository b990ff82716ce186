// Tensor-core fragments and asynchronous copies, as every matrix kernel here uses them.
#pragma once

#include <mma.h>

#include "common/cuda.cuh"

namespace unet_fast::gpu {

using nvcuda::wmma::accumulator;
using nvcuda::wmma::col_major;
using nvcuda::wmma::matrix_a;
using nvcuda::wmma::matrix_b;
using nvcuda::wmma::row_major;
template <typename Use, typename T, typename... Layout>
using Fragment = nvcuda::wmma::fragment<Use, 16, 16, 16, T, Layout...>;
using Accumulator = Fragment<accumulator, float>;

// bfloat16 has matrix instructions from sm_80 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <typename T>
constexpr bool kHasTensorCores = std::is_same_v<T, __half>;
#else
template <typename T>
constexpr bool kHasTensorCores = true;
#endif

__device__ inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Blocks that should fit a multiprocessor at once, by registers: up to 255 a thread where a warp has 64x64 results,
// else 128.
template <typename Shape>
constexpr int kBlocksAtOnce = (Shape::kWarpM * Shape::kWarpN == 64 * 64 ? 256 : 512) / Shape::kThreads;

// wmma::load_matrix_sync from shared memory. The compiler does not see through the bfloat16 overloads that the address
// is one of shared memory, and turns them into generic loads; the same instruction with its state space spelt out
// becomes ldmatrix, as the float16 ones do.
template <typename Use, typename T, typename Layout>
__device__ void LoadFragment(Fragment<Use, T, Layout>& fragment, const T* shared, int ld) {
  if constexpr (std::is_same_v<T, __half>) {
    nvcuda::wmma::load_matrix_sync(fragment, shared, ld);
  } else {
    uint32_t* r = reinterpret_cast<uint32_t*>(fragment.x);
    const uint32_t address = SharedAddress(shared);
#define UNET_FAST_WMMA_LOAD(operand, layout)                                                                     \
  asm volatile("wmma.load." operand ".sync.aligned." layout ".m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;" \
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                                  \
               : "r"(address), "r"(ld)                                                                           \
               : "memory")
    constexpr bool kA = std::is_same_v<Use, matrix_a>, kRow = std::is_same_v<Layout, row_major>;
    if constexpr (kA && kRow) UNET_FAST_WMMA_LOAD("a", "row");
    if constexpr (kA && !kRow) UNET_FAST_WMMA_LOAD("a", "col");
    if constexpr (!kA && kRow) UNET_FAST_WMMA_LOAD("b", "row");
    if constexpr (!kA && !kRow) UNET_FAST_WMMA_LOAD("b", "col");
#undef UNET_FAST_WMMA_LOAD
  }
}

// 16 bytes from global to shared memory; zeros, and nothing read, where not `valid`. Through the first-level cache
// where neighbouring taps read the same pixels again, past it else.
enum class Cache { kAll, kL2 };
template <Cache kCache>
__device__ void CopyAsync(uint32_t shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  const int bytes = valid ? 16 : 0;
  if constexpr (kCache == Cache::kAll) {
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
                 : "memory");
  }
#else
  const uint4 v = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#endif
}
template <typename T>
__device__ void StoreShared(uint32_t shared, const Pack<T>& pack) {
  const uint4 v = reinterpret_cast<const uint4&>(pack);
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ inline void CommitCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `kPending` of the groups committed last are under way.
template <int kPending>
__device__ void WaitForCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace unet_fast::gpu
