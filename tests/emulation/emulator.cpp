// Runs CUDA kernels on the CPU, to find faults in them where there is no GPU.
//
// Every CUDA thread of a block is a fiber, a stack of its own that runs until it waits for others.
// Blocks run one after another. Each of these ends a launch in a RuntimeError:
//
//   divergence   a barrier, shuffle or __syncwarp that not every thread of the block or warp
//                reaches, or that they reach at different places in the source;
//   races        two threads use the same memory, one of them writing, and no barrier is between
//                them, or they are of different blocks. A shuffle orders nothing, a __syncwarp the
//                warp alone;
//   bounds       use of memory that is neither the block's shared memory nor a live tensor's, and
//                a read of shared memory that nothing was written to;
//   launches     empty or too large, more shared memory than 48 KiB, another stream than the
//                current one, no device guard, or no check after the launch before.
//
// What it cannot show: the memory model of a real GPU, which may reorder what is unordered here,
// what nvcc makes of the code, CUDA's own exp and log, and time. Tests on a GPU do.
//
// Races and bounds are seen by the calls that g++ -fsanitize=thread adds to every use of memory,
// to functions that are defined here and not by ThreadSanitizer. In a build for the address and
// undefined-behaviour sanitizers those calls are missing and the sanitizers watch instead.
#include "cuda_runtime.h"

#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <torch/csrc/stable/c/shim.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;
int planted = 0;
extern "C" const char __ehdr_start, _end;  // where this library begins and ends in memory

