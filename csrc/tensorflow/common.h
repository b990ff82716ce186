// What the op kernels share: types, shapes and the thread pool as csrc/kernels wants them.
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "common/dtype.h"
#include "common/thread_pool.h"
#include "conv/problem.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#ifdef UNET_FAST_CUDA
#include "common/device.h"
#include "xla/stream_executor/stream.h"
#endif

namespace unet_fast {

inline DType ToDType(tensorflow::DataType type) {
  if (type == tensorflow::DT_HALF) return DType::kFloat16;
  if (type == tensorflow::DT_BFLOAT16) return DType::kBFloat16;
  return DType::kFloat32;
}

inline Dims ToDims(const tensorflow::TensorShape& shape) {
  Dims dims;
  for (const auto& dim : shape) dims.push_back(dim.size);
  return dims;
}

inline absl::Status ToShape(const Dims& dims, tensorflow::TensorShape* shape) {
  return tensorflow::TensorShape::BuildTensorShape(dims, shape);
}

// InvalidArgument with the op's name before the message; OK where the message is empty.
inline absl::Status Invalid(const char* op, const std::string& message) {
  if (message.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(std::string(op) + ": " + message);
}

// For shape functions: TensorFlow's word on two dimensions that differ names no argument, so this comes before it.
inline absl::Status Named(const char* op, const char* expected, const absl::Status& status) {
  if (status.ok()) return status;
  return Invalid(op, std::string(expected) + ": " + std::string(status.message()));
}

// TensorFlow's intra-op threads.
class OpThreadPool : public ThreadPool {
 public:
  explicit OpThreadPool(tensorflow::OpKernelContext* context)
      : threads_(context->device()->tensorflow_cpu_worker_threads()) {}
  void Schedule(std::function<void()> task) override { threads_->workers->Schedule(std::move(task)); }
  int NumThreads() const override { return threads_->num_threads; }

 private:
  const tensorflow::DeviceBase::CpuWorkerThreads* threads_;
};

#ifdef UNET_FAST_CUDA
// The cudaStream_t that TensorFlow wants a kernel's work on.
inline void* GpuStream(tensorflow::OpKernelContext* context) {
  return context->op_device_context()->stream()->platform_specific_handle().stream;
}

// What a launcher of csrc/kernels returned.
inline absl::Status GpuStatus(const char* op, int error) {
  if (error == 0) return absl::OkStatus();
  if (IsCudaNotSupported(error)) {
    return absl::UnimplementedError(std::string(op) + ": " + kGpuServes);
  }
  return absl::InternalError(std::string(op) + ": " + CudaErrorString(error));
}

// Device memory for as long as the op runs; null for none.
inline absl::Status GpuWorkspace(tensorflow::OpKernelContext* context, size_t bytes, tensorflow::Tensor* storage,
                                 void** workspace) {
  *workspace = nullptr;
  if (bytes == 0) return absl::OkStatus();
  TF_RETURN_IF_ERROR(context->allocate_temp(tensorflow::DT_UINT8, {static_cast<int64_t>(bytes)}, storage));
  *workspace = storage->data();
  return absl::OkStatus();
}
#endif

// CLASS<kGpu> for the CPU and, in a build with CUDA, for the types that the GPU's kernels take.
#define UNET_FAST_REGISTER_CPU_KERNEL(OP, CLASS) \
  REGISTER_KERNEL_BUILDER(Name(OP).Device(tensorflow::DEVICE_CPU), CLASS<false>)
#ifdef UNET_FAST_CUDA
#define UNET_FAST_REGISTER_GPU_KERNEL(OP, CLASS, TYPE) \
  REGISTER_KERNEL_BUILDER(Name(OP).Device(tensorflow::DEVICE_GPU).TypeConstraint<TYPE>("T"), CLASS<true>)
#define UNET_FAST_REGISTER_KERNELS(OP, CLASS)            \
  UNET_FAST_REGISTER_CPU_KERNEL(OP, CLASS);              \
  UNET_FAST_REGISTER_GPU_KERNEL(OP, CLASS, Eigen::half); \
  UNET_FAST_REGISTER_GPU_KERNEL(OP, CLASS, Eigen::bfloat16)
#else
#define UNET_FAST_REGISTER_KERNELS(OP, CLASS) UNET_FAST_REGISTER_CPU_KERNEL(OP, CLASS)
#endif

}  // namespace unet_fast
