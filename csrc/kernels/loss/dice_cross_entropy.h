// Soft Dice and cross entropy from logits, one value a sample, and their gradient with respect to the logits.
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"
#include "common/thread_pool.h"

namespace unet_fast {

enum class LabelType { kUInt8, kInt32, kInt64 };

// With p = softmax(logits), t the one-hot labels, sums over the pixels of a sample whose label is not ignored:
//   ce   = sum w[label] * (-sum_k q_k log p_k) / sum w[label],  q = (1 - label_smoothing) t + label_smoothing / classes
//   dice = (2 sum p t + smooth) / (sum p^2 + sum t^2 + smooth)  a class; sum p + sum t where not `squared`
//   loss = ce_weight * ce + dice_weight * mean over the counted classes of (1 - dice)
// Counted are all classes but 0 where not `include_background`, and but `ignore_class`.
struct DiceCrossEntropyProblem {
  DType dtype = DType::kFloat32;
  LabelType label_type = LabelType::kInt32;
  int64_t batch = 0, pixels = 0, classes = 0;
  float dice_weight = 1, ce_weight = 1, smooth = 1e-6f, label_smoothing = 0;
  bool has_ignore_class = false;
  int64_t ignore_class = 0;  // where has_ignore_class; any integer, also outside the classes
  bool include_background = true, squared = true;

  bool Counts(int64_t k) const { return (include_background || k != 0) && !(has_ignore_class && k == ignore_class); }
  int64_t counted_classes() const {
    int64_t count = 0;
    for (int64_t k = 0; k < classes; ++k) count += Counts(k);
    return count;
  }
};

// Set where a label is neither a class nor ignored.
struct BadLabel {
  bool found = false;
  int64_t label = 0, sample = 0, pixel = 0;

  std::string Message(const DiceCrossEntropyProblem& problem) const {  // "" where none was found
    if (!found) return "";
    return "labels: expected classes 0 to " + std::to_string(problem.classes - 1) +
           " (the logits' last dimension), got " + std::to_string(label) + " in sample " + std::to_string(sample) +
           " at pixel " + std::to_string(pixel) +
           "; map the mask's values to classes, or name the value to leave out as ignore_class";
  }
};

namespace cpu {

// logits [batch, pixels, classes], labels [batch, pixels], class_weights [classes]
// -> loss [batch], sums [batch, 3, classes] (sum pt, sum p^2 or p, sum t), ce [batch, 2] (weighted sum, sum of weights)
BadLabel DiceCrossEntropy(ThreadPool& pool, const DiceCrossEntropyProblem& problem, const void* labels,
                          const void* logits, const float* class_weights, float* loss, float* sums, float* ce);
// dloss [batch] -> dlogits [batch, pixels, classes]
void DiceCrossEntropyGrad(ThreadPool& pool, const DiceCrossEntropyProblem& problem, const float* dloss,
                          const void* labels, const void* logits, const float* class_weights, const float* sums,
                          const float* ce, void* dlogits);

}  // namespace cpu
}  // namespace unet_fast
