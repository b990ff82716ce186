// Which tile a matrix product runs on and into how many partial sums a weight gradient is split: a small cost model,
// pure host functions of the problem. They must give the same answer when a graph is compiled (the workspace is part of
// it) and when it runs, so they know no device: the number of multiprocessors is an H100's, within a factor of two of
// every card that matters.
#pragma once

#include <cstddef>
#include <cstdint>

namespace unet_fast::gpu::wmma {

struct Tile {
  int m, n;           // rows and columns of a block's tile
  int blocks_per_sm;  // that fit a multiprocessor, by registers and shared memory
  float rate;         // relative speed of a multiprocessor full of them
};

// Tiles of the implicit GEMM and of the weight gradient; rates as measured on an H100. The last of each also takes
// channel counts that are no multiple of 8.
constexpr Tile kGemmTiles[] = {{128, 128, 2, 1.0f}, {128, 64, 4, 0.75f}, {64, 64, 4, 0.6f}};
constexpr Tile kWgradTiles[] = {{128, 128, 2, 1.0f}, {128, 64, 4, 0.75f}, {64, 64, 4, 0.6f}};
constexpr int kGemmTileCount = sizeof(kGemmTiles) / sizeof(Tile), kWgradTileCount = sizeof(kWgradTiles) / sizeof(Tile);

// Index of the tile for m x n results. `vector`: all channels are multiples of 8. `forced`: that one where it fits.
int ChooseGemmTile(int64_t m, int64_t n, bool vector, int forced);

constexpr int kPixelStep = 32;  // splits of the pixels are multiples of it

struct WgradPlan {
  int tile;
  int splits;
  int pixels_per_split;
};
// For m x n results, each a sum over `pixels`.
WgradPlan PlanWgrad(int64_t m, int64_t n, int64_t pixels, bool vector, int forced_tile, int forced_splits);

}  // namespace unet_fast::gpu::wmma
