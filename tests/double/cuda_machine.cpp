// A CUDA driver in software: libcuda.so.1 for real cuda-python, running the project's kernels on the CPU.
//
// Streams are lazy: what is enqueued runs when somebody waits for it, so a missing synchronization or a missing wait
// between streams gives wrong results in a test instead of once a month on a device. Device memory starts as noise.
// Linked with the host builds of the kernels; with -fsanitize=address the heap around every buffer is guarded, which makes the
// address sanitizer a memcheck for kernels.
//
// Environment: CUDA_MACHINE_SM "90"; CUDA_MACHINE_MEMORY in bytes; CUDA_MACHINE_FAIL "cuMemAlloc=2" lets that call
// answer an error. machine_calls() gives the names of the calls so far, machine_forget() empties them.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "host_kernels.h"

namespace {

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

std::recursive_mutex machine_lock;
std::string calls;
std::map<std::uintptr_t, std::size_t> device_memory, host_memory;
std::set<void*> streams, events, graphs, executables, modules;
std::size_t used = 0;
Stream legacy_stream;
thread_local void* current_context = nullptr;
int context_tag;

long setting(const char* name, long otherwise) {
    const char* text = std::getenv(name);
    return text && *text ? std::atol(text) : otherwise;
}

std::size_t total_memory() { return std::size_t(setting("CUDA_MACHINE_MEMORY", 4l << 30)); }

// Notes a call and answers what it was told to fail with.
int note(const char* name) {
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

Stream* stream_of(void* handle) {
    if (handle == nullptr || std::uintptr_t(handle) <= 2) return &legacy_stream;
    return streams.count(handle) ? static_cast<Stream*>(handle) : nullptr;
}

// Whether all of begin..begin+size lies in one allocation.
bool inside(const std::map<std::uintptr_t, std::size_t>& memory, std::uintptr_t begin, std::size_t size) {
    auto after = memory.upper_bound(begin);
    if (after == memory.begin()) return false;
    --after;
    return begin + size <= after->first + after->second;
}

bool on_device(std::uintptr_t begin, std::size_t size) {
    return inside(device_memory, begin, size) || inside(host_memory, begin, size);
}

void* allocate(std::map<std::uintptr_t, std::size_t>& memory, std::size_t size) {
    void* place = nullptr;
    if (posix_memalign(&place, 256, size)) return nullptr;
    std::memset(place, 0xa7, size);
    memory[std::uintptr_t(place)] = size;
    return place;
}

int copy(std::uintptr_t target, std::uintptr_t source, std::size_t size, void* handle) {
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    stream->add([=] { std::memcpy(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), size); });
    return SUCCESS;
}

}  // namespace

extern "C" {

const char* machine_calls() { return calls.c_str(); }
void machine_forget() { calls.clear(); }
// What was opened and not closed.
int machine_open() {
    return int(device_memory.size() + host_memory.size() + streams.size() + events.size() + graphs.size() +
               executables.size() + modules.size());
}

int cuGetProcAddress_v2(const char* symbol, void** function, int, std::uint64_t, int* status) {
    static void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = nullptr;
    for (const char* suffix : {"_v2", ""}) {
        if ((*function = dlsym(self, (std::string(symbol) + suffix).c_str()))) break;
    }
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}

// NVRTC asks for the driver's private tables, and goes without.
int cuGetExportTable(const void** table, const void*) {
    *table = nullptr;
    return NOT_FOUND;
}

int cuInit(unsigned) {
    BEGIN("cuInit");
    return SUCCESS;
}

int cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}

int cuGetErrorName(int code, const char** name) {
    *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR";
    return SUCCESS;
}

int cuGetErrorString(int code, const char** text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : code == 719 ? "unspecified launch failure" : "an error";
    return SUCCESS;
}

int cuDeviceGetCount(int* count) {
    *count = 1;
    return SUCCESS;
}

int cuDeviceGet(int* device, int ordinal) {
    BEGIN("cuDeviceGet");
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : 101;
}

int cuDeviceGetName(char* name, int size, int) {
    std::snprintf(name, size, "CPU as GPU");
    return SUCCESS;
}

int cuDeviceTotalMem_v2(std::size_t* total, int) {
    *total = total_memory();
    return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int which, int) {
    const int sm = int(setting("CUDA_MACHINE_SM", 90));
    *value = which == 75 ? sm / 10 : which == 76 ? sm % 10 : which == 16 ? 1 : 0;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    BEGIN("cuDevicePrimaryCtxRetain");
    *context = &context_tag;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int) {
    BEGIN("cuDevicePrimaryCtxRelease");
    return SUCCESS;
}

int cuCtxSetCurrent(void* context) {
    BEGIN("cuCtxSetCurrent");
    current_context = context;
    return SUCCESS;
}

int cuMemGetInfo_v2(std::size_t* free_size, std::size_t* total) {
    BEGIN("cuMemGetInfo");
    NEED_CONTEXT;
    *total = total_memory();
    *free_size = *total - used;
    return SUCCESS;
}

