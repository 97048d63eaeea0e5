// A CPU meaning for the parts of CUDA that the kernels use, so that a host compiler builds the very same .cu files.
//
// A block's threads are fibers that take turns on one CPU thread and yield at barriers and warp collectives; blocks run
// one after the other. A barrier that part of the threads never reach ends the process with a message. Include the .cu
// file, then call host_cuda::launch. Compile with -fno-strict-aliasing: kernels read bytes as words.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
#define __grid_constant__
#define ANY_LANES 0xffffffffu

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace host_cuda {

inline dim3 thread_index, block_index, block_size, grid_size;

// Jumps between stacks. swapcontext would ask the kernel for the signal mask at every turn.
#if defined(__GNUC__) && !defined(__clang__)
using Place = void* [5];
#define HOST_CUDA_STAND(place) __builtin_setjmp(place)
#define HOST_CUDA_JUMP(place) __builtin_longjmp(place, 1)
#else
using Place = jmp_buf;
#define HOST_CUDA_STAND(place) _setjmp(place)
#define HOST_CUDA_JUMP(place) _longjmp(place, 1)
#endif

enum class State { ready, at_barrier, at_collective, done };

struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t start;
    Place here;
    State state = State::done;
    bool started = false;
    unsigned collectives = 0;  // passed
};

struct Gathering {  // of a block's threads at a barrier, or of a warp's lanes at a collective
    int alive = 0, arrived = 0;
};

class Block {
public:
    void run(const dim3& size, const std::function<void()>& kernel) {
        body = &kernel;
        count = int(size.x * size.y * size.z);
        if (int(fibers.size()) < count) fibers.resize(count);
        warps.assign((count + 31) / 32, {});
        for (std::vector<std::uint64_t>& brought : values) brought.assign(count, 0);
        all = {count, 0};
        for (int i = 0; i < count; i++) prepare(i);
        while (all.alive > 0) {
            bool moved = false;
            for (current = 0; current < count; current++) {
                if (fibers[current].state != State::ready) continue;
                moved = true;
                const unsigned rest = unsigned(current) / size.x;
                thread_index = {unsigned(current) % size.x, rest % size.y, rest / size.y};
                resume(fibers[current]);
            }
            if (!moved) fail();
        }
    }

    void barrier() { wait(all, State::at_barrier, 0, count); }

    // What every lane of the warp brought. Two sets of values in turn: no lane comes to the collective after the next
    // before all have read this one's.
    const std::uint64_t* exchange(std::uint64_t value) {
        const int first = current / 32 * 32;
        std::vector<std::uint64_t>& brought = values[fibers[current].collectives++ % 2];
        brought[current] = value;
        wait(warps[current / 32], State::at_collective, first, first + lanes());
        return &brought[first];
    }

    int lane() const { return current % 32; }
    int lanes() const {
        const int left = count - current / 32 * 32;
        return left < 32 ? left : 32;
    }

private:
    static constexpr std::size_t STACK = 256 << 10;

    static void enter(unsigned high, unsigned low) {
        Block* block = reinterpret_cast<Block*>(std::uintptr_t(std::uint64_t(high) << 32 | low));
        for (;;) {
            (*block->body)();
            block->finish();
        }
    }

    void prepare(int i) {
        Fiber& fiber = fibers[i];
        fiber.state = State::ready;
        fiber.collectives = 0;
        warps[i / 32].alive++;
        if (fiber.stack) return;
        fiber.stack.reset(new char[STACK]);
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        const std::uint64_t address = std::uint64_t(reinterpret_cast<std::uintptr_t>(this));
        makecontext(&fiber.start, reinterpret_cast<void (*)()>(enter), 2, unsigned(address >> 32), unsigned(address));
    }

    void resume(Fiber& fiber) {
        if (!HOST_CUDA_STAND(scheduler)) go(fiber);
    }

    void yield() {
        if (!HOST_CUDA_STAND(fibers[current].here)) leave();
    }

    // In functions of their own: GCC may not jump to where the same function stands.
    [[gnu::noinline]] void go(Fiber& fiber) {
        if (fiber.started) HOST_CUDA_JUMP(fiber.here);
        fiber.started = true;
        setcontext(&fiber.start);
    }

    [[gnu::noinline]] void leave() { HOST_CUDA_JUMP(scheduler); }

