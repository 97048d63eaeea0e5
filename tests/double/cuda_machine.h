// A CUDA driver in software: libcuda.so.1 for real cuda-python, running the project's kernels on the CPU.
// This header: what the machine is made of. cuda_machine.cpp: device and memory. cuda_work.cpp: streams to graphs.
//
// Streams are lazy: what is enqueued runs when somebody waits for it, so a missing synchronization or a missing wait
// between streams gives wrong results in a test instead of once a month on a device. Device memory starts as noise.
// Linked with the host builds of the kernels; with -fsanitize=address the heap around every buffer is guarded, which
// makes the address sanitizer a memcheck for kernels.
//
// Environment: CUDA_MACHINE_SM "90"; CUDA_MACHINE_MEMORY in bytes; CUDA_MACHINE_INTEGRATED "1" for a GPU that shares
// the host's memory; CUDA_MACHINE_FAIL "cuMemAlloc=2" lets that call answer an error. machine_calls() gives the names of the calls so far, machine_forget() empties them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace machine {

using Action = std::function<void()>;

enum : int { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
             INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, CAPTURE_UNSUPPORTED = 900 };

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

    void add(Action action) {
        if (capture) {
            capture->push_back(std::move(action));
        } else {
            waiting.push_back(std::move(action));
            enqueued++;
        }
    }

    void run_to(std::uint64_t position) {
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
inline std::map<std::uintptr_t, std::size_t> device_memory, host_memory;
inline std::set<void*> streams, events, graphs, executables, modules;
inline std::size_t used = 0;
inline Stream legacy_stream;
inline thread_local void* current_context = nullptr;

inline long setting(const char* name, long otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? std::atol(text) : otherwise;
}

inline std::size_t total_memory() { return std::size_t(setting("CUDA_MACHINE_MEMORY", 4l << 30)); }

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

inline int copy(std::uintptr_t target, std::uintptr_t source, std::size_t size, void* handle) {
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    stream->add([=] { std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), size); });
    return SUCCESS;
}

}  // namespace machine