int cuMemAlloc_v2(std::uintptr_t* address, std::size_t size) {
    BEGIN("cuMemAlloc");
    NEED_CONTEXT;
    for (void* handle : streams) {  // an allocation breaks a capture
        if (static_cast<Stream*>(handle)->capture) {
            static_cast<Stream*>(handle)->capture_broken = true;
            return CAPTURE_UNSUPPORTED;
        }
    }
    if (size == 0) return INVALID_VALUE;
    if (used + size > total_memory()) return OUT_OF_MEMORY;
    *address = std::uintptr_t(allocate(device_memory, size));
    used += size;
    return SUCCESS;
}

int cuMemFree_v2(std::uintptr_t address) {
    BEGIN("cuMemFree");
    NEED_CONTEXT;
    auto found = device_memory.find(address);
    if (found == device_memory.end()) return INVALID_VALUE;
    used -= found->second;
    device_memory.erase(found);
    std::free(reinterpret_cast<void*>(address));
    return SUCCESS;
}

int cuMemHostAlloc(void** address, std::size_t size, unsigned) {
    BEGIN("cuMemHostAlloc");
    NEED_CONTEXT;
    *address = allocate(host_memory, size);
    return *address ? SUCCESS : OUT_OF_MEMORY;
}

int cuMemFreeHost(void* address) {
    BEGIN("cuMemFreeHost");
    NEED_CONTEXT;
    if (!host_memory.erase(std::uintptr_t(address))) return INVALID_VALUE;
    std::free(address);
    return SUCCESS;
}

int cuMemHostGetDevicePointer_v2(std::uintptr_t* device, void* host, unsigned) {
    BEGIN("cuMemHostGetDevicePointer");
    if (!host_memory.count(std::uintptr_t(host))) return INVALID_VALUE;
    *device = std::uintptr_t(host);
    return SUCCESS;
}

int cuPointerGetAttribute(void* data, int attribute, std::uintptr_t address) {
    BEGIN("cuPointerGetAttribute");
    if (!on_device(address, 1)) return INVALID_VALUE;
    if (attribute != 9) return INVALID_VALUE;  // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    *static_cast<int*>(data) = 0;
    return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(std::uintptr_t target, const void* source, std::size_t size, void* stream) {
    BEGIN("cuMemcpyHtoDAsync");
    NEED_CONTEXT;
    if (!inside(device_memory, target, size)) return INVALID_VALUE;
    return copy(target, std::uintptr_t(source), size, stream);
}

int cuMemcpyDtoHAsync_v2(void* target, std::uintptr_t source, std::size_t size, void* stream) {
    BEGIN("cuMemcpyDtoHAsync");
    NEED_CONTEXT;
    if (!inside(device_memory, source, size)) return INVALID_VALUE;
    return copy(std::uintptr_t(target), source, size, stream);
}

int cuMemcpyDtoDAsync_v2(std::uintptr_t target, std::uintptr_t source, std::size_t size, void* stream) {
    BEGIN("cuMemcpyDtoDAsync");
    NEED_CONTEXT;
    if (!inside(device_memory, source, size) || !inside(device_memory, target, size)) return INVALID_VALUE;
    return copy(target, source, size, stream);
}

int cuMemsetD8Async(std::uintptr_t target, unsigned char value, std::size_t size, void* handle) {
    BEGIN("cuMemsetD8Async");
    NEED_CONTEXT;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!on_device(target, size)) return INVALID_VALUE;
    stream->add([=] { std::memset(reinterpret_cast<void*>(target), value, size); });
    return SUCCESS;
}

int cuStreamCreate(void** stream, unsigned) {
    BEGIN("cuStreamCreate");
    NEED_CONTEXT;
    *stream = new Stream;
    streams.insert(*stream);
    return SUCCESS;
}

int cuStreamDestroy_v2(void* handle) {
    BEGIN("cuStreamDestroy");
    if (!streams.erase(handle)) return INVALID_HANDLE;
    delete static_cast<Stream*>(handle);
    return SUCCESS;
}

int cuStreamSynchronize(void* handle) {
    BEGIN("cuStreamSynchronize");
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) {
        stream->capture_broken = true;
        return CAPTURE_UNSUPPORTED;
    }
    stream->run_to(stream->enqueued);
    return SUCCESS;
}

int cuStreamWaitEvent(void* handle, void* event, unsigned) {
    BEGIN("cuStreamWaitEvent");
    Stream* stream = stream_of(handle);
    if (!stream || !events.count(event)) return INVALID_HANDLE;
    const Mark mark = static_cast<Event*>(event)->mark;
    if (mark.stream) stream->add([mark] { mark.stream->run_to(mark.position); });
    return SUCCESS;
}

int cuEventCreate(void** event, unsigned) {
    BEGIN("cuEventCreate");
    NEED_CONTEXT;
    *event = new Event;
    events.insert(*event);
    return SUCCESS;
}

