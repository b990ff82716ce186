// Handlers of the custom calls that xla/conv2d_bias_relu.cc emits; shapes were checked there.
#include "conv/cpu/conv2d.h"
#include "xla/handler.h"
#ifdef UNET_FAST_CUDA
#include "conv/gpu.h"
#endif

namespace unet_fast {
namespace {

constexpr char kOp[] = "conv2d_bias_relu", kGradOp[] = "conv2d_bias_relu gradient";

// The attributes that both calls have.
struct Flags {
  int64_t same, relu, num_skip, num_pooled;
};

// Those of the gradient's alone.
struct GradFlags {
  int64_t num_dx, num_dskip, dy_is_masked, mask_dx, mask_dskip;
};

Conv2DProblem Problem(const ffi::AnyBuffer& x, const ffi::AnyBuffer* skip, const ffi::AnyBuffer& kernel,
                      const Flags& flags, std::string* error) {
  Conv2DProblem p;
  p.dtype = ToDType(x.element_type());
  p.same = flags.same, p.relu = flags.relu, p.pool = flags.num_pooled == 1;
  const Dims skip_dims = skip != nullptr ? ToDims(*skip) : Dims();
  *error = p.SetDims(ToDims(x), skip != nullptr ? &skip_dims : nullptr, ToDims(kernel));
  return p;
}

// The operands and results in their order, and the problem that they pose.
std::string ReadForward(Cursor* at, const Flags& flags, Conv2DProblem* p, Conv2DForward* data) {
  const ffi::AnyBuffer x = at->Arg(), skip = flags.num_skip == 1 ? at->Arg() : x, kernel = at->Arg(), bias = at->Arg();
  std::string error;
  *p = Problem(x, flags.num_skip == 1 ? &skip : nullptr, kernel, flags, &error);
  data->x = x.untyped_data(), data->skip = flags.num_skip == 1 ? skip.untyped_data() : nullptr;
  data->kernel = kernel.untyped_data(), data->bias = bias.untyped_data();
  data->y = at->Ret(), data->pooled = p->pool ? at->Ret() : nullptr;
  return error;
}

std::string ReadGrad(Cursor* at, const Flags& flags, const GradFlags& grad, Conv2DProblem* p, Conv2DGradient* data) {
  const ffi::AnyBuffer dy = at->Arg();
  data->dy = dy.untyped_data();
  data->dpooled = flags.num_pooled == 1 ? at->Arg().untyped_data() : nullptr;
  data->y = at->Arg().untyped_data();
  const ffi::AnyBuffer x = at->Arg(), skip = flags.num_skip == 1 ? at->Arg() : x, kernel = at->Arg();
  std::string error;
  *p = Problem(x, flags.num_skip == 1 ? &skip : nullptr, kernel, flags, &error);
  p->dy_is_masked = grad.dy_is_masked, p->mask_dx = grad.mask_dx, p->mask_dskip = grad.mask_dskip;
  if (error.empty()) error = p->SetDyDims(ToDims(dy));
  data->x = x.untyped_data(), data->skip = flags.num_skip == 1 ? skip.untyped_data() : nullptr;
  data->kernel = kernel.untyped_data();
  data->dx = grad.num_dx == 1 ? at->Ret() : nullptr, data->dskip = grad.num_dskip == 1 ? at->Ret() : nullptr;
  data->dkernel = at->Ret(), data->dbias = at->Ret();
  return error;
}

ffi::Error Forward(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t same,
                   int64_t relu, int64_t num_skip, int64_t num_pooled) {
  Cursor at(args, rets);
  Conv2DProblem p;
  Conv2DForward data;
  const std::string error = ReadForward(&at, {same, relu, num_skip, num_pooled}, &p, &data);
  if (!error.empty()) return ToError(kOp, error);
  FfiThreadPool pool(threads);
  cpu::Conv2DBiasRelu(pool, p, data);
  return ffi::Error::Success();
}

ffi::Error Grad(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t same, int64_t relu,
                int64_t num_skip, int64_t num_pooled, int64_t num_dx, int64_t num_dskip, int64_t dy_is_masked,
                int64_t mask_dx, int64_t mask_dskip) {
  Cursor at(args, rets);
  Conv2DProblem p;
  Conv2DGradient data;
  const Flags flags = {same, relu, num_skip, num_pooled};
  const std::string error = ReadGrad(&at, flags, {num_dx, num_dskip, dy_is_masked, mask_dx, mask_dskip}, &p, &data);
  if (!error.empty()) return ToError(kGradOp, error);
  FfiThreadPool pool(threads);
  cpu::Conv2DBiasReluGrad(pool, p, data);
  return ffi::Error::Success();
}

#define UNET_FAST_CONV2D_BINDING(CONTEXT) \
  ffi::Ffi::Bind()                        \
      .Ctx<CONTEXT>()                     \
      .RemainingArgs()                    \
      .RemainingRets()                    \
      .Attr<int64_t>("same")              \
      .Attr<int64_t>("relu")              \
      .Attr<int64_t>("num_skip")          \
      .Attr<int64_t>("num_pooled")
#define UNET_FAST_CONV2D_GRAD_BINDING(CONTEXT) \
  UNET_FAST_CONV2D_BINDING(CONTEXT)            \
      .Attr<int64_t>("num_dx")                 \
      .Attr<int64_t>("num_dskip")              \
      .Attr<int64_t>("dy_is_masked")           \
      .Attr<int64_t>("mask_dx")                \
      .Attr<int64_t>("mask_dskip")
XLA_FFI_DEFINE_HANDLER(kForwardHost, Forward, UNET_FAST_CONV2D_BINDING(ffi::ThreadPool));
XLA_FFI_DEFINE_HANDLER(kGradHost, Grad, UNET_FAST_CONV2D_GRAD_BINDING(ffi::ThreadPool));
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_conv2d_bias_relu", "Host", kForwardHost);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_conv2d_bias_relu_grad", "Host", kGradHost);

#ifdef UNET_FAST_CUDA
ffi::Error ForwardGpu(void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t same, int64_t relu,
                      int64_t num_skip, int64_t num_pooled) {
  Cursor at(args, rets);
  Conv2DProblem p;
  Conv2DForward data;
  std::string error = ReadForward(&at, {same, relu, num_skip, num_pooled}, &p, &data);
  if (!error.empty()) return ToError(kOp, error);
  void* workspace;
  error = at.Workspace(gpu::Conv2DBiasReluWorkspaceBytes(p), &workspace);
  if (!error.empty()) return ToError(kOp, error);
  return GpuError(kOp, gpu::Conv2DBiasRelu(stream, p, data, workspace));
}

ffi::Error GradGpu(void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t same, int64_t relu,
                   int64_t num_skip, int64_t num_pooled, int64_t num_dx, int64_t num_dskip, int64_t dy_is_masked,
                   int64_t mask_dx, int64_t mask_dskip) {
  Cursor at(args, rets);
  Conv2DProblem p;
  Conv2DGradient data;
  const Flags flags = {same, relu, num_skip, num_pooled};
  std::string error = ReadGrad(&at, flags, {num_dx, num_dskip, dy_is_masked, mask_dx, mask_dskip}, &p, &data);
  if (!error.empty()) return ToError(kGradOp, error);
  void* workspace;
  error = at.Workspace(gpu::Conv2DBiasReluGradWorkspaceBytes(p), &workspace);
  if (!error.empty()) return ToError(kGradOp, error);
  return GpuError(kGradOp, gpu::Conv2DBiasReluGrad(stream, p, data, workspace));
}

UNET_FAST_DEFINE_GPU_HANDLER(kForwardCuda, ForwardGpu, UNET_FAST_CONV2D_BINDING(FfiStream));
UNET_FAST_DEFINE_GPU_HANDLER(kGradCuda, GradGpu, UNET_FAST_CONV2D_GRAD_BINDING(FfiStream));
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_conv2d_bias_relu", "CUDA", kForwardCuda);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_conv2d_bias_relu_grad", "CUDA", kGradCuda);
#endif

}  // namespace
}  // namespace unet_fast
