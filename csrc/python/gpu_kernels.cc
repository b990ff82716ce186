// Python module unet_fast._native.gpu. Compiled with UNET_FAST_GPU_KERNELS_MODULE it is a module of its own,
// _gpu_kernels, that needs neither TensorFlow nor the CPU kernels; see tests/gpu/build_native.sh.
#include "gpu_kernels.h"

#include <cstdint>
#include <stdexcept>
#include <string>

#include <pybind11/stl.h>

#include "cast/gpu.h"
#include "conv/gpu.h"
#include "conv/measure.h"
#ifdef UNET_FAST_CUDNN
#include "conv/cudnn/config.h"
#endif
#ifdef UNET_FAST_SM90
#include "conv/sm90/config.h"
#endif
#include "conv/wmma/config.h"
#include "loss/gpu.h"
#include "pool/gpu.h"

namespace py = pybind11;

namespace unet_fast {
namespace {

using Address = std::uintptr_t;  // 0: none

template <typename T = void>
T* Pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void Check(int status) {
  if (status != 0) throw std::runtime_error("CUDA error " + std::to_string(status));
}

DType ToDType(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  throw py::value_error("dtype: expected float32, float16 or bfloat16, got " + name);
}

gpu::Engine ToEngine(const std::string& name) {
  if (name == "auto") return gpu::Engine::kAuto;
  if (name == "wmma") return gpu::Engine::kWmma;
  if (name == "sm90") return gpu::Engine::kSm90;
  if (name == "cudnn") return gpu::Engine::kCudnn;
  throw py::value_error("engine: expected auto, wmma, sm90 or cudnn, got " + name);
}

template <typename Problem>
std::vector<gpu::MeasuredProduct> Measured(const Problem& problem) {
  std::vector<gpu::MeasuredProduct> products;
  Check(gpu::Measure(problem, &products));
  return products;
}

LabelType ToLabelType(const std::string& name) {
  if (name == "uint8") return LabelType::kUInt8;
  if (name == "int32") return LabelType::kInt32;
  if (name == "int64") return LabelType::kInt64;
  throw py::value_error("label_type: expected uint8, int32 or int64, got " + name);
}

}  // namespace

void BindGpuKernels(py::module_& m) {
  m.doc() = "The GPU kernels on addresses of device memory. They launch on `stream` and do not wait.";

  py::class_<Conv2DProblem>(m, "Conv2DProblem", "Sizes and flags, see csrc/kernels/conv/problem.h.")
      .def(py::init<>())
      .def_property("dtype", nullptr, [](Conv2DProblem& p, const std::string& name) { p.dtype = ToDType(name); })
      .def_readwrite("batch", &Conv2DProblem::batch)
      .def_readwrite("height", &Conv2DProblem::height)
      .def_readwrite("width", &Conv2DProblem::width)
      .def_readwrite("channels", &Conv2DProblem::channels)
      .def_readwrite("skip_height", &Conv2DProblem::skip_height)
      .def_readwrite("skip_width", &Conv2DProblem::skip_width)
      .def_readwrite("skip_channels", &Conv2DProblem::skip_channels)
      .def_readwrite("filters", &Conv2DProblem::filters)
      .def_readwrite("kernel_size", &Conv2DProblem::kernel_size)
      .def_readwrite("dy_height", &Conv2DProblem::dy_height)
      .def_readwrite("dy_width", &Conv2DProblem::dy_width)
      .def_readwrite("same", &Conv2DProblem::same)
      .def_readwrite("relu", &Conv2DProblem::relu)
      .def_readwrite("pool", &Conv2DProblem::pool)
      .def_readwrite("mask_dx", &Conv2DProblem::mask_dx)
      .def_readwrite("mask_dskip", &Conv2DProblem::mask_dskip)
      .def_property("input_is_relu", nullptr, [](Conv2DProblem& p, bool v) { p.mask_dx = p.mask_dskip = v; })
      .def_readwrite("dy_is_masked", &Conv2DProblem::dy_is_masked);

  py::class_<Conv2DTransposeProblem>(m, "Conv2DTransposeProblem", "Sizes and flags, see csrc/kernels/conv/problem.h.")
      .def(py::init<>())
      .def_property("dtype", nullptr,
                    [](Conv2DTransposeProblem& p, const std::string& name) { p.dtype = ToDType(name); })
      .def_readwrite("batch", &Conv2DTransposeProblem::batch)
      .def_readwrite("height", &Conv2DTransposeProblem::height)
      .def_readwrite("width", &Conv2DTransposeProblem::width)
      .def_readwrite("channels", &Conv2DTransposeProblem::channels)
      .def_readwrite("filters", &Conv2DTransposeProblem::filters)
      .def_readwrite("kernel_size", &Conv2DTransposeProblem::kernel_size)
      .def_readwrite("relu", &Conv2DTransposeProblem::relu)
      .def_readwrite("input_is_relu", &Conv2DTransposeProblem::input_is_relu)
      .def_readwrite("dy_is_masked", &Conv2DTransposeProblem::dy_is_masked);

  py::class_<DiceCrossEntropyProblem>(m, "DiceCrossEntropyProblem",
                                      "Sizes and flags, see csrc/kernels/loss/dice_cross_entropy.h.")
      .def(py::init<>())
      .def_property("dtype", nullptr,
                    [](DiceCrossEntropyProblem& p, const std::string& name) { p.dtype = ToDType(name); })
      .def_property("label_type", nullptr,
                    [](DiceCrossEntropyProblem& p, const std::string& name) { p.label_type = ToLabelType(name); })
      .def_readwrite("batch", &DiceCrossEntropyProblem::batch)
      .def_readwrite("pixels", &DiceCrossEntropyProblem::pixels)
      .def_readwrite("classes", &DiceCrossEntropyProblem::classes)
      .def_readwrite("dice_weight", &DiceCrossEntropyProblem::dice_weight)
      .def_readwrite("ce_weight", &DiceCrossEntropyProblem::ce_weight)
      .def_readwrite("smooth", &DiceCrossEntropyProblem::smooth)
      .def_readwrite("label_smoothing", &DiceCrossEntropyProblem::label_smoothing)
      .def_readwrite("has_ignore_class", &DiceCrossEntropyProblem::has_ignore_class)
      .def_readwrite("ignore_class", &DiceCrossEntropyProblem::ignore_class)
      .def_readwrite("include_background", &DiceCrossEntropyProblem::include_background)
      .def_readwrite("squared", &DiceCrossEntropyProblem::squared);

  py::class_<gpu::Conv2DTuning>(m, "Conv2DTuning", "Choices that otherwise follow from the problem.")
      .def(py::init<>())
      .def_property("engine", nullptr, [](gpu::Conv2DTuning& t, const std::string& name) { t.engine = ToEngine(name); })
      .def_readwrite("gemm", &gpu::Conv2DTuning::gemm)
      .def_readwrite("wgrad", &gpu::Conv2DTuning::wgrad)
      .def_readwrite("splits", &gpu::Conv2DTuning::splits);

  py::class_<gpu::ProductChoice>(m, "ProductChoice", "An engine, and its tile or why it is this one.")
      .def_readonly("product", &gpu::ProductChoice::product)
      .def_readonly("engine", &gpu::ProductChoice::engine)
      .def_readonly("detail", &gpu::ProductChoice::detail);

  // Of each engine in this build: how many tiles its implicit GEMM and its weight gradient have.
  py::dict engines;
  engines["wmma"] = py::make_tuple(gpu::wmma::kGemmTileCount, gpu::wmma::kWgradTileCount);
#ifdef UNET_FAST_SM90
  engines["sm90"] = py::make_tuple(gpu::sm90::kGemmConfigCount, gpu::sm90::kWgradConfigCount);
#endif
#ifdef UNET_FAST_CUDNN
  engines["cudnn"] = py::make_tuple(gpu::cudnn::kPlans, gpu::cudnn::kPlans);
#endif
  m.attr("engines") = engines;

  m.def("conv2d_choices", &gpu::Conv2DChoices, py::arg("problem"), py::arg("compute_capability"),
        "What each product would run on, on a device of that compute capability (90 for 9.0).");
  m.def("conv2d_transpose_choices", &gpu::Conv2DTransposeChoices, py::arg("problem"), py::arg("compute_capability"),
        "As conv2d_choices.");

  py::class_<gpu::Timing>(m, "Timing", "An engine with one of its configurations, and how long a product takes on it.")
      .def_property_readonly("engine", [](const gpu::Timing& t) { return gpu::EngineName(t.choice.engine); })
      .def_property_readonly("config", [](const gpu::Timing& t) { return t.choice.config; })
      .def_property_readonly("splits", [](const gpu::Timing& t) { return t.choice.splits; })
      .def_readonly("microseconds", &gpu::Timing::microseconds);
  py::class_<gpu::MeasuredProduct>(m, "MeasuredProduct", "A product's timings, the first of what the rules choose.")
      .def_readonly("product", &gpu::MeasuredProduct::name)
      .def_readonly("key", &gpu::MeasuredProduct::key)
      .def_readonly("timings", &gpu::MeasuredProduct::timings);
  m.def("measure_conv2d", &Measured<Conv2DProblem>, py::arg("problem"),
        "Times each product on each engine and configuration that serves it, on the current device.");
  m.def("measure_conv2d_transpose", &Measured<Conv2DTransposeProblem>, py::arg("problem"), "As measure_conv2d.");
  m.def("tuning_path", &gpu::TuningPath, "The file of choices that this process reads; '' without a device.");

  m.def(
      "conv2d_bias_relu",
      [](Address stream, const Conv2DProblem& p, Address x, Address skip, Address kernel, Address bias, Address y,
         Address pooled, Address workspace, const gpu::Conv2DTuning& tuning) {
        Check(gpu::Conv2DBiasRelu(
            Pointer(stream), p,
            {Pointer(x), Pointer(skip), Pointer(kernel), Pointer(bias), Pointer(y), Pointer(pooled)},
            Pointer(workspace), tuning));
      },
      py::arg("stream"), py::arg("problem"), py::arg("x"), py::arg("skip"), py::arg("kernel"), py::arg("bias"),
      py::arg("y"), py::arg("pooled"), py::arg("workspace"), py::arg("tuning"));
  m.def("conv2d_bias_relu_workspace_bytes", &gpu::Conv2DBiasReluWorkspaceBytes, py::arg("problem"), py::arg("tuning"));

  m.def(
      "conv2d_bias_relu_grad",
      [](Address stream, const Conv2DProblem& p, Address dy, Address dpooled, Address y, Address x, Address skip,
         Address kernel, Address dx, Address dskip, Address dkernel, Address dbias, Address workspace,
         const gpu::Conv2DTuning& tuning) {
        Check(gpu::Conv2DBiasReluGrad(Pointer(stream), p,
                                      {Pointer(dy), Pointer(dpooled), Pointer(y), Pointer(x), Pointer(skip),
                                       Pointer(kernel), Pointer(dx), Pointer(dskip), Pointer(dkernel), Pointer(dbias)},
                                      Pointer(workspace), tuning));
      },
      py::arg("stream"), py::arg("problem"), py::arg("dy"), py::arg("dpooled"), py::arg("y"), py::arg("x"),
      py::arg("skip"), py::arg("kernel"), py::arg("dx"), py::arg("dskip"), py::arg("dkernel"), py::arg("dbias"),
      py::arg("workspace"), py::arg("tuning"));
  m.def("conv2d_bias_relu_grad_workspace_bytes", &gpu::Conv2DBiasReluGradWorkspaceBytes, py::arg("problem"),
        py::arg("tuning"));

  m.def(
      "conv2d_transpose_bias_relu",
      [](Address stream, const Conv2DTransposeProblem& p, Address x, Address kernel, Address bias, Address y,
         Address workspace, const gpu::Conv2DTuning& tuning) {
        Check(gpu::Conv2DTransposeBiasRelu(Pointer(stream), p, {Pointer(x), Pointer(kernel), Pointer(bias), Pointer(y)},
                                           Pointer(workspace), tuning));
      },
      py::arg("stream"), py::arg("problem"), py::arg("x"), py::arg("kernel"), py::arg("bias"), py::arg("y"),
      py::arg("workspace"), py::arg("tuning"));
  m.def("conv2d_transpose_bias_relu_workspace_bytes", &gpu::Conv2DTransposeBiasReluWorkspaceBytes, py::arg("problem"),
        py::arg("tuning"));

  m.def(
      "conv2d_transpose_bias_relu_grad",
      [](Address stream, const Conv2DTransposeProblem& p, Address dy, Address y, Address x, Address kernel, Address dx,
         Address dkernel, Address dbias, Address workspace, const gpu::Conv2DTuning& tuning) {
        Check(gpu::Conv2DTransposeBiasReluGrad(
            Pointer(stream), p,
            {Pointer(dy), Pointer(y), Pointer(x), Pointer(kernel), Pointer(dx), Pointer(dkernel), Pointer(dbias)},
            Pointer(workspace), tuning));
      },
      py::arg("stream"), py::arg("problem"), py::arg("dy"), py::arg("y"), py::arg("x"), py::arg("kernel"),
      py::arg("dx"), py::arg("dkernel"), py::arg("dbias"), py::arg("workspace"), py::arg("tuning"));
  m.def("conv2d_transpose_bias_relu_grad_workspace_bytes", &gpu::Conv2DTransposeBiasReluGradWorkspaceBytes,
        py::arg("problem"), py::arg("tuning"));

  m.def(
      "max_pool2d",
      [](Address stream, const std::string& dtype, int64_t n, int64_t h, int64_t w, int64_t c, Address x, Address y) {
        Check(gpu::MaxPool2D(Pointer(stream), ToDType(dtype), n, h, w, c, Pointer(x), Pointer(y)));
      },
      py::arg("stream"), py::arg("dtype"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("x"),
      py::arg("y"));
  m.def(
      "max_pool2d_grad",
      [](Address stream, const std::string& dtype, int64_t n, int64_t h, int64_t w, int64_t c, Address x, Address dy,
         Address dx) {
        Check(gpu::MaxPool2DGrad(Pointer(stream), ToDType(dtype), n, h, w, c, Pointer(x), Pointer(dy), Pointer(dx)));
      },
      py::arg("stream"), py::arg("dtype"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("x"),
      py::arg("dy"), py::arg("dx"));

  m.def(
      "cast",
      [](Address stream, const std::string& dtype, const std::vector<std::tuple<Address, Address, int64_t>>& arrays) {
        std::vector<gpu::CastArray> list;
        for (const auto& [from, to, elements] : arrays) list.push_back({Pointer(from), Pointer(to), elements});
        Check(gpu::Cast(Pointer(stream), ToDType(dtype), list));
      },
      py::arg("stream"), py::arg("dtype"), py::arg("arrays"), "arrays: (float32 from, to, elements) each.");

  m.def(
      "dice_cross_entropy",
      [](Address stream, const DiceCrossEntropyProblem& p, Address labels, Address logits, Address class_weights,
         Address loss, Address sums, Address ce, Address workspace) {
        Check(gpu::DiceCrossEntropy(Pointer(stream), p, Pointer(labels), Pointer(logits), Pointer<float>(class_weights),
                                    Pointer<float>(loss), Pointer<float>(sums), Pointer<float>(ce),
                                    Pointer(workspace)));
      },
      py::arg("stream"), py::arg("problem"), py::arg("labels"), py::arg("logits"), py::arg("class_weights"),
      py::arg("loss"), py::arg("sums"), py::arg("ce"), py::arg("workspace"));
  m.def("dice_cross_entropy_workspace_bytes", &gpu::DiceCrossEntropyWorkspaceBytes, py::arg("problem"));
  m.def(
      "dice_cross_entropy_grad",
      [](Address stream, const DiceCrossEntropyProblem& p, Address dloss, Address labels, Address logits,
         Address class_weights, Address sums, Address ce, Address dlogits) {
        Check(gpu::DiceCrossEntropyGrad(Pointer(stream), p, Pointer<float>(dloss), Pointer(labels), Pointer(logits),
                                        Pointer<float>(class_weights), Pointer<float>(sums), Pointer<float>(ce),
                                        Pointer(dlogits)));
      },
      py::arg("stream"), py::arg("problem"), py::arg("dloss"), py::arg("labels"), py::arg("logits"),
      py::arg("class_weights"), py::arg("sums"), py::arg("ce"), py::arg("dlogits"));
}

}  // namespace unet_fast

#ifdef UNET_FAST_GPU_KERNELS_MODULE
PYBIND11_MODULE(_gpu_kernels, m) { unet_fast::BindGpuKernels(m); }
#endif
