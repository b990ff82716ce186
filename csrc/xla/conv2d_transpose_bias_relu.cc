// Lowering of UnetFastConv2DTransposeBiasRelu and its gradient.
#include "xla/lowering.h"
#ifdef UNET_FAST_CUDA
#include "conv/gpu.h"
#endif

namespace unet_fast::conv2d_transpose_bias_relu_lowering {
namespace {

class Base : public tensorflow::XlaOpKernel {
 public:
  explicit Base(tensorflow::OpKernelConstruction* c) : XlaOpKernel(c) {
    std::string activation;
    OP_REQUIRES_OK(c, c->GetAttr("activation", &activation));
    relu_ = activation == "relu";
    for_gpu_ = ForGpu(c);
  }

 protected:
  // x is operand `first`, the kernel the next.
  bool SetProblem(tensorflow::XlaOpKernelContext* c, int first, Conv2DTransposeProblem* p) const {
    p->dtype = ToDType(c->input_type(first));
    p->relu = relu_;
    const absl::Status status = Invalid("conv2d_transpose_bias_relu",
                                        p->SetDims(ToDims(c->InputShape(first)), ToDims(c->InputShape(first + 1))));
    if (!status.ok()) c->CtxFailure(status);
    return status.ok();
  }
  bool relu_ = true, for_gpu_ = false;
};

class Forward : public Base {
 public:
  using Base::Base;
  void Compile(tensorflow::XlaOpKernelContext* c) override {
    Conv2DTransposeProblem p;
    if (!SetProblem(c, 0, &p)) return;
    OP_REQUIRES_OK(c, Invalid("conv2d_transpose_bias_relu", CheckDims("bias", ToDims(c->InputShape(2)), {p.filters})));
    std::vector<xla::Shape> results = {RowMajor(c->input_xla_type(0), p.y_dims())};
#ifdef UNET_FAST_CUDA
    if (for_gpu_) results.push_back(Workspace(gpu::Conv2DTransposeBiasReluWorkspaceBytes(p)));
#endif
    EmitCustomCall(c, "unet_fast_conv2d_transpose_bias_relu", Attributes().Int("relu", relu_), results);
  }
};

class Grad : public Base {
 public:
  explicit Grad(tensorflow::OpKernelConstruction* c) : Base(c) {
    OP_REQUIRES_OK(c, c->GetAttr("num_dx", &num_dx_));
    OP_REQUIRES_OK(c, c->GetAttr("input_is_relu", &input_is_relu_));
    OP_REQUIRES_OK(c, c->GetAttr("dy_is_masked", &dy_is_masked_));
  }
  void Compile(tensorflow::XlaOpKernelContext* c) override {
    Conv2DTransposeProblem p;
    if (!SetProblem(c, 2, &p)) return;
    p.input_is_relu = input_is_relu_, p.dy_is_masked = dy_is_masked_;
    const char* op = "conv2d_transpose_bias_relu gradient";
    OP_REQUIRES_OK(c, Invalid(op, CheckDims("dy", ToDims(c->InputShape(0)), p.y_dims())));
    OP_REQUIRES_OK(c, Invalid(op, CheckDims("y", ToDims(c->InputShape(1)), p.y_dims())));
    const xla::PrimitiveType type = c->input_xla_type(0);
    std::vector<xla::Shape> results;
    if (num_dx_ == 1) results.push_back(RowMajor(type, p.x_dims()));
    results.push_back(RowMajor(type, p.kernel_dims()));
    results.push_back(RowMajor(type, {p.filters}));
#ifdef UNET_FAST_CUDA
    if (for_gpu_) results.push_back(Workspace(gpu::Conv2DTransposeBiasReluGradWorkspaceBytes(p)));
#endif
    EmitCustomCall(c, "unet_fast_conv2d_transpose_bias_relu_grad",
                   Attributes()
                       .Int("relu", relu_)
                       .Int("num_dx", num_dx_)
                       .Int("input_is_relu", input_is_relu_)
                       .Int("dy_is_masked", dy_is_masked_),
                   results);
  }

 private:
  int num_dx_ = 0;
  bool input_is_relu_ = false, dy_is_masked_ = false;
};

UNET_FAST_REGISTER_XLA("UnetFastConv2DTransposeBiasRelu", Forward);
UNET_FAST_REGISTER_XLA("UnetFastConv2DTransposeBiasReluGrad", Grad);

}  // namespace
}  // namespace unet_fast::conv2d_transpose_bias_relu_lowering
