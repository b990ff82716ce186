// Which engine runs a product. What was forced or measured comes first; else sm90 where the device is a Hopper GPU and
// the build has its kernels, and cudnn on any other; what neither serves goes to wmma, which serves everything. So does
// what was to run on one that fails.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>

#include "common/cuda.cuh"
#include "conv/gemm.h"
#include "conv/mask.h"
#include "conv/reduce.h"
#include "conv/tuning.h"
#include "conv/wmma/config.h"
#include "conv/wmma/engine.h"
#include "pool/gpu.h"
#ifdef UNET_FAST_CUDNN
#include "conv/cudnn/config.h"
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

#if defined(UNET_FAST_CUDNN) || defined(UNET_FAST_SM90)
// On the current device.
std::atomic<bool>& HasFailed(Engine engine) {
  constexpr int kDevices = 64;
  static std::atomic<bool> failed[kDevices][3];
  int device = 0;
  cudaGetDevice(&device);
  return failed[device % kDevices][static_cast<int>(engine)];
}

// Whether the error is one that no engine could help: memory ran out, a capture was broken before, or the device is
// lost to an earlier kernel.
bool IsOfOthers(int status) {
  switch (status) {
    case cudaErrorMemoryAllocation:
    case cudaErrorIllegalAddress:
    case cudaErrorMisalignedAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return status >= cudaErrorStreamCaptureUnsupported && status <= cudaErrorStreamCaptureWrongThread;
  }
}

// Whether the next engine is to run a product that ended in `status` on this one: it is not served, or the engine
// fails, as cuDNN may in a process that lacks a part of it. That is said once, and the engine not asked again.
bool PassesOn(Engine engine, int status, const Conv2DTuning& tuning) {
  if (tuning.strict || status == 0) return false;
  if (status == cudaErrorNotSupported) return true;
  if (IsOfOthers(status)) return false;
  const char* require = std::getenv("UNET_FAST_REQUIRE_KERNELS");
  if (require != nullptr && std::string(require) == "1") return false;
  if (!HasFailed(engine).exchange(true)) {
    std::fprintf(
        stderr,
        "unet_fast: the engine %s failed (%s) and is left out from now on; with UNET_FAST_REQUIRE_KERNELS=1 that "
        "is an error\n",
        EngineName(engine), cudaGetErrorString(static_cast<cudaError_t>(status)));
  }
  cudaGetLastError();  // is not the next engine's
  return true;
}
#endif

#ifdef UNET_FAST_CUDNN
// Left open, a Hopper GPU has kernels of its own, which are the slower ones in gradients of transposed convolutions of
// these sizes (measured on an H100: up to 1.25 times the time); others have portable ones only.
bool CudnnWins(const GemmArgs& g) { return g.stride == 2 && g.n <= 512; }
bool CudnnWins(const WgradArgs& g) { return g.stride == 2 && g.n >= 512; }

template <typename Args>
bool TriesCudnn(const Choice& choice, const Args& args, int capability) {
  if (HasFailed(Engine::kCudnn)) return false;
#ifdef UNET_FAST_SM90
  if (choice.engine == Engine::kAuto && capability == 90) return CudnnWins(args);
#endif
  return choice.engine == Engine::kAuto || choice.engine == Engine::kCudnn;
}
template <typename Args>
bool TriesCudnn(const Choice& choice, const Args& args) {
  return TriesCudnn(choice, args, ComputeCapability());
}
#endif

#ifdef UNET_FAST_SM90
bool TriesSm90(const Choice& choice) {
  return choice.engine != Engine::kWmma && !HasFailed(Engine::kSm90) && ComputeCapability() == 90;
}

