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

}  // namespace unet_fast
