// The entry points of libgomp that the kernels call, on standard threads, for builds with a sanitizer. libgomp itself
// is not instrumented: ThreadSanitizer would not see its barriers, and report what they order as races.
//
// Workers wait for one region after the other. Regions and barriers synchronise through a mutex; what OpenMP does not
// promise to order is not ordered here either: iterations and `single` are dealt out by relaxed atomics.
#include "openmp.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

thread_local int my_index = 0, my_team = 1;
thread_local long my_loops = 0, my_singles = 0;  // met so far in this region

constexpr int kConstructs = 64;  // loops, and singles, of a region

struct Team {
  int allowed = 1, granted = 1;  // what omp_get_max_threads says; what a region gets at most
  std::mutex mutex;
  std::condition_variable changed;
  long region = 0;
  void (*body)(void *) = nullptr;
  void *data = nullptr;
  int size = 1, busy = 0, waiting = 0;
  long barriers = 0;
  bool over = false;
  std::atomic<long> loops[kConstructs];    // iterations dealt out
  std::atomic<bool> singles[kConstructs];  // taken
  std::vector<std::thread> workers;

  void run(int index) {
    my_index = index, my_team = size, my_loops = my_singles = 0;
    if (size > 1) barrier();  // else the first thread would often be done before the last one has begun
    body(data);
    my_index = 0, my_team = 1;
  }

  void work(int index) {
    for (long done = 0;;) {
      {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return over || region > done; });
        if (over) return;
        done = region;
        if (index >= size) continue;
      }
      run(index);
      const std::lock_guard<std::mutex> lock(mutex);
      if (--busy == 0) changed.notify_all();
    }
  }

  void start(void (*function)(void *), void *argument, int wanted) {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      size = std::min(wanted > 0 ? wanted : allowed, granted);
      while (int(workers.size()) < size - 1) workers.emplace_back(&Team::work, this, int(workers.size()) + 1);
      body = function, data = argument, busy = size - 1, waiting = 0;
      for (auto &dealt : loops) dealt = 0;
      for (auto &single : singles) single = false;
      ++region;
      changed.notify_all();
    }
    run(0);
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return busy == 0; });
  }

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const long generation = barriers;
    if (++waiting == size) {
      waiting = 0, ++barriers;
      changed.notify_all();
    } else {
      changed.wait(lock, [&] { return barriers > generation; });
    }
  }

  ~Team() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      over = true;
      changed.notify_all();
    }
    for (std::thread &worker : workers) worker.join();
  }
};
Team team;

thread_local struct {
  std::atomic<long> *dealt;
  long start, end, chunk;
} my_loop;

bool next_chunk(long *first, long *last) {
  std::this_thread::yield();  // or one thread takes them all
  *first = my_loop.start + my_loop.dealt->fetch_add(my_loop.chunk, std::memory_order_relaxed);
  *last = std::min(*first + my_loop.chunk, my_loop.end);
  return *first < my_loop.end;
}

}  // namespace

void set_threads(int allowed, int granted) { team.allowed = allowed, team.granted = granted; }

extern "C" {

int omp_get_max_threads() { return team.allowed; }
int omp_get_num_threads() { return my_team; }
int omp_get_thread_num() { return my_index; }
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned) {
  if (my_team > 1) std::abort();  // the kernels have no nested regions
  team.start(body, data, int(threads));
}
void GOMP_barrier() {
  if (my_team > 1) team.barrier();
}
bool GOMP_single_start() {
  if (my_singles == kConstructs) std::abort();
  return !team.singles[my_singles++].exchange(true, std::memory_order_relaxed);
}
bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long *first, long *last) {
  if (my_loops == kConstructs || step != 1) std::abort();
  my_loop = {&team.loops[my_loops++], start, end, chunk};
  return next_chunk(first, last);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long *first, long *last) { return next_chunk(first, last); }
void GOMP_loop_end() { GOMP_barrier(); }

}  // extern "C"
