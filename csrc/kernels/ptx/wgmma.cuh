// wgmma: D [64, N] += A [64, 16] B [16, N], by the 128 threads of a warpgroup, A and B in shared memory (128-byte
// swizzle), D in float32 registers. Thread t of the group holds rows 16 * (t / 32) + t % 32 / 4 (+ 8) and of every 8
// columns two, 2 * (t % 4) and the next: d[4 * (n / 8) + 2 * (upper half of rows) + n % 2].
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace unet_fast::gpu::ptx {

// Descriptor of an operand at `address`, made by TMA with 128-byte swizzle: rows of 64 elements, 128 bytes apart, 8 of
// them a group. Channels contiguous along the sum (K-major): rows are those of the matrix, `stride` bytes between
// groups of 8. Contiguous across it (MN-major): rows run along the sum, `stride` as before, and `leading` bytes between
// columns 64 apart.
__device__ inline uint64_t Descriptor(uint32_t address, uint32_t leading = 16, uint32_t stride = 1024) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

__device__ inline void WgmmaFence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void WgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define UNET_FAST_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define UNET_FAST_D8(i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define UNET_FAST_D32(i) UNET_FAST_D8(i), UNET_FAST_D8(i + 8), UNET_FAST_D8(i + 16), UNET_FAST_D8(i + 24)

#define UNET_FAST_WGMMA_40(type)                                                                 \
  asm volatile(                                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %22, 0;\n"                                               \
      "wgmma.mma_async.sync.aligned.m64n40k16.f32." type "." type                                \
      " {"                                                                                       \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19" \
      "}, %20, %21, p, 1, 1, %23, %24;\n}\n"                                                     \
      : UNET_FAST_D8(0), UNET_FAST_D8(8), UNET_FAST_D4(16)                                       \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))

#define UNET_FAST_WGMMA_64(type)                                                                             \
  asm volatile(                                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                            \
      " {"                                                                                                   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                                                     \
      "}, %32, %33, p, 1, 1, %35, %36;\n}\n"                                                                 \
      : UNET_FAST_D32(0)                                                                                     \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))

#define UNET_FAST_WGMMA_128(type)                                                                            \
  asm volatile(                                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                           \
      " {"                                                                                                   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
      "%62, %63"                                                                                             \
      "}, %64, %65, p, 1, 1, %67, %68;\n}\n"                                                                 \
      : UNET_FAST_D32(0), UNET_FAST_D32(32)                                                                  \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))

#define UNET_FAST_WGMMA_192(type)                                                                            \
  asm volatile(                                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type                                           \
      " {"                                                                                                   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
      "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"                                 \
      "}, %96, %97, p, 1, 1, %99, %100;\n}\n"                                                                \
      : UNET_FAST_D32(0), UNET_FAST_D32(32), UNET_FAST_D32(64)                                               \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))

#define UNET_FAST_WGMMA_256(type)                                                                            \
  asm volatile(                                                                                              \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"                                                          \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                           \
      " {"                                                                                                   \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
      "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "     \
      "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "     \
      "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"                                     \
      "}, %128, %129, p, 1, 1, %131, %132;\n}\n"                                                             \
      : UNET_FAST_D32(0), UNET_FAST_D32(32), UNET_FAST_D32(64), UNET_FAST_D32(96)                            \
      : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposeA), "n"(kTransposeB))

