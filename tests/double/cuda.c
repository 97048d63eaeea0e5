/* A stand-in for NVIDIA's driver with one GPU, described by FAKE_GPU="name|major|minor|SMs|total|free|integrated|ms|pci".
   An event measures "ms"; memory is the host's. Without FAKE_GPU the driver finds no GPU. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static const char *field(int index, char *buffer, size_t size) {
    const char *text = getenv("FAKE_GPU");
    while (text && index--) {
        text = strchr(text, '|');
        if (text) text++;
    }
    if (!text) return NULL;
    size_t length = strcspn(text, "|");
    if (length >= size) length = size - 1;
    memcpy(buffer, text, length);
    buffer[length] = 0;
    return buffer;
}

static double number(int index) {
    char buffer[300];
    const char *text = field(index, buffer, sizeof buffer);
    return text ? atof(text) : 0;
}

int cuInit(unsigned flags) { return getenv("FAKE_GPU") ? 0 : 100; }
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? 101 : 0; }
int cuDeviceGetName(char *name, int size, int device) { return field(0, name, size) ? 0 : 100; }
int cuDeviceGetPCIBusId(char *bus, int size, int device) { return field(8, bus, size) ? 0 : 1; }
int cuDeviceTotalMem_v2(size_t *total, int device) { *total = (size_t)number(4); return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
    *value = which == 75 ? number(1) : which == 76 ? number(2) : which == 16 ? number(3) : which == 18 ? number(6) : 0;
    return 0;
}
/* A GPU whose memory others hold to the last byte cannot make a context. */
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return number(5) == 0 ? 2 : 0; }
int cuCtxSetCurrent(void *context) { return context ? 0 : 1; }
int cuMemGetInfo_v2(size_t *available, size_t *total) {
    *available = (size_t)number(5);
    *total = (size_t)number(4);
    return 0;
}
int cuMemAlloc_v2(uint64_t *pointer, size_t size) { *pointer = (uint64_t)malloc(size); return *pointer ? 0 : 2; }
int cuMemsetD8Async(uint64_t pointer, unsigned char value, size_t size, void *stream) {
    memset((void *)pointer, value, size);
    return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t size, void *stream) {
    memcpy((void *)to, from, size);
    return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *stream) {
    memcpy(to, (void *)from, size);
    return 0;
}
int cuMemFree_v2(uint64_t pointer) { free((void *)pointer); return 0; }
int cuStreamSynchronize(void *stream) { return 0; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)7; return 0; }
int cuEventCreate(void **event, unsigned flags) { *event = (void *)9; return 0; }
int cuEventRecord(void *event, void *stream) { return 0; }
int cuEventSynchronize(void *event) { return 0; }
int cuEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = (float)number(7); return 0; }
