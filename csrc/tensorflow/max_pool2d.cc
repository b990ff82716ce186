// UnetFastMaxPool2D and its gradient: definition, shape functions, CPU and GPU kernels.
#include "pool/max_pool2d.h"

#include "tensorflow/common.h"
#include "tensorflow/core/framework/op.h"
#ifdef UNET_FAST_CUDA
#include "pool/gpu.h"
#endif

namespace unet_fast::max_pool2d_kernels {
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
  TF_RETURN_IF_ERROR(
      Named("max_pool2d", "x: expected a shape [batch, height, width, channels]", c->WithRank(c->input(0), 4, &x)));
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

template <bool kGpu>
class Forward : public OpKernel {
 public:
  using OpKernel::OpKernel;
  void Compute(OpKernelContext* c) override {
    const Tensor& x = c->input(0);
    OP_REQUIRES_OK(c, CheckX(x));
    Tensor* y = nullptr;
    OP_REQUIRES_OK(c, c->allocate_output(
                          0, TensorShape({x.dim_size(0), x.dim_size(1) / 2, x.dim_size(2) / 2, x.dim_size(3)}), &y));
    const int64_t n = x.dim_size(0), h = x.dim_size(1), w = x.dim_size(2), channels = x.dim_size(3);
    if (y->NumElements() == 0) return;
    if constexpr (kGpu) {
#ifdef UNET_FAST_CUDA
      OP_REQUIRES_OK(c, GpuStatus("max_pool2d", gpu::MaxPool2D(GpuStream(c), ToDType(x.dtype()), n, h, w, channels,
                                                               x.data(), y->data())));
#endif
    } else {
      OpThreadPool pool(c);
      cpu::MaxPool2D(pool, ToDType(x.dtype()), n, h, w, channels, x.data(), y->data());
    }
  }
};

template <bool kGpu>
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
    const int64_t n = x.dim_size(0), h = x.dim_size(1), w = x.dim_size(2), channels = x.dim_size(3);
    if (x.NumElements() == 0) return;
    if constexpr (kGpu) {
#ifdef UNET_FAST_CUDA
      OP_REQUIRES_OK(
          c, GpuStatus("max_pool2d gradient", gpu::MaxPool2DGrad(GpuStream(c), ToDType(x.dtype()), n, h, w, channels,
                                                                 x.data(), dy.data(), dx->data())));
#endif
    } else {
      OpThreadPool pool(c);
      cpu::MaxPool2DGrad(pool, ToDType(x.dtype()), n, h, w, channels, x.data(), dy.data(), dx->data());
    }
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

UNET_FAST_REGISTER_KERNELS("UnetFastMaxPool2D", Forward);
UNET_FAST_REGISTER_KERNELS("UnetFastMaxPool2DGrad", Grad);

}  // namespace
}  // namespace unet_fast::max_pool2d_kernels
