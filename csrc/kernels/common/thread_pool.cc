#include "common/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <utility>

namespace unet_fast {
namespace {

struct Loop {
  std::atomic<int64_t> next{0};
  int64_t count = 0;
  std::atomic<int64_t> ended{0};
  const std::function<void(int64_t)>* task = nullptr;
  std::mutex mutex;
  std::condition_variable all_ended;

  // A helper that comes late claims nothing and so never touches `task`, which lives on the caller's stack.
  void Work() {
    int64_t done = 0;
    for (int64_t i; (i = next.fetch_add(1)) < count; ++done) (*task)(i);
    if (done == 0 || ended.fetch_add(done) + done < count) return;
    std::lock_guard<std::mutex> lock(mutex);
    all_ended.notify_all();
  }
};

}  // namespace

void ParallelFor(ThreadPool& pool, int64_t count, const std::function<void(int64_t)>& task) {
  const int64_t helpers = std::min<int64_t>(pool.NumThreads(), count) - 1;
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  auto loop = std::make_shared<Loop>();
  loop->count = count;
  loop->task = &task;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([loop] { loop->Work(); });
  loop->Work();
  // Helpers mostly end within microseconds of each other, and to sleep and be woken takes longer than that.
  constexpr int kSpins = 1 << 14;
  for (int i = 0; i < kSpins; ++i) {
    if (loop->ended == count) return;
  }
  std::unique_lock<std::mutex> lock(loop->mutex);
  loop->all_ended.wait(lock, [&] { return loop->ended == count; });
}

void HelpingQueue::Schedule(std::function<void()> task) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
  }
  changed_.notify_one();
  pool_.Schedule([self = shared_from_this()] { self->RunOne(); });
}

void HelpingQueue::Finish() {
  // Notified under the lock: the waiter may destroy what it waits on as soon as it sees `finished_`.
  std::lock_guard<std::mutex> lock(mutex_);
  finished_ = true;
  changed_.notify_all();
}

bool HelpingQueue::RunOne() {
  std::function<void()> task;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (tasks_.empty()) return false;
    task = std::move(tasks_.front());
    tasks_.pop_front();
  }
  task();
  return true;
}

void HelpingQueue::RunUntilFinished() {
  for (;;) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return finished_ || !tasks_.empty(); });
      if (finished_) return;
    }
    RunOne();
  }
}

}  // namespace unet_fast
