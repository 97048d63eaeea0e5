// The host build of the kernels as a library for ctypes.
#include "host_kernels.h"

extern "C" {

const char* host_layout_text() { return host_layout().c_str(); }

// 0, or 1 for an unknown name.
int run_host_kernel(const char* name, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                    unsigned block_y, unsigned block_z, const void* parameters) {
    const auto found = host_kernels().find(name);
    if (found == host_kernels().end()) return 1;
    found->second.run(grid_x, grid_y, grid_z, block_x, block_y, block_z, parameters);
    return 0;
}

}  // extern "C"