// A in registers, as mma.m16n8k16 has it: a[0] rows as of d, columns 2 * (t % 4) and the next; a[1] 8 rows on; a[2] and
// a[3] 8 columns on. B is K-major.
#define UNET_FAST_WGMMA_A40(type)                                                                \
  asm volatile(                                                                                  \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %25, 0;\n"                                               \
      "wgmma.mma_async.sync.aligned.m64n40k16.f32." type "." type                                \
      " {"                                                                                       \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19" \
      "}, {%20, %21, %22, %23}, %24, p, 1, 1, 0;\n}\n"                                           \
      : UNET_FAST_D8(0), UNET_FAST_D8(8), UNET_FAST_D4(16)                                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define UNET_FAST_WGMMA_A48(type)                                                                       \
  asm volatile(                                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %29, 0;\n"                                                      \
      "wgmma.mma_async.sync.aligned.m64n48k16.f32." type "." type                                       \
      " {"                                                                                              \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
      "%21, %22, %23"                                                                                   \
      "}, {%24, %25, %26, %27}, %28, p, 1, 1, 0;\n}\n"                                                  \
      : UNET_FAST_D8(0), UNET_FAST_D8(8), UNET_FAST_D8(16)                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define UNET_FAST_WGMMA_A56(type)                                                                       \
  asm volatile(                                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %33, 0;\n"                                                      \
      "wgmma.mma_async.sync.aligned.m64n56k16.f32." type "." type                                       \
      " {"                                                                                              \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
      "%21, %22, %23, %24, %25, %26, %27"                                                               \
      "}, {%28, %29, %30, %31}, %32, p, 1, 1, 0;\n}\n"                                                  \
      : UNET_FAST_D8(0), UNET_FAST_D8(8), UNET_FAST_D8(16), UNET_FAST_D4(24)                            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

#define UNET_FAST_WGMMA_A64(type)                                                                       \
  asm volatile(                                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                      \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                       \
      " {"                                                                                              \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                                           \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                                                  \
      : UNET_FAST_D32(0)                                                                                \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))

template <typename T, int kN>
__device__ void WgmmaA(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kN == 40 || kN == 48 || kN == 56 || kN == 64);
  if constexpr (kN == 40 && kHalf) UNET_FAST_WGMMA_A40("f16");
  if constexpr (kN == 40 && !kHalf) UNET_FAST_WGMMA_A40("bf16");
  if constexpr (kN == 48 && kHalf) UNET_FAST_WGMMA_A48("f16");
  if constexpr (kN == 48 && !kHalf) UNET_FAST_WGMMA_A48("bf16");
  if constexpr (kN == 56 && kHalf) UNET_FAST_WGMMA_A56("f16");
  if constexpr (kN == 56 && !kHalf) UNET_FAST_WGMMA_A56("bf16");
  if constexpr (kN == 64 && kHalf) UNET_FAST_WGMMA_A64("f16");
  if constexpr (kN == 64 && !kHalf) UNET_FAST_WGMMA_A64("bf16");
}

// kTranspose...: the operand is MN-major. `accumulate` 0: D = A B.
template <typename T, int kN, int kTransposeA, int kTransposeB>
__device__ void Wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kN == 40 || kN == 64 || kN == 128 || kN == 192 || kN == 256);
  if constexpr (kN == 40 && kHalf) UNET_FAST_WGMMA_40("f16");
  if constexpr (kN == 40 && !kHalf) UNET_FAST_WGMMA_40("bf16");
  if constexpr (kN == 64 && kHalf) UNET_FAST_WGMMA_64("f16");
  if constexpr (kN == 64 && !kHalf) UNET_FAST_WGMMA_64("bf16");
  if constexpr (kN == 128 && kHalf) UNET_FAST_WGMMA_128("f16");
  if constexpr (kN == 128 && !kHalf) UNET_FAST_WGMMA_128("bf16");
  if constexpr (kN == 192 && kHalf) UNET_FAST_WGMMA_192("f16");
  if constexpr (kN == 192 && !kHalf) UNET_FAST_WGMMA_192("bf16");
  if constexpr (kN == 256 && kHalf) UNET_FAST_WGMMA_256("f16");
  if constexpr (kN == 256 && !kHalf) UNET_FAST_WGMMA_256("bf16");
}

#undef UNET_FAST_WGMMA_A40
#undef UNET_FAST_WGMMA_A48
#undef UNET_FAST_WGMMA_A56
#undef UNET_FAST_WGMMA_A64
#undef UNET_FAST_WGMMA_40
#undef UNET_FAST_WGMMA_64
#undef UNET_FAST_WGMMA_128
#undef UNET_FAST_WGMMA_192
#undef UNET_FAST_WGMMA_256
#undef UNET_FAST_D32
#undef UNET_FAST_D8
#undef UNET_FAST_D4

}  // namespace unet_fast::gpu::ptx
