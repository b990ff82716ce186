// UnetFastConv2DBiasRelu and its gradient: definition, shape functions, CPU and GPU kernels.
#include "conv/cpu/conv2d.h"
#include "tensorflow/common.h"
#include "tensorflow/core/framework/op.h"
#ifdef UNET_FAST_CUDA
#include "conv/gpu.h"
#endif

namespace unet_fast::conv2d_bias_relu_kernels {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

absl::Status OptionalCounts(InferenceContext* c, std::initializer_list<const char*> names) {
  for (const char* name : names) {
    int count;
    TF_RETURN_IF_ERROR(c->GetAttr(name, &count));
    if (count > 1) return absl::InvalidArgumentError(std::string(name) + ": expected 0 or 1");
  }
  return absl::OkStatus();
}

absl::Status ForwardShape(InferenceContext* c) {
  TF_RETURN_IF_ERROR(OptionalCounts(c, {"num_skip", "num_pooled"}));
  int num_skip, num_pooled;
  std::string padding;
  TF_RETURN_IF_ERROR(c->GetAttr("num_skip", &num_skip));
  TF_RETURN_IF_ERROR(c->GetAttr("num_pooled", &num_pooled));
  TF_RETURN_IF_ERROR(c->GetAttr("padding", &padding));
  const auto named = [](const char* expected, const absl::Status& status) {
    return Named("conv2d_bias_relu", expected, status);
  };
  ShapeHandle x, skip, kernel, bias;
  TF_RETURN_IF_ERROR(named("x: expected a shape [batch, height, width, channels]", c->WithRank(c->input(0), 4, &x)));
  TF_RETURN_IF_ERROR(
      named("kernel: expected a shape [k, k, channels, filters]", c->WithRank(c->input(1 + num_skip), 4, &kernel)));
  TF_RETURN_IF_ERROR(named("bias: expected a shape [filters]", c->WithRank(c->input(2 + num_skip), 1, &bias)));
  DimensionHandle batch = c->Dim(x, 0), channels = c->Dim(x, 3), filters, square;
  if (num_skip == 1) {
    TF_RETURN_IF_ERROR(
        named("skip: expected a shape [batch, height, width, channels]", c->WithRank(c->input(1), 4, &skip)));
    TF_RETURN_IF_ERROR(named("skip: expected x's batch", c->Merge(batch, c->Dim(skip, 0), &batch)));
    TF_RETURN_IF_ERROR(named("skip: expected fewer channels", c->Add(channels, c->Dim(skip, 3), &channels)));
  }
  TF_RETURN_IF_ERROR(named("kernel: expected 3x3 or 1x1", c->Merge(c->Dim(kernel, 0), c->Dim(kernel, 1), &square)));
  TF_RETURN_IF_ERROR(named("kernel: expected x's and skip's channels in its third dimension",
                           c->Merge(c->Dim(kernel, 2), channels, &channels)));
  TF_RETURN_IF_ERROR(
      named("bias: expected the kernel's filters", c->Merge(c->Dim(kernel, 3), c->Dim(bias, 0), &filters)));
  DimensionHandle out[2], half[2];
  for (int i = 0; i < 2; ++i) {
    out[i] = c->Dim(x, 1 + i);
    if (padding == "valid") {
      if (!c->ValueKnown(square) || !c->ValueKnown(out[i])) {
        out[i] = c->UnknownDim();
      } else {
        TF_RETURN_IF_ERROR(named("x: expected at least the kernel's rows and columns",
                                 c->Subtract(out[i], c->Value(square) - 1, &out[i])));
      }
    }
    TF_RETURN_IF_ERROR(c->Divide(out[i], 2, /*evenly_divisible=*/false, &half[i]));
  }
  c->set_output(0, c->MakeShape({batch, out[0], out[1], filters}));
  if (num_pooled == 1) c->set_output(1, c->MakeShape({batch, half[0], half[1], filters}));
  return absl::OkStatus();
}

absl::Status GradShape(InferenceContext* c) {
  TF_RETURN_IF_ERROR(OptionalCounts(c, {"num_skip", "num_pooled", "num_dx", "num_dskip"}));
  int num_skip, num_pooled, num_dx, num_dskip;
  TF_RETURN_IF_ERROR(c->GetAttr("num_skip", &num_skip));
  TF_RETURN_IF_ERROR(c->GetAttr("num_pooled", &num_pooled));
  TF_RETURN_IF_ERROR(c->GetAttr("num_dx", &num_dx));
  TF_RETURN_IF_ERROR(c->GetAttr("num_dskip", &num_dskip));
  if (num_dskip > num_skip) return absl::InvalidArgumentError("num_dskip: expected at most num_skip");
  const int first = 2 + num_pooled;
  ShapeHandle dy, x, skip, kernel;
  int output = 0;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 4, &dy));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(first), 4, &x));
  if (num_dx == 1) c->set_output(output++, x);
  if (num_skip == 1) TF_RETURN_IF_ERROR(c->WithRank(c->input(first + 1), 4, &skip));
  if (num_dskip == 1) {
    c->set_output(output++, c->MakeShape({c->Dim(x, 0), c->Dim(x, 1), c->Dim(x, 2), c->Dim(skip, 3)}));
  }
  TF_RETURN_IF_ERROR(c->WithRank(c->input(first + 1 + num_skip), 4, &kernel));
  c->set_output(output++, kernel);
  c->set_output(output, c->Vector(c->Dim(kernel, 3)));
  return absl::OkStatus();
}

