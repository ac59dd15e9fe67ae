// CUDA C++ on a CPU, to test a kernel's arithmetic and indexing without a GPU: the .cu is compiled after this by g++.
//
// A block's threads are fibers: each runs until it waits for others, then the next one has its turn, in the order asked
// for (ascending, descending or shuffled). So a kernel that lacks a barrier gives other numbers in another order. Shared
// memory is filled with NaNs before each block. A thread that leaves while others wait for it, or lanes that disagree on
// a shuffle, are errors. What no fiber can show: the speed, real races within a warp, and alignment.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __constant__ static const
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(on_cpu::shared.data())

struct dim3 { unsigned x = 1, y = 1, z = 1; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;

#define VECTOR(type, name)                                                                   \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                 \
    struct name##3 { type x, y, z; };                                                        \
    struct alignas(sizeof(type) > 4 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; };   \
    static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                  \
    static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }       \
    static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTOR(float, float)
VECTOR(double, double)
VECTOR(int, int)
VECTOR(unsigned, uint)
VECTOR(unsigned short, ushort)
VECTOR(unsigned char, uchar)

namespace on_cpu {

struct Meeting { unsigned expected = 0, arrived = 0, turn = 0; };
struct Warp { Meeting meeting; unsigned long long slots[32]; };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    unsigned thread = 0, turn = 0;
    Meeting* waits = nullptr;
    bool done = false;
};

static std::vector<float> shared;
static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static Meeting block;
static ucontext_t scheduler;
static Fiber* current;
static void (*body)(void*);
static void* body_argument;
static const char* broken;

static void enter() {
    body(body_argument);
    current->done = true;
    swapcontext(&current->context, &scheduler);
}

static void meet(Meeting& meeting) {
    if (++meeting.arrived == meeting.expected) {
        meeting.arrived = 0;
        ++meeting.turn;
        return;
    }
    current->waits = &meeting;
    current->turn = meeting.turn;
    swapcontext(&current->context, &scheduler);
}

// One block; whether all of its threads came to their end.
static bool run_block(const std::vector<unsigned>& order) {
    const unsigned n = blockDim.x;
    block = {n, 0, 0};
    for (unsigned w = 0; w < warps.size(); ++w) {
        const unsigned left = n - 32 * w;
        warps[w].meeting = {left < 32 ? left : 32, 0, 0};
    }
    for (unsigned i = 0; i < n; ++i) {
        Fiber& fiber = fibers[i];
        fiber.stack.resize(1 << 16);
        fiber.thread = i, fiber.waits = nullptr, fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (unsigned done = 0; done < n;) {
        bool moved = false;
        for (unsigned i : order) {
            Fiber& fiber = fibers[i];
            if (fiber.done || (fiber.waits && fiber.waits->turn == fiber.turn)) continue;
            fiber.waits = nullptr;
            threadIdx.x = fiber.thread;
            current = &fiber;
            moved = true;
            swapcontext(&scheduler, &fiber.context);
            done += fiber.done;
            if (broken) return false;
        }
        if (!moved) {
            broken = "threads wait for others that have left, or that wait elsewhere";
            return false;
        }
    }
    return true;
}

template <class... A, std::size_t... I>
static void call(void (*kernel)(A...), void** parameters, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(parameters[I])...);
}

// 0 ascending, 1 descending, above: shuffled with that seed. What went wrong, or null.
template <class... A>
static const char* launch(void (*kernel)(A...), unsigned grid, unsigned threads, unsigned bytes, void** parameters,
                          unsigned order) {
    struct Call { void (*kernel)(A...); void** parameters; } both{kernel, parameters};
    body = [](void* argument) {
        Call& made = *static_cast<Call*>(argument);
        call(made.kernel, made.parameters, std::index_sequence_for<A...>{});
    };
    body_argument = &both;
    broken = nullptr;
    gridDim.x = grid, blockDim.x = threads;
    fibers.resize(threads);
    warps.resize((threads + 31) / 32);
    std::vector<unsigned> turns(threads);
    for (unsigned i = 0; i < threads; ++i) turns[i] = order == 1 ? threads - 1 - i : i;
    std::mt19937 chance(order);
    for (unsigned b = 0; b < grid; ++b) {
        blockIdx.x = b;
        shared.assign(bytes / 4 + 16, NAN);
        if (order > 1) std::shuffle(turns.begin(), turns.end(), chance);
        if (!run_block(turns)) return broken;
    }
    return nullptr;
}

template <class T>
static T shuffled(unsigned mask, T value, unsigned lane) {
    static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
    if (mask != 0xffffffffu) broken = "a shuffle must name all lanes";
    Warp& warp = warps[threadIdx.x / 32];
    std::memcpy(&warp.slots[threadIdx.x % 32], &value, sizeof(T));
    meet(warp.meeting);
    if (lane < 32) std::memcpy(&value, &warp.slots[lane], sizeof(T));
    meet(warp.meeting);
    return value;
}

}  // namespace on_cpu

static inline void __syncthreads() { on_cpu::meet(on_cpu::block); }
static inline void __syncwarp(unsigned = 0xffffffffu) { on_cpu::meet(on_cpu::warps[threadIdx.x / 32].meeting); }
static inline void __threadfence() {}
template <class T> static T __shfl_sync(unsigned mask, T v, int lane) { return on_cpu::shuffled(mask, v, lane & 31); }
template <class T> static T __shfl_xor_sync(unsigned mask, T v, int lanes) {
    return on_cpu::shuffled(mask, v, (threadIdx.x % 32) ^ lanes);
}
template <class T> static T __shfl_down_sync(unsigned mask, T v, unsigned by) {
    return on_cpu::shuffled(mask, v, threadIdx.x % 32 + by);
}
template <class T> static T __shfl_up_sync(unsigned mask, T v, unsigned by) {
    return on_cpu::shuffled(mask, v, threadIdx.x % 32 - by);
}
static inline unsigned __ballot_sync(unsigned mask, bool vote) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= on_cpu::shuffled(mask, unsigned(vote), lane) << lane;
    return votes;
}
static inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
static inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == 0xffffffffu; }
template <class T> static T __ldg(const T* address) { return *address; }
template <class T> static T atomicAdd(T* address, T value) { T old = *address; *address = old + value; return old; }

static inline float __uint_as_float(unsigned bits) { float v; std::memcpy(&v, &bits, 4); return v; }
static inline unsigned __float_as_uint(float value) { unsigned v; std::memcpy(&v, &value, 4); return v; }
static inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
static inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }  // NaN: 0
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dsub_rn(double a, double b) { return a - b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline double __dsqrt_rn(double a) { return std::sqrt(a); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
template <class T> static T min(T a, T b) { return b < a ? b : a; }
template <class T> static T max(T a, T b) { return a < b ? b : a; }
