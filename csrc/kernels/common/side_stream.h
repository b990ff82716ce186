// A second stream for the length of one call, so that kernels which do not depend on each other share the GPU: the last
// blocks of one leave multiprocessors idle that the first of the other take.
#pragma once

namespace unet_fast::gpu {

class SideStream {
 public:
  // What it is given later runs after all that `stream` (a cudaStream_t) has been given so far, and after Join() before
  // all that `stream` is given from then on. `stream` may be one whose work is captured into a graph.
  explicit SideStream(void* stream);
  ~SideStream();
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  void* get() const;
  // A cudaError_t: of this call, or of the constructor. Has to be called whatever became of the work between.
  int Join();

 private:
  struct Lane;
  struct Pool;
  static Pool& PoolOf(int device);

  void* stream_;
  Lane* lane_ = nullptr;
  int device_ = -1, status_ = 0;
};

// Two pieces of work that do not depend on each other, each a function of the stream that it shall use; returns the
// first error.
template <typename First, typename Second>
int AtOnce(void* stream, First first, Second second) {
  SideStream side(stream);
  int status = side.get() == nullptr ? 0 : first(stream);
  if (status == 0 && side.get() != nullptr) status = second(side.get());
  const int joined = side.Join();
  return status != 0 ? status : joined;
}

}  // namespace unet_fast::gpu
