// Handlers of the custom calls that xla/conv2d_transpose_bias_relu.cc emits; shapes were checked there.
#include "conv/cpu/conv2d.h"
#include "xla/handler.h"

namespace unet_fast {
namespace {

Conv2DTransposeProblem Problem(const ffi::AnyBuffer& x, const ffi::AnyBuffer& kernel, int64_t relu,
                               std::string* error) {
  Conv2DTransposeProblem p;
  p.dtype = ToDType(x.element_type());
  p.relu = relu;
  *error = p.SetDims(ToDims(x), ToDims(kernel));
  return p;
}

ffi::Error Forward(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t relu) {
  Cursor at(args, rets);
  const ffi::AnyBuffer x = at.Arg(), kernel = at.Arg(), bias = at.Arg();
  std::string error;
  const Conv2DTransposeProblem p = Problem(x, kernel, relu, &error);
  if (!error.empty()) return ToError("conv2d_transpose_bias_relu", error);
  FfiThreadPool pool(threads);
  cpu::Conv2DTransposeBiasRelu(pool, p, {x.untyped_data(), kernel.untyped_data(), bias.untyped_data(), at.Ret()});
  return ffi::Error::Success();
}

ffi::Error Grad(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t relu,
                int64_t num_dx) {
  Cursor at(args, rets);
  const ffi::AnyBuffer dy = at.Arg(), y = at.Arg(), x = at.Arg(), kernel = at.Arg();
  std::string error;
  const Conv2DTransposeProblem p = Problem(x, kernel, relu, &error);
  if (!error.empty()) return ToError("conv2d_transpose_bias_relu gradient", error);
  FfiThreadPool pool(threads);
  cpu::Conv2DTransposeGradient data;
  data.dy = dy.untyped_data(), data.y = y.untyped_data(), data.x = x.untyped_data(),
  data.kernel = kernel.untyped_data();
  data.dx = num_dx == 1 ? at.Ret() : nullptr;
  data.dkernel = at.Ret(), data.dbias = at.Ret();
  cpu::Conv2DTransposeBiasReluGrad(pool, p, data);
  return ffi::Error::Success();
}

#define UNET_FAST_TRANSPOSE_BINDING \
  ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int64_t>("relu")
XLA_FFI_DEFINE_HANDLER(kForwardHost, Forward, UNET_FAST_TRANSPOSE_BINDING);
XLA_FFI_DEFINE_HANDLER(kGradHost, Grad, UNET_FAST_TRANSPOSE_BINDING.Attr<int64_t>("num_dx"));
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_conv2d_transpose_bias_relu", "Host", kForwardHost);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_conv2d_transpose_bias_relu_grad", "Host", kGradHost);

}  // namespace
}  // namespace unet_fast
