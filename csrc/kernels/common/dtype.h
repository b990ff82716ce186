// Element types of activations and weights. Accumulation is float32 whatever the type.
#pragma once

#include <cstddef>
#include <cstdint>

namespace unet_fast {

enum class DType { kFloat32, kFloat16, kBFloat16 };

inline size_t SizeOf(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// The address of element `index` of an array of `type`.
inline const void* At(const void* data, DType type, int64_t index) {
  return static_cast<const char*>(data) + index * static_cast<int64_t>(SizeOf(type));
}
inline void* At(void* data, DType type, int64_t index) {
  return static_cast<char*>(data) + index * static_cast<int64_t>(SizeOf(type));
}

}  // namespace unet_fast
