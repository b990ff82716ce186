// Lowering of UnetFastMaxPool2D and its gradient.
#include "xla/lowering.h"

namespace unet_fast::max_pool2d_lowering {
namespace {

// Gives x's shape.
bool CheckX(tensorflow::XlaOpKernelContext* c, const char* op, Dims* x) {
  *x = ToDims(c->InputShape(0));
  if (x->size() == 4) return true;
  c->CtxFailure(Invalid(op, "x: expected a shape [batch, height, width, channels], got " + ToString(*x)));
  return false;
}

class Forward : public tensorflow::XlaOpKernel {
 public:
  using XlaOpKernel::XlaOpKernel;
  void Compile(tensorflow::XlaOpKernelContext* c) override {
    Dims x;
    if (!CheckX(c, "max_pool2d", &x)) return;
    EmitCustomCall(c, "unet_fast_max_pool2d", Attributes(),
                   {RowMajor(c->input_xla_type(0), {x[0], x[1] / 2, x[2] / 2, x[3]})});
  }
};

class Grad : public tensorflow::XlaOpKernel {
 public:
  using XlaOpKernel::XlaOpKernel;
  void Compile(tensorflow::XlaOpKernelContext* c) override {
    const char* op = "max_pool2d gradient";
    Dims x;
    if (!CheckX(c, op, &x)) return;
    OP_REQUIRES_OK(c, Invalid(op, CheckDims("dy", ToDims(c->InputShape(1)), {x[0], x[1] / 2, x[2] / 2, x[3]})));
    EmitCustomCall(c, "unet_fast_max_pool2d_grad", Attributes(), {RowMajor(c->input_xla_type(0), x)});
  }
};

UNET_FAST_REGISTER_XLA("UnetFastMaxPool2D", Forward);
UNET_FAST_REGISTER_XLA("UnetFastMaxPool2DGrad", Grad);

}  // namespace
}  // namespace unet_fast::max_pool2d_lowering
