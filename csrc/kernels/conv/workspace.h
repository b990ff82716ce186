// Parts of a workspace, one behind the other, each aligned to 256 bytes.
#pragma once

#include <cstddef>

namespace unet_fast::gpu {

class Workspace {
 public:
  // With a null base it only counts.
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  void* Take(size_t bytes) {
    void* part = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += (bytes + 255) / 256 * 256;
    return part;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* base_;
  size_t bytes_ = 0;
};

}  // namespace unet_fast::gpu
