// Random problems for the CPU kernels, each against plain loops in double. tests/sanitize_cpu.py builds this with
// sanitizers and runs it; arrays have exactly the bytes that a kernel may touch.
//   fuzz_cpu CASES SEED      prints a line a failure and, last, what was run; status 1 if anything failed
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "conv/cpu/conv2d.h"
#include "conv/cpu/primitives.h"
#include "loss/dice_cross_entropy.h"
#include "pool/max_pool2d.h"

namespace {

using namespace unet_fast;  // NOLINT
using Doubles = std::vector<double>;

std::mt19937_64 rng;
int64_t Draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }
bool Chance(int percent) { return Draw(1, 100) <= percent; }
int64_t Channels() {  // around the widths of vectors and the places where kernels change
  static const int64_t kAll[] = {1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 72, 96, 130};
  return kAll[Draw(0, std::size(kAll) - 1)];
}

class Threads : public ThreadPool {
 public:
  explicit Threads(int count) : count_(count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~Threads() override {
    Schedule(nullptr);
    for (std::thread& thread : threads_) thread.join();
  }
  void Schedule(std::function<void()> task) override {
    std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
    changed_.notify_all();
  }
  int NumThreads() const override { return count_; }

 private:
  void Work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return !tasks_.empty(); });
      const std::function<void()> task = tasks_.front();
      if (!task) return;  // stays, for the other threads
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }
  const int count_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
};

// An array of `count` elements on the heap, and no byte more.
struct Array {
  DType type;
  int64_t count;
  std::unique_ptr<char[]> bytes;

  Array(DType type, int64_t count) : type(type), count(count), bytes(new char[count * SizeOf(type)]) {
    std::fill_n(bytes.get(), count * SizeOf(type), char(0xff));  // NaN in all three types
  }
  Array(DType type, const Doubles& values) : Array(type, values.size()) {
    const std::vector<float> floats(values.begin(), values.end());
    cpu::GetPrimitives().from_float(floats.data(), type, bytes.get(), count);
  }
  Doubles Values() const {
    std::vector<float> floats(count);
    cpu::GetPrimitives().to_float(bytes.get(), type, floats.data(), count);
    return Doubles(floats.begin(), floats.end());
  }
};

Doubles Normal(int64_t count, double scale = 1) {
  std::normal_distribution<double> normal(0, scale);
  Doubles values(count);
  for (double& value : values) value = Chance(10) ? 0 : normal(rng);  // zeros: what a ReLU gives out
  return values;
}
Array Random(DType type, int64_t count, double scale = 1) { return Array(type, Normal(count, scale)); }

int failures = 0;
std::string current;  // the case that runs

void Fail(const std::string& what) {
  std::printf("FAILED %s: %s\n", current.c_str(), what.c_str());
  std::fflush(stdout);
  ++failures;
}

// Norm of the difference over the norm of what is expected.
void Check(const char* name, const Array& got, const Doubles& expected, double unit = 1e-5) {
  const double limit = got.type == DType::kFloat32 ? unit : got.type == DType::kFloat16 ? 1e-3 : 8e-3;
  const Doubles values = got.Values();
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < got.count; ++i) {
    difference += (values[i] - expected[i]) * (values[i] - expected[i]), norm += expected[i] * expected[i];
  }
  if (!(std::sqrt(difference) <= limit * std::sqrt(norm) + 1e-12)) {
    Fail(std::string(name) + ": error " + std::to_string(std::sqrt(difference / std::max(norm, 1e-300))));
  }
}

// Some NaN and infinities: nothing is compared then, it only has to run.
bool Spoil(Array* array) {
  if (array->count == 0 || !Chance(10)) return false;
  Doubles values = array->Values();
  const double kinds[] = {NAN, INFINITY, -INFINITY, 3e38, 1e-42};
  for (int i = 0; i < 3; ++i) values[Draw(0, array->count - 1)] = kinds[Draw(0, 4)];
  *array = Array(array->type, values);
  return true;
}

