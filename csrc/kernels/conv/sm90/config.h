// The tiles of the sm90 engine; launch.h and wgrad.cu have their kernels, config.cu chooses.
#pragma once

namespace unet_fast::gpu::sm90 {

// A tile of the implicit GEMM: two warpgroups of warp_m rows each, and n columns. share 3: taps that lie three in a row
// share a load of pixels. pairs: rows of the image in pairs, for pooling in the epilogue; plain weights only.
// splits: blocks that share the sum of a tile, 2 or 4.
// Or weights that stay in registers, for so many channels and n columns in all: share 3 (stationary.cuh), or 1 for
// transposed convolutions (upsampling.cuh).
struct GemmConfig {
  int warp_m, n, share;
  bool pairs;
  int blocks;  // at once on a multiprocessor
  int stationary = 0, splits = 1;
};
constexpr GemmConfig kGemmConfigs[] = {
    {128, 64, 3, false, 2},        {128, 64, 3, true, 2},         {64, 128, 3, false, 2},
    {128, 128, 3, false, 1},       {128, 128, 3, true, 1},        {64, 256, 3, false, 1},
    {128, 128, 1, false, 1},       {64, 256, 1, false, 1},        {128, 64, 1, false, 2},
    {128, 64, 3, true, 1, 64},     {128, 128, 3, true, 1, 64},    {128, 64, 3, true, 1, 128},
    {128, 128, 3, false, 1, 0, 2}, {128, 128, 3, false, 1, 0, 4}, {128, 128, 3, true, 1, 0, 2},
    {128, 128, 3, true, 1, 0, 4},  {128, 128, 1, false, 1, 0, 2}, {128, 128, 1, false, 1, 0, 4},
    {128, 64, 1, false, 1, 128},   {64, 128, 3, true, 2},         {64, 128, 3, false, 1, 0, 2},
    {64, 128, 1, false, 1, 0, 2}};
constexpr int kGemmConfigCount = sizeof(kGemmConfigs) / sizeof(GemmConfig);

// A tile of the weight gradient: three warpgroups of 64 * rounds rows each, and n columns; share as above. strips: of
// 3x3 convolutions, down strips of 64 positions (wgrad_strips.cuh).
struct WgradConfig {
  int rounds, n, share;
  bool strips = false;
};
constexpr WgradConfig kWgradConfigs[] = {{3, 64, 3},  {2, 128, 3}, {1, 128, 3},
                                         {2, 128, 1}, {1, 128, 1}, {3, 64, 3, true}};
constexpr int kWgradConfigCount = sizeof(kWgradConfigs) / sizeof(WgradConfig);

}  // namespace unet_fast::gpu::sm90