int GemmOnSm90(void* stream, DType dtype, const GemmArgs& args, int forced) {
  int config = sm90::ChooseGemm(args, forced);
  if (config >= 0) return sm90::ImplicitGemm(stream, dtype, args, config);
  if (args.pooled == nullptr) return cudaErrorNotSupported;
  GemmArgs plain = args;  // pooled in a pass of its own where the epilogue cannot
  plain.pooled = nullptr;
  config = sm90::ChooseGemm(plain, forced);
  if (config < 0) return cudaErrorNotSupported;
  UNET_FAST_CUDA_RETURN_IF_ERROR(sm90::ImplicitGemm(stream, dtype, plain, config));
  return MaxPool2D(stream, dtype, args.batch, args.out_h, args.out_w, args.n, args.result[0].data, args.pooled);
}

int WgradOnSm90(void* stream, DType dtype, const WgradArgs& args, const sm90::WgradPlan& plan) {
  if (plan.config < 0) return cudaErrorNotSupported;
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
  if (TriesCudnn(choice, args)) {
    const int status = cudnn::Gemm(stream, dtype, args, Config(choice, Engine::kCudnn), workspace);
    if (!PassesOn(Engine::kCudnn, status, tuning)) return status;
  }
#endif
#ifdef UNET_FAST_SM90
  if (TriesSm90(choice)) {
    const int status = GemmOnSm90(stream, dtype, args, Config(choice, Engine::kSm90));
    if (!PassesOn(Engine::kSm90, status, tuning)) return status;
  }
#endif
  return wmma::ImplicitGemm(stream, dtype, args, Config(choice, Engine::kWmma));
}

