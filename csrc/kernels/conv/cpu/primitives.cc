#include "conv/cpu/primitives.h"

#include <algorithm>
#include <cstdlib>
#include <string>

namespace unet_fast::cpu {

#define UNET_FAST_DECLARE_ISA(ISA)                                                                          \
  namespace ISA {                                                                                           \
  bool DirectConvServes(const ConvArgs& args);                                                              \
  void DirectConv(ThreadPool& pool, const ConvArgs& args);                                                  \
  bool DirectWgradServes(const WgradArgs& args);                                                            \
  void DirectWgrad(ThreadPool& pool, const WgradArgs& args);                                                \
  void EigenConv(ThreadPool& pool, const ConvArgs& args);                                                   \
  void EigenWgrad(ThreadPool& pool, const WgradArgs& args);                                                 \
  void MaskGradientRow(const float* dy, const float* y, int64_t pixels, int64_t c, float* dz, float* sums); \
  void UnpoolGradientRows(const UnpooledRows& rows);                                                        \
  void ToFloat(const void* source, DType type, float* target, int64_t count);                               \
  void FromFloat(const float* source, DType type, void* target, int64_t count);                             \
  static const Primitives kPrimitives = {                                                                   \
      #ISA,       DirectConvServes, DirectConv,         DirectWgradServes, DirectWgrad, EigenConv,          \
      EigenWgrad, MaskGradientRow,  UnpoolGradientRows, ToFloat,           FromFloat};                      \
  }
UNET_FAST_DECLARE_ISA(baseline)
#ifdef UNET_FAST_X86
UNET_FAST_DECLARE_ISA(avx2)
UNET_FAST_DECLARE_ISA(avx512)
#endif

const Primitives& GetPrimitives() {
  static const Primitives& chosen = []() -> const Primitives& {
#ifdef UNET_FAST_X86
    const char* wish = std::getenv("UNET_FAST_CPU_ISA");
    const std::string limit = wish != nullptr ? wish : "avx512";
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512cd");
    if (has_avx512 && limit == "avx512") return avx512::kPrimitives;
    if (has_avx2 && (limit == "avx512" || limit == "avx2")) return avx2::kPrimitives;
#endif
    return baseline::kPrimitives;
  }();
  return chosen;
}

int64_t WgradSlabs(bool direct, int64_t kh, int64_t kw, int64_t ci, int64_t co) {
  // Enough equal parts for the cores of a workstation where the output alone gives too few; large outputs need no
  // second copy.
  const auto parts = [](int64_t wanted, int64_t tasks) { return std::max<int64_t>(1, (wanted + tasks - 1) / tasks); };
  if (direct && ci * co <= kNarrowWgrad) return parts(36, kh);
  if (direct) return parts(12, kh * parts(ci, kWgradChannels));
  constexpr int64_t kLargeTile = 512 * 1536;
  return parts(8, kh * std::max<int64_t>(1, kw * ci * co / kLargeTile));
}

}  // namespace unet_fast::cpu
