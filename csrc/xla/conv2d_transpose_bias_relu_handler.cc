// Handlers of the custom calls that xla/conv2d_transpose_bias_relu.cc emits; shapes were checked there.
#include "conv/cpu/conv2d.h"
#include "xla/handler.h"
#ifdef UNET_FAST_CUDA
#include "conv/gpu.h"
#endif

namespace unet_fast {
namespace {

constexpr char kOp[] = "conv2d_transpose_bias_relu", kGradOp[] = "conv2d_transpose_bias_relu gradient";

Conv2DTransposeProblem Problem(const ffi::AnyBuffer& x, const ffi::AnyBuffer& kernel, int64_t relu,
                               std::string* error) {
  Conv2DTransposeProblem p;
  p.dtype = ToDType(x.element_type());
  p.relu = relu;
  *error = p.SetDims(ToDims(x), ToDims(kernel));
  return p;
}

// The operands and results in their order, and the problem that they pose.
std::string ReadForward(Cursor* at, int64_t relu, Conv2DTransposeProblem* p, Conv2DTransposeForward* data) {
  const ffi::AnyBuffer x = at->Arg(), kernel = at->Arg(), bias = at->Arg();
  std::string error;
  *p = Problem(x, kernel, relu, &error);
  *data = {x.untyped_data(), kernel.untyped_data(), bias.untyped_data(), at->Ret()};
  return error;
}

std::string ReadGrad(Cursor* at, int64_t relu, int64_t num_dx, int64_t input_is_relu, int64_t dy_is_masked,
                     Conv2DTransposeProblem* p, Conv2DTransposeGradient* data) {
  const ffi::AnyBuffer dy = at->Arg(), y = at->Arg(), x = at->Arg(), kernel = at->Arg();
  std::string error;
  *p = Problem(x, kernel, relu, &error);
  p->input_is_relu = input_is_relu, p->dy_is_masked = dy_is_masked;
  data->dy = dy.untyped_data(), data->y = y.untyped_data(), data->x = x.untyped_data();
  data->kernel = kernel.untyped_data();
  data->dx = num_dx == 1 ? at->Ret() : nullptr;
  data->dkernel = at->Ret(), data->dbias = at->Ret();
  return error;
}

ffi::Error Forward(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t relu) {
  Cursor at(args, rets);
  Conv2DTransposeProblem p;
  Conv2DTransposeForward data;
  const std::string error = ReadForward(&at, relu, &p, &data);
  if (!error.empty()) return ToError(kOp, error);
  FfiThreadPool pool(threads);
  cpu::Conv2DTransposeBiasRelu(pool, p, data);
  return ffi::Error::Success();
}

ffi::Error Grad(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t relu, int64_t num_dx,
                int64_t input_is_relu, int64_t dy_is_masked) {
  Cursor at(args, rets);
  Conv2DTransposeProblem p;
  Conv2DTransposeGradient data;
  const std::string error = ReadGrad(&at, relu, num_dx, input_is_relu, dy_is_masked, &p, &data);
  if (!error.empty()) return ToError(kGradOp, error);
  FfiThreadPool pool(threads);
  cpu::Conv2DTransposeBiasReluGrad(pool, p, data);
  return ffi::Error::Success();
}

#define UNET_FAST_TRANSPOSE_BINDING(CONTEXT) \
  ffi::Ffi::Bind().Ctx<CONTEXT>().RemainingArgs().RemainingRets().Attr<int64_t>("relu")
#define UNET_FAST_TRANSPOSE_GRAD_BINDING(CONTEXT) \
  UNET_FAST_TRANSPOSE_BINDING(CONTEXT)            \
      .Attr<int64_t>("num_dx")                    \
      .Attr<int64_t>("input_is_relu")             \
      .Attr<int64_t>("dy_is_masked")
XLA_FFI_DEFINE_HANDLER(kForwardHost, Forward, UNET_FAST_TRANSPOSE_BINDING(ffi::ThreadPool));
XLA_FFI_DEFINE_HANDLER(kGradHost, Grad, UNET_FAST_TRANSPOSE_GRAD_BINDING(ffi::ThreadPool));
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_conv2d_transpose_bias_relu", "Host", kForwardHost);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_conv2d_transpose_bias_relu_grad", "Host", kGradHost);

#ifdef UNET_FAST_CUDA
ffi::Error ForwardGpu(void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t relu) {
  Cursor at(args, rets);
  Conv2DTransposeProblem p;
  Conv2DTransposeForward data;
  std::string error = ReadForward(&at, relu, &p, &data);
  if (!error.empty()) return ToError(kOp, error);
  void* workspace;
  error = at.Workspace(gpu::Conv2DTransposeBiasReluWorkspaceBytes(p), &workspace);
  if (!error.empty()) return ToError(kOp, error);
  return GpuError(kOp, gpu::Conv2DTransposeBiasRelu(stream, p, data, workspace));
}

ffi::Error GradGpu(void* stream, ffi::RemainingArgs args, ffi::RemainingRets rets, int64_t relu, int64_t num_dx,
                   int64_t input_is_relu, int64_t dy_is_masked) {
  Cursor at(args, rets);
  Conv2DTransposeProblem p;
  Conv2DTransposeGradient data;
  std::string error = ReadGrad(&at, relu, num_dx, input_is_relu, dy_is_masked, &p, &data);
  if (!error.empty()) return ToError(kGradOp, error);
  void* workspace;
  error = at.Workspace(gpu::Conv2DTransposeBiasReluGradWorkspaceBytes(p), &workspace);
  if (!error.empty()) return ToError(kGradOp, error);
  return GpuError(kGradOp, gpu::Conv2DTransposeBiasReluGrad(stream, p, data, workspace));
}

UNET_FAST_DEFINE_GPU_HANDLER(kForwardCuda, ForwardGpu, UNET_FAST_TRANSPOSE_BINDING(FfiStream));
UNET_FAST_DEFINE_GPU_HANDLER(kGradCuda, GradGpu, UNET_FAST_TRANSPOSE_GRAD_BINDING(FfiStream));
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_conv2d_transpose_bias_relu", "CUDA", kForwardCuda);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), "unet_fast_conv2d_transpose_bias_relu_grad", "CUDA", kGradCuda);
#endif

}  // namespace
}  // namespace unet_fast
