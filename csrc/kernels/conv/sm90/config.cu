#include <algorithm>

#include "conv/sm90/engine.h"

namespace unet_fast::gpu::sm90 {
namespace {

constexpr int64_t kMultiprocessors = 132;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether the taps come in rows of three neighbours.
bool InThrees(const TapList& taps) {
  if (taps.count % 3 != 0) return false;
  for (int t = 0; t < taps.count; ++t) {
    const Tap &first = taps.tap[t / 3 * 3], &tap = taps.tap[t], &last = taps.tap[t / 3 * 3 + 2];
    const int direction = last.col > first.col ? 1 : -1;
    if (tap.row != first.row || tap.col != first.col + direction * (t % 3)) return false;
  }
  return true;
}

// Whether they are those of a 3x3 kernel.
bool AreSquare(const TapList& taps) {
  return taps.count == 9 && InThrees(taps) && taps.tap[0].col == taps.tap[3].col &&
         taps.tap[3].col == taps.tap[6].col && taps.tap[3].row == taps.tap[0].row + 1 &&
         taps.tap[6].row == taps.tap[0].row + 2;
}

// Of 64 channels, of all sources.
int64_t Chunks(const GemmArgs& g) {
  int64_t chunks = 0;
  for (int s = 0; s < g.sources; ++s) chunks += CeilDiv(g.source[s].channels, 64);
  return chunks;
}

// Whether it is the forward pass of a 3x3 transposed convolution.
bool Upsamples(const GemmArgs& g) {
  return g.lists == 4 && g.taps[0].count == 4 && g.taps[3].count == 1 && g.transposed && g.stride == 1;
}

bool ServesStationary(const GemmConfig& c, const GemmArgs& g) {
  if (c.share == 1) return Upsamples(g) && Chunks(g) == 2 && g.n <= 64;
  if (g.lists != 1 || g.stride != 1 || g.taps[0].count != 9 || !InThrees(g.taps[0])) return false;
  // Blocks of 128 channels share out the results, 64 each.
  const int64_t results = CeilDiv(g.n, 64) * 64;
  if (Chunks(g) * 64 != c.stationary || (c.stationary == 128 ? results > 256 : results != c.n)) return false;
  if (g.results == 2 && (g.result[0].channels == 0 || g.result[0].channels % 64 != 0)) return false;
  return g.pooled == nullptr || ((c.n == 64 || c.stationary == 128) && !g.transposed);
}

bool Serves(const GemmConfig& c, const GemmArgs& g) {
  if (c.stationary > 0) return ServesStationary(c, g);
  if (c.pairs != (g.pooled != nullptr)) return false;
  if (Chunks(g) < c.splits) return false;  // each block needs a part of the sum
  if (c.share == 3 && (g.lists != 1 || g.stride != 1 || !InThrees(g.taps[0]))) return false;
  return !c.pairs || (g.sources == 1 && !g.transposed && g.results == 1);
}

// Offsets into results and masks are counted by 16 bytes in 32 bits.
bool OffsetsFit(const GemmArgs& g) {
  int64_t image = g.mask_image_stride;
  for (int r = 0; r < g.results; ++r) image = std::max(image, g.result[r].image_stride);
  return image <= (int64_t{1} << 35) / std::max(g.batch, 1);
}

}  // namespace

bool InPairs(const GemmSource* source, int sources, int source_w, int stride, FirstTap first) {
  // A tile of 64 channels must not reach into the second pixel.
  bool whole = true;
  for (int s = 0; s < sources; ++s) whole = whole && source[s].channels % 64 == 0;
  return stride == 2 && source_w % 2 == 0 && first.col % 2 == 0 && whole;
}

int ChooseGemm(const GemmArgs& g, int forced) {
  // How fast a multiprocessor full of such tiles is, fitted to what `unet-fast tune` measured on an H100; in the order
  // of kGemmConfigs.
  constexpr double kGemmRate[kGemmConfigCount] = {0.83, 0.78, 0.935, 0.99,  0.97, 0.99, 0.972, 0.974,
                                                  0.42, 1.0,  1.0,   1.0,   0.95, 0.89, 0.95,  0.9,
                                                  0.92, 0.85, 1.0,   0.857, 0.97, 0.907};
  const int64_t pixels = static_cast<int64_t>(g.batch) * (g.out_h + 1) * (g.out_w + 4) * g.lists;
  if (!g.vector || !OffsetsFit(g) || g.out_h > 32768 || g.out_w > 32768 || pixels + 4096 >= int64_t{1} << 31) return -1;
  if (forced >= 0 && forced < kGemmConfigCount && Serves(kGemmConfigs[forced], g)) return forced;
  int best = -1;
  double best_cost = 0;
  for (int i = 0; i < kGemmConfigCount; ++i) {
    const GemmConfig& c = kGemmConfigs[i];
    if (!Serves(c, g)) continue;
    if (c.stationary > 0) return i;  // measured: always the fastest
    // As the launcher walks: see ImplicitGemm.
    int64_t pitch = g.out_w + c.share - 1;
    if (c.pairs) pitch += pitch % 2;
    const int64_t positions = g.batch * pitch * (c.pairs ? (g.out_h + 1) / 2 : g.out_h);
    const int64_t tiles = CeilDiv(positions, (c.pairs ? 1 : 2) * c.warp_m) * CeilDiv(g.n, c.n) * g.lists;
    // Cycles of a tile: products, and an epilogue that only a second block on the multiprocessor would hide. Clusters
    // that add up a tile start later and exchange sums, and not all multiprocessors find partners.
    const auto products = [&](int taps) {
      return static_cast<double>(Chunks(g) * taps) * c.warp_m * c.n / 16 / kGemmRate[i] / c.splits;
    };
    const double beside = c.splits == 4 ? 19900 : c.splits == 2 ? 11000 : c.blocks == 1 ? 3100 : 1600;
    const int64_t at_once = c.splits == 4 ? 30 : c.splits == 2 ? kMultiprocessors / 2 : kMultiprocessors;
    double taps = 0;  // of a list, on average; the longest is the first
    for (int l = 0; l < g.lists; ++l) taps += static_cast<double>(g.taps[l].count) / g.lists;
    const double cost = std::max(static_cast<double>(CeilDiv(tiles, at_once)) * (products(1) * taps + beside),
                                 products(g.taps[0].count) + beside);
    if (best < 0 || cost < best_cost) best = i, best_cost = cost;
  }
  return best;
}

std::string DescribeGemm(int config) {
  const GemmConfig& c = kGemmConfigs[config];
  if (c.stationary > 0) {
    return "weights in registers, " + std::to_string(c.stationary) + " channels by " + std::to_string(c.n);
  }
  std::string text = "tiles of " + std::to_string(2 * c.warp_m) + " by " + std::to_string(c.n);
  if (c.splits > 1) text += ", " + std::to_string(c.splits) + " blocks a tile";
  return text;
}

std::string Describe(const WgradPlan& plan) {
  const WgradConfig& c = kWgradConfigs[plan.config];
  return "tiles of " + std::to_string(192 * c.rounds) + " by " + std::to_string(c.n) +
         (c.strips ? " down strips, " : ", ") + std::to_string(plan.splits) + (plan.splits == 1 ? " part" : " parts");
}

WgradPlan PlanWgrad(const WgradArgs& g, int forced_config, int forced_splits) {
  constexpr int64_t kMaxSplits = 264, kMinSteps = 8;
  constexpr double kWgradRate[kWgradConfigCount] = {0.86, 1.0, 0.93, 0.9, 0.8, 1.1};  // as kGemmRate
  int64_t chunks = 0;
  for (int s = 0; s < g.sources; ++s) chunks += CeilDiv(g.source[s].channels, 64);
  WgradPlan plan{-1, 1, 0, 0};
  double best = -1;
  if (!g.vector) return plan;
  const bool in_pairs = InPairs(g.source, g.sources, g.source_w, g.stride, First(&g.taps, 1));
  for (int i = 0; i < kWgradConfigCount; ++i) {
    const WgradConfig& c = kWgradConfigs[i];
    if (forced_config >= 0 && forced_config < kWgradConfigCount && i != forced_config) continue;
    if (c.share == 3 && (!InThrees(g.taps) || (g.stride != 1 && !c.strips))) continue;
    if (c.strips && (!AreSquare(g.taps) || (g.stride != 1 && !in_pairs))) continue;
    const int64_t row = static_cast<int64_t>(g.batch) * (g.out_w + c.share - 1);  // of an image, or of all of them
    if (row * g.out_h + 64 * g.out_h >= int64_t{1} << 31) continue;
    const int64_t steps = std::max<int64_t>(1, c.strips ? CeilDiv(row, 64) * g.out_h : CeilDiv(row * g.out_h, 64));
    const int64_t units = chunks * g.taps.count / c.share;
    const int64_t tiles = CeilDiv(units, c.share == 3 ? c.rounds : 3 * c.rounds) * CeilDiv(g.n, c.n);
    const int64_t limit = forced_splits > 0 ? std::min<int64_t>(forced_splits, steps)
                                            : std::clamp<int64_t>(steps / kMinSteps, 1, kMaxSplits);
    for (int64_t splits = forced_splits > 0 ? limit : 1; splits <= limit; ++splits) {
      const int64_t per_split = CeilDiv(steps, splits), waves = CeilDiv(tiles * splits, kMultiprocessors);
      // Cycles of a multiprocessor: products, what a block costs beside them, slabs written and read.
      const double products = 6.0 * c.rounds * c.n * static_cast<double>(per_split) / kWgradRate[i];
      const double slabs =
          splits == 1 ? 0.0 : static_cast<double>(splits) * g.taps.count * chunks * 64 * g.n * 8 / 1800;
      const double cost = static_cast<double>(waves) * (products + 5000) + slabs;
      if (best < 0 || cost < best) {
        best = cost;
        plan = {i, static_cast<int>(splits), static_cast<int>(steps), static_cast<int>(per_split)};
      }
    }
  }
  if (plan.config >= 0) plan.splits = static_cast<int>(CeilDiv(plan.steps, plan.steps_per_split));
  return plan;
}

}  // namespace unet_fast::gpu::sm90