size_t GemmWorkspaceBytes(DType dtype, const GemmArgs& args, const Conv2DTuning& tuning) {
#ifdef UNET_FAST_CUDNN
  const Choice choice = ChoiceFor(dtype, args, tuning);
  if (TriesCudnn(choice, args)) {
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
  if (TriesCudnn(choice, args)) {
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
  if (TriesCudnn(choice, args)) {
    const int status = cudnn::Wgrad(stream, dtype, args, Config(choice, Engine::kCudnn), args.slabs);
    if (status == 0 && args.dbias != nullptr) return SumOverPixels(stream, dtype, args);
    if (!PassesOn(Engine::kCudnn, status, tuning)) return status;
  }
#endif
#ifdef UNET_FAST_SM90
  if (TriesSm90(choice)) {
    const sm90::WgradPlan plan = sm90::PlanWgrad(args, Config(choice, Engine::kSm90), choice.splits);
    const int status = WgradOnSm90(stream, dtype, args, plan);
    if (!PassesOn(Engine::kSm90, status, tuning)) return status;
  }
#endif
  if (args.dbias != nullptr) UNET_FAST_CUDA_RETURN_IF_ERROR(SumOverPixels(stream, dtype, args));
  return wmma::Wgrad(stream, dtype, args, Config(choice, Engine::kWmma), choice.splits);
}

namespace {

// One engine's choices behind the other's; wmma's tiles where there are none.
std::vector<Choice> Joined(std::vector<Choice> first, const std::vector<Choice>& second, int wmma_tiles) {
  first.insert(first.end(), second.begin(), second.end());
  for (int i = 0, tiles = first.empty() ? wmma_tiles : 0; i < tiles; ++i) first.push_back({Engine::kWmma, i, 0});
  return first;
}

#ifdef UNET_FAST_CUDNN
int64_t CudnnBytes(DType dtype, const GemmArgs& args, int plan) { return cudnn::GemmWorkspaceBytes(dtype, args, plan); }
int64_t CudnnBytes(DType dtype, const WgradArgs& args, int plan) {
  return cudnn::WgradWorkspaceBytes(dtype, args, plan);
}
#endif

template <typename Args>
std::vector<Choice> CandidatesOf(DType dtype, const Args& args, std::vector<Choice> own, int wmma_tiles) {
  std::vector<Choice> plans;
#ifdef UNET_FAST_CUDNN
  for (int i = 0; i < cudnn::kPlans; ++i) {
    if (CudnnBytes(dtype, args, i) >= 0) plans.push_back({Engine::kCudnn, i, 0});
  }
  if (CudnnWins(args)) std::swap(own, plans);
#endif
  return Joined(std::move(own), plans, wmma_tiles);
}

}  // namespace

std::vector<Choice> Candidates(DType dtype, const GemmArgs& args) {
  std::vector<Choice> own;
#ifdef UNET_FAST_SM90
  if (ComputeCapability() == 90) {
    GemmArgs served = args;
    if (sm90::ChooseGemm(args, -1) < 0) served.pooled = nullptr;  // as GemmOnSm90 does
    const int by_rules = sm90::ChooseGemm(served, -1);
    if (by_rules >= 0) own.push_back({Engine::kSm90, by_rules, 0});
    for (int i = 0; i < sm90::kGemmConfigCount; ++i) {
      if (i != by_rules && sm90::ChooseGemm(served, i) == i) own.push_back({Engine::kSm90, i, 0});
    }
  }
#endif
  return CandidatesOf(dtype, args, std::move(own), wmma::kGemmTileCount);
}

std::vector<Choice> Candidates(DType dtype, const WgradArgs& args) {
  std::vector<Choice> own;
#ifdef UNET_FAST_SM90
  if (ComputeCapability() == 90) {
    const sm90::WgradPlan by_rules = sm90::PlanWgrad(args, -1, 0);
    if (by_rules.config >= 0) own.push_back({Engine::kSm90, by_rules.config, by_rules.splits});
    for (int i = 0; by_rules.config >= 0 && i < sm90::kWgradConfigCount; ++i) {
      const sm90::WgradPlan plan = sm90::PlanWgrad(args, i, 0);
      if (plan.config != i) continue;
      for (const int splits : {plan.splits, 2 * plan.splits, plan.splits / 2}) {
        const bool is_first = i == by_rules.config && splits == by_rules.splits;
        if (splits > 0 && !is_first) own.push_back({Engine::kSm90, i, splits});
      }
    }
  }
#endif
  return CandidatesOf(dtype, args, std::move(own), wmma::kWgradTileCount);
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
  if (p.is_wgrad ? TriesCudnn(choice, p.wgrad, capability) : TriesCudnn(choice, p.gemm, capability)) {
    const int config = Config(choice, Engine::kCudnn);
    // What cuDNN plans on another device than this one is not known here.
    const bool planned =
        capability != ComputeCapability() || (p.is_wgrad ? cudnn::WgradWorkspaceBytes(p.dtype, p.wgrad, config)
                                                         : cudnn::GemmWorkspaceBytes(p.dtype, p.gemm, config)) >= 0;
    const bool vector = p.is_wgrad ? p.wgrad.vector : p.gemm.vector;
    const std::string which = config < 0 ? "first working plan" : "plan " + std::to_string(config);
    if (planned && vector) return which + " of its heuristic";
  }
#endif
  return "";
}

std::string OnSm90(const Product& p, const Choice& choice, int capability) {
#ifdef UNET_FAST_SM90
  if (capability != 90 || choice.engine == Engine::kWmma || HasFailed(Engine::kSm90)) return "";
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
  const std::string key = ProductKey(p);
  const Choice choice = capability == ComputeCapability() ? ChosenFor(key) : ShippedFor(key, capability);
  const auto how = [&](Engine engine) {
    return choice.engine != engine ? "" : choice.config < 0 ? ", forced" : ", measured";
  };
  if (const std::string plan = OnCudnn(p, choice, capability); !plan.empty()) {
    return {p.name, "cudnn", plan + how(Engine::kCudnn)};
  }
  if (const std::string tile = OnSm90(p, choice, capability); !tile.empty()) {
    return {p.name, "sm90", tile + how(Engine::kSm90)};
  }
  return {p.name, "wmma", WhyWmma(choice, p.is_wgrad ? p.wgrad.vector : p.gemm.vector, capability)};
}

}  // namespace unet_fast::gpu
