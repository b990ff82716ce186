// UnetFastConv2DTransposeBiasRelu and its gradient: definition, shape functions, CPU and GPU kernels.
#include "conv/cpu/conv2d.h"
#include "tensorflow/common.h"
#include "tensorflow/core/framework/op.h"
#ifdef UNET_FAST_CUDA
#include "conv/gpu.h"
#endif

namespace unet_fast::conv2d_transpose_bias_relu_kernels {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

absl::Status ForwardShape(InferenceContext* c) {
  const auto named = [](const char* expected, const absl::Status& status) {
    return Named("conv2d_transpose_bias_relu", expected, status);
  };
  ShapeHandle x, kernel, bias;
  TF_RETURN_IF_ERROR(named("x: expected a shape [batch, height, width, channels]", c->WithRank(c->input(0), 4, &x)));
  TF_RETURN_IF_ERROR(named("kernel: expected a shape [k, k, filters, channels]", c->WithRank(c->input(1), 4, &kernel)));
  TF_RETURN_IF_ERROR(named("bias: expected a shape [filters]", c->WithRank(c->input(2), 1, &bias)));
  DimensionHandle merged, filters, height, width;
  TF_RETURN_IF_ERROR(named("kernel: expected 3x3 or 2x2", c->Merge(c->Dim(kernel, 0), c->Dim(kernel, 1), &merged)));
  TF_RETURN_IF_ERROR(
      named("kernel: expected x's channels in its last dimension", c->Merge(c->Dim(kernel, 3), c->Dim(x, 3), &merged)));
  TF_RETURN_IF_ERROR(
      named("bias: expected the kernel's filters", c->Merge(c->Dim(kernel, 2), c->Dim(bias, 0), &filters)));
  TF_RETURN_IF_ERROR(named("x: expected a smaller height", c->Multiply(c->Dim(x, 1), 2, &height)));
  TF_RETURN_IF_ERROR(named("x: expected a smaller width", c->Multiply(c->Dim(x, 2), 2, &width)));
  c->set_output(0, c->MakeShape({c->Dim(x, 0), height, width, filters}));
  return absl::OkStatus();
}

absl::Status GradShape(InferenceContext* c) {
  int num_dx;
  TF_RETURN_IF_ERROR(c->GetAttr("num_dx", &num_dx));
  if (num_dx > 1) return absl::InvalidArgumentError("num_dx: expected 0 or 1");
  ShapeHandle x, kernel;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 4, &x));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(3), 4, &kernel));
  if (num_dx == 1) c->set_output(0, x);
  c->set_output(num_dx, kernel);
  c->set_output(num_dx + 1, c->Vector(c->Dim(kernel, 2)));
  return absl::OkStatus();
}

class Base : public OpKernel {
 public:
  explicit Base(OpKernelConstruction* c) : OpKernel(c) {
    std::string activation;
    OP_REQUIRES_OK(c, c->GetAttr("activation", &activation));
    flags_.relu = activation == "relu";
  }

 protected:
  absl::Status Problem(const Tensor& x, const Tensor& kernel, Conv2DTransposeProblem* problem) const {
    *problem = flags_;
    problem->dtype = ToDType(x.dtype());
    return Invalid("conv2d_transpose_bias_relu", problem->SetDims(ToDims(x.shape()), ToDims(kernel.shape())));
  }
  Conv2DTransposeProblem flags_;
};

template <bool kGpu>
class Forward : public Base {
 public:
  using Base::Base;
  void Compute(OpKernelContext* c) override {
    const Tensor &x = c->input(0), &kernel = c->input(1), &bias = c->input(2);
    Conv2DTransposeProblem p;
    OP_REQUIRES_OK(c, Problem(x, kernel, &p));
    OP_REQUIRES_OK(c, Invalid("conv2d_transpose_bias_relu", CheckDims("bias", ToDims(bias.shape()), {p.filters})));
    TensorShape y_shape;
    OP_REQUIRES_OK(c, ToShape(p.y_dims(), &y_shape));
    Tensor* y = nullptr;
    OP_REQUIRES_OK(c, c->allocate_output(0, y_shape, &y));
    if (p.batch == 0) return;
    const Conv2DTransposeForward data = {x.data(), kernel.data(), bias.data(), y->data()};
    if constexpr (kGpu) {
#ifdef UNET_FAST_CUDA
      Tensor storage;
      void* workspace;
      OP_REQUIRES_OK(c, GpuWorkspace(c, gpu::Conv2DTransposeBiasReluWorkspaceBytes(p), &storage, &workspace));
      OP_REQUIRES_OK(
          c, GpuStatus("conv2d_transpose_bias_relu", gpu::Conv2DTransposeBiasRelu(GpuStream(c), p, data, workspace)));
#endif
    } else {
      OpThreadPool pool(c);
      cpu::Conv2DTransposeBiasRelu(pool, p, data);
    }
  }
};

