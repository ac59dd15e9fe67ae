// What all kernels share; it stands before each .cu when that is compiled (see build.py), so nothing is included.
//
// The same text must compile as plain C++ with tests/kernels/on_cpu.h, where a CUDA thread is a fiber: keep to the words
// that it defines. Blocks have one dimension, of whole warps.

typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef long long int64;
typedef unsigned long long uint64;

#ifndef DYNAMIC_SHARED
// The shared memory whose size is given at the launch.
#define DYNAMIC_SHARED(type, name)                                      \
    extern __shared__ __align__(16) unsigned char dynamic_shared[];     \
    type* const name = reinterpret_cast<type*>(dynamic_shared)
#endif

const uint32 WARP = 32;
const uint32 ALL_LANES = 0xffffffffu;

// bfloat16 is the upper half of a float32; here it is carried as its bits.
__device__ __forceinline__ float widen(uint16 bits) { return __uint_as_float(static_cast<uint32>(bits) << 16); }

// To the nearest, ties to even. A NaN stays one.
__device__ __forceinline__ uint16 narrow(float value) {
    const uint32 bits = __float_as_uint(value);
    if (value != value) return static_cast<uint16>((bits >> 16) | 0x40);
    return static_cast<uint16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The sum over the block, in all of its threads; its order depends on the block's size alone.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float of_warp[32];
    for (uint32 step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    __syncthreads();  // whoever reads what an earlier call left here has done so
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    float sum = 0;
    for (uint32 warp = 0; warp < blockDim.x / WARP; ++warp) sum += of_warp[warp];
    return sum;
}
