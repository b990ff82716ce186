// Vectors of the instruction set that a file is built for. Included by the primitives alone.
#pragma once

#include <cstdint>
#include <cstring>

namespace unet_fast::cpu::UNET_FAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRegisters = 32, kWidest = 16;
#elif defined(__AVX2__)
constexpr int kRegisters = 16, kWidest = 8;
#else
constexpr int kRegisters = 16, kWidest = 4;
#endif

template <int W>
struct Vector {
  typedef float Type __attribute__((vector_size(W * sizeof(float))));
};
template <int W>
typename Vector<W>::Type Load(const float* p) {
  typename Vector<W>::Type v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <int W>
void Store(float* p, typename Vector<W>::Type v) {
  std::memcpy(p, &v, sizeof(v));
}

// The widest vector that divides the channels; 0 where none does.
inline int Width(int64_t channels) {
  for (int w = kWidest; w >= 4; w /= 2) {
    if (channels % w == 0) return w;
  }
  return 0;
}

}  // namespace
}  // namespace unet_fast::cpu::UNET_FAST_ISA
