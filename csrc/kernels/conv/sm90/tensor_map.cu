#include "conv/sm90/tensor_map.h"

#include <cuda_runtime.h>

namespace unet_fast::gpu::sm90 {
namespace {

// The driver's functions are asked of the runtime, so that nothing links with libcuda, which a machine without a GPU
// has not got.
template <typename Function>
Function DriverFunction(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result);
  return status == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Function>(function)
                                                                        : nullptr;
}

CUtensorMapDataType Type(DType dtype) {
  return dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

constexpr uint64_t kBytes = 2;  // an element
constexpr uint32_t kChannels = 64;

int EncodeTiles(const void* data, DType dtype, int rank, const cuuint64_t* dims, const cuuint64_t* strides,
                const cuuint32_t* box, CUtensorMap* out) {
  static const auto encode = DriverFunction<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult result =
      encode(out, Type(dtype), rank, const_cast<void*>(data), dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

int Encode(const PixelMap& m, DType dtype, CUtensorMap* out) {
  static const auto encode = DriverFunction<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t dims[] = {static_cast<cuuint64_t>(m.channels), static_cast<cuuint64_t>(m.w),
                             static_cast<cuuint64_t>(m.h), static_cast<cuuint64_t>(m.n)};
  const cuuint64_t strides[] = {m.channels * kBytes, m.row_stride * kBytes, m.image_stride * kBytes};
  // Corners of the box of positions, counted from the array's first and last pixel.
  const int lower[] = {m.first_col, m.first_row};
  const int upper[] = {m.first_col + m.col_step * (m.cols - 1) - (m.w - 1),
                       m.first_row + m.row_step * (m.rows - 1) - (m.h - 1)};
  const cuuint32_t steps[] = {1, static_cast<cuuint32_t>(m.col_step), static_cast<cuuint32_t>(m.row_step), 1};
  const CUresult result =
      encode(out, Type(dtype), 4, const_cast<void*>(m.data), dims, strides, lower, upper, kChannels,
             static_cast<cuuint32_t>(m.box), steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

int Encode(const ImageMap& m, DType dtype, CUtensorMap* out) {
  const cuuint64_t dims[] = {static_cast<cuuint64_t>(m.channels), static_cast<cuuint64_t>(m.w),
                             static_cast<cuuint64_t>(m.h), static_cast<cuuint64_t>(m.n)};
  const cuuint64_t strides[] = {m.channels * kBytes, m.row_stride * kBytes, m.image_stride * kBytes};
  const cuuint32_t box[] = {kChannels, static_cast<cuuint32_t>(m.box_cols), static_cast<cuuint32_t>(m.box_rows), 1};
  return EncodeTiles(m.data, dtype, 4, dims, strides, box, out);
}

int Encode(const WeightMap& m, DType dtype, CUtensorMap* out) {
  const cuuint64_t dims[] = {static_cast<cuuint64_t>(m.inner), static_cast<cuuint64_t>(m.rows),
                             static_cast<cuuint64_t>(m.taps)};
  const cuuint64_t strides[] = {m.row_stride * kBytes, m.tap_stride * kBytes};
  const cuuint32_t box[] = {kChannels, static_cast<cuuint32_t>(m.box_rows), 1};
  return EncodeTiles(m.data, dtype, 3, dims, strides, box, out);
}

}  // namespace unet_fast::gpu::sm90
