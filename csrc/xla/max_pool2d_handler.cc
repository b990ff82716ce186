// Handlers of the custom calls that xla/max_pool2d.cc emits; shapes were checked there.
#include "pool/max_pool2d.h"

#include "xla/handler.h"
#ifdef UNET_FAST_CUDA
#include "pool/gpu.h"
#endif

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

#ifdef UNET_FAST_CUDA
ffi::Error ForwardGpu(void* stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  const Dims d = ToDims(x);
  if (y->element_count() == 0) return ffi::Error::Success();
  return GpuError("max_pool2d", gpu::MaxPool2D(stream, ToDType(x.element_type()), d[0], d[1], d[2], d[3],
                                               x.untyped_data(), y->untyped_data()));
}

ffi::Error GradGpu(void* stream, ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::Result<ffi::AnyBuffer> dx) {
  const Dims d = ToDims(x);
  if (x.element_count() == 0) return ffi::Error::Success();
  return GpuError("max_pool2d gradient", gpu::MaxPool2DGrad(stream, ToDType(x.element_type()), d[0], d[1], d[2], d[3],
                                                            x.untyped_data(), dy.untyped_data(), dx->untyped_data()));
}

UNET_FAST_DEFINE_GPU_HANDLER(kForwardCuda, ForwardGpu,
                             ffi::Ffi::Bind().Ctx<FfiStream>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
UNET_FAST_DEFINE_GPU_HANDLER(
    kGradCuda, GradGpu,
    ffi::Ffi::Bind().Ctx<FfiStream>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_max_pool2d", "CUDA", kForwardCuda);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_max_pool2d_grad", "CUDA", kGradCuda);
#endif

}  // namespace
}  // namespace unet_fast
