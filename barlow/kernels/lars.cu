// LARS for all tensors in two launches: the sums of squares that the trust ratios need, then everything else. That
// moves 8 and 20 bytes a float32 parameter, as it must; between the two only two numbers a chunk are kept. The
// definition is reference_step in barlow/optim/lars.py, the host side barlow/optim/fused.py.
//
// A chunk is a run of elements of one tensor, and a block's work. Every block adds up the sums of its tensor's chunks
// itself, always in the same order: so the result has the same bits each time.

const int THREADS = 256;
const int GROUPS = 64;
const int POINTERS = 480;

// One parameter group.
struct Rule {
    float weight_decay, momentum, eta, lr;
    const float* lr_on_device;  // if there is one, it is the rate
    int clip, adapt;
};
struct Rules { Rule of[GROUPS]; };

// What stays as it is from step to step; all of a tensor's memory is dense, in whatever order of its dimensions.
struct Tensor {
    int64 n;
    int64 first;  // of its chunks
    int64 group;
    int64 bf16;  // else float32; the momentum always is
};

struct Pointers { int64 at[POINTERS]; };

// Where gradients, parameters and momenta are: sets entries of that table. They come by value, so no host memory must
// outlive the launch, and a CUDA graph has its own.
extern "C" __global__ void lars_point(int64* table, int first, int count, Pointers pointers) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) table[first + i] = pointers.at[i];
}

__device__ __forceinline__ float widen(float value) { return value; }

__device__ __forceinline__ float4 load(const float* from, int quad) {
    return reinterpret_cast<const float4*>(from)[quad];
}
__device__ __forceinline__ float4 load(const uint16* from, int quad) {
    const ushort4 bits = reinterpret_cast<const ushort4*>(from)[quad];
    return make_float4(widen(bits.x), widen(bits.y), widen(bits.z), widen(bits.w));
}
__device__ __forceinline__ void store(float* to, int quad, float4 value) {
    reinterpret_cast<float4*>(to)[quad] = value;
}
__device__ __forceinline__ void store(uint16* to, int quad, float4 value) {
    reinterpret_cast<ushort4*>(to)[quad] =
        make_ushort4(narrow(value.x), narrow(value.y), narrow(value.z), narrow(value.w));
}
__device__ __forceinline__ void store_one(float* to, float value) { *to = value; }
__device__ __forceinline__ void store_one(uint16* to, float value) { *to = narrow(value); }

template <typename T>
__device__ __forceinline__ bool in_quads(const T* address) {
    return reinterpret_cast<uint64>(address) % (4 * sizeof(T)) == 0;
}

struct Sums { float p, g; };

__device__ __forceinline__ void add_squares(Sums& sums, float p, float g, float weight_decay) {
    g += weight_decay * p;
    sums.p += p * p;
    sums.g += g * g;
}

// From quad `at` on, as long as there are `ahead` for this thread: so many loads of each are under way at a time.
// Returns where it has stopped.
template <int ahead, typename T>
__device__ __forceinline__ int add_quads(Sums& sums, int at, int quads, const T* p, const T* g,
                                            float weight_decay) {
    for (; at + (ahead - 1) * THREADS < quads; at += ahead * THREADS) {
        float4 ps[ahead], gs[ahead];
#pragma unroll
        for (int i = 0; i < ahead; ++i) ps[i] = load(p, at + i * THREADS), gs[i] = load(g, at + i * THREADS);
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            add_squares(sums, ps[i].x, gs[i].x, weight_decay);
            add_squares(sums, ps[i].y, gs[i].y, weight_decay);
            add_squares(sums, ps[i].z, gs[i].z, weight_decay);
            add_squares(sums, ps[i].w, gs[i].w, weight_decay);
        }
    }
    return at;
}

template <typename T>
__device__ __forceinline__ Sums squares(const T* p, const T* g, int n, float weight_decay) {
    const int quads = in_quads(p) && in_quads(g) ? n / 4 : 0;
    Sums sums = {0, 0};
    const int at = add_quads<4>(sums, threadIdx.x, quads, p, g, weight_decay);
    add_quads<1>(sums, at, quads, p, g, weight_decay);
    for (int i = 4 * quads + threadIdx.x; i < n; i += THREADS)
        add_squares(sums, widen(p[i]), widen(g[i]), weight_decay);
    return sums;
}

struct Step { float weight_decay, momentum, lr, q; };

__device__ __forceinline__ void move(float& p, float g, float& mu, const Step& by) {
    mu = by.momentum * mu + by.q * (g + by.weight_decay * p);
    p -= by.lr * mu;
}

