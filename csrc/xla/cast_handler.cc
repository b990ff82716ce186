// Handler of the custom call that xla/cast.cc emits, for the GPU alone.
#ifdef UNET_FAST_CUDA
#include "cast/gpu.h"

#include "xla/handler.h"

namespace unet_fast {
namespace {

ffi::Error Cast(void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  std::vector<gpu::CastArray> arrays;
  DType type = DType::kFloat16;
  for (size_t i = 0; i < args.size(); ++i) {
    const ffi::AnyBuffer x = *args.get<ffi::AnyBuffer>(i);
    ffi::Result<ffi::AnyBuffer> y = *rets.get<ffi::AnyBuffer>(i);
    type = ToDType(y->element_type());
    arrays.push_back({x.untyped_data(), y->untyped_data(), static_cast<int64_t>(x.element_count())});
  }
  return GpuError("cast", gpu::Cast(stream, type, arrays));
}

UNET_FAST_DEFINE_GPU_HANDLER(kCuda, Cast, ffi::Ffi::Bind().Ctx<FfiStream>().RemainingArgs().RemainingRets());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_cast", "CUDA", kCuda);

}  // namespace
}  // namespace unet_fast
#endif
