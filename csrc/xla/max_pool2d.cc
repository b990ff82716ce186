// Lowering of UnetFastMaxPool2D and its gradient.
#include "xla/lowering.h"

namespace unet_fast::max_pool2d_lowering {
namespace {

class Forward : public tensorflow::XlaOpKernel {
 public:
  using XlaOpKernel::XlaOpKernel;
  void Compile(tensorflow::XlaOpKernelContext* c) override {
    const Dims x = ToDims(c->InputShape(0));
    OP_REQUIRES(c, x.size() == 4,
                Invalid("max_pool2d", "x: expected a shape [batch, height, width, channels], got " + ToString(x)));
    EmitCustomCall(c, "unet_fast_max_pool2d", Attributes(),
                   {RowMajor(c->input_xla_type(0), {x[0], x[1] / 2, x[2] / 2, x[3]})});
  }
};

class Grad : public tensorflow::XlaOpKernel {
 public:
  using XlaOpKernel::XlaOpKernel;
  void Compile(tensorflow::XlaOpKernelContext* c) override {
    EmitCustomCall(c, "unet_fast_max_pool2d_grad", Attributes(),
                   {RowMajor(c->input_xla_type(0), ToDims(c->InputShape(0)))});
  }
};

UNET_FAST_REGISTER_XLA("UnetFastMaxPool2D", Forward);
UNET_FAST_REGISTER_XLA("UnetFastMaxPool2DGrad", Grad);

}  // namespace
}  // namespace unet_fast::max_pool2d_lowering
