// A product is captured into a CUDA graph a few times over and the graph replayed between two events, so that what a
// launch costs the host is not in its time: under XLA and in CUDA graphs nobody pays that. Candidates take turns, since
// a card slows down as it gets warm. All of them are timed briefly, and the best of them again.
#include "conv/measure.h"

#include <algorithm>
#include <cmath>

#include "common/cuda.cuh"
#include "conv/gemm.h"
#include "conv/tuning.h"

namespace unet_fast::gpu {
namespace {

constexpr double kBriefMs = 0.5, kLongMs = 3.0;  // that a replay takes at least
constexpr int kTurns = 7;
constexpr double kWorthAnother = 1.1;  // times the best: what is timed again
constexpr int kMostLaunches = 100;     // in a graph

__device__ uint32_t Hash(uint32_t v) {  // that of Prospector's lowbias32 family: each bit depends on all
  v = (v ^ (v >> 16)) * 0x7feb352dU;
  v = (v ^ (v >> 15)) * 0x846ca68bU;
  return v ^ (v >> 16);
}

// Numbers as a network has them: a card's speed depends on its power, and that on the bits that change. `rectified`: as
// many zeros as ReLU leaves.
template <typename T>
__global__ void Fill(T* to, int64_t count, uint32_t seed, bool rectified) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const float v = static_cast<float>(Hash(static_cast<uint32_t>(i) ^ seed)) * 0x1p-32f - 0.5f;
    to[i] = FromFloat<T>(rectified ? fmaxf(v, 0.0f) : v);
  }
}

// Device memory, a stream and two events of a measurement; what fails first is kept.
class Bench {
 public:
  Bench() {
    Keep(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    Keep(cudaEventCreate(&begin_));
    Keep(cudaEventCreate(&end_));
  }
  ~Bench() {
    cudaStreamSynchronize(stream_);
    for (cudaGraphExec_t graph : graphs_) cudaGraphExecDestroy(graph);
    for (void* array : arrays_) cudaFree(array);
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  int status() const { return status_; }
  void* stream() const { return stream_; }

  void* Allocate(size_t bytes) {
    void* array = nullptr;
    if (status_ != 0 || bytes == 0) return nullptr;
    Keep(cudaMalloc(&array, bytes));
    if (array != nullptr) arrays_.push_back(array);
    return array;
  }
  void* Array(DType dtype, int64_t elements, bool rectified) {
    void* array = Allocate(elements * SizeOf(dtype));
    if (array == nullptr) return nullptr;
    const uint32_t seed = 0x9e3779b9U * static_cast<uint32_t>(arrays_.size());
    const dim3 grid(1024), block(256);
    Keep(Dispatch16(dtype, [&](auto t) {
      return Launch(Fill<decltype(t)>, grid, block, 0, stream_, static_cast<decltype(t)*>(array), elements, seed,
                    rectified);
    }));
    return array;
  }

  // A graph of as many calls as take `ms`, by `us` for one of them. Null where it cannot be captured.
  template <typename F>
  cudaGraphExec_t Capture(double us, double ms, F f) {
    const int count = Launches(us, ms);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    if (cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal) != cudaSuccess) return nullptr;
    int status = 0;
    for (int i = 0; i < count && status == 0; ++i) status = f();
    const cudaError_t ended = cudaStreamEndCapture(stream_, &graph);
    if (status == 0 && ended == cudaSuccess && cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess) {
      graphs_.push_back(exec);
    }
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaGetLastError();  // what a capture leaves is not the next call's
    return exec;
  }
  static int Launches(double us, double ms) {
    return std::clamp(static_cast<int>(std::ceil(1000 * ms / us)), 1, kMostLaunches);
  }

  // Of one replay.
  double Microseconds(cudaGraphExec_t graph) {
    Keep(cudaEventRecord(begin_, stream_));
    Keep(cudaGraphLaunch(graph, stream_));
    return Between();
  }
  // Of one call.
  template <typename F>
  double CallMicroseconds(F f) {
    Keep(cudaEventRecord(begin_, stream_));
    Keep(f());
    return Between();
  }
  void Keep(int status) {
    if (status_ == 0) status_ = status;
  }

 private:
  double Between() {
    Keep(cudaEventRecord(end_, stream_));
    Keep(cudaEventSynchronize(end_));
    float ms = 0;
    Keep(cudaEventElapsedTime(&ms, begin_, end_));
    return std::max(1000.0 * ms, 0.5);
  }

  int status_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  std::vector<void*> arrays_;
  std::vector<cudaGraphExec_t> graphs_;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// `run(choice)` launches the product. Choices that the engines turn down, or fail at, are left out.
template <typename F>
std::vector<Timing> Time(Bench& bench, const std::vector<Choice>& choices, F run) {
  struct Entry {
    Choice choice;
    double us;
  };
  std::vector<Entry> entries;
  for (const Choice& choice : choices) {
    const auto call = [&] { return run(choice); };
    if (call() != 0) {  // the first call loads the kernel
      cudaGetLastError();
      continue;
    }
    const double once = bench.CallMicroseconds(call);
    cudaGraphExec_t graph = bench.Capture(once, kBriefMs, call);
    if (bench.status() != 0) return {};
    if (graph == nullptr) continue;
    const int launches = Bench::Launches(once, kBriefMs);
    bench.Microseconds(graph);
    entries.push_back({choice, std::min(bench.Microseconds(graph), bench.Microseconds(graph)) / launches});
  }
  if (entries.empty()) return {};
  double best = entries[0].us;
  for (const Entry& e : entries) best = std::min(best, e.us);

  struct Contender {
    size_t entry;
    cudaGraphExec_t graph;
    int launches;
    std::vector<double> us;
  };
  std::vector<Contender> contenders;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (i > 0 && entries[i].us > kWorthAnother * best) continue;
    const Choice& choice = entries[i].choice;
    cudaGraphExec_t graph = bench.Capture(entries[i].us, kLongMs, [&] { return run(choice); });
    if (graph != nullptr) contenders.push_back({i, graph, Bench::Launches(entries[i].us, kLongMs), {}});
  }
  for (int turn = 0; turn < kTurns; ++turn) {
    for (Contender& c : contenders) c.us.push_back(bench.Microseconds(c.graph) / c.launches);
  }
  for (const Contender& c : contenders) entries[c.entry].us = Median(c.us);
  std::vector<Timing> timings;
  for (const Entry& e : entries) timings.push_back({e.choice, e.us});
  return timings;
}

Conv2DTuning TuningOf(const Choice& choice) {
  return {choice.engine, choice.config, choice.config, choice.splits, true};
}

int MeasureProducts(Bench& bench, std::vector<Product> list, std::vector<MeasuredProduct>* products) {
  for (Product& p : list) {
    const std::vector<Choice> choices = p.is_wgrad ? Candidates(p.dtype, p.wgrad) : Candidates(p.dtype, p.gemm);
    size_t bytes = 0, bias_bytes = 0;
    for (const Choice& choice : choices) {
      const Conv2DTuning tuning = TuningOf(choice);
      if (p.is_wgrad) {
        bytes = std::max(bytes, WgradWorkspaceBytes(p.dtype, p.wgrad, tuning));
        bias_bytes = std::max(bias_bytes, BiasSlabBytes(p.dtype, p.wgrad, tuning));
      } else {
        bytes = std::max(bytes, GemmWorkspaceBytes(p.dtype, p.gemm, tuning));
      }
    }
    void* workspace = bench.Allocate(bytes);
    p.wgrad.slabs = static_cast<float*>(workspace);
    p.wgrad.bias_slabs = static_cast<float*>(bench.Allocate(bias_bytes));
    const auto run = [&](const Choice& choice) {
      const Conv2DTuning tuning = TuningOf(choice);
      return p.is_wgrad ? Wgrad(bench.stream(), p.dtype, p.wgrad, tuning)
                        : ImplicitGemm(bench.stream(), p.dtype, p.gemm, tuning, workspace);
    };
    if (bench.status() != 0) return bench.status();
    std::vector<Timing> timings = Time(bench, choices, run);
    if (bench.status() != 0) return bench.status();
    if (!timings.empty()) products->push_back({p.name, ProductKey(p), std::move(timings)});
  }
  return 0;
}

}  // namespace

