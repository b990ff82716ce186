// Handlers of the custom calls that xla/dice_cross_entropy.cc emits; shapes were checked there.
#include "loss/dice_cross_entropy.h"

#include "xla/handler.h"
#ifdef UNET_FAST_CUDA
#include "loss/gpu.h"
#endif

namespace unet_fast {
namespace {

// The attributes, in the order of UNET_FAST_LOSS_BINDING.
struct Flags {
  float dice_weight, ce_weight, smooth, label_smoothing;
  int64_t has_ignore_class, ignore_class, include_background, squared;

  DiceCrossEntropyProblem Problem(const ffi::AnyBuffer& labels, const ffi::AnyBuffer& logits) const {
    DiceCrossEntropyProblem p;
    p.dtype = ToDType(logits.element_type());
    p.label_type = labels.element_type() == ffi::DataType::U8    ? LabelType::kUInt8
                   : labels.element_type() == ffi::DataType::S32 ? LabelType::kInt32
                                                                 : LabelType::kInt64;
    const Dims dims = ToDims(logits);
    p.batch = dims.front(), p.classes = dims.back(), p.pixels = 1;
    for (size_t i = 1; i + 1 < dims.size(); ++i) p.pixels *= dims[i];
    p.dice_weight = dice_weight, p.ce_weight = ce_weight, p.smooth = smooth, p.label_smoothing = label_smoothing;
    p.has_ignore_class = has_ignore_class, p.ignore_class = ignore_class;
    p.include_background = include_background, p.squared = squared;
    return p;
  }
};

ffi::Error Forward(ffi::ThreadPool threads, ffi::AnyBuffer labels, ffi::AnyBuffer logits, ffi::Buffer<ffi::F32> weights,
                   ffi::ResultBuffer<ffi::F32> loss, ffi::ResultBuffer<ffi::F32> sums, ffi::ResultBuffer<ffi::F32> ce,
                   float dice_weight, float ce_weight, float smooth, float label_smoothing, int64_t has_ignore_class,
                   int64_t ignore_class, int64_t include_background, int64_t squared) {
  const Flags flags = {dice_weight,  ce_weight,          smooth, label_smoothing, has_ignore_class,
                       ignore_class, include_background, squared};
  const DiceCrossEntropyProblem p = flags.Problem(labels, logits);
  FfiThreadPool pool(threads);
  const BadLabel bad =
      cpu::DiceCrossEntropy(pool, p, labels.untyped_data(), logits.untyped_data(), weights.typed_data(),
                            loss->typed_data(), sums->typed_data(), ce->typed_data());
  return ToError("dice_cross_entropy", bad.Message(p));
}

ffi::Error Grad(ffi::ThreadPool threads, ffi::Buffer<ffi::F32> dloss, ffi::AnyBuffer labels, ffi::AnyBuffer logits,
                ffi::Buffer<ffi::F32> weights, ffi::Buffer<ffi::F32> sums, ffi::Buffer<ffi::F32> ce,
                ffi::Result<ffi::AnyBuffer> dlogits, float dice_weight, float ce_weight, float smooth,
                float label_smoothing, int64_t has_ignore_class, int64_t ignore_class, int64_t include_background,
                int64_t squared) {
  const Flags flags = {dice_weight,  ce_weight,          smooth, label_smoothing, has_ignore_class,
                       ignore_class, include_background, squared};
  FfiThreadPool pool(threads);
  cpu::DiceCrossEntropyGrad(pool, flags.Problem(labels, logits), dloss.typed_data(), labels.untyped_data(),
                            logits.untyped_data(), weights.typed_data(), sums.typed_data(), ce.typed_data(),
                            dlogits->untyped_data());
  return ffi::Error::Success();
}

#define UNET_FAST_LOSS_ATTRIBUTES(BINDING) \
  BINDING.Attr<float>("dice_weight")       \
      .Attr<float>("ce_weight")            \
      .Attr<float>("smooth")               \
      .Attr<float>("label_smoothing")      \
      .Attr<int64_t>("has_ignore_class")   \
      .Attr<int64_t>("ignore_class")       \
      .Attr<int64_t>("include_background") \
      .Attr<int64_t>("squared")
using F32 = ffi::Buffer<ffi::F32>;
XLA_FFI_DEFINE_HANDLER(kForwardHost, Forward,
                       UNET_FAST_LOSS_ATTRIBUTES(ffi::Ffi::Bind()
                                                     .Ctx<ffi::ThreadPool>()
                                                     .Arg<ffi::AnyBuffer>()
                                                     .Arg<ffi::AnyBuffer>()
                                                     .Arg<F32>()
                                                     .Ret<F32>()
                                                     .Ret<F32>()
                                                     .Ret<F32>()));
XLA_FFI_DEFINE_HANDLER(kGradHost, Grad,
                       UNET_FAST_LOSS_ATTRIBUTES(ffi::Ffi::Bind()
                                                     .Ctx<ffi::ThreadPool>()
                                                     .Arg<F32>()
                                                     .Arg<ffi::AnyBuffer>()
                                                     .Arg<ffi::AnyBuffer>()
                                                     .Arg<F32>()
                                                     .Arg<F32>()
                                                     .Arg<F32>()
                                                     .Ret<ffi::AnyBuffer>()));
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_dice_cross_entropy", "Host", kForwardHost);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_dice_cross_entropy_grad", "Host", kGradHost);

#ifdef UNET_FAST_CUDA
ffi::Error ForwardGpu(void* stream, ffi::AnyBuffer labels, ffi::AnyBuffer logits, F32 weights,
                      ffi::ResultBuffer<ffi::F32> loss, ffi::ResultBuffer<ffi::F32> sums,
                      ffi::ResultBuffer<ffi::F32> ce, ffi::Result<ffi::AnyBuffer> workspace, float dice_weight,
                      float ce_weight, float smooth, float label_smoothing, int64_t has_ignore_class,
                      int64_t ignore_class, int64_t include_background, int64_t squared) {
  const Flags flags = {dice_weight,  ce_weight,          smooth, label_smoothing, has_ignore_class,
                       ignore_class, include_background, squared};
  return GpuError("dice_cross_entropy",
                  gpu::DiceCrossEntropy(stream, flags.Problem(labels, logits), labels.untyped_data(),
                                        logits.untyped_data(), weights.typed_data(), loss->typed_data(),
                                        sums->typed_data(), ce->typed_data(), workspace->untyped_data()));
}

ffi::Error GradGpu(void* stream, F32 dloss, ffi::AnyBuffer labels, ffi::AnyBuffer logits, F32 weights, F32 sums, F32 ce,
                   ffi::Result<ffi::AnyBuffer> dlogits, float dice_weight, float ce_weight, float smooth,
                   float label_smoothing, int64_t has_ignore_class, int64_t ignore_class, int64_t include_background,
                   int64_t squared) {
  const Flags flags = {dice_weight,  ce_weight,          smooth, label_smoothing, has_ignore_class,
                       ignore_class, include_background, squared};
  return GpuError("dice_cross_entropy gradient",
                  gpu::DiceCrossEntropyGrad(stream, flags.Problem(labels, logits), dloss.typed_data(),
                                            labels.untyped_data(), logits.untyped_data(), weights.typed_data(),
                                            sums.typed_data(), ce.typed_data(), dlogits->untyped_data()));
}

UNET_FAST_DEFINE_GPU_HANDLER(kForwardCuda, ForwardGpu,
                             UNET_FAST_LOSS_ATTRIBUTES(ffi::Ffi::Bind()
                                                           .Ctx<FfiStream>()
                                                           .Arg<ffi::AnyBuffer>()
                                                           .Arg<ffi::AnyBuffer>()
                                                           .Arg<F32>()
                                                           .Ret<F32>()
                                                           .Ret<F32>()
                                                           .Ret<F32>()
                                                           .Ret<ffi::AnyBuffer>()));
UNET_FAST_DEFINE_GPU_HANDLER(kGradCuda, GradGpu,
                             UNET_FAST_LOSS_ATTRIBUTES(ffi::Ffi::Bind()
                                                           .Ctx<FfiStream>()
                                                           .Arg<F32>()
                                                           .Arg<ffi::AnyBuffer>()
                                                           .Arg<ffi::AnyBuffer>()
                                                           .Arg<F32>()
                                                           .Arg<F32>()
                                                           .Arg<F32>()
                                                           .Ret<ffi::AnyBuffer>()));
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_dice_cross_entropy", "CUDA", kForwardCuda);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_dice_cross_entropy_grad", "CUDA", kGradCuda);
#endif

}  // namespace
}  // namespace unet_fast
