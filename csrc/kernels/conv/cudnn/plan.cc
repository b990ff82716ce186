// cuDNN's graphs by its header-only frontend, which the TensorFlow wheel brings along as it does cuDNN's headers.
//
// Nothing links with cuDNN: the frontend looks its functions up in a library that is opened when the first product is
// planned. In a process of TensorFlow that is libtensorflow_framework, whose stubs of cuDNN know where TensorFlow's
// lies; elsewhere it is the cuDNN that is loaded already, by PyTorch say, or that the loader finds. So the modules of
// this project load with and without either.
#define NV_CUDNN_FRONTEND_USE_DYNAMIC_LOADING
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#include "conv/cudnn/plan.h"

#include <cuda_runtime_api.h>
#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // declared by the frontend: where it looks up cuDNN's functions
}

namespace unet_fast::gpu::cudnn {
namespace {

namespace fe = cudnn_frontend;
using Graph = fe::graph::Graph;
using Tensor = fe::graph::Tensor_attributes;

constexpr int64_t kMostWorkspace = int64_t{256} << 20;

enum Uid : int64_t { kUidX = 1, kUidFilter, kUidY, kUidBias, kUidMask };

struct Plans {
  std::unique_ptr<Graph> graph;             // null: cuDNN does not know the graph
  std::unordered_map<int, int64_t> chosen;  // from `config` to the index of a plan of the graph, -1 where it has none
};

// Never destroyed: at the end of the process CUDA and cuDNN may be gone before it.
struct State {
  std::mutex mutex;
  std::unordered_map<int, cudnnHandle_t> handles;  // by device
  bool said = false;                               // that cuDNN gave none
  std::unordered_map<std::string, Plans> plans;
};
State& GetState() {
  static State& state = *new State;
  return state;
}

// 0 where the library holds no cuDNN. TensorFlow's stubs give 0 themselves where they find none.
int64_t VersionOf(void* library) {
  const auto version = reinterpret_cast<size_t (*)()>(dlsym(library, "cudnnGetVersion"));
  return version == nullptr ? 0 : static_cast<int64_t>(version());
}

// Whether cuDNN's functions can be called. Not finding them is not remembered: TensorFlow may be imported later.
bool OpenLibrary() {
  if (fe::cudnn_dlhandle != nullptr) return true;
  constexpr std::pair<const char*, int> kPlaces[] = {{"libtensorflow_framework.so.2", RTLD_NOLOAD},
                                                     {"libcudnn.so.9", 0}};
  for (const auto& [name, flags] : kPlaces) {
    void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL | flags);
    if (library == nullptr) continue;
    if (VersionOf(library) >= 90000) {
      fe::cudnn_dlhandle = library;
      return true;
    }
    dlclose(library);
  }
  return false;
}

cudnnHandle_t Handle(State& state, int device) {
  if (!OpenLibrary()) return nullptr;
  if (const auto found = state.handles.find(device); found != state.handles.end()) return found->second;
  cudnnHandle_t handle = nullptr;
  if (const cudnnStatus_t status = fe::detail::create_handle(&handle); status != CUDNN_STATUS_SUCCESS) {
    // Not remembered: memory may have run out for a while.
    if (!std::exchange(state.said, true)) {
      std::fprintf(stderr,
                   "unet_fast: cuDNN cannot be started (%s); products go to other engines, which may be slower\n",
                   fe::detail::get_error_string(status));
    }
    return nullptr;
  }
  return state.handles[device] = handle;
}

// What the frontend calls n, c, h, w, and in memory is [n, h, w, c].
struct Shape {
  int64_t n, c, h, w;
};
Tensor& Describe(Tensor& tensor, const Shape& s) {
  return tensor.set_dim({s.n, s.c, s.h, s.w}).set_stride({s.h * s.w * s.c, 1, s.w * s.c, s.c});
}
std::shared_ptr<Tensor> Input(Graph& graph, Uid uid, const Shape& shape) {
  Tensor tensor;
  return graph.tensor(Describe(tensor, shape).set_uid(uid));
}

template <typename Attributes>
Attributes Geometry(const Convolution& c) {
  return Attributes()
      .set_pre_padding({c.pad_top, c.pad_left})
      .set_post_padding({c.pad_bottom, c.pad_right})
      .set_stride({c.stride, c.stride})
      .set_dilation({1, 1});
}

std::unique_ptr<Graph> BuildGraph(const Convolution& c) {
  auto graph = std::make_unique<Graph>();
  graph->set_io_data_type(c.dtype == DType::kBFloat16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  const Shape x = {c.batch, c.x.channels, c.x.h, c.x.w}, y = {c.batch, c.y.channels, c.y.h, c.y.w};
  const Shape filter = {c.y.channels, c.x.channels, c.kernel_h, c.kernel_w};
  std::shared_ptr<Tensor> result;
  Shape shape;
  Uid uid;
  if (c.kind == Kind::kForward) {
    result = graph->conv_fprop(Input(*graph, kUidX, x), Input(*graph, kUidFilter, filter),
                               Geometry<fe::graph::Conv_fprop_attributes>(c));
    shape = y, uid = kUidY;
  } else if (c.kind == Kind::kInputGradient) {
    result = graph->conv_dgrad(Input(*graph, kUidY, y), Input(*graph, kUidFilter, filter),
                               Geometry<fe::graph::Conv_dgrad_attributes>(c));
    shape = x, uid = kUidX;
  } else {
    result = graph->conv_wgrad(Input(*graph, kUidY, y), Input(*graph, kUidX, x),
                               Geometry<fe::graph::Conv_wgrad_attributes>(c));
    shape = filter, uid = kUidFilter;
  }
  Describe(*result, shape);
  // What lies between two operations stays in registers, in float32.
  const auto pointwise = [](fe::PointwiseMode_t mode) { return fe::graph::Pointwise_attributes().set_mode(mode); };
  if (c.epilogue & kBias) {
    result = graph->pointwise(result, Input(*graph, kUidBias, {1, shape.c, 1, 1}), pointwise(fe::PointwiseMode_t::ADD));
  }
  if (c.epilogue & kRelu) result = graph->pointwise(result, pointwise(fe::PointwiseMode_t::RELU_FWD));
  if (c.epilogue & kMask) {
    result = graph->pointwise(result, Input(*graph, kUidMask, shape), pointwise(fe::PointwiseMode_t::RELU_BWD));
  }
  Describe(*result, shape).set_output(true).set_uid(uid);
  return graph;
}

// The graph with the plans that the heuristic proposes, none of them built; null where cuDNN does not know it.
std::unique_ptr<Graph> Propose(const Convolution& c, cudnnHandle_t handle) {
  using Note = fe::NumericalNote_t;
  std::unique_ptr<Graph> graph = BuildGraph(c);
  if (graph->validate().is_bad() || graph->build_operation_graph(handle).is_bad() ||
      graph->create_execution_plans({fe::HeurMode_t::A}).is_bad()) {
    return nullptr;
  }
  // Results are to be the same to the bit run after run, and sums to be in float32.
  graph
      ->deselect_numeric_notes({Note::NONDETERMINISTIC, Note::DOWN_CONVERT_INPUTS, Note::REDUCED_PRECISION_REDUCTION,
                                Note::WINOGRAD, Note::WINOGRAD_TILE_4x4, Note::WINOGRAD_TILE_6x6,
                                Note::WINOGRAD_TILE_13x13})
      .deselect_workspace_greater_than(kMostWorkspace);
  return graph->check_support().is_bad() ? nullptr : std::move(graph);
}

// Index of the plan, built; -1 where it cannot be.
int64_t BuildPlan(Graph& graph, int config) {
  const int64_t count = graph.get_execution_plan_count();
  const int64_t last = config < 0 ? count : std::min<int64_t>(config + 1, count);
  for (int64_t i = std::max(config, 0); i < last; ++i) {
    if (graph.build_plan_at_index(i).is_good()) return i;
  }
  return -1;
}

std::string Key(const Convolution& c, int device) {
  static_assert(std::has_unique_object_representations_v<Convolution>);
  std::string key(reinterpret_cast<const char*>(&c), sizeof(c));
  return key.append(reinterpret_cast<const char*>(&device), sizeof(device));
}

// The plans that were made of a graph, or null.
Plans* Find(State& state, const Convolution& c, int device) {
  const auto found = state.plans.find(Key(c, device));
  return found == state.plans.end() || found->second.graph == nullptr ? nullptr : &found->second;
}

// Also keeps in mind what cannot be planned. Where the frontend throws, a failure is what is left behind.
void Plan(State& state, const Convolution& c, int device, int config) {
  const cudnnHandle_t handle = Handle(state, device);
  if (handle == nullptr) return;
  const auto [found, is_new] = state.plans.emplace(Key(c, device), Plans{});
  Plans& plans = found->second;
  if (is_new) plans.graph = Propose(c, handle);
  if (plans.graph == nullptr) return;
  const auto [chosen, is_new_config] = plans.chosen.emplace(config, -1);
  if (is_new_config) chosen->second = BuildPlan(*plans.graph, config);
}

void* Mutable(const void* data) { return const_cast<void*>(data); }

// Index of a plan that was made, or -1.
int64_t IndexOf(const Plans* plans, int config) {
  if (plans == nullptr) return -1;
  const auto chosen = plans->chosen.find(config);
  return chosen == plans->chosen.end() ? -1 : chosen->second;
}

}  // namespace

int64_t PlanBytes(const Convolution& c, int config, bool may_plan) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return -1;
  State& state = GetState();
  const std::lock_guard<std::mutex> lock(state.mutex);
  try {
    if (may_plan) Plan(state, c, device, config);
    const Plans* plans = Find(state, c, device);
    const int64_t index = IndexOf(plans, config);
    return index < 0 ? -1 : plans->graph->get_workspace_size_plan_at_index(index);
  } catch (const std::exception&) {
    return -1;
  }
}