int Measure(const Conv2DProblem& p, std::vector<MeasuredProduct>* products) {
  Bench bench;
  const int64_t pixels = p.batch * p.out_height() * p.out_width() * p.filters;
  const int64_t x = p.batch * p.height * p.width * p.channels;
  const auto rectified = [&](int64_t count) { return bench.Array(p.dtype, count, true); };
  const void* const skip = rectified(p.batch * p.skip_height * p.skip_width * p.skip_channels);
  void* const dskip = rectified(p.batch * p.height * p.width * p.skip_channels);
  void* const pooled = p.pool ? rectified(pixels / 4) : nullptr;
  const void* const kernel = bench.Array(p.dtype, p.kernel_elements(), false);
  void* const bias = bench.Array(p.dtype, p.filters, false);
  const Conv2DForward forward = {rectified(x), skip, kernel, bias, rectified(pixels), pooled};
  // dz is as sparse as y is. Behind a pool the mask's pass sums it, elsewhere the weight gradient does.
  void* const dkernel = bench.Array(p.dtype, p.kernel_elements(), false);
  const Conv2DGradient gradient = {forward.y, pooled,       forward.y, forward.x, skip,
                                   kernel,    rectified(x), dskip,     dkernel,   p.pool ? nullptr : bias};
  if (bench.status() != 0) return bench.status();
  std::vector<Product> list = Products(p, forward, gradient, forward.y);
  for (Product& product : list) product.wgrad.dbias = gradient.dbias;
  return MeasureProducts(bench, std::move(list), products);
}

int Measure(const Conv2DTransposeProblem& p, std::vector<MeasuredProduct>* products) {
  Bench bench;
  const int64_t x = p.batch * p.height * p.width * p.channels, y = 4 * p.batch * p.height * p.width * p.filters;
  const auto rectified = [&](int64_t count) { return bench.Array(p.dtype, count, true); };
  const void* const kernel = bench.Array(p.dtype, p.kernel_elements(), false);
  void* const bias = bench.Array(p.dtype, p.filters, false);
  const Conv2DTransposeForward forward = {rectified(x), kernel, bias, rectified(y)};
  void* const dkernel = bench.Array(p.dtype, p.kernel_elements(), false);
  const Conv2DTransposeGradient gradient = {forward.y, forward.y, forward.x, kernel, rectified(x), dkernel, bias};
  if (bench.status() != 0) return bench.status();
  return MeasureProducts(bench, Products(p, forward, gradient, forward.y), products);
}

}  // namespace unet_fast::gpu