// 2x2 max pool of y [n, h, w, c]; with `dpooled`, what it adds to the gradient of y: to the first of equal maxima.
Doubles Pool(const Doubles& y, int64_t n, int64_t h, int64_t w, int64_t c, const Doubles* dpooled = nullptr) {
  Doubles result(dpooled != nullptr ? y.size() : n * (h / 2) * (w / 2) * c, 0.0);
  for (int64_t b = 0, window = 0; b < n; ++b) {
    for (int64_t i = 0; i < h / 2; ++i) {
      for (int64_t j = 0; j < w / 2; ++j) {
        for (int64_t k = 0; k < c; ++k, ++window) {
          int64_t best = -1;
          for (int64_t q = 0; q < 4; ++q) {
            const int64_t at = ((b * h + 2 * i + q / 2) * w + 2 * j + q % 2) * c + k;
            if (best < 0 || y[at] > y[best]) best = at;
          }
          (dpooled != nullptr ? result[best] : result[window]) = dpooled != nullptr ? (*dpooled)[window] : y[best];
        }
      }
    }
  }
  return result;
}

// Every product of a convolution: visit(element of the input, of the kernel, of the output). The input has `ci`
// channels. stride 1: y[i] sees x[i + r - pad]; stride 2, transposed: x[i] goes to y[2 i + r].
template <class Visit>
void Products(int64_t n, int64_t h, int64_t w, int64_t ci, int64_t oh, int64_t ow, int64_t co, int64_t k, int64_t pad,
              bool transposed, Visit visit) {
  for (int64_t b = 0; b < n; ++b) {
    for (int64_t i = 0; i < (transposed ? h : oh); ++i) {
      for (int64_t j = 0; j < (transposed ? w : ow); ++j) {
        for (int64_t r = 0; r < k; ++r) {
          for (int64_t s = 0; s < k; ++s) {
            const int64_t xi = transposed ? i : i + r - pad, xj = transposed ? j : j + s - pad;
            const int64_t yi = transposed ? 2 * i + r : i, yj = transposed ? 2 * j + s : j;
            if (xi < 0 || xi >= h || xj < 0 || xj >= w || yi >= oh || yj >= ow) continue;
            for (int64_t c = 0; c < ci; ++c) {
              for (int64_t f = 0; f < co; ++f) {
                const int64_t tap = transposed ? ((r * k + s) * co + f) * ci + c : ((r * k + s) * ci + c) * co + f;
                visit(((b * h + xi) * w + xj) * ci + c, tap, ((b * oh + yi) * ow + yj) * co + f);
              }
            }
          }
        }
      }
    }
  }
}

Doubles Activate(Doubles y, const Doubles& bias, bool relu) {
  for (size_t i = 0; i < y.size(); ++i) {
    y[i] += bias[i % bias.size()];
    if (relu && y[i] < 0) y[i] = 0;
  }
  return y;
}

