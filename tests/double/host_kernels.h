// The kernels as a host compiler builds them, by name, and the layout of their parameters.
#pragma once

#include <cstddef>
#include <map>
#include <string>

struct HostKernel {
    std::size_t bytes;  // of its one parameter
    void (*run)(unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z,
                const void* parameters);
};

inline std::map<std::string, HostKernel>& host_kernels() {
    static std::map<std::string, HostKernel> all;
    return all;
}

// "Structure.field offset size" lines.
inline std::string& host_layout() {
    static std::string text;
    return text;
}

#define HOST_KERNEL(name, Parameters)                                                                             \
    static const bool name##_is_known = [] {                                                                      \
        host_kernels()[#name] = {sizeof(Parameters), [](unsigned grid_x, unsigned grid_y, unsigned grid_z,        \
                                                        unsigned block_x, unsigned block_y, unsigned block_z,     \
                                                        const void* parameters) {                                 \
                                     host_cuda::launch({grid_x, grid_y, grid_z}, {block_x, block_y, block_z},     \
                                                       [=] { name(*static_cast<const Parameters*>(parameters)); }); \
                                 }};                                                                              \
        return true;                                                                                              \
    }()

#define HOST_FIELD(Structure, field)                                                                             \
    host_layout() += #Structure "." #field " " + std::to_string(offsetof(Structure, field)) + " " +               \
                     std::to_string(sizeof(Structure::field)) + "\n"
