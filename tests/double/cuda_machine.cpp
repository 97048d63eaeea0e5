// The software driver's device and memory.
#include "cuda_machine.h"

#include <dlfcn.h>

#include <cstdio>

using namespace machine;

extern "C" {

const char* machine_calls() { return calls.c_str(); }
void machine_forget() { calls.clear(); }
// What was opened and not closed.
int machine_open() {
    return int(device_memory.size() + host_memory.size() + streams.size() + events.size() + graphs.size() +
               executables.size() + modules.size());
}

int cuGetProcAddress_v2(const char* symbol, void** function, int, std::uint64_t, int* status) {
    static void* self = [] {  // by its file: the library has no other name, so that only who looks for it there finds it
        Dl_info found;
        dladdr(reinterpret_cast<void*>(&machine_open), &found);
        return dlopen(found.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    }();
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
    return has_gpu() ? SUCCESS : NO_DEVICE;
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
    *count = has_gpu();
    return SUCCESS;
}

int cuDeviceGet(int* device, int ordinal) {
    BEGIN("cuDeviceGet");
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : 101;
}

int cuDeviceGetName(char* name, int size, int) {
    std::snprintf(name, size, "%s", described(0, "CPU as GPU").c_str());
    return SUCCESS;
}

int cuDeviceGetPCIBusId(char* bus, int size, int) {
    const std::string place = described(8, "");
    std::snprintf(bus, size, "%s", place.c_str());
    return place.empty() ? INVALID_VALUE : SUCCESS;
}

int cuDeviceTotalMem_v2(std::size_t* total, int) {
    *total = total_memory();
    return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int which, int) {
    *value = which == 75 ? int(described_number(1, "9")) : which == 76 ? int(described_number(2, "0"))
           : which == 16 ? int(described_number(3, "1"))
           : which == 18 ? int(setting("CUDA_MACHINE_INTEGRATED", long(described_number(6, "0")))) : 0;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    BEGIN("cuDevicePrimaryCtxRetain");
    static int context_itself;
    *context = &context_itself;
    return usable_memory() ? SUCCESS : OUT_OF_MEMORY;  // a context takes memory, too
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
    *free_size = usable_memory() - std::min(usable_memory(), used);
    return SUCCESS;
}

int cuMemAlloc_v2(std::uintptr_t* address, std::size_t size) {
    BEGIN("cuMemAlloc");
    NEED_CONTEXT;
    for (void* handle : streams) {  // an allocation breaks a capture: the thread's own, or anybody's where both mind others
        Stream* stream = static_cast<Stream*>(handle);
        const bool own = stream->captured_by == std::this_thread::get_id();
        if (stream->capture && (own ? stream->capture_mode != 2 : !stream->capture_mode && !capture_mode_of_thread)) {
            stream->capture_broken = true;
            return CAPTURE_UNSUPPORTED;
        }
    }
    if (size == 0) return INVALID_VALUE;
    if (used + size > usable_memory()) return OUT_OF_MEMORY;
    *address = std::uintptr_t(allocate_on_device(size));
    if (!*address) return OUT_OF_MEMORY;
    used += size;
    return SUCCESS;
}

int cuMemFree_v2(std::uintptr_t address) {
    BEGIN("cuMemFree");
    NEED_CONTEXT;
    auto found = device_memory.find(address);
    if (found == device_memory.end()) return INVALID_VALUE;
    const std::size_t size = found->second;
    used -= size;
    device_memory.erase(found);
    free_on_device(address, size);
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

}  // extern "C"