namespace emulated {
namespace {

constexpr size_t max_threads = 1024, max_shared = 48 * 1024, stack_bytes = 256 << 10;
constexpr int warp = 32;

// ------------------------------------------------------------------ memory
// What is known of the two bytes at one address.
struct Cell {
  uint32_t epoch;  // of the latest use
  // Who used it: one thread, or several lanes of its warp, or several warps.
  uint32_t thread : 10, lanes : 1, warps : 1;
  uint32_t live : 1, shared : 1;     // part of a tensor or of shared memory
  uint32_t wrote : 1, written : 1;   // in that use; in this launch
  uint32_t foreign : 1;              // read by an earlier block of this launch
  uint32_t meetings : 15;            // the __syncwarps that the thread had passed
};

// Addresses for memory that is watched, handed out once each, and a cell for every two bytes.
constexpr size_t page = 4096, watched_bytes = size_t(1) << 36;

template <class T>
T* reserve(size_t bytes) {
  void* memory = mmap(
      nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<T*>(memory);
}

struct Watched {
  char* memory = reserve<char>(watched_bytes);
  Cell* cells = reserve<Cell>(watched_bytes / 2 * sizeof(Cell));
  size_t used = page;
  std::unordered_map<void*, size_t> sizes;
  std::mutex mutex;

  bool contains(uintptr_t address) const { return address - uintptr_t(memory) < watched_bytes; }
  Cell& cell(uintptr_t address) { return cells[(address - uintptr_t(memory)) / 2]; }

  void* allocate(size_t bytes, bool shared) {
    const std::lock_guard lock(mutex);
    const size_t pages = (bytes + page - 1) / page * page;
    if (sizes.empty()) used = page;
    if (pages + page > watched_bytes - used) throw std::bad_alloc();
    char* at = memory + used;
    used += pages + page;  // an unused page between any two
    sizes[at] = pages;
    Cell cell{};
    cell.live = true;
    cell.shared = shared;
    std::fill_n(&this->cell(uintptr_t(at)), (bytes + 1) / 2, cell);
    if (!shared) std::memset(at, 0xFF, bytes);  // NaN, where a kernel counts on zeros
    return at;
  }

  void release(void* at) {
    const std::lock_guard lock(mutex);
    const size_t pages = sizes.extract(at).mapped();
    madvise(at, pages, MADV_DONTNEED);  // it reads as zero from now on
    madvise(&cell(uintptr_t(at)), pages / 2 * sizeof(Cell), MADV_DONTNEED);
  }
};

Watched* watched = nullptr;  // set once, by the first that watch

// Gives PyTorch watched memory for the tensors on the CPU.
struct Allocator final : c10::Allocator {
  static void release(void* at) {
    if (at) watched->release(at);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* at = bytes ? watched->allocate(bytes, false) : nullptr;
    return {at, at, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

// ------------------------------------------------------------------ threads
enum State { ready, at_warp, at_block, done };

struct Fiber {
  void* registers[5];
  bool started = false;
  State state = done;
  Place place;
  int meetings = 0;     // of the warp and the block, so far
  int syncwarps = 0;
  bool orders = false;  // whether the meeting is a __syncwarp
  char posted[2][16];  // in two turns: a lane may read the last value while the next is posted
  dim3 index;
};

Fiber fibers[max_threads];
char* stacks = nullptr;
int count = 0, current = -1;  // the threads of a block; the one that runs
void* scheduler[5];
void (*body)(const void*) = nullptr;
const void* body_of = nullptr;
const char* kernel = "";
std::string problem;
uint32_t epoch = 0, block_epoch = 0, launch_epoch = 0;  // counts the barriers, across launches
int guards = 0, guarded = 0;  // how many there are, and the device of the last

// One for each device; -1 is the CPU, which stands for a GPU.
cudaStream_t stream_of(int device) {
  static char streams[16];
  return reinterpret_cast<cudaStream_t>(&streams[device + 1]);
}
bool unchecked = false;
std::unordered_map<const void*, std::pair<void*, size_t>> shared_variables;

// noipa: while one function waits, others change what it has seen.
[[noreturn]] __attribute__((noipa)) void go_on(void** at) { __builtin_longjmp(at, 1); }

// Saves the place where this returns to, and goes on where another was saved.
__attribute__((noipa)) void switch_to(void** from, void** to) {
  if (__builtin_setjmp(from) == 0) go_on(to);
}

void thread_main() {
  for (;;) {
    body(body_of);
    fibers[current].state = done;
    switch_to(fibers[current].registers, scheduler);
  }
}

__attribute__((noipa)) void start(Fiber& fiber) {
  fiber.started = true;
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks + (&fiber - fibers) * stack_bytes;
  context.uc_stack.ss_size = stack_bytes;
  makecontext(&context, &thread_main, 0);
  if (__builtin_setjmp(scheduler) == 0) setcontext(&context);
}

// Ends the launch: from a thread, which never goes on, or from the scheduler.
[[noreturn]] void fail(const std::string& text) {
  if (problem.empty()) problem = text;
  if (current >= 0) go_on(scheduler);
  for (Fiber& fiber : fibers) fiber.started = false;
  unchecked = false;
  const std::string message = std::string("CUDA emulation: ") + kernel + ": " + problem;
  problem.clear();
  throw std::runtime_error(message);
}

std::string name(Place place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

bool same_place(Place a, Place b) {  // in one kernel, so the names are the same pointer
  return a.line() == b.line() && a.column() == b.column() && a.file_name() == b.file_name();
}

std::string where() {
  std::ostringstream text;
  text << "block " << blockIdx.x << ", thread " << current;
  return text.str();
}

void wait(State state, Place place, bool orders = false) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  fiber.place = place;
  fiber.orders = orders;
  ++fiber.meetings;
  switch_to(fiber.registers, scheduler);
}

void resume(int i) {
  current = i;
  threadIdx = fibers[i].index;
  if (fibers[i].started) {
    switch_to(scheduler, fibers[i].registers);
  } else {
    start(fibers[i]);
  }
  current = -1;
  if (!problem.empty()) fail(problem);
}

// Lets the threads [first, last) go on if all have come to the same meeting.
bool release(int first, int last, State state) {
  for (int i = first; i < last; ++i) {
    if (fibers[i].state != state) return false;
  }
  for (int i = first; i < last; ++i) {
    if (!same_place(fibers[i].place, fibers[first].place) ||
        (state == at_warp && fibers[i].meetings != fibers[first].meetings)) {
      fail(
          "divergence: threads meet at " + name(fibers[first].place) + " and " +
          name(fibers[i].place) + ", or not equally often");
    }
    fibers[i].state = ready;
    fibers[i].syncwarps += fibers[i].orders;
  }
  return true;
}

void run_block() {
  block_epoch = ++epoch;
  for (int i = 0; i < count; ++i) {
    fibers[i].state = ready;
    fibers[i].meetings = fibers[i].syncwarps = 0;
  }
  for (;;) {
    for (int i = 0; i < count; ++i) {
      if (fibers[i].state == ready) resume(i);
    }
    bool moved = false;
    for (int i = 0; i < count; i += warp) moved |= release(i, std::min(i + warp, count), at_warp);
    if (moved) continue;
    if (release(0, count, at_block)) {
      ++epoch;
      continue;
    }
    for (int i = 0; i < count; ++i) {
      if (fibers[i].state != done) {
        fail("divergence: not all threads come to " + name(fibers[i].place));
      }
    }
    return;
  }
}

// ------------------------------------------------------------------ races and bounds
void use(Cell& cell, bool write) {
  const Fiber& fiber = fibers[current];
  if (!cell.live) fail("use of memory outside any tensor, " + where());
  const unsigned me = current, meetings = fiber.syncwarps & 0x7fff;
  const bool known = cell.epoch >= (cell.shared ? block_epoch : launch_epoch);
  if (!known) {
    if (cell.shared && !write) fail("read of shared memory that holds nothing, " + where());
    cell.written = cell.foreign = cell.wrote = cell.lanes = cell.warps = false;
    cell.thread = me;
  }
  const bool other_block = known && cell.epoch < block_epoch;
  const bool same_thread = cell.thread == me && !cell.lanes && !cell.warps;
  const bool same_warp = cell.thread / warp == me / warp && !cell.warps;
  const bool ordered = !known || same_thread || cell.epoch < epoch ||
      (same_warp && cell.meetings != meetings);
  if (other_block ? write || cell.written
                  : (write ? !ordered || cell.foreign : !ordered && cell.wrote)) {
    std::ostringstream text;
    text << "race: " << where() << (write ? " writes" : " reads") << " what "
         << (other_block || cell.foreign ? "another block" : "thread ");
    if (!other_block && !cell.foreign) text << cell.thread;
    fail(text.str() + (cell.wrote ? " wrote" : " read"));
  }
  if (!write && cell.wrote && cell.epoch == epoch) return;  // the write forbids more
  const bool joins = !ordered;  // reads beside reads
  cell.warps = joins && !other_block && (cell.warps || !same_warp);
  cell.lanes = joins && !other_block;
  cell.foreign |= other_block;
  cell.epoch = epoch;
  cell.thread = me;
  cell.meetings = meetings;
  cell.wrote = write;
  cell.written |= write;
}

void use(const void* pointer, size_t bytes, bool write) {
  if (current < 0 || !watched) return;  // the host's code
  const uintptr_t begin = uintptr_t(pointer);
  if (begin - uintptr_t(stacks) < max_threads * stack_bytes) return;
  if (begin - uintptr_t(&__ehdr_start) < uintptr_t(&_end) - uintptr_t(&__ehdr_start)) return;
  for (uintptr_t at = begin; at < begin + bytes; at += 4) {
    if (!watched->contains(at)) fail("use of memory outside any tensor, " + where());
    use(watched->cell(at), write);
  }
}

void check_mask(unsigned mask, Place place) {
  if (mask != ~0u) fail("a mask of fewer than all lanes is not emulated, " + name(place));
}

}  // namespace

// ------------------------------------------------------------------ what device code calls
int lane() { return current % warp; }

void meet_block(Place place) { wait(at_block, place); }

void meet_warp(unsigned mask, Place place) {
  check_mask(mask, place);
  wait(at_warp, place, true);
}

void exchange(unsigned mask, const void* value, void* out, size_t bytes, int source, Place place) {
  check_mask(mask, place);
  if (bytes > sizeof(Fiber::posted[0])) fail("a shuffle of too large a value, " + name(place));
  const int turn = fibers[current].meetings % 2, other = current / warp * warp + source % warp;
  memcpy(fibers[current].posted[turn], value, bytes);
  wait(at_warp, place);
  if (other >= count) fail("a shuffle from a lane that is not there, " + name(place));
  memcpy(out, fibers[other].posted[turn], bytes);
}

void* shared_memory(const void* variable, size_t bytes) {
  auto& [memory, size] = shared_variables[variable];
  if (!memory) {
    memory = watched ? watched->allocate(bytes, true) : malloc(bytes);
    size = bytes;
    size_t total = 0;
    for (const auto& entry : shared_variables) total += entry.second.second;
    if (total > max_shared) fail("more than 48 KiB of shared memory");
  }
  return memory;
}

void* dynamic_shared() {
  const auto found = shared_variables.find(nullptr);
  return found == shared_variables.end() ? nullptr : found->second.first;
}

void Launch::run(void (*start)(const void*), const void* thread) const {
  emulated::kernel = kernel;
  if (std::exchange(unchecked, true)) fail("the launch before was not checked");
  if (!guards) fail("launched without a device guard");
  if (stream != stream_of(guarded)) fail("not on the current stream of the guarded device");
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (!threads || threads > max_threads || block.z > 64) fail("invalid block");
  if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) {
    fail("invalid grid");
  }
  if (!stacks) stacks = reserve<char>(max_threads * stack_bytes);
  struct Release {
    ~Release() {
      for (const auto& [variable, memory] : shared_variables) {
        watched ? watched->release(memory.first) : free(memory.first);
      }
      shared_variables.clear();
    }
  } release_at_end;
  if (shared) shared_memory(nullptr, shared);
  body = start;
  body_of = thread;
  blockDim = block;
  gridDim = grid;
  count = int(threads);
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
  }
  launch_epoch = epoch + 1;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block();
    }
  }
}

}  // namespace emulated

