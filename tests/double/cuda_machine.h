// A CUDA driver in software: libcuda.so.1 for real cuda-python, running the project's kernels on the CPU.
// This header: what the machine is made of. cuda_machine.cpp: device and memory. cuda_work.cpp: streams to graphs.
//
// Streams are lazy: what is enqueued runs when somebody waits for it, so a missing synchronization or a missing wait
// between streams gives wrong results in a test instead of once a month on a device. Device memory starts as noise.
// Linked with the host builds of the kernels; with -fsanitize=address the heap around every buffer is guarded, which
// makes the address sanitizer a memcheck for kernels.
//
// Environment: CUDA_MACHINE_GPU "name|major|minor|SMs|total|free|integrated|ms|pci" describes the GPU (sizes in bytes; an
// event measures "ms"), "none" lets the driver find none; CUDA_MACHINE_MEMORY, in bytes, and CUDA_MACHINE_INTEGRATED, "1"
// for a GPU that shares the host's memory, change what it says there; CUDA_MACHINE_FAIL "cuMemAlloc=2" lets that call
// answer an error. machine_calls() gives the names of the calls so far, machine_forget() empties them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include <sys/mman.h>

namespace machine {

using Action = std::function<void()>;

enum : int { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
             INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, CAPTURE_UNSUPPORTED = 900 };

// The GPU's memory is within reach while the GPU works, and only then: a host that reads or writes there itself ends
// with SIGSEGV, as on a real one. Built with the address sanitizer it lies on the heap instead, guarded on both sides.
inline std::map<std::uintptr_t, std::size_t> device_memory, host_memory;
inline int at_work = 0;

inline std::size_t pages(std::size_t size) { return (size + 4095) & ~std::size_t(4095); }

inline void reach_device_memory(bool within) {
#ifndef __SANITIZE_ADDRESS__
    for (const auto& [address, size] : device_memory)
        mprotect(reinterpret_cast<void*>(address), pages(size), within ? PROT_READ | PROT_WRITE : PROT_NONE);
#else
    (void)within;
#endif
}

struct AtWork {
    AtWork() {
        if (at_work++ == 0) reach_device_memory(true);
    }
    ~AtWork() {
        if (--at_work == 0) reach_device_memory(false);
    }
};

struct Stream;

struct Mark {
    Stream* stream = nullptr;
    std::uint64_t position = 0;  // of the stream's actions done when the mark is passed
};

struct Stream {
    std::deque<Action> waiting;
    std::uint64_t enqueued = 0, done = 0;
    std::vector<Action>* capture = nullptr;
    bool capture_broken = false;
    int capture_mode = 0;  // global, thread-local, relaxed
    std::thread::id captured_by;

    void add(Action action) {
        if (capture) {
            capture->push_back(std::move(action));
        } else {
            waiting.push_back(std::move(action));
            enqueued++;
        }
    }

    void run_to(std::uint64_t position) {
        const AtWork guard;
        while (done < position) {
            Action action = std::move(waiting.front());
            waiting.pop_front();
            done++;
            action();
        }
    }
};

struct Event {
    Mark mark;
};

struct Graph {
    std::vector<Action> actions;
};

inline std::recursive_mutex machine_lock;
inline std::string calls;
inline std::set<void*> streams, events, graphs, executables, modules;
inline std::size_t used = 0;
inline Stream legacy_stream;
inline thread_local void* current_context = nullptr;
inline thread_local int capture_mode_of_thread = 0;

inline long setting(const char* name, long otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? std::atol(text) : otherwise;
}

// A part of the GPU's description, or what stands for it where there is none.
inline std::string described(int part, const char* otherwise) {
    const char* text = std::getenv("CUDA_MACHINE_GPU");
    for (; text && part; part--) {
        text = std::strchr(text, '|');
        if (text) text++;
    }
    return text ? std::string(text, std::strcspn(text, "|")) : otherwise;
}

inline double described_number(int part, const char* otherwise) { return std::atof(described(part, otherwise).c_str()); }
inline bool has_gpu() { return described(0, "") != "none"; }

inline std::size_t total_memory() {
    return std::size_t(setting("CUDA_MACHINE_MEMORY", long(described_number(4, "4294967296"))));
}

// What may be allocated of it: others may hold the rest.
inline std::size_t usable_memory() {
    const std::size_t total = total_memory();
    return std::min(total, std::size_t(described_number(5, std::to_string(total).c_str())));
}

// Notes a call and answers what it was told to fail with.
inline int note(const char* name) {
    calls += name;
    calls += '\n';
    const char* fail = std::getenv("CUDA_MACHINE_FAIL");
    const std::size_t length = std::strlen(name);
    if (fail && std::strncmp(fail, name, length) == 0 && fail[length] == '=') return std::atoi(fail + length + 1);
    return SUCCESS;
}

#define BEGIN(name)                                          \
    std::lock_guard<std::recursive_mutex> guard(machine_lock); \
    if (const int failure = note(name)) return failure

#define NEED_CONTEXT \
    if (!current_context) return INVALID_CONTEXT

inline Stream* stream_of(void* handle) {
    if (handle == nullptr || std::uintptr_t(handle) <= 2) return &legacy_stream;
    return streams.count(handle) ? static_cast<Stream*>(handle) : nullptr;
}

// Whether all of begin..begin+size lies in one allocation.
inline bool inside(const std::map<std::uintptr_t, std::size_t>& memory, std::uintptr_t begin, std::size_t size) {
    auto after = memory.upper_bound(begin);
    if (after == memory.begin()) return false;
    --after;
    return begin + size <= after->first + after->second;
}

inline bool on_device(std::uintptr_t begin, std::size_t size) {
    return inside(device_memory, begin, size) || inside(host_memory, begin, size);
}

inline void* allocate(std::map<std::uintptr_t, std::size_t>& memory, std::size_t size) {
    void* place = nullptr;
    if (posix_memalign(&place, 256, size)) return nullptr;
    std::memset(place, 0xa7, size);
    memory[std::uintptr_t(place)] = size;
    return place;
}

inline void* allocate_on_device(std::size_t size) {
#ifndef __SANITIZE_ADDRESS__
    void* place = mmap(nullptr, pages(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED) return nullptr;
    std::memset(place, 0xa7, size);
    if (!at_work) mprotect(place, pages(size), PROT_NONE);
    device_memory[std::uintptr_t(place)] = size;
    return place;
#else
    return allocate(device_memory, size);
#endif
}

inline void free_on_device(std::uintptr_t address, std::size_t size) {
#ifndef __SANITIZE_ADDRESS__
    munmap(reinterpret_cast<void*>(address), pages(size));
#else
    (void)size;
    std::free(reinterpret_cast<void*>(address));
#endif
}

inline int copy(std::uintptr_t target, std::uintptr_t source, std::size_t size, void* handle) {
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    stream->add([=] { std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), size); });
    return SUCCESS;
}

}  // namespace machine
