// Which engine runs a product. What was forced or measured comes first; else sm90 where the device is a Hopper GPU and
// the build has its kernels, and cudnn on any other; what neither serves goes to wmma, which serves everything.
#include <algorithm>

#include "common/cuda.cuh"
#include "conv/gemm.h"
#include "conv/mask.h"
#include "conv/reduce.h"
#include "conv/tuning.h"
#include "conv/wmma/engine.h"
#include "pool/gpu.h"
#ifdef UNET_FAST_CUDNN
#include "conv/cudnn/engine.h"
#endif
#ifdef UNET_FAST_SM90
#include "conv/sm90/engine.h"
#endif

namespace unet_fast::gpu {
namespace {

// As asked for, else as measured.
Choice ChoiceFor(DType dtype, const GemmArgs& args, const Conv2DTuning& tuning) {
  if (tuning.engine != Engine::kAuto || tuning.gemm >= 0) return {tuning.engine, tuning.gemm, 0};
  return ChosenFor(ProductKey(dtype, args));
}
Choice ChoiceFor(DType dtype, const WgradArgs& args, const Conv2DTuning& tuning) {
  if (tuning.engine != Engine::kAuto || tuning.wgrad >= 0 || tuning.splits > 0) {
    return {tuning.engine, tuning.wgrad, tuning.splits};
  }
  return ChosenFor(ProductKey(dtype, args));
}

// Configurations are numbered an engine: a chosen one means nothing to another.
int Config(const Choice& choice, Engine engine) {
  return choice.engine == engine || choice.engine == Engine::kAuto ? choice.config : -1;
}

#ifdef UNET_FAST_CUDNN
// Left open, a Hopper GPU has kernels of its own; others have portable ones only.
bool TriesCudnn(const Choice& choice, int capability) {
#ifdef UNET_FAST_SM90
  if (choice.engine == Engine::kAuto && capability == 90) return false;
#endif
  return choice.engine == Engine::kAuto || choice.engine == Engine::kCudnn;
}
bool TriesCudnn(const Choice& choice) { return TriesCudnn(choice, ComputeCapability()); }
#endif

#ifdef UNET_FAST_SM90
bool TriesSm90(const Choice& choice) { return choice.engine != Engine::kWmma && ComputeCapability() == 90; }

// False where the engine does not serve the product; else its status in `status`.
bool GemmOnSm90(void* stream, DType dtype, const GemmArgs& args, int forced, int* status) {
  int config = sm90::ChooseGemm(args, forced);
  if (config >= 0) {
    *status = sm90::ImplicitGemm(stream, dtype, args, config);
    return true;
  }
  if (args.pooled == nullptr) return false;
  GemmArgs plain = args;  // pooled in a pass of its own where the epilogue cannot
  plain.pooled = nullptr;
  config = sm90::ChooseGemm(plain, forced);
  if (config < 0) return false;
  *status = sm90::ImplicitGemm(stream, dtype, plain, config);
  if (*status == 0) {
    *status = MaxPool2D(stream, dtype, args.batch, args.out_h, args.out_w, args.n, args.result[0].data, args.pooled);
  }
  return true;
}

int WgradOnSm90(void* stream, DType dtype, const WgradArgs& args, const sm90::WgradPlan& plan) {
  UNET_FAST_CUDA_RETURN_IF_ERROR(
      sm90::Wgrad(stream, dtype, args, plan, args.dbias != nullptr ? args.bias_slabs : nullptr));
  const SlabSum bias = {args.bias_slabs, args.n, args.dbias};
  if (plan.splits == 1) return args.dbias == nullptr ? 0 : SumSlabs(stream, dtype, 1, bias);
  const int64_t channels = args.source[0].channels + (args.sources == 2 ? args.source[1].channels : 0);
  return SumSlabs(stream, dtype, plan.splits, {args.slabs, args.taps.count * channels * args.n, args.dweights}, bias);
}
#endif

int64_t Pixels(const WgradArgs& args) { return static_cast<int64_t>(args.batch) * args.out_h * args.out_w; }

// dbias, where an engine does not compute it along with the product.
int SumOverPixels(void* stream, DType dtype, const WgradArgs& args) {
  MaskArgs sums = {};
  sums.dy = args.dz, sums.batch = args.batch, sums.h = args.out_h, sums.w = args.out_w, sums.channels = args.n;
  sums.dy_h = sums.h, sums.dy_w = sums.w;
  sums.slabs = args.bias_slabs, sums.dbias = args.dbias;
  return MaskGradient(stream, dtype, sums);
}

}  // namespace

int ImplicitGemm(void* stream, DType dtype, const GemmArgs& args, const Conv2DTuning& tuning, void* workspace) {
  const Choice choice = ChoiceFor(dtype, args, tuning);
#ifdef UNET_FAST_CUDNN
  if (TriesCudnn(choice)) {
    const int status = cudnn::Gemm(stream, dtype, args, Config(choice, Engine::kCudnn), workspace);
    if (status != cudaErrorNotSupported) return status;
  }
#endif
#ifdef UNET_FAST_SM90
  int status;
  if (TriesSm90(choice) && GemmOnSm90(stream, dtype, args, Config(choice, Engine::kSm90), &status)) return status;
#endif
  return wmma::ImplicitGemm(stream, dtype, args, Config(choice, Engine::kWmma));
}

size_t GemmWorkspaceBytes(DType dtype, const GemmArgs& args, const Conv2DTuning& tuning) {
#ifdef UNET_FAST_CUDNN
  const Choice choice = ChoiceFor(dtype, args, tuning);
  if (TriesCudnn(choice)) {
    return std::max<int64_t>(0, cudnn::GemmWorkspaceBytes(dtype, args, Config(choice, Engine::kCudnn)));
  }
#endif
  return 0;
}

size_t WgradWorkspaceBytes(DType dtype, const WgradArgs& args, const Conv2DTuning& tuning) {
  const Choice choice = ChoiceFor(dtype, args, tuning);
  size_t bytes = wmma::WgradSlabBytes(args, Config(choice, Engine::kWmma), choice.splits);
#ifdef UNET_FAST_SM90
  const sm90::WgradPlan plan = sm90::PlanWgrad(args, Config(choice, Engine::kSm90), choice.splits);
  if (plan.splits > 1) {
    const int64_t channels = args.source[0].channels + (args.sources == 2 ? args.source[1].channels : 0);
    bytes = std::max(bytes, static_cast<size_t>(plan.splits) * args.taps.count * channels * args.n * sizeof(float));
  }
#endif
#ifdef UNET_FAST_CUDNN
  if (TriesCudnn(choice)) {
    const int64_t needed = cudnn::WgradWorkspaceBytes(dtype, args, Config(choice, Engine::kCudnn));
    bytes = std::max(bytes, static_cast<size_t>(std::max<int64_t>(0, needed)));
  }
#endif
  return bytes;
}

size_t BiasSlabBytes(DType dtype, const WgradArgs& args, const Conv2DTuning& tuning) {
  size_t bytes = MaskSlabBytes(Pixels(args), args.n);
#ifdef UNET_FAST_SM90
  const Choice choice = ChoiceFor(dtype, args, tuning);
  const sm90::WgradPlan plan = sm90::PlanWgrad(args, Config(choice, Engine::kSm90), choice.splits);
  bytes = std::max(bytes, static_cast<size_t>(plan.splits) * args.n * sizeof(float));
#endif
  return bytes;
}

int Wgrad(void* stream, DType dtype, const WgradArgs& args, const Conv2DTuning& tuning) {
  const Choice choice = ChoiceFor(dtype, args, tuning);
#ifdef UNET_FAST_CUDNN
  if (TriesCudnn(choice)) {
    const int status = cudnn::Wgrad(stream, dtype, args, Config(choice, Engine::kCudnn), args.slabs);
    if (status == 0 && args.dbias != nullptr) return SumOverPixels(stream, dtype, args);
    if (status != cudaErrorNotSupported) return status;
  }
#endif
#ifdef UNET_FAST_SM90
  if (TriesSm90(choice)) {
    const sm90::WgradPlan plan = sm90::PlanWgrad(args, Config(choice, Engine::kSm90), choice.splits);
    if (plan.config >= 0) return WgradOnSm90(stream, dtype, args, plan);
  }
#endif
  if (args.dbias != nullptr) UNET_FAST_CUDA_RETURN_IF_ERROR(SumOverPixels(stream, dtype, args));
  return wmma::Wgrad(stream, dtype, args, Config(choice, Engine::kWmma), choice.splits);
}

namespace {

// Why a device cannot run a type's kernels, or "".
std::string Unsupported(DType dtype, int capability) {
  if (dtype == DType::kFloat32) return "float32 is left to stock TensorFlow";
  const int least = dtype == DType::kBFloat16 ? 80 : 75;
  if (capability >= least) return "";
  return "compute capability " + std::to_string(least / 10) + "." + std::to_string(least % 10) + " or more is needed";
}

// Why a product is left to wmma.
std::string WhyWmma(const Choice& choice, bool vector, int capability) {
  if (choice.engine == Engine::kWmma) return "chosen";
  if (!vector) return "a number of channels is no multiple of 8";
#ifdef UNET_FAST_SM90
  if (capability == 90) return "too large for sm90's counters";
#endif
#ifdef UNET_FAST_CUDNN
  return "cuDNN has no plan for it";
#else
  return "the build has no cuDNN";
#endif
}

// On the engine that comes first, or "" where it is not the one.
std::string OnCudnn(const Product& p, const Choice& choice, int capability) {
#ifdef UNET_FAST_CUDNN
  if (TriesCudnn(choice, capability)) {
    const int config = Config(choice, Engine::kCudnn);
    // What cuDNN plans on another device than this one is not known here.
    const bool planned =
        capability != ComputeCapability() || (p.is_wgrad ? cudnn::WgradWorkspaceBytes(p.dtype, p.wgrad, config)
                                                         : cudnn::GemmWorkspaceBytes(p.dtype, p.gemm, config)) >= 0;
    const bool vector = p.is_wgrad ? p.wgrad.vector : p.gemm.vector;
    if (planned && vector) return "plan " + std::to_string(std::max(0, config)) + " of its heuristic";
  }
#endif
  return "";
}

std::string OnSm90(const Product& p, const Choice& choice, int capability) {
#ifdef UNET_FAST_SM90
  if (capability != 90 || choice.engine == Engine::kWmma) return "";
  const int forced = Config(choice, Engine::kSm90);
  if (p.is_wgrad) {
    const sm90::WgradPlan plan = sm90::PlanWgrad(p.wgrad, forced, choice.splits);
    return plan.config >= 0 ? sm90::Describe(plan) : "";
  }
  GemmArgs plain = p.gemm;
  plain.pooled = nullptr;
  const int fused = sm90::ChooseGemm(p.gemm, forced), config = fused >= 0 ? fused : sm90::ChooseGemm(plain, forced);
  if (config < 0) return "";
  return sm90::DescribeGemm(config) + (fused < 0 ? ", pooling in a pass of its own" : "");
#endif
  return "";
}

}  // namespace

ProductChoice Describe(const Product& p, int capability) {
  const std::string unsupported = Unsupported(p.dtype, capability);
  if (!unsupported.empty()) return {p.name, "none", unsupported};
  // What was measured on the device that is here says nothing of another.
  const Choice choice = capability == ComputeCapability() ? ChosenFor(ProductKey(p)) : Choice();
  const std::string measured = choice.engine == Engine::kAuto ? "" : ", chosen";
  if (const std::string plan = OnCudnn(p, choice, capability); !plan.empty()) return {p.name, "cudnn", plan + measured};
  if (const std::string tile = OnSm90(p, choice, capability); !tile.empty()) return {p.name, "sm90", tile + measured};
  return {p.name, "wmma", WhyWmma(choice, p.is_wgrad ? p.wgrad.vector : p.gemm.vector, capability)};
}

}  // namespace unet_fast::gpu
