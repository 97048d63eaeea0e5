// The software driver's copies, streams, events, kernels and graphs.
#include "cuda_machine.h"

#include <memory>
#include <utility>

#include "host_kernels.h"

using namespace machine;

extern "C" {

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

int cuStreamQuery(void* handle) {
    BEGIN("cuStreamQuery");
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) {
        stream->capture_broken = true;
        return CAPTURE_UNSUPPORTED;
    }
    return stream->done < stream->enqueued ? NOT_READY : SUCCESS;
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
    *milliseconds = float(described_number(7, "1.5"));
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

int cuThreadExchangeStreamCaptureMode(int* mode) {
    BEGIN("cuThreadExchangeStreamCaptureMode");
    std::swap(*mode, capture_mode_of_thread);
    return SUCCESS;
}

int cuStreamBeginCapture_v2(void* handle, int mode) {
    BEGIN("cuStreamBeginCapture");
    Stream* stream = stream_of(handle);
    if (!stream || stream == &legacy_stream || stream->capture) return INVALID_HANDLE;
    stream->capture = new std::vector<Action>;
    stream->capture_broken = false;
    stream->capture_mode = mode;
    stream->captured_by = std::this_thread::get_id();
    return SUCCESS;
}

int cuStreamEndCapture(void* handle, void** graph) {
    *graph = nullptr;
    Stream* stream;
    std::unique_ptr<std::vector<Action>> captured;
    {
        std::lock_guard<std::recursive_mutex> one_by_one(machine_lock);
        stream = stream_of(handle);
        if (stream) captured.reset(std::exchange(stream->capture, nullptr));  // it ends, with an error too
    }
    BEGIN("cuStreamEndCapture");
    if (!captured) return INVALID_HANDLE;
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
