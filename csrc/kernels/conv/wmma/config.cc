#include "conv/wmma/config.h"

#include <algorithm>

namespace unet_fast::gpu::wmma {
namespace {

constexpr int64_t kMultiprocessors = 132;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Time of `units` of work, each on a tile, in tile steps of a multiprocessor.
double Waves(const Tile& tile, int64_t units) {
  const int64_t slots = kMultiprocessors * tile.blocks_per_sm;
  // A last wave that leaves multiprocessors half empty runs its blocks faster, but not twice as fast.
  const int64_t full = units / slots, rest = units % slots;
  const double last =
      rest == 0 ? 0 : 0.3 + 0.7 * static_cast<double>(CeilDiv(rest, kMultiprocessors)) / tile.blocks_per_sm;
  return (static_cast<double>(full) + last) * tile.m * tile.n * tile.blocks_per_sm / tile.rate;
}

}  // namespace

int ChooseGemmTile(int64_t m, int64_t n, bool vector, int forced) {
  if (!vector) return kGemmTileCount - 1;
  if (forced >= 0 && forced < kGemmTileCount) return forced;
  int best = 0;
  double best_cost = 0;
  for (int i = 0; i < kGemmTileCount; ++i) {
    const double cost = Waves(kGemmTiles[i], CeilDiv(m, kGemmTiles[i].m) * CeilDiv(n, kGemmTiles[i].n));
    if (i == 0 || cost < best_cost) best = i, best_cost = cost;
  }
  return best;
}

WgradPlan PlanWgrad(int64_t m, int64_t n, int64_t pixels, bool vector, int forced_tile, int forced_splits) {
  constexpr int64_t kMaxSplits = 512, kMinSteps = 8;
  const int64_t steps = CeilDiv(pixels, kPixelStep);
  const bool forced = forced_tile >= 0 && forced_tile < kWgradTileCount;
  WgradPlan plan{kWgradTileCount - 1, 1, 0};
  double best = -1;
  for (int i = 0; i < kWgradTileCount; ++i) {
    if (vector ? forced && i != forced_tile : i != kWgradTileCount - 1) continue;
    const int64_t tiles = CeilDiv(m, kWgradTiles[i].m) * CeilDiv(n, kWgradTiles[i].n);
    const int64_t limit = std::clamp<int64_t>(steps / kMinSteps, 1, kMaxSplits);
    for (int64_t splits = 1; splits <= limit; ++splits) {
      // Writing and reading a partial sum of a tile costs about as much as this many steps of it.
      constexpr double kSlabSteps = 6;
      const double cost =
          Waves(kWgradTiles[i], tiles * splits) * (static_cast<double>(CeilDiv(steps, splits)) + kSlabSteps);
      if (best < 0 || cost < best) best = cost, plan = {i, static_cast<int>(splits), 0};
    }
  }
  if (forced_splits > 0) plan.splits = static_cast<int>(std::clamp<int64_t>(steps, 1, forced_splits));
  // An empty batch has a plan too: nothing is launched, but its workspace is asked for.
  plan.pixels_per_split = static_cast<int>(std::max<int64_t>(1, CeilDiv(steps, plan.splits)) * kPixelStep);
  plan.splits = static_cast<int>(std::max<int64_t>(1, CeilDiv(pixels, plan.pixels_per_split)));
  return plan;
}

}  // namespace unet_fast::gpu::wmma