void Conv2D(ThreadPool& pool, DType type) {
  Conv2DProblem p;
  p.dtype = type, p.same = Chance(50), p.relu = Chance(60), p.pool = Chance(40), p.kernel_size = Chance(70) ? 3 : 1;
  const bool has_skip = Chance(40), skip_only = has_skip && Chance(10);
  const int64_t least = p.same ? 1 : p.kernel_size;
  p.batch = Draw(0, 3), p.height = least + Draw(0, 8), p.width = least + (Chance(10) ? Draw(50, 70) : Draw(0, 10));
  p.channels = skip_only ? 0 : Channels(), p.filters = Channels();
  if (has_skip) {
    p.skip_channels = Chance(5) && !skip_only ? 0 : Channels();
    p.skip_height = p.height + Draw(0, 3), p.skip_width = p.width + Draw(0, 3);
  }
  while (p.batch * p.out_height() * p.out_width() * p.kernel_elements() > 4000000) p.filters = (p.filters + 1) / 2;
  p.mask_dx = Chance(30), p.mask_dskip = has_skip && Chance(30), p.dy_is_masked = p.relu && Chance(20);
  const int64_t oh = p.out_height(), ow = p.out_width(), ci = p.in_channels(), co = p.filters, k = p.kernel_size;
  p.dy_height = std::max<int64_t>(0, oh - (Chance(30) ? Draw(0, 3) : 0));
  p.dy_width = std::max<int64_t>(0, ow - (Chance(30) ? Draw(0, 3) : 0));
  current += " x " + ToString(p.x_dims()) + " skip [" + std::to_string(p.skip_height) + ", " +
             std::to_string(p.skip_width) + ", " + std::to_string(p.skip_channels) + "] kernel " +
             ToString(p.kernel_dims()) + (p.same ? " same" : "") + (p.relu ? " relu" : "") + (p.pool ? " pool" : "") +
             " dy " + ToString({p.dy_height, p.dy_width}) + (p.dy_is_masked ? " masked" : "");

  const int64_t pixels = p.batch * p.height * p.width, outputs = p.batch * oh * ow * co;
  Array x = Random(type, pixels * p.channels), kernel = Random(type, p.kernel_elements(), 1 / std::sqrt(k * k * ci));
  Array skip = Random(type, p.batch * p.skip_height * p.skip_width * p.skip_channels), bias = Random(type, co);
  Array y(type, outputs), pooled(type, p.pool ? p.batch * (oh / 2) * (ow / 2) * co : 0);
  const bool spoilt = Spoil(&x) | Spoil(&skip) | Spoil(&kernel);
  cpu::Conv2DBiasRelu(pool, p,
                      {x.bytes.get(), has_skip ? skip.bytes.get() : nullptr, kernel.bytes.get(), bias.bytes.get(),
                       y.bytes.get(), p.pool ? pooled.bytes.get() : nullptr});

  // The input as the convolution sees it: x beside the skip's centre.
  const Doubles xs = x.Values(), ss = skip.Values(), ks = kernel.Values();
  Doubles input(pixels * ci);
  std::vector<bool> dx_masked(pixels * ci);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t b = pixel / (p.height * p.width), i = pixel / p.width % p.height, j = pixel % p.width;
    for (int64_t c = 0; c < ci; ++c) {
      const int64_t in_skip = (b * p.skip_height + i + p.crop_top()) * p.skip_width + j + p.crop_left();
      const bool own = c < p.channels;
      const double value = own ? xs[pixel * p.channels + c] : ss[in_skip * p.skip_channels + c - p.channels];
      input[pixel * ci + c] = value;
      dx_masked[pixel * ci + c] = (own ? p.mask_dx : p.mask_dskip) && !(value > 0);
    }
  }
  Doubles expected(outputs, 0.0);
  Products(p.batch, p.height, p.width, ci, oh, ow, co, k, p.pad(), false,
           [&](int64_t in, int64_t tap, int64_t out) { expected[out] += input[in] * ks[tap]; });
  const Doubles ys = y.Values();
  if (!spoilt) {
    Check("y", y, Activate(expected, bias.Values(), p.relu));
    if (p.pool) Check("pooled", pooled, Pool(ys, p.batch, oh, ow, co), 0);
  }

  Array dy = Random(type, p.batch * p.dy_height * p.dy_width * co);
  const Array dpooled = Random(type, pooled.count);
  const auto whole = [&](int64_t at) {  // of an element of dy, its place in y
    const int64_t c = at % co, j = at / co % p.dy_width, i = at / co / p.dy_width % p.dy_height;
    const int64_t b = at / co / p.dy_width / p.dy_height;
    return ((b * oh + i + p.dy_top()) * ow + j + p.dy_left()) * co + c;
  };
  Doubles dys = dy.Values(), dz(outputs, 0.0);
  for (int64_t i = 0; i < dy.count; ++i) dz[whole(i)] = dys[i] *= p.dy_is_masked && !(ys[whole(i)] > 0) ? 0 : 1;
  dy = Array(type, dys);
  const Doubles unpooled_gradient = dpooled.Values();
  const Doubles unpooled = p.pool ? Pool(ys, p.batch, oh, ow, co, &unpooled_gradient) : Doubles(outputs, 0.0);
  for (int64_t i = 0; i < outputs; ++i) dz[i] = p.relu && !(ys[i] > 0) ? 0 : dz[i] + unpooled[i];
  Array dx(type, x.count), dskip(type, pixels * p.skip_channels), dkernel(type, kernel.count), dbias(type, co);
  const bool want_dx = Chance(80), want_dskip = has_skip && Chance(80);
  cpu::Conv2DBiasReluGrad(
      pool, p,
      {dy.bytes.get(), p.pool ? dpooled.bytes.get() : nullptr, y.bytes.get(), x.bytes.get(),
       has_skip ? skip.bytes.get() : nullptr, kernel.bytes.get(), want_dx ? dx.bytes.get() : nullptr,
       want_dskip ? dskip.bytes.get() : nullptr, dkernel.bytes.get(), dbias.bytes.get()});
  if (spoilt) return;
  Doubles dinput(input.size(), 0.0), dks(kernel.count, 0.0), dbs(co, 0.0), dxs, dss;
  Products(p.batch, p.height, p.width, ci, oh, ow, co, k, p.pad(), false, [&](int64_t in, int64_t tap, int64_t out) {
    dinput[in] += dz[out] * ks[tap], dks[tap] += dz[out] * input[in];
  });
  for (int64_t i = 0; i < outputs; ++i) dbs[i % co] += dz[i];
  for (size_t i = 0; i < dinput.size(); ++i) {
    (int64_t(i) % ci < p.channels ? dxs : dss).push_back(dx_masked[i] ? 0 : dinput[i]);
  }
  if (want_dx) Check("dx", dx, dxs);
  if (want_dskip) Check("dskip", dskip, dss);
  Check("dkernel", dkernel, dks, 2e-5);
  Check("dbias", dbias, dbs, 2e-5);
}

