// Handlers of the custom calls that xla/max_pool2d.cc emits.
#include "pool/max_pool2d.h"

#include "xla/handler.h"

namespace unet_fast {
namespace {

ffi::Error Forward(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  FfiThreadPool pool(threads);
  const Dims d = ToDims(x);
  cpu::MaxPool2D(pool, ToDType(x.element_type()), d[0], d[1], d[2], d[3], x.untyped_data(), y->untyped_data());
  return ffi::Error::Success();
}

ffi::Error Grad(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::Result<ffi::AnyBuffer> dx) {
  const Dims d = ToDims(x);
  const std::string error = CheckDims("dy", ToDims(dy), {d[0], d[1] / 2, d[2] / 2, d[3]});
  if (!error.empty()) return ToError("max_pool2d gradient", error);
  FfiThreadPool pool(threads);
  cpu::MaxPool2DGrad(pool, ToDType(x.element_type()), d[0], d[1], d[2], d[3], x.untyped_data(), dy.untyped_data(),
                     dx->untyped_data());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kForwardHost, Forward,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER(
    kGradHost, Grad,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_max_pool2d", "Host", kForwardHost);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_max_pool2d_grad", "Host", kGradHost);

}  // namespace
}  // namespace unet_fast
