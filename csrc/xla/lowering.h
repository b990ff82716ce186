// Turns an op into one typed-FFI custom call. XLA's C++ headers come in here; the handlers (handler.h) must not see
// them, for both declare classes of the same names.
#pragma once

#include <string>
#include <vector>

#include "tensorflow/common.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "xla/shape.h"
#include "xla/xla_data.pb.h"

namespace unet_fast {

// The dictionary of attributes as XLA parses it, e.g. "{same = 1 : i64}".
class Attributes {
 public:
  Attributes& Int(const char* name, int64_t value);
  Attributes& Float(const char* name, float value);  // by its bits, so that nothing is rounded
  std::string Text() const { return "{" + text_ + "}"; }

 private:
  Attributes& Add(const std::string& entry);
  std::string text_;
};

xla::Shape RowMajor(xla::PrimitiveType type, const Dims& dims);

// Whether an op is being compiled for the GPU.
inline bool ForGpu(tensorflow::OpKernelConstruction* context) {
  return context->device_type() == tensorflow::DeviceType("XLA_GPU_JIT");
}

// A last result that nobody reads. XLA owns it, so unlike a scratch allocation it is still there when a CUDA graph is
// replayed. On the GPU it is always there, that handlers may count on it.
inline xla::Shape Workspace(size_t bytes) { return RowMajor(xla::U8, {static_cast<int64_t>(bytes > 0 ? bytes : 1)}); }

// All inputs of the op, row-major, to the handler `target`; its results, row-major, are the op's outputs in order, and
// results beyond the op's outputs are dropped (workspace).
void EmitCustomCall(tensorflow::XlaOpKernelContext* context, const char* target, const Attributes& attributes,
                    const std::vector<xla::Shape>& results);

// REGISTER_XLA_OP alone is too late where XLA has compiled something in this process before this library was loaded: it
// turns its registry into kernels once, at the first compilation. So the kernels are registered for the JIT devices as
// well; the priority settles which is used where both exist.
#define UNET_FAST_REGISTER_XLA(OP, CLASS)                                     \
  REGISTER_XLA_OP(Name(OP), CLASS);                                           \
  REGISTER_KERNEL_BUILDER(Name(OP).Device("XLA_CPU_JIT").Priority(1), CLASS); \
  REGISTER_KERNEL_BUILDER(Name(OP).Device("XLA_GPU_JIT").Priority(1), CLASS)

}  // namespace unet_fast