template <bool kGpu>
class Grad : public Base {
 public:
  explicit Grad(OpKernelConstruction* c) : Base(c) {
    OP_REQUIRES_OK(c, c->GetAttr("num_dx", &num_dx_));
    OP_REQUIRES_OK(c, c->GetAttr("input_is_relu", &input_is_relu_));
    OP_REQUIRES_OK(c, c->GetAttr("dy_is_masked", &dy_is_masked_));
  }
  void Compute(OpKernelContext* c) override {
    const Tensor &dy = c->input(0), &y = c->input(1), &x = c->input(2), &kernel = c->input(3);
    Conv2DTransposeProblem p;
    OP_REQUIRES_OK(c, Problem(x, kernel, &p));
    p.input_is_relu = input_is_relu_, p.dy_is_masked = dy_is_masked_;
    const char* op = "conv2d_transpose_bias_relu gradient";
    OP_REQUIRES_OK(c, Invalid(op, CheckDims("dy", ToDims(dy.shape()), p.y_dims())));
    OP_REQUIRES_OK(c, Invalid(op, CheckDims("y", ToDims(y.shape()), p.y_dims())));
    Tensor *dx = nullptr, *dkernel = nullptr, *dbias = nullptr;
    if (num_dx_ == 1) OP_REQUIRES_OK(c, c->allocate_output(0, x.shape(), &dx));
    OP_REQUIRES_OK(c, c->allocate_output(num_dx_, kernel.shape(), &dkernel));
    OP_REQUIRES_OK(c, c->allocate_output(num_dx_ + 1, TensorShape({p.filters}), &dbias));
    const Conv2DTransposeGradient data = {
        dy.data(),       y.data(),     x.data(), kernel.data(), dx != nullptr ? dx->data() : nullptr,
        dkernel->data(), dbias->data()};
    if constexpr (kGpu) {
#ifdef UNET_FAST_CUDA
      Tensor storage;
      void* workspace;
      OP_REQUIRES_OK(c, GpuWorkspace(c, gpu::Conv2DTransposeBiasReluGradWorkspaceBytes(p), &storage, &workspace));
      OP_REQUIRES_OK(c, GpuStatus(op, gpu::Conv2DTransposeBiasReluGrad(GpuStream(c), p, data, workspace)));
#endif
    } else {
      OpThreadPool pool(c);
      cpu::Conv2DTransposeBiasReluGrad(pool, p, data);
    }
  }

 private:
  int num_dx_ = 0;
  bool input_is_relu_ = false, dy_is_masked_ = false;
};

REGISTER_OP("UnetFastConv2DTransposeBiasRelu")
    .Input("x: T")
    .Input("kernel: T")
    .Input("bias: T")
    .Output("y: T")
    .Attr("T: {float, half, bfloat16}")
    .Attr("activation: {'relu', 'linear'} = 'relu'")
    .SetShapeFn(ForwardShape);

REGISTER_OP("UnetFastConv2DTransposeBiasReluGrad")
    .Input("dy: T")
    .Input("y: T")
    .Input("x: T")
    .Input("kernel: T")
    .Output("dx: num_dx * T")
    .Output("dkernel: T")
    .Output("dbias: T")
    .Attr("T: {float, half, bfloat16}")
    .Attr("num_dx: int >= 0 = 1")
    .Attr("activation: {'relu', 'linear'} = 'relu'")
    .Attr("input_is_relu: bool = false")
    .Attr("dy_is_masked: bool = false")
    .SetShapeFn(GradShape);

UNET_FAST_REGISTER_KERNELS("UnetFastConv2DTransposeBiasRelu", Forward);
UNET_FAST_REGISTER_KERNELS("UnetFastConv2DTransposeBiasReluGrad", Grad);

}  // namespace
}  // namespace unet_fast::conv2d_transpose_bias_relu_kernels