int cuEventDestroy_v2(void* event) {
    BEGIN("cuEventDestroy");
    if (!events.erase(event)) return INVALID_HANDLE;
    delete static_cast<Event*>(event);
    return SUCCESS;
}

int cuEventRecord(void* event, void* handle) {
    BEGIN("cuEventRecord");
    Stream* stream = stream_of(handle);
    if (!stream || !events.count(event)) return INVALID_HANDLE;
    static_cast<Event*>(event)->mark = {stream, stream->enqueued};
    return SUCCESS;
}

int cuEventSynchronize(void* event) {
    BEGIN("cuEventSynchronize");
    if (!events.count(event)) return INVALID_HANDLE;
    const Mark& mark = static_cast<Event*>(event)->mark;
    if (mark.stream) mark.stream->run_to(mark.position);
    return SUCCESS;
}

int cuEventQuery(void* event) {
    BEGIN("cuEventQuery");
    if (!events.count(event)) return INVALID_HANDLE;
    const Mark& mark = static_cast<Event*>(event)->mark;
    return mark.stream && mark.stream->done < mark.position ? NOT_READY : SUCCESS;
}

int cuEventElapsedTime_v2(float* milliseconds, void* start, void* end) {
    BEGIN("cuEventElapsedTime");
    if (!events.count(start) || !events.count(end)) return INVALID_HANDLE;
    *milliseconds = 1.5f;
    return cuEventQuery(end);
}

int cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

int cuModuleLoadData(void** module, const void* image) {
    BEGIN("cuModuleLoadData");
    NEED_CONTEXT;
    const char* bytes = static_cast<const char*>(image);
    const bool cubin = std::memcmp(bytes, "\177ELF", 4) == 0;
    if (!cubin && !std::strstr(bytes, ".visible .entry")) return INVALID_IMAGE;
    *module = new int;
    modules.insert(*module);
    return SUCCESS;
}

int cuModuleUnload(void* module) {
    BEGIN("cuModuleUnload");
    if (!modules.erase(module)) return INVALID_HANDLE;
    delete static_cast<int*>(module);
    return SUCCESS;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    BEGIN("cuModuleGetFunction");
    if (!modules.count(module)) return INVALID_HANDLE;
    const auto found = host_kernels().find(name);
    if (found == host_kernels().end()) return NOT_FOUND;
    *function = &found->second;
    return SUCCESS;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void* handle, void** parameters, void** extra) {
    BEGIN("cuLaunchKernel");
    NEED_CONTEXT;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    const std::uint64_t threads = std::uint64_t(block_x) * block_y * block_z;
    if (!grid_x || !grid_y || !grid_z || grid_y > 65535 || grid_z > 65535 || !threads || threads > 1024 || shared || extra)
        return INVALID_VALUE;
    const HostKernel* kernel = static_cast<const HostKernel*>(function);
    std::vector<char> copied(static_cast<char*>(parameters[0]), static_cast<char*>(parameters[0]) + kernel->bytes);
    stream->add([=] { kernel->run(grid_x, grid_y, grid_z, block_x, block_y, block_z, copied.data()); });
    return SUCCESS;
}

int cuStreamBeginCapture_v2(void* handle, int) {
    BEGIN("cuStreamBeginCapture");
    Stream* stream = stream_of(handle);
    if (!stream || stream == &legacy_stream || stream->capture) return INVALID_HANDLE;
    stream->capture = new std::vector<Action>;
    stream->capture_broken = false;
    return SUCCESS;
}

int cuStreamEndCapture(void* handle, void** graph) {
    BEGIN("cuStreamEndCapture");
    Stream* stream = stream_of(handle);
    *graph = nullptr;
    if (!stream || !stream->capture) return INVALID_HANDLE;
    std::unique_ptr<std::vector<Action>> captured(stream->capture);
    stream->capture = nullptr;
    if (stream->capture_broken) return 901;  // CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    *graph = new Graph{*captured};
    graphs.insert(*graph);
    return SUCCESS;
}

int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
    BEGIN("cuGraphInstantiate");
    if (!graphs.count(graph)) return INVALID_HANDLE;
    *executable = new Graph(*static_cast<Graph*>(graph));
    executables.insert(*executable);
    return SUCCESS;
}

int cuGraphLaunch(void* executable, void* handle) {
    BEGIN("cuGraphLaunch");
    Stream* stream = stream_of(handle);
    if (!stream || !executables.count(executable)) return INVALID_HANDLE;
    for (const Action& action : static_cast<Graph*>(executable)->actions) stream->add(action);
    return SUCCESS;
}

int cuGraphExecDestroy(void* executable) {
    BEGIN("cuGraphExecDestroy");
    if (!executables.erase(executable)) return INVALID_HANDLE;
    delete static_cast<Graph*>(executable);
    return SUCCESS;
}

int cuGraphDestroy(void* graph) {
    BEGIN("cuGraphDestroy");
    if (!graphs.erase(graph)) return INVALID_HANDLE;
    delete static_cast<Graph*>(graph);
    return SUCCESS;
}

}  // extern "C"
