// Work sharing on a thread pool that belongs to somebody else (TensorFlow's or XLA's intra-op threads).
//
// Nothing here ever waits for a task that nobody has started: the caller works through its own tasks, and pool threads
// only help. A kernel that merely waited could deadlock under XLA, where several kernels run at once on the very
// threads whose help they would be waiting for.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>

namespace unet_fast {

class ThreadPool {
 public:
  virtual ~ThreadPool() = default;
  virtual void Schedule(std::function<void()> task) = 0;
  virtual int NumThreads() const = 0;
};

// Runs task(0) .. task(count - 1), in no particular order, and returns when all have ended.
void ParallelFor(ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& task);

// A queue of closures that any thread may run. `RunUntilFinished` works on it until `Finish` is called, which a closure
// does.
class HelpingQueue : public std::enable_shared_from_this<HelpingQueue> {
 public:
  explicit HelpingQueue(ThreadPool& pool) : pool_(pool) {}
  void Schedule(std::function<void()> task);
  void Finish();
  void RunUntilFinished();
  int NumThreads() const { return pool_.NumThreads(); }

 private:
  bool RunOne();
  ThreadPool& pool_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool finished_ = false;
};

}  // namespace unet_fast