int Run(void* stream, const Convolution& c, int config, const Arrays& arrays, void* workspace) {
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  State& state = GetState();
  const std::lock_guard<std::mutex> lock(state.mutex);  // a handle is one thread's at a time
  try {
    const Plans* plans = Find(state, c, device);
    const int64_t index = IndexOf(plans, config);
    if (index < 0) return cudaErrorNotSupported;
    const cudnnHandle_t handle = Handle(state, device);
    if (fe::detail::set_stream(handle, static_cast<cudaStream_t>(stream)) != CUDNN_STATUS_SUCCESS) {
      return cudaErrorUnknown;
    }
    std::unordered_map<int64_t, void*> pack = {{kUidX, Mutable(arrays.x)},
                                               {kUidFilter, Mutable(arrays.filter)},
                                               {kUidY, Mutable(arrays.y)},
                                               {kUidBias, Mutable(arrays.bias)},
                                               {kUidMask, Mutable(arrays.mask)}};
    return plans->graph->execute_plan_at_index(handle, pack, workspace, index).is_good() ? cudaSuccess
                                                                                         : cudaErrorUnknown;
  } catch (const std::exception&) {
    return cudaErrorUnknown;
  }
}

int64_t LibraryVersion() {
  const std::lock_guard<std::mutex> lock(GetState().mutex);
  return OpenLibrary() ? VersionOf(fe::cudnn_dlhandle) : 0;
}

}  // namespace unet_fast::gpu::cudnn