cudaError_t cudaGetLastError() {
  emulated::unchecked = false;
  return cudaSuccess;
}

// In place of PyTorch's own functions for CUDA, and of ThreadSanitizer's.
extern "C" {
AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  ++emulated::guards;
  emulated::guarded = device;
  *guard = reinterpret_cast<DeviceGuardHandle>(&emulated::guards);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --emulated::guards;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = emulated::stream_of(device);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_c10_cuda_check_msg(
    int32_t, const char*, const char*, uint32_t, bool, char** message) {
  *message = nullptr;
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char*) {}

// Whether tensors on the CPU are allocated in watched memory from now on.
void watch_memory(bool on) {
  static c10::Allocator* const usual = c10::GetCPUAllocator();
  static emulated::Allocator allocator;
  if (!emulated::watched) emulated::watched = new emulated::Watched;
  c10::SetCPUAllocator(on ? &allocator : usual);
}

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_read_range(void* at, size_t bytes) { emulated::use(at, bytes, false); }
void __tsan_write_range(void* at, size_t bytes) { emulated::use(at, bytes, true); }
#define USES(bytes) \
  void __tsan_read##bytes(void* at) { emulated::use(at, bytes, false); } \
  void __tsan_write##bytes(void* at) { emulated::use(at, bytes, true); }
USES(1) USES(2) USES(4) USES(8) USES(16)
// The host's code counts references, and asks whether a static variable is initialised.
uint32_t __tsan_atomic32_fetch_add(uint32_t* at, uint32_t by, int) {
  return __atomic_fetch_add(at, by, __ATOMIC_SEQ_CST);
}
uint8_t __tsan_atomic8_load(const uint8_t* at, int) {
  return __atomic_load_n(at, __ATOMIC_SEQ_CST);
}
}
