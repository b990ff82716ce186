// Lowering of UnetFastConv2DBiasRelu and its gradient.
#include "xla/lowering.h"
#ifdef UNET_FAST_CUDA
#include "conv/gpu.h"
#endif

namespace unet_fast::conv2d_bias_relu_lowering {
namespace {

class Base : public tensorflow::XlaOpKernel {
 public:
  explicit Base(tensorflow::OpKernelConstruction* c) : XlaOpKernel(c) {
    std::string padding, activation;
    OP_REQUIRES_OK(c, c->GetAttr("padding", &padding));
    OP_REQUIRES_OK(c, c->GetAttr("activation", &activation));
    OP_REQUIRES_OK(c, c->GetAttr("num_skip", &num_skip_));
    OP_REQUIRES_OK(c, c->GetAttr("num_pooled", &num_pooled_));
    flags_.same = padding == "same";
    flags_.relu = activation == "relu";
    flags_.pool = num_pooled_ == 1;
    for_gpu_ = ForGpu(c);
  }

 protected:
  // x is operand `first`, skip and kernel follow.
  bool SetProblem(tensorflow::XlaOpKernelContext* c, int first, Conv2DProblem* p) const {
    *p = flags_;
    p->dtype = ToDType(c->input_type(first));
    const Dims skip = num_skip_ == 1 ? ToDims(c->InputShape(first + 1)) : Dims();
    const absl::Status status =
        Invalid("conv2d_bias_relu", p->SetDims(ToDims(c->InputShape(first)), num_skip_ == 1 ? &skip : nullptr,
                                               ToDims(c->InputShape(first + 1 + num_skip_))));
    if (!status.ok()) c->CtxFailure(status);
    return status.ok();
  }
  Attributes Flags() const {
    return Attributes()
        .Int("same", flags_.same)
        .Int("relu", flags_.relu)
        .Int("num_skip", num_skip_)
        .Int("num_pooled", num_pooled_);
  }
  Conv2DProblem flags_;
  int num_skip_ = 0, num_pooled_ = 0;
  bool for_gpu_ = false;
};

class Forward : public Base {
 public:
  using Base::Base;
  void Compile(tensorflow::XlaOpKernelContext* c) override {
    Conv2DProblem p;
    if (!SetProblem(c, 0, &p)) return;
    OP_REQUIRES_OK(c,
                   Invalid("conv2d_bias_relu", CheckDims("bias", ToDims(c->InputShape(2 + num_skip_)), {p.filters})));
    std::vector<xla::Shape> results = {RowMajor(c->input_xla_type(0), p.y_dims())};
    if (p.pool) results.push_back(RowMajor(c->input_xla_type(0), p.pooled_dims()));
#ifdef UNET_FAST_CUDA
    if (for_gpu_) results.push_back(Workspace(gpu::Conv2DBiasReluWorkspaceBytes(p)));
#endif
    EmitCustomCall(c, "unet_fast_conv2d_bias_relu", Flags(), results);
  }
};

class Grad : public Base {
 public:
  explicit Grad(tensorflow::OpKernelConstruction* c) : Base(c) {
    OP_REQUIRES_OK(c, c->GetAttr("num_dx", &num_dx_));
    OP_REQUIRES_OK(c, c->GetAttr("num_dskip", &num_dskip_));
    OP_REQUIRES_OK(c, c->GetAttr("dy_is_masked", &flags_.dy_is_masked));
    OP_REQUIRES_OK(c, c->GetAttr("mask_dx", &flags_.mask_dx));
    OP_REQUIRES_OK(c, c->GetAttr("mask_dskip", &flags_.mask_dskip));
  }
  void Compile(tensorflow::XlaOpKernelContext* c) override {
    Conv2DProblem p;
    if (!SetProblem(c, 2 + num_pooled_, &p)) return;
    const char* op = "conv2d_bias_relu gradient";
    OP_REQUIRES_OK(c, Invalid(op, p.SetDyDims(ToDims(c->InputShape(0)))));
    OP_REQUIRES_OK(c, Invalid(op, CheckDims("y", ToDims(c->InputShape(1 + num_pooled_)), p.y_dims())));
    if (p.pool) OP_REQUIRES_OK(c, Invalid(op, CheckDims("dpooled", ToDims(c->InputShape(1)), p.pooled_dims())));
    const xla::PrimitiveType type = c->input_xla_type(0);
    std::vector<xla::Shape> results;
    if (num_dx_ == 1) results.push_back(RowMajor(type, p.x_dims()));
    if (num_dskip_ == 1) results.push_back(RowMajor(type, p.dskip_dims()));
    results.push_back(RowMajor(type, p.kernel_dims()));
    results.push_back(RowMajor(type, {p.filters}));
#ifdef UNET_FAST_CUDA
    if (for_gpu_) results.push_back(Workspace(gpu::Conv2DBiasReluGradWorkspaceBytes(p)));
#endif
    EmitCustomCall(c, "unet_fast_conv2d_bias_relu_grad",
                   Flags()
                       .Int("num_dx", num_dx_)
                       .Int("num_dskip", num_dskip_)
                       .Int("dy_is_masked", flags_.dy_is_masked)
                       .Int("mask_dx", flags_.mask_dx)
                       .Int("mask_dskip", flags_.mask_dskip),
                   results);
  }

 private:
  int num_dx_ = 0, num_dskip_ = 0;
};

UNET_FAST_REGISTER_XLA("UnetFastConv2DBiasRelu", Forward);
UNET_FAST_REGISTER_XLA("UnetFastConv2DBiasReluGrad", Grad);

}  // namespace
}  // namespace unet_fast::conv2d_bias_relu_lowering
