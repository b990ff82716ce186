// UnetFastMaxPool2D and its gradient: definition, shape functions, CPU kernels.
#include "pool/max_pool2d.h"

#include "tensorflow/common.h"
#include "tensorflow/core/framework/op.h"

namespace unet_fast {
namespace {

using tensorflow::OpKernel;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

absl::Status ForwardShape(InferenceContext* c) {
  ShapeHandle x;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 4, &x));
  DimensionHandle half[2];
  for (int i = 0; i < 2; ++i) TF_RETURN_IF_ERROR(c->Divide(c->Dim(x, 1 + i), 2, /*evenly_divisible=*/false, &half[i]));
  c->set_output(0, c->MakeShape({c->Dim(x, 0), half[0], half[1], c->Dim(x, 3)}));
  return absl::OkStatus();
}

absl::Status CheckX(const Tensor& x) {
  if (x.dims() == 4) return absl::OkStatus();
  return Invalid("max_pool2d",
                 "x: expected a shape [batch, height, width, channels], got " + ToString(ToDims(x.shape())));
}

class Forward : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* c) override {
    const Tensor& x = c->input(0);
    OP_REQUIRES_OK(c, CheckX(x));
    Tensor* y = nullptr;
    OP_REQUIRES_OK(c, c->allocate_output(
                          0, TensorShape({x.dim_size(0), x.dim_size(1) / 2, x.dim_size(2) / 2, x.dim_size(3)}), &y));
    OpThreadPool pool(c);
    cpu::MaxPool2D(pool, ToDType(x.dtype()), x.dim_size(0), x.dim_size(1), x.dim_size(2), x.dim_size(3), x.data(),
                   y->data());
  }
};

class Grad : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* c) override {
    const Tensor &x = c->input(0), &dy = c->input(1);
    OP_REQUIRES_OK(c, CheckX(x));
    OP_REQUIRES_OK(c, Invalid("max_pool2d gradient",
                              CheckDims("dy", ToDims(dy.shape()),
                                        {x.dim_size(0), x.dim_size(1) / 2, x.dim_size(2) / 2, x.dim_size(3)})));
    Tensor* dx = nullptr;
    OP_REQUIRES_OK(c, c->allocate_output(0, x.shape(), &dx));
    OpThreadPool pool(c);
    cpu::MaxPool2DGrad(pool, ToDType(x.dtype()), x.dim_size(0), x.dim_size(1), x.dim_size(2), x.dim_size(3), x.data(),
                       dy.data(), dx->data());
  }
};

REGISTER_OP("UnetFastMaxPool2D")
    .Input("x: T")
    .Output("y: T")
    .Attr("T: {float, half, bfloat16}")
    .SetShapeFn(ForwardShape);

REGISTER_OP("UnetFastMaxPool2DGrad")
    .Input("x: T")
    .Input("dy: T")
    .Output("dx: T")
    .Attr("T: {float, half, bfloat16}")
    .SetShapeFn([](InferenceContext* c) {
      c->set_output(0, c->input(0));
      return absl::OkStatus();
    });

REGISTER_KERNEL_BUILDER(Name("UnetFastMaxPool2D").Device(tensorflow::DEVICE_CPU), Forward);
REGISTER_KERNEL_BUILDER(Name("UnetFastMaxPool2DGrad").Device(tensorflow::DEVICE_CPU), Grad);

}  // namespace
}  // namespace unet_fast