class Base : public OpKernel {
 public:
  explicit Base(OpKernelConstruction* c) : OpKernel(c) {
    std::string padding, activation;
    OP_REQUIRES_OK(c, c->GetAttr("padding", &padding));
    OP_REQUIRES_OK(c, c->GetAttr("activation", &activation));
    OP_REQUIRES_OK(c, c->GetAttr("num_skip", &num_skip_));
    OP_REQUIRES_OK(c, c->GetAttr("num_pooled", &num_pooled_));
    flags_.same = padding == "same";
    flags_.relu = activation == "relu";
    flags_.pool = num_pooled_ == 1;
  }

 protected:
  absl::Status Problem(const Tensor& x, const Tensor* skip, const Tensor& kernel, Conv2DProblem* problem) const {
    *problem = flags_;
    problem->dtype = ToDType(x.dtype());
    const Dims skip_dims = skip != nullptr ? ToDims(skip->shape()) : Dims();
    return Invalid("conv2d_bias_relu",
                   problem->SetDims(ToDims(x.shape()), skip != nullptr ? &skip_dims : nullptr, ToDims(kernel.shape())));
  }
  Conv2DProblem flags_;
  int num_skip_ = 0, num_pooled_ = 0;
};

template <bool kGpu>
class Forward : public Base {
 public:
  using Base::Base;
  void Compute(OpKernelContext* c) override {
    const Tensor &x = c->input(0), &kernel = c->input(1 + num_skip_), &bias = c->input(2 + num_skip_);
    const Tensor* skip = num_skip_ == 1 ? &c->input(1) : nullptr;
    Conv2DProblem p;
    OP_REQUIRES_OK(c, Problem(x, skip, kernel, &p));
    OP_REQUIRES_OK(c, Invalid("conv2d_bias_relu", CheckDims("bias", ToDims(bias.shape()), {p.filters})));
    TensorShape y_shape, pooled_shape;
    OP_REQUIRES_OK(c, ToShape(p.y_dims(), &y_shape));
    OP_REQUIRES_OK(c, ToShape(p.pooled_dims(), &pooled_shape));
    Tensor *y = nullptr, *pooled = nullptr;
    OP_REQUIRES_OK(c, c->allocate_output(0, y_shape, &y));
    if (p.pool) OP_REQUIRES_OK(c, c->allocate_output(1, pooled_shape, &pooled));
    if (p.batch == 0) return;
    const Conv2DForward data = {x.data(),  skip != nullptr ? skip->data() : nullptr,    kernel.data(), bias.data(),
                                y->data(), pooled != nullptr ? pooled->data() : nullptr};
    if constexpr (kGpu) {
#ifdef UNET_FAST_CUDA
      Tensor storage;
      void* workspace;
      OP_REQUIRES_OK(c, GpuWorkspace(c, gpu::Conv2DBiasReluWorkspaceBytes(p), &storage, &workspace));
      OP_REQUIRES_OK(c, GpuStatus("conv2d_bias_relu", gpu::Conv2DBiasRelu(GpuStream(c), p, data, workspace)));
#endif
    } else {
      OpThreadPool pool(c);
      cpu::Conv2DBiasRelu(pool, p, data);
    }
  }
};

