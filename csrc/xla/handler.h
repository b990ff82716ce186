// What the FFI handlers share. Only the header-only C API of XLA's FFI here: nothing depends on XLA's C++ ABI.
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "common/dtype.h"
#include "common/thread_pool.h"
#include "conv/problem.h"
#include "xla/ffi/api/ffi.h"
#ifdef UNET_FAST_CUDA
#include "common/device.h"
#endif

namespace xla::ffi {
// Exported by TensorFlow 2.19 and newer; the C symbol XLA_FFI_GetApi only by 2.21.
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi

namespace unet_fast {

namespace ffi = ::xla::ffi;

// The threads that XLA runs CPU programs on.
class FfiThreadPool : public ThreadPool {
 public:
  explicit FfiThreadPool(ffi::ThreadPool pool) : pool_(pool), num_threads_(static_cast<int>(pool.num_threads())) {}
  void Schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }
  int NumThreads() const override { return num_threads_ > 0 ? num_threads_ : 1; }

 private:
  ffi::ThreadPool pool_;
  int num_threads_;
};

inline DType ToDType(ffi::DataType type) {
  if (type == ffi::DataType::F16) return DType::kFloat16;
  if (type == ffi::DataType::BF16) return DType::kBFloat16;
  return DType::kFloat32;
}

inline Dims ToDims(const ffi::AnyBuffer& buffer) {
  return Dims(buffer.dimensions().begin(), buffer.dimensions().end());
}

// Operands and results in order, the optional ones left out as in the op.
class Cursor {
 public:
  Cursor(ffi::RemainingArgs args, ffi::RemainingRets rets) : args_(args), rets_(rets) {}
  ffi::AnyBuffer Arg() { return *args_.get<ffi::AnyBuffer>(arg_++); }
  void* Ret() { return (*rets_.get<ffi::AnyBuffer>(ret_++))->untyped_data(); }
  // The last result, reserved when the program was compiled. It may be too small for another kind of GPU than that was
  // compiled on.
  std::string Workspace(size_t needed, void** workspace) {
    ffi::Result<ffi::AnyBuffer> buffer = *rets_.get<ffi::AnyBuffer>(ret_++);
    *workspace = buffer->untyped_data();
    const size_t reserved = buffer->element_count();
    if (needed <= reserved) return "";
    return "expected a workspace of " + std::to_string(needed) + " bytes, got " + std::to_string(reserved) +
           ": the program was compiled for another GPU; compile it on this one";
  }

 private:
  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  size_t arg_ = 0, ret_ = 0;
};

inline ffi::Error ToError(const char* op, const std::string& message) {
  return message.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(std::string(op) + ": " + message);
}

#ifdef UNET_FAST_CUDA
using FfiStream = ffi::PlatformStream<void*>;  // a cudaStream_t

inline ffi::Error GpuError(const char* op, int error) {
  if (error == 0) return ffi::Error::Success();
  if (IsCudaNotSupported(error)) return ffi::Error(ffi::ErrorCode::kUnimplemented, std::string(op) + ": " + kGpuServes);
  return ffi::Error::Internal(std::string(op) + ": " + CudaErrorString(error));
}

// GPU handlers launch always the same kernels for the same shapes and attributes: XLA may record them into a CUDA graph
// and replay that. What cuDNN is to run was planned when the program was compiled; on another device than the current
// one of then it is at the first launch, which enqueues nothing.
#define UNET_FAST_DEFINE_GPU_HANDLER(NAME, FUNCTION, BINDING) \
  XLA_FFI_DEFINE_HANDLER(NAME, FUNCTION, BINDING, {ffi::Traits::kCmdBufferCompatible})
#endif

}  // namespace unet_fast