void Conv2DTranspose(ThreadPool& pool, DType type) {
  Conv2DTransposeProblem p;
  p.dtype = type, p.relu = Chance(60), p.kernel_size = Draw(2, 3), p.batch = Draw(0, 3), p.height = Draw(1, 7);
  p.width = Chance(10) ? Draw(30, 40) : Draw(1, 8), p.channels = Channels(), p.filters = Channels();
  p.input_is_relu = Chance(30), p.dy_is_masked = p.relu && Chance(20);
  while (p.batch * p.height * p.width * p.kernel_elements() > 4000000) p.filters = (p.filters + 1) / 2;
  current += " x " + ToString(p.x_dims()) + " kernel " + ToString(p.kernel_dims()) + (p.relu ? " relu" : "");
  const int64_t outputs = p.batch * 4 * p.height * p.width * p.filters, co = p.filters;
  Array x = Random(type, p.batch * p.height * p.width * p.channels), bias = Random(type, co);
  Array kernel = Random(type, p.kernel_elements(), 1 / std::sqrt(2.25 * p.channels)), y(type, outputs);
  const bool spoilt = Spoil(&x) | Spoil(&kernel);
  cpu::Conv2DTransposeBiasRelu(pool, p, {x.bytes.get(), kernel.bytes.get(), bias.bytes.get(), y.bytes.get()});
  const Doubles xs = x.Values(), ks = kernel.Values(), ys = y.Values();
  const auto products = [&](auto visit) {
    Products(p.batch, p.height, p.width, p.channels, 2 * p.height, 2 * p.width, co, p.kernel_size, 0, true, visit);
  };
  Doubles expected(outputs, 0.0);
  products([&](int64_t in, int64_t tap, int64_t out) { expected[out] += xs[in] * ks[tap]; });
  if (!spoilt) Check("y", y, Activate(expected, bias.Values(), p.relu));

  Doubles dz = Normal(outputs);
  for (int64_t i = 0; i < outputs; ++i) dz[i] = p.dy_is_masked && !(ys[i] > 0) ? 0 : dz[i];
  const Array dy(type, dz);
  dz = dy.Values();
  for (int64_t i = 0; i < outputs; ++i) dz[i] = p.relu && !(ys[i] > 0) ? 0 : dz[i];
  Array dx(type, x.count), dkernel(type, kernel.count), dbias(type, co);
  const bool want_dx = Chance(80);
  cpu::Conv2DTransposeBiasReluGrad(pool, p,
                                   {dy.bytes.get(), y.bytes.get(), x.bytes.get(), kernel.bytes.get(),
                                    want_dx ? dx.bytes.get() : nullptr, dkernel.bytes.get(), dbias.bytes.get()});
  if (spoilt) return;
  Doubles dxs(x.count, 0.0), dks(kernel.count, 0.0), dbs(co, 0.0);
  products([&](int64_t in, int64_t tap, int64_t out) { dxs[in] += dz[out] * ks[tap], dks[tap] += dz[out] * xs[in]; });
  for (int64_t i = 0; i < outputs; ++i) dbs[i % co] += dz[i];
  for (int64_t i = 0; i < x.count; ++i) dxs[i] = p.input_is_relu && !(xs[i] > 0) ? 0 : dxs[i];
  if (want_dx) Check("dx", dx, dxs);
  Check("dkernel", dkernel, dks, 2e-5);
  Check("dbias", dbias, dbs, 2e-5);
}

