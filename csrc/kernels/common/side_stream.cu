#include "common/side_stream.h"

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace unet_fast::gpu {

// A stream that no call uses, with the events that tie it to another. They live as long as the process: as many as
// there were calls at once, or calls in one capture beside others that were not captured.
struct SideStream::Lane {
  cudaStream_t stream = nullptr;
  cudaEvent_t fork = nullptr, join = nullptr;

  cudaError_t Create() {
    // Making them does not belong to the work that may be captured, and no capture of another thread forbids it.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaError_t status = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    for (cudaEvent_t* event : {&fork, &join}) {
      if (status == cudaSuccess) status = cudaEventCreateWithFlags(event, cudaEventDisableTiming);
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    return status;
  }
  void Destroy() {
    for (cudaEvent_t event : {fork, join}) {
      if (event != nullptr) cudaEventDestroy(event);
    }
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
};

struct SideStream::Pool {
  std::mutex mutex;
  std::vector<Lane*> free;
};

SideStream::Pool& SideStream::PoolOf(int device) {
  static std::mutex* const mutex = new std::mutex;  // never destroyed: threads may end after static objects do
  static auto* const pools = new std::map<int, std::unique_ptr<Pool>>;
  const std::lock_guard<std::mutex> lock(*mutex);
  std::unique_ptr<Pool>& pool = (*pools)[device];
  if (pool == nullptr) pool = std::make_unique<Pool>();
  return *pool;
}

SideStream::SideStream(void* stream) : stream_(stream) {
  const auto main = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capture, of_lane;
  unsigned long long id, id_of_lane;
  status_ = cudaGetDevice(&device_);
  if (status_ == 0) status_ = cudaStreamGetCaptureInfo(main, &capture, &id);
  if (status_ != 0) return;
  Pool& pool = PoolOf(device_);
  {
    const std::lock_guard<std::mutex> lock(pool.mutex);
    for (auto at = pool.free.begin(); at != pool.free.end() && lane_ == nullptr; ++at) {
      // After a call that was captured a lane belongs to that capture until it ends.
      if (cudaStreamGetCaptureInfo((*at)->stream, &of_lane, &id_of_lane) != cudaSuccess) continue;
      const bool is_free = of_lane == cudaStreamCaptureStatusNone;
      const bool is_same = of_lane == cudaStreamCaptureStatusActive && of_lane == capture && id_of_lane == id;
      if (!is_free && !is_same) continue;
      lane_ = *at;
      pool.free.erase(at);
      break;
    }
  }
  if (lane_ == nullptr) {
    auto lane = std::make_unique<Lane>();
    status_ = lane->Create();
    if (status_ != 0) {
      lane->Destroy();
      return;
    }
    lane_ = lane.release();
  }
  if (status_ == 0) status_ = cudaEventRecord(lane_->fork, main);
  if (status_ == 0) status_ = cudaStreamWaitEvent(lane_->stream, lane_->fork, 0);
}

SideStream::~SideStream() {
  if (lane_ == nullptr) return;
  Pool& pool = PoolOf(device_);
  const std::lock_guard<std::mutex> lock(pool.mutex);
  pool.free.push_back(lane_);
}

void* SideStream::get() const { return lane_ == nullptr ? nullptr : lane_->stream; }

int SideStream::Join() {
  if (status_ != 0) return status_;
  cudaError_t status = cudaEventRecord(lane_->join, lane_->stream);
  if (status == cudaSuccess) status = cudaStreamWaitEvent(static_cast<cudaStream_t>(stream_), lane_->join, 0);
  return status;
}

}  // namespace unet_fast::gpu