    void finish() {
        fibers[current].state = State::done;
        const int first = current / 32 * 32;
        all.alive--;
        warps[current / 32].alive--;
        release_if_complete(all, State::at_barrier, 0, count);
        release_if_complete(warps[current / 32], State::at_collective, first, first + lanes());
        yield();
    }

    void wait(Gathering& gathering, State state, int first, int last) {
        gathering.arrived++;
        fibers[current].state = state;
        release_if_complete(gathering, state, first, last);
        if (fibers[current].state != State::ready) yield();
    }

    void release_if_complete(Gathering& gathering, State state, int first, int last) {
        if (gathering.arrived == 0 || gathering.arrived < gathering.alive) return;
        gathering.arrived = 0;
        for (int i = first; i < last; i++)
            if (fibers[i].state == state) fibers[i].state = State::ready;
    }

    [[noreturn]] void fail() const {
        int barrier = 0, collective = 0;
        for (int i = 0; i < count; i++) {
            barrier += fibers[i].state == State::at_barrier;
            collective += fibers[i].state == State::at_collective;
        }
        std::fprintf(
            stderr, "deadlock in block (%u, %u, %u): %d threads at a barrier, %d at a warp collective, %d alive\n",
            block_index.x, block_index.y, block_index.z, barrier, collective, all.alive);
        std::abort();
    }

    std::vector<Fiber> fibers;
    std::vector<Gathering> warps;
    std::vector<std::uint64_t> values[2];
    Gathering all;
    Place scheduler;
    const std::function<void()>* body = nullptr;
    int count = 0, current = 0;
};

inline Block& block() {
    static Block instance;
    return instance;
}

// Runs a kernel with its arguments bound. One launch at a time.
inline void launch(const dim3& grid, const dim3& threads, const std::function<void()>& kernel) {
    grid_size = grid;
    block_size = threads;
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                block_index = {x, y, z};
                block().run(threads, kernel);
            }
}

}  // namespace host_cuda

#define threadIdx host_cuda::thread_index
#define blockIdx host_cuda::block_index
#define blockDim host_cuda::block_size
#define gridDim host_cuda::grid_size

inline void __syncthreads() { host_cuda::block().barrier(); }
inline void __threadfence() {}

inline unsigned atomicAdd(unsigned* address, unsigned value) {
    const unsigned old = *address;
    *address += value;
    return old;
}

inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    const unsigned long long old = *address;
    *address += value;
    return old;
}

inline unsigned atomicMax(unsigned* address, unsigned value) {
    const unsigned old = *address;
    if (value > old) *address = value;
    return old;
}

inline void __syncwarp() { host_cuda::block().exchange(0); }

inline unsigned __reduce_add_sync(unsigned, unsigned value) {
    host_cuda::Block& block = host_cuda::block();
    const std::uint64_t* values = block.exchange(value);
    unsigned sum = 0;
    for (int lane = 0; lane < block.lanes(); lane++) sum += unsigned(values[lane]);
    return sum;
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
    host_cuda::Block& block = host_cuda::block();
    const std::uint64_t* values = block.exchange(value);
    unsigned greatest = 0;
    for (int lane = 0; lane < block.lanes(); lane++)
        if (values[lane] > greatest) greatest = unsigned(values[lane]);
    return greatest;
}

template <typename Value>
inline Value __shfl_down_sync(unsigned, Value value, unsigned distance) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    host_cuda::Block& block = host_cuda::block();
    const std::uint64_t* values = block.exchange(bits);
    const int source = block.lane() + int(distance);
    bits = values[source < block.lanes() ? source : block.lane()];
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename Value>
inline Value __shfl_sync(unsigned, Value value, int lane) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = host_cuda::block().exchange(bits)[lane];
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
    host_cuda::Block& block = host_cuda::block();
    const std::uint64_t* values = block.exchange(predicate);
    unsigned bits = 0;
    for (int lane = 0; lane < block.lanes(); lane++) bits |= unsigned(values[lane] & 1) << lane;
    return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(unsigned(bits)) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((std::uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned((std::uint64_t(high) << 32 | low) >> (shift & 31));
}

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned chosen = selector >> (4 * i) & 7;
        result |= ((chosen < 4 ? low : high) >> (8 * (chosen % 4)) & 255) << (8 * i);
    }
    return result;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float2int_rn(float value) { return int(std::nearbyint(value)); }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