void MaxPool(ThreadPool& pool, DType type) {
  const int64_t n = Draw(0, 3), h = Draw(0, 9), w = Draw(0, 9), c = Chance(10) ? 0 : Channels();
  current += " x " + ToString({n, h, w, c});
  Array x = Random(type, n * h * w * c), y(type, n * (h / 2) * (w / 2) * c), dx(type, x.count);
  const bool spoilt = Spoil(&x);
  const Array dy = Random(type, y.count);
  const Doubles dys = dy.Values();
  cpu::MaxPool2D(pool, type, n, h, w, c, x.bytes.get(), y.bytes.get());
  cpu::MaxPool2DGrad(pool, type, n, h, w, c, x.bytes.get(), dy.bytes.get(), dx.bytes.get());
  if (spoilt) return;
  Check("y", y, Pool(x.Values(), n, h, w, c), 0);
  Check("dx", dx, Pool(x.Values(), n, h, w, c, &dys), 0);
}

void Loss(ThreadPool& pool, DType type) {
  DiceCrossEntropyProblem p;
  p.dtype = type, p.label_type = LabelType(Draw(0, 2)), p.batch = Draw(0, 3), p.classes = Draw(1, 9);
  p.pixels = Chance(5) ? 0 : Chance(10) ? Draw(4000, 9000) : Draw(1, 90), p.squared = Chance(50);
  p.include_background = Chance(70) || p.classes == 1, p.smooth = Chance(10) ? 0 : 1e-3;
  p.has_ignore_class = Chance(30), p.ignore_class = Chance(50) ? 255 : Draw(0, p.classes - 1);
  p.label_smoothing = Chance(30) ? 0.1 : 0;
  if (p.counted_classes() == 0) p.has_ignore_class = false;
  current += " " + ToString({p.batch, p.pixels, p.classes});
  const int64_t pixels = p.batch * p.pixels, classes = p.classes;
  const size_t width = p.label_type == LabelType::kUInt8 ? 1 : p.label_type == LabelType::kInt32 ? 4 : 8;
  std::unique_ptr<char[]> labels(new char[pixels * width]);
  std::vector<int64_t> truth(pixels);
  const bool bad = pixels > 0 && Chance(10);
  for (int64_t i = 0; i < pixels; ++i) {
    truth[i] = p.has_ignore_class && Chance(20) ? p.ignore_class : Draw(0, classes - 1);
    if (bad && i == pixels / 2) truth[i] = width == 1 || Chance(50) ? 200 : -(int64_t{1} << (8 * width - 2));
    std::copy_n(reinterpret_cast<const char*>(&truth[i]), width, labels.get() + i * width);  // little-endian
  }
  Array logits = Random(type, pixels * classes, 3);
  const bool spoilt = Spoil(&logits);
  std::vector<float> weights(classes), dloss(p.batch), loss(p.batch), sums(p.batch * 3 * classes), ce(p.batch * 2);
  for (float& weight : weights) weight = Draw(1, 4);
  for (float& d : dloss) d = Draw(1, 3);
  const BadLabel found = cpu::DiceCrossEntropy(pool, p, labels.get(), logits.bytes.get(), weights.data(), loss.data(),
                                               sums.data(), ce.data());
  if (found.found != bad) return Fail("a bad label was " + std::string(bad ? "missed" : "invented"));
  if (bad) return;
  Array dlogits(type, logits.count);
  cpu::DiceCrossEntropyGrad(pool, p, dloss.data(), labels.get(), logits.bytes.get(), weights.data(), sums.data(),
                            ce.data(), dlogits.bytes.get());
  if (spoilt) return;
  Doubles prob = logits.Values(), expected(p.batch), gradient(logits.count, 0.0);
  for (int64_t n = 0; n < p.batch; ++n) {
    Doubles above(classes, p.smooth), below(classes, p.smooth);
    double entropy = 0, weight = 0, dice = 0;
    const auto visit = [&](auto function) {  // the pixels that count
      for (int64_t i = n * p.pixels; i < (n + 1) * p.pixels; ++i) {
        if (!p.has_ignore_class || truth[i] != p.ignore_class) function(truth[i], &prob[i * classes], i * classes);
      }
    };
    visit([&](int64_t label, double* z, int64_t) {
      double sum = 0, cross = 0;
      for (int64_t k = 0; k < classes; ++k) sum += std::exp(z[k]);
      for (int64_t k = 0; k < classes; ++k) {
        const double log_p = z[k] - std::log(sum), t = k == label;
        cross -= ((1 - p.label_smoothing) * t + p.label_smoothing / classes) * log_p;
        z[k] = std::exp(log_p);
        above[k] += 2 * z[k] * t, below[k] += (p.squared ? z[k] * z[k] : z[k]) + t;
      }
      entropy += weights[label] * cross, weight += weights[label];
    });
    for (int64_t k = 0; k < classes; ++k) dice += !p.Counts(k) || below[k] == 0 ? 0 : 1 - above[k] / below[k];
    expected[n] = (weight > 0 ? entropy / weight : 0) + dice / p.counted_classes();
    visit([&](int64_t label, double* q, int64_t at) {
      Doubles dq(classes, 0.0);
      double mean = 0;
      for (int64_t k = 0; k < classes; ++k) {
        if (p.Counts(k) && below[k] != 0) {
          const double slope = p.squared ? 2 * q[k] : 1;
          dq[k] = (above[k] * slope / below[k] - 2 * (k == label)) / below[k] / p.counted_classes();
        }
        mean += q[k] * dq[k];
      }
      for (int64_t k = 0; k < classes; ++k) {
        const double target = (1 - p.label_smoothing) * (k == label) + p.label_smoothing / classes;
        gradient[at + k] = dloss[n] * (q[k] * (dq[k] - mean) + weights[label] / weight * (q[k] - target));
      }
    });
  }
  Check("loss", Array(DType::kFloat32, Doubles(loss.begin(), loss.end())), expected);
  Check("dlogits", dlogits, gradient, 2e-5);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "usage: fuzz_cpu CASES SEED\n"), 2;
  __sanitizer_set_death_callback([] { std::fprintf(stderr, "in %s\n", current.c_str()); });
  const int64_t cases = std::atoll(argv[1]), seed = std::atoll(argv[2]);
  using Op = void (*)(ThreadPool&, DType);
  const std::pair<const char*, Op> ops[] = {{"conv2d_bias_relu", Conv2D},
                                            {"conv2d_bias_relu", Conv2D},
                                            {"conv2d_transpose_bias_relu", Conv2DTranspose},
                                            {"max_pool2d", MaxPool},
                                            {"dice_cross_entropy", Loss}};
  const char* types[] = {"float32", "float16", "bfloat16"};
  std::map<std::string, int> counts;
  Threads one(1), several(4);
  for (int64_t i = 0; i < cases; ++i) {
    rng.seed(seed + i);  // so that a case runs alone as `fuzz_cpu 1 SEED`
    const auto& [name, op] = ops[(seed + i) % std::size(ops)];
    const int64_t type = Chance(60) ? 0 : Draw(1, 2);
    current = "seed " + std::to_string(seed + i) + ", " + name + " " + types[type];
    op(Chance(20) ? static_cast<ThreadPool&>(one) : several, DType(type));
    ++counts[name];
  }
  std::string summary;
  for (const auto& [name, count] : counts) summary += ", " + name + " " + std::to_string(count);
  std::printf("%lld cases%s; %d failed\n", static_cast<long long>(cases), summary.c_str(), failures);
  return failures > 0;
}
