// Which engine runs a product: sm90 where the device is a Hopper GPU, the build has its kernels, and it serves the
// problem; else wmma.
#include <algorithm>

#include "common/cuda.cuh"
#include "conv/gemm.h"
#include "conv/mask.h"
#include "conv/reduce.h"
#include "conv/wmma/engine.h"
#include "pool/gpu.h"
#ifdef UNET_FAST_SM90
#include "conv/sm90/engine.h"
#endif

namespace unet_fast::gpu {
namespace {

// Tiles are numbered an engine: a forced one means nothing to another.
int Forced(const Conv2DTuning& tuning, Engine engine, int tile) {
  return tuning.engine == engine || tuning.engine == Engine::kAuto ? tile : -1;
}

#ifdef UNET_FAST_SM90
bool TriesSm90(const Conv2DTuning& tuning) { return tuning.engine != Engine::kWmma && ComputeCapability() == 90; }

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

}  // namespace

int ImplicitGemm(void* stream, DType dtype, const GemmArgs& args, const Conv2DTuning& tuning) {
#ifdef UNET_FAST_SM90
  int status;
  if (TriesSm90(tuning) && GemmOnSm90(stream, dtype, args, Forced(tuning, Engine::kSm90, tuning.gemm), &status)) {
    return status;
  }
#endif
  return wmma::ImplicitGemm(stream, dtype, args, Forced(tuning, Engine::kWmma, tuning.gemm));
}

size_t WgradSlabBytes(const WgradArgs& args, const Conv2DTuning& tuning) {
  size_t bytes = wmma::WgradSlabBytes(args, Forced(tuning, Engine::kWmma, tuning.wgrad), tuning.splits);
#ifdef UNET_FAST_SM90
  const sm90::WgradPlan plan = sm90::PlanWgrad(args, Forced(tuning, Engine::kSm90, tuning.wgrad), tuning.splits);
  if (plan.splits > 1) {
    const int64_t channels = args.source[0].channels + (args.sources == 2 ? args.source[1].channels : 0);
    bytes = std::max(bytes, static_cast<size_t>(plan.splits) * args.taps.count * channels * args.n * sizeof(float));
  }
#endif
  return bytes;
}

size_t BiasSlabBytes(const WgradArgs& args, const Conv2DTuning& tuning) {
  size_t bytes = MaskSlabBytes(Pixels(args), args.n);
#ifdef UNET_FAST_SM90
  const sm90::WgradPlan plan = sm90::PlanWgrad(args, Forced(tuning, Engine::kSm90, tuning.wgrad), tuning.splits);
  bytes = std::max(bytes, static_cast<size_t>(plan.splits) * args.n * sizeof(float));
#endif
  return bytes;
}

int Wgrad(void* stream, DType dtype, const WgradArgs& args, const Conv2DTuning& tuning) {
#ifdef UNET_FAST_SM90
  if (TriesSm90(tuning)) {
    const sm90::WgradPlan plan = sm90::PlanWgrad(args, Forced(tuning, Engine::kSm90, tuning.wgrad), tuning.splits);
    if (plan.config >= 0) return WgradOnSm90(stream, dtype, args, plan);
  }
#endif
  if (args.dbias != nullptr) {
    MaskArgs sums = {};
    sums.dy = args.dz, sums.batch = args.batch, sums.h = args.out_h, sums.w = args.out_w, sums.channels = args.n;
    sums.dy_h = sums.h, sums.dy_w = sums.w;
    sums.slabs = args.bias_slabs, sums.dbias = args.dbias;
    UNET_FAST_CUDA_RETURN_IF_ERROR(MaskGradient(stream, dtype, sums));
  }
  return wmma::Wgrad(stream, dtype, args, Forced(tuning, Engine::kWmma, tuning.wgrad), tuning.splits);
}

namespace {

// Why a device cannot run a type's kernels, or "".
std::string Unsupported(DType dtype, int capability) {
  if (dtype == DType::kFloat32) return "float32 is left to stock TensorFlow";
  const int least = dtype == DType::kBFloat16 ? 80 : 75;
  if (capability >= least) return "";
  return "compute capability " + std::to_string(least / 10) + "." + std::to_string(least % 10) + " or more is needed";
}

// Why a product does not run on sm90.
std::string WhyNotSm90(bool vector, int capability) {
#ifndef UNET_FAST_SM90
  return "the build has no kernels for 9.0";
#endif
  if (capability != 90) return "sm90 is for compute capability 9.0";
  return vector ? "too large for sm90's counters" : "a number of channels is no multiple of 8";
}

}  // namespace

ProductChoice DescribeGemm(const char* product, DType dtype, const GemmArgs& args, int capability) {
  const std::string unsupported = Unsupported(dtype, capability);
  if (!unsupported.empty()) return {product, "none", unsupported};
#ifdef UNET_FAST_SM90
  if (capability == 90) {
    GemmArgs plain = args;
    plain.pooled = nullptr;
    const int fused = sm90::ChooseGemm(args, -1), config = fused >= 0 ? fused : sm90::ChooseGemm(plain, -1);
    if (config >= 0) {
      return {product, "sm90", sm90::DescribeGemm(config) + (fused < 0 ? ", pooling in a pass of its own" : "")};
    }
  }
#endif
  return {product, "wmma", WhyNotSm90(args.vector, capability)};
}

ProductChoice DescribeWgrad(const char* product, DType dtype, const WgradArgs& args, int capability) {
  const std::string unsupported = Unsupported(dtype, capability);
  if (!unsupported.empty()) return {product, "none", unsupported};
#ifdef UNET_FAST_SM90
  if (capability == 90) {
    const sm90::WgradPlan plan = sm90::PlanWgrad(args, -1, 0);
    if (plan.config >= 0) return {product, "sm90", sm90::Describe(plan)};
  }
#endif
  return {product, "wmma", WhyNotSm90(args.vector, capability)};
}

}  // namespace unet_fast::gpu
