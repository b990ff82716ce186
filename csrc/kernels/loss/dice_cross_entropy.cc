// One read of logits and labels gives every sum that loss and gradient need. Pixels are cut into blocks of a fixed
// size whose sums are added in order, so the result does not depend on the number of threads.
#include "loss/dice_cross_entropy.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "conv/cpu/primitives.h"

namespace unet_fast::cpu {
namespace {

constexpr int64_t kBlock = 4096;  // pixels

int64_t Label(const void* labels, LabelType type, int64_t i) {
  switch (type) {
    case LabelType::kUInt8:
      return static_cast<const uint8_t*>(labels)[i];
    case LabelType::kInt32:
      return static_cast<const int32_t*>(labels)[i];
    case LabelType::kInt64:
      return static_cast<const int64_t*>(labels)[i];
  }
  return 0;
}

// Softmax of z in place; gives log(sum(exp(z))) back.
float Softmax(float* z, int64_t classes) {
  const float top = *std::max_element(z, z + classes);
  float sum = 0;
  for (int64_t k = 0; k < classes; ++k) sum += (z[k] = std::exp(z[k] - top));
  for (int64_t k = 0; k < classes; ++k) z[k] /= sum;
  return top + std::log(sum);
}

}  // namespace

BadLabel DiceCrossEntropy(ThreadPool& pool, const DiceCrossEntropyProblem& p, const void* labels, const void* logits,
                          const float* class_weights, float* loss, float* sums, float* ce) {
  const int64_t classes = p.classes, blocks = (p.pixels + kBlock - 1) / kBlock, width = 3 * classes + 2;
  std::vector<double> partial(p.batch * blocks * width, 0.0);
  std::atomic<int64_t> bad{-1};
  ParallelFor(pool, p.batch * blocks, [&](int64_t task) {
    const int64_t n = task / blocks, begin = n * p.pixels + task % blocks * kBlock;
    const int64_t count = std::min(kBlock, p.pixels - task % blocks * kBlock);
    std::vector<float> z(count * classes), original(classes);
    GetPrimitives().to_float(At(logits, p.dtype, begin * classes), p.dtype, z.data(), count * classes);
    double *intersection = partial.data() + task * width, *prediction = intersection + classes;
    double *truth = prediction + classes, *entropy = truth + classes, *weight = entropy + 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t label = Label(labels, p.label_type, begin + i);
      if (p.has_ignore_class && label == p.ignore_class) continue;
      if (label < 0 || label >= classes) {
        int64_t none = -1;
        bad.compare_exchange_strong(none, begin + i);
        continue;
      }
      float* prob = z.data() + i * classes;
      std::copy_n(prob, classes, original.data());
      const float log_sum = Softmax(prob, classes);
      double cross = (1.0 - p.label_smoothing) * (log_sum - original[label]);
      if (p.label_smoothing != 0) {
        for (int64_t k = 0; k < classes; ++k) cross += p.label_smoothing / classes * (log_sum - original[k]);
      }
      *entropy += class_weights[label] * cross;
      *weight += class_weights[label];
      intersection[label] += prob[label];
      truth[label] += 1;
      for (int64_t k = 0; k < classes; ++k) prediction[k] += p.squared ? double(prob[k]) * prob[k] : double(prob[k]);
    }
  });
  BadLabel result;
  if (bad >= 0) {
    result.found = true;
    result.label = Label(labels, p.label_type, bad);
    result.sample = bad / p.pixels;
    result.pixel = bad % p.pixels;
    return result;
  }
  const int64_t counted = p.counted_classes();
  for (int64_t n = 0; n < p.batch; ++n) {
    std::vector<double> total(width, 0.0);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < width; ++i) total[i] += partial[(n * blocks + b) * width + i];
    }
    std::copy_n(total.data(), 3 * classes, sums + n * 3 * classes);
    std::copy_n(total.data() + 3 * classes, 2, ce + n * 2);
    double dice_loss = 0;
    for (int64_t k = 0; k < classes; ++k) {
      if (!p.Counts(k)) continue;
      const double denominator = total[classes + k] + total[2 * classes + k] + p.smooth;
      // 0 / 0: a class that is nowhere, without smoothing, is a perfect match.
      dice_loss += denominator == 0 ? 0.0 : 1.0 - (2 * total[k] + p.smooth) / denominator;
    }
    const double weight = total[3 * classes + 1];
    loss[n] = p.ce_weight * (weight == 0 ? 0.0 : total[3 * classes] / weight) +
              (counted == 0 ? 0.0 : p.dice_weight * dice_loss / counted);
  }
  return result;
}

void DiceCrossEntropyGrad(ThreadPool& pool, const DiceCrossEntropyProblem& p, const float* dloss, const void* labels,
                          const void* logits, const float* class_weights, const float* sums, const float* ce,
                          void* dlogits) {
  const int64_t classes = p.classes, blocks = (p.pixels + kBlock - 1) / kBlock, counted = p.counted_classes();
  ParallelFor(pool, p.batch * blocks, [&](int64_t task) {
    const int64_t n = task / blocks, begin = n * p.pixels + task % blocks * kBlock;
    const int64_t count = std::min(kBlock, p.pixels - task % blocks * kBlock);
    // d loss / d prob[k] = at_label[k] * t[k] + linear[k] * prob[k] + constant[k]
    std::vector<float> at_label(classes, 0.0f), linear(classes, 0.0f), constant(classes, 0.0f);
    for (int64_t k = 0; k < classes; ++k) {
      const float* s = sums + n * 3 * classes + k;
      const double denominator = double(s[classes]) + s[2 * classes] + p.smooth;
      if (!p.Counts(k) || denominator == 0) continue;
      const double scale = double(dloss[n]) * p.dice_weight / counted / denominator;
      const double slope = scale * (2.0 * s[0] + p.smooth) / denominator;
      at_label[k] = -2.0 * scale;
      (p.squared ? linear[k] : constant[k]) = p.squared ? 2.0 * slope : slope;
    }
    const double weight = ce[n * 2 + 1];
    const float ce_scale = weight == 0 ? 0.0 : double(dloss[n]) * p.ce_weight / weight;
    std::vector<float> z(count * classes);
    GetPrimitives().to_float(At(logits, p.dtype, begin * classes), p.dtype, z.data(), count * classes);
    for (int64_t i = 0; i < count; ++i) {
      float* prob = z.data() + i * classes;
      const int64_t label = Label(labels, p.label_type, begin + i);
      if (label < 0 || label >= classes || (p.has_ignore_class && label == p.ignore_class)) {
        std::fill_n(prob, classes, 0.0f);
        continue;
      }
      Softmax(prob, classes);
      float mean = prob[label] * at_label[label];  // sum over k of prob[k] * d loss / d prob[k]
      for (int64_t k = 0; k < classes; ++k) mean += prob[k] * (linear[k] * prob[k] + constant[k]);
      const float pixel_weight = ce_scale * class_weights[label];
      for (int64_t k = 0; k < classes; ++k) {
        const float t = k == label ? 1.0f : 0.0f;
        const float target = (1.0f - p.label_smoothing) * t + p.label_smoothing / classes;
        const float dprob = at_label[k] * t + linear[k] * prob[k] + constant[k] - mean;
        prob[k] = prob[k] * dprob + pixel_weight * (prob[k] - target);
      }
    }
    GetPrimitives().from_float(z.data(), p.dtype, At(dlogits, p.dtype, begin * classes), count * classes);
  });
}

}  // namespace unet_fast::cpu