// As add_quads.
template <int ahead, typename T>
__device__ __forceinline__ int move_quads(int at, int quads, T* p, T* g, float* mu, const Step& by, bool zero) {
    for (; at + (ahead - 1) * THREADS < quads; at += ahead * THREADS) {
        float4 ps[ahead], gs[ahead], mus[ahead];
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            const int quad = at + i * THREADS;
            ps[i] = load(p, quad), gs[i] = load(g, quad), mus[i] = load(mu, quad);
        }
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            const int quad = at + i * THREADS;
            move(ps[i].x, gs[i].x, mus[i].x, by);
            move(ps[i].y, gs[i].y, mus[i].y, by);
            move(ps[i].z, gs[i].z, mus[i].z, by);
            move(ps[i].w, gs[i].w, mus[i].w, by);
            store(p, quad, ps[i]);
            store(mu, quad, mus[i]);
            if (zero) store(g, quad, make_float4(0, 0, 0, 0));
        }
    }
    return at;
}

template <typename T>
__device__ __forceinline__ void update(T* p, T* g, float* mu, int n, const Step& by, bool zero) {
    const int quads = in_quads(p) && in_quads(g) && in_quads(mu) ? n / 4 : 0;
    const int at = move_quads<2>(threadIdx.x, quads, p, g, mu, by, zero);
    move_quads<1>(at, quads, p, g, mu, by, zero);
    for (int i = 4 * quads + threadIdx.x; i < n; i += THREADS) {
        float p_i = widen(p[i]);
        move(p_i, widen(g[i]), mu[i], by);
        store_one(p + i, p_i);
        if (zero) store_one(g + i, 0);
    }
}

// A block's work.
struct Chunk {
    Tensor tensor;
    int64 start;
    int n;
    int64 g, p, mu;  // addresses of the tensor's; no gradient: 0
};

__device__ __forceinline__ Chunk chunk_of(int number, const int* owner, const Tensor* tensors, const int64* table,
                                          int count, int size) {
    const int of = owner[number];
    Chunk chunk;
    chunk.tensor = tensors[of];
    chunk.g = table[of], chunk.p = table[count + of], chunk.mu = table[2 * count + of];
    chunk.start = (number - chunk.tensor.first) * size;
    const int64 left = chunk.tensor.n - chunk.start;
    chunk.n = left < size ? static_cast<int>(left) : size;
    return chunk;
}

template <typename T>
__device__ __forceinline__ T* address(int64 tensor, int64 start) {
    T* const found = reinterpret_cast<T*>(tensor) + start;
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(found));  // the compiler cannot know it of a number, and would take slower instructions
#endif
    return found;
}

// partial[chunk] = sums of p^2 and of (g + weight_decay p)^2 over it; nothing for tensors that are not adapted.
extern "C" __global__ void __launch_bounds__(256)
lars_norms(const int* owner, const Tensor* tensors, const int64* table, int count, int size, float2* partial,
           Rules rules) {
    const Chunk it = chunk_of(blockIdx.x, owner, tensors, table, count, size);
    const Rule& rule = rules.of[it.tensor.group];
    if (it.g == 0 || !rule.adapt) return;
    const Sums sums =
        it.tensor.bf16
            ? squares(address<uint16>(it.p, it.start), address<uint16>(it.g, it.start), it.n, rule.weight_decay)
            : squares(address<float>(it.p, it.start), address<float>(it.g, it.start), it.n, rule.weight_decay);
    const float p = block_sum(sums.p), g = block_sum(sums.g);
    if (threadIdx.x == 0) partial[blockIdx.x] = make_float2(p, g);
}

// q of a tensor, from the sums of all of its chunks. A norm that is NaN is not above 0.
__device__ __forceinline__ float trust(const Rule& rule, const Tensor& tensor, float lr, int size,
                                       const float2* partial) {
    const int64 chunks = (tensor.n + size - 1) / size;
    Sums sums = {0, 0};
    for (int64 i = threadIdx.x; i < chunks; i += THREADS) {
        const float2 one = partial[tensor.first + i];
        sums.p += one.x;
        sums.g += one.y;
    }
    const float p = sqrtf(block_sum(sums.p)), g = sqrtf(block_sum(sums.g));
    if (!(p > 0 && g > 0)) return 1;
    const float q = rule.eta * p / g;
    if (!rule.clip) return q;
    return q / lr > 1 ? 1 : q / lr;
}

// Chunks are taken from the last, whose parameters and gradients lars_norms has left in the cache.
extern "C" __global__ void __launch_bounds__(256)
lars_update(const int* owner, const Tensor* tensors, const int64* table, int count, int size, const float2* partial,
            int zero, Rules rules) {
    const Chunk it = chunk_of(gridDim.x - 1 - blockIdx.x, owner, tensors, table, count, size);
    if (it.g == 0) return;
    const Rule& rule = rules.of[it.tensor.group];
    const float lr = rule.lr_on_device ? *rule.lr_on_device : rule.lr;
    const float q = rule.adapt ? trust(rule, it.tensor, lr, size, partial) : 1;
    const Step by = {rule.weight_decay, rule.momentum, lr, q};
    float* const mu = address<float>(it.mu, it.start);
    if (it.tensor.bf16)
        update(address<uint16>(it.p, it.start), address<uint16>(it.g, it.start), mu, it.n, by, zero);
    else
        update(address<float>(it.p, it.start), address<float>(it.g, it.start), mu, it.n, by, zero);
}
