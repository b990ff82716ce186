// Handlers of the custom calls that xla/conv2d_bias_relu.cc emits; shapes were checked there.
#include "conv/cpu/conv2d.h"
#include "xla/handler.h"

namespace unet_fast {
namespace {

Conv2DProblem Problem(const ffi::AnyBuffer& x, const ffi::AnyBuffer* skip, const ffi::AnyBuffer& kernel, int64_t same,
                      int64_t relu, int64_t num_pooled, int64_t input_is_relu, std::string* error) {
  Conv2DProblem p;
  p.dtype = ToDType(x.element_type());
  p.same = same, p.relu = relu, p.pool = num_pooled == 1, p.input_is_relu = input_is_relu;
  const Dims skip_dims = skip != nullptr ? ToDims(*skip) : Dims();
  *error = p.SetDims(ToDims(x), skip != nullptr ? &skip_dims : nullptr, ToDims(kernel));
  return p;
}

ffi::Error Forward(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t same,
                   int64_t relu, int64_t num_skip, int64_t num_pooled, int64_t input_is_relu) {
  Cursor at(args, rets);
  const ffi::AnyBuffer x = at.Arg(), skip = num_skip == 1 ? at.Arg() : x, kernel = at.Arg(), bias = at.Arg();
  std::string error;
  const Conv2DProblem p =
      Problem(x, num_skip == 1 ? &skip : nullptr, kernel, same, relu, num_pooled, input_is_relu, &error);
  if (!error.empty()) return ToError("conv2d_bias_relu", error);
  FfiThreadPool pool(threads);
  cpu::Conv2DForward data;
  data.x = x.untyped_data(), data.skip = num_skip == 1 ? skip.untyped_data() : nullptr;
  data.kernel = kernel.untyped_data(), data.bias = bias.untyped_data();
  data.y = at.Ret(), data.pooled = p.pool ? at.Ret() : nullptr;
  cpu::Conv2DBiasRelu(pool, p, data);
  return ffi::Error::Success();
}

ffi::Error Grad(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t same, int64_t relu,
                int64_t num_skip, int64_t num_pooled, int64_t input_is_relu, int64_t num_dx, int64_t num_dskip) {
  Cursor at(args, rets);
  cpu::Conv2DGradient data;
  data.dy = at.Arg().untyped_data();
  data.dpooled = num_pooled == 1 ? at.Arg().untyped_data() : nullptr;
  data.y = at.Arg().untyped_data();
  const ffi::AnyBuffer x = at.Arg(), skip = num_skip == 1 ? at.Arg() : x, kernel = at.Arg();
  std::string error;
  const Conv2DProblem p =
      Problem(x, num_skip == 1 ? &skip : nullptr, kernel, same, relu, num_pooled, input_is_relu, &error);
  if (!error.empty()) return ToError("conv2d_bias_relu gradient", error);
  FfiThreadPool pool(threads);
  data.x = x.untyped_data(), data.skip = num_skip == 1 ? skip.untyped_data() : nullptr;
  data.kernel = kernel.untyped_data();
  data.dx = num_dx == 1 ? at.Ret() : nullptr, data.dskip = num_dskip == 1 ? at.Ret() : nullptr;
  data.dkernel = at.Ret(), data.dbias = at.Ret();
  cpu::Conv2DBiasReluGrad(pool, p, data);
  return ffi::Error::Success();
}

#define UNET_FAST_CONV2D_BINDING   \
  ffi::Ffi::Bind()                 \
      .Ctx<ffi::ThreadPool>()      \
      .RemainingArgs()             \
      .RemainingRets()             \
      .Attr<int64_t>("same")       \
      .Attr<int64_t>("relu")       \
      .Attr<int64_t>("num_skip")   \
      .Attr<int64_t>("num_pooled") \
      .Attr<int64_t>("input_is_relu")
XLA_FFI_DEFINE_HANDLER(kForwardHost, Forward, UNET_FAST_CONV2D_BINDING);
XLA_FFI_DEFINE_HANDLER(kGradHost, Grad, UNET_FAST_CONV2D_BINDING.Attr<int64_t>("num_dx").Attr<int64_t>("num_dskip"));
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_conv2d_bias_relu", "Host", kForwardHost);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_conv2d_bias_relu_grad", "Host", kGradHost);

}  // namespace
}  // namespace unet_fast