template <bool kGpu>
class Grad : public Base {
 public:
  explicit Grad(OpKernelConstruction* c) : Base(c) {
    OP_REQUIRES_OK(c, c->GetAttr("mask_dx", &flags_.mask_dx));
    OP_REQUIRES_OK(c, c->GetAttr("mask_dskip", &flags_.mask_dskip));
    OP_REQUIRES_OK(c, c->GetAttr("dy_is_masked", &flags_.dy_is_masked));
    OP_REQUIRES_OK(c, c->GetAttr("num_dx", &num_dx_));
    OP_REQUIRES_OK(c, c->GetAttr("num_dskip", &num_dskip_));
  }
  void Compute(OpKernelContext* c) override {
    const Tensor &dy = c->input(0), &y = c->input(1 + num_pooled_), &x = c->input(2 + num_pooled_);
    const Tensor* dpooled = num_pooled_ == 1 ? &c->input(1) : nullptr;
    const Tensor* skip = num_skip_ == 1 ? &c->input(3 + num_pooled_) : nullptr;
    const Tensor& kernel = c->input(3 + num_pooled_ + num_skip_);
    Conv2DProblem p;
    OP_REQUIRES_OK(c, Problem(x, skip, kernel, &p));
    const char* op = "conv2d_bias_relu gradient";
    OP_REQUIRES_OK(c, Invalid(op, p.SetDyDims(ToDims(dy.shape()))));
    OP_REQUIRES_OK(c, Invalid(op, CheckDims("y", ToDims(y.shape()), p.y_dims())));
    if (p.pool) OP_REQUIRES_OK(c, Invalid(op, CheckDims("dpooled", ToDims(dpooled->shape()), p.pooled_dims())));
    int output = 0;
    TensorShape dskip_shape;
    OP_REQUIRES_OK(c, ToShape(p.dskip_dims(), &dskip_shape));
    Tensor *dx = nullptr, *dskip = nullptr, *dkernel = nullptr, *dbias = nullptr;
    if (num_dx_ == 1) OP_REQUIRES_OK(c, c->allocate_output(output++, x.shape(), &dx));
    if (num_dskip_ == 1) OP_REQUIRES_OK(c, c->allocate_output(output++, dskip_shape, &dskip));
    OP_REQUIRES_OK(c, c->allocate_output(output++, kernel.shape(), &dkernel));
    OP_REQUIRES_OK(c, c->allocate_output(output, TensorShape({p.filters}), &dbias));
    const auto at = [](const Tensor* t) { return t != nullptr ? t->data() : nullptr; };
    const Conv2DGradient data = {dy.data(),     at(dpooled), y.data(),  x.data(),        at(skip),
                                 kernel.data(), at(dx),      at(dskip), dkernel->data(), dbias->data()};
    if constexpr (kGpu) {
#ifdef UNET_FAST_CUDA
      Tensor storage;
      void* workspace;
      OP_REQUIRES_OK(c, GpuWorkspace(c, gpu::Conv2DBiasReluGradWorkspaceBytes(p), &storage, &workspace));
      OP_REQUIRES_OK(c, GpuStatus(op, gpu::Conv2DBiasReluGrad(GpuStream(c), p, data, workspace)));
#endif
    } else {
      OpThreadPool pool(c);
      cpu::Conv2DBiasReluGrad(pool, p, data);
    }
  }

 private:
  int num_dx_ = 0, num_dskip_ = 0;
};

REGISTER_OP("UnetFastConv2DBiasRelu")
    .Input("x: T")
    .Input("skip: num_skip * T")
    .Input("kernel: T")
    .Input("bias: T")
    .Output("y: T")
    .Output("pooled: num_pooled * T")
    .Attr("T: {float, half, bfloat16}")
    .Attr("num_skip: int >= 0 = 0")
    .Attr("num_pooled: int >= 0 = 0")
    .Attr("padding: {'valid', 'same'} = 'valid'")
    .Attr("activation: {'relu', 'linear'} = 'relu'")
    .Attr("input_is_relu: bool = false")  // for the gradient
    .SetShapeFn(ForwardShape);

REGISTER_OP("UnetFastConv2DBiasReluGrad")
    .Input("dy: T")  // of y's size, or of its centre alone
    .Input("dpooled: num_pooled * T")
    .Input("y: T")
    .Input("x: T")
    .Input("skip: num_skip * T")
    .Input("kernel: T")
    .Output("dx: num_dx * T")
    .Output("dskip: num_dskip * T")  // of the crop: of x's height and width
    .Output("dkernel: T")
    .Output("dbias: T")
    .Attr("T: {float, half, bfloat16}")
    .Attr("num_skip: int >= 0 = 0")
    .Attr("num_pooled: int >= 0 = 0")
    .Attr("num_dx: int >= 0 = 1")
    .Attr("num_dskip: int >= 0 = 0")
    .Attr("padding: {'valid', 'same'} = 'valid'")
    .Attr("activation: {'relu', 'linear'} = 'relu'")
    .Attr("mask_dx: bool = false")
    .Attr("mask_dskip: bool = false")
    .Attr("dy_is_masked: bool = false")
    .SetShapeFn(GradShape);

UNET_FAST_REGISTER_KERNELS("UnetFastConv2DBiasRelu", Forward);
UNET_FAST_REGISTER_KERNELS("UnetFastConv2DBiasReluGrad", Grad);

}  // namespace
}  // namespace unet_fast::conv2d_bias_relu_kernels
