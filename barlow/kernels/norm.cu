// Batch norm of activations [rows, channels], the layout of channels_last, with the ReLU and the sum that follow it, in
// as few passes over memory as the collectives of W ranks allow: x is read for the moments, and again with what is
// added for the result; backward reads the gradient and x for two sums a channel, and again for the gradient of x. The
// definition is in barlow/models/norm_ops.py, which is the host side too.
//
// A block has a tile of columns and a run of rows; a column is what one load of 16 bytes brings of a row. Sums are a
// thread's over its rows, then a block's in a tree, then of all blocks by a launch of their own. Their order depends on
// the shape alone: so the result has the same bits each time.

const int THREADS = 256;
const int MERGING = 512;  // threads of a block in the launches that merge what others have found: it has
const int CHANNELS = 8;   // so many channels, and the parts are shared out

struct Tiling {
    int64 rows;
    int channels;
    int bf16;    // else float32
    int wide;    // channels in a column are 8 bfloat16 or 4 float32; else, for odd numbers and addresses, 1
    int across;  // columns of a block, a power of two
    int tiles;   // blocks beside each other
    int deep;    // rows of a block
};

template <typename T, int n>
struct alignas(n * sizeof(T)) Column { T of[n]; };

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ void narrow_to(float* to, float value) { *to = value; }
__device__ __forceinline__ void narrow_to(uint16* to, float value) { *to = narrow(value); }

template <typename T, int n>
__device__ __forceinline__ void store(T* to, const float (&values)[n]) {
    Column<T, n> column;
#pragma unroll
    for (int i = 0; i < n; ++i) narrow_to(column.of + i, values[i]);
    *reinterpret_cast<Column<T, n>*>(to) = column;
}

// A thread's channels and rows: of a block's, every step-th. A thread beyond the last channel has no rows.
struct Place { int channel, lane, step; int64 row, end; };

__device__ __forceinline__ Place place(const Tiling& t, int n, int block) {
    Place at;
    at.channel = (block % t.tiles * t.across + threadIdx.x % t.across) * n;
    at.lane = threadIdx.x / t.across;
    at.step = THREADS / t.across;
    const int64 first = static_cast<int64>(block / t.tiles) * t.deep;
    const int64 last = first + t.deep < t.rows ? first + t.deep : t.rows;
    at.row = first + at.lane;
    at.end = at.channel < t.channels ? last : 0;
    return at;
}

template <typename T, int inputs>
struct From { const T* of[inputs]; };

template <int ahead, int n, int inputs, typename T, typename Body>
__device__ __forceinline__ int64 some_rows(int64 row, const Place& at, const Tiling& t, const From<T, inputs>& from,
                                           Body body) {
    for (; row + (ahead - 1) * at.step < at.end; row += ahead * at.step) {
        Column<T, n> columns[ahead][inputs];
#pragma unroll
        for (int i = 0; i < ahead; ++i)
#pragma unroll
            for (int k = 0; k < inputs; ++k)
                columns[i][k] = *reinterpret_cast<const Column<T, n>*>(from.of[k] + (row + i * at.step) * t.channels +
                                                                       at.channel);
#pragma unroll
        for (int i = 0; i < ahead; ++i) {
            float values[inputs][n];
#pragma unroll
            for (int k = 0; k < inputs; ++k)
#pragma unroll
                for (int c = 0; c < n; ++c) values[k][c] = widen(columns[i][k].of[c]);
            body((row + i * at.step) * t.channels + at.channel, values);
        }
    }
    return row;
}

// body(where in the tensors, values[input][channel]) for each of the thread's rows; several are loaded at a time.
template <int n, int inputs, typename T, typename Body>
__device__ __forceinline__ void each_row(const Place& at, const Tiling& t, const From<T, inputs>& from, Body body) {
    const int64 row = some_rows<4, n, inputs>(at.row, at, t, from, body);
    some_rows<1, n, inputs>(row, at, t, from, body);
}

// From a block's threads of one column the first goes on, with what `take(of another)` has made of all.
template <typename Take>
__device__ __forceinline__ void in_a_tree(const Place& at, int across, Take take) {
    for (int half = at.step / 2; half > 0; half /= 2) {
        __syncthreads();
        if (at.lane < half) take(threadIdx.x + half * across);
    }
}

// ------------------------------------------------------------------------------------------------------------ moments
//
// Those of some rows are 2 * channels + 1 numbers: means, biased variances, the count. So are those of all blocks, and
// those of all ranks.

// Each thread takes its first value from all others before it sums them and their squares. What the subtraction of the
// squared mean then costs is bounded by the number of its rows, for the first value itself adds to the variance: which
// so cannot fall below 0.
template <typename T, int n>
__device__ __forceinline__ void moments(const T* x, float* parts, const Tiling& t, float* shared) {
    const Place at = place(t, n, blockIdx.x);
    float mean[n] = {}, square[n] = {}, first[n] = {};
    float count = 0;
    if (at.row < at.end) {
        const T* const own = x + at.row * t.channels + at.channel;
        for (int c = 0; c < n; ++c) first[c] = widen(own[c]);
        count = static_cast<float>((at.end - at.row + at.step - 1) / at.step);
    }
    each_row<n, 1>(at, t, From<T, 1>{{x}}, [&](int64, const float (&values)[1][n]) {
#pragma unroll
        for (int c = 0; c < n; ++c) {
            const float away = values[0][c] - first[c];
            mean[c] += away;
            square[c] += away * away;
        }
    });
    float *const means = shared, *const squares = shared + n * THREADS, *const counts = shared + 2 * n * THREADS;
    const auto keep = [&] {
        counts[threadIdx.x] = count;
#pragma unroll
        for (int c = 0; c < n; ++c) {
            means[c * THREADS + threadIdx.x] = mean[c];
            squares[c * THREADS + threadIdx.x] = square[c];
        }
    };
#pragma unroll
    for (int c = 0; c < n; ++c) {
        const float along = count > 0 ? mean[c] / count : 0;
        square[c] -= mean[c] * along;
        mean[c] = first[c] + along;
    }
    keep();
    in_a_tree(at, t.across, [&](int other) {
        const float more = counts[other];
        if (!(more > 0)) return;
        const float share = more / (count + more), weight = count * share;
#pragma unroll
        for (int c = 0; c < n; ++c) {
            const float away = means[c * THREADS + other] - mean[c];
            mean[c] += away * share;
            square[c] += squares[c * THREADS + other] + away * away * weight;
        }
        count += more;
        keep();
    });
    float* const part = parts + static_cast<int64>(blockIdx.x / t.tiles) * (2 * t.channels + 1);
    if (at.lane == 0 && at.channel < t.channels) {
        for (int c = 0; c < n; ++c) {
            part[at.channel + c] = mean[c];
            part[t.channels + at.channel + c] = square[c] / count;
        }
        if (at.channel == 0) part[2 * t.channels] = count;
    }
}

// The sum over the threads of one channel, in all of them; shared: MERGING.
__device__ __forceinline__ float strand_sum(float value, float* shared) {
    __syncthreads();  // whoever reads what an earlier call left here has done so
    shared[threadIdx.x] = value;
    for (int half = MERGING / 2; half >= CHANNELS; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    __syncthreads();
    return shared[threadIdx.x % CHANNELS];
}

// One of many, be they of blocks or of ranks. Means are summed as they differ from the first, and what they differ by
// from all of them adds to the variance: no digits are lost where a mean is large.
extern "C" __global__ void __launch_bounds__(512) norm_merge(const float* parts, int count, int channels, float* out) {
    DYNAMIC_SHARED(float, shared);
    const int channel = blockIdx.x * CHANNELS + threadIdx.x % CHANNELS, width = 2 * channels + 1;
    const int64 from = threadIdx.x / CHANNELS, to = channel < channels ? count : 0;
    const float pivot = channel < channels ? parts[channel] : 0;
    float total = 0, along = 0, spread = 0;
#pragma unroll 4
    for (int64 i = from; i < to; i += MERGING / CHANNELS) {
        const float* const part = parts + i * width;
        total += part[2 * channels];
        along += part[2 * channels] * (part[channel] - pivot);
    }
    total = strand_sum(total, shared);
    const float mean = pivot + strand_sum(along, shared) / total;
#pragma unroll 4
    for (int64 i = from; i < to; i += MERGING / CHANNELS) {
        const float* const part = parts + i * width;
        const float away = part[channel] - mean;
        spread += part[2 * channels] * (part[channels + channel] + away * away);
    }
    spread = strand_sum(spread, shared);
    if (threadIdx.x < CHANNELS && channel < channels) {
        out[channel] = mean;
        out[channels + channel] = spread / total;
        if (channel == 0) out[2 * channels] = total;
    }
}

// ------------------------------------------------------------------------------------------------------------- result

// Of a thread's channels. The mean is taken off before anything is multiplied: where it is large, that is exact.
template <int n>
struct Affine {
    float mean[n], inverse[n], scale[n], bias[n];

    __device__ __forceinline__ Affine(const float* moments, const float* weight, const float* bias_at, float eps,
                                      int channel, int channels) {
#pragma unroll
        for (int c = 0; c < n; ++c) {
            const int k = channel + c < channels ? channel + c : 0;
            mean[c] = moments[k];
            inverse[c] = rsqrtf(moments[channels + k] + eps);
            scale[c] = weight ? weight[k] * inverse[c] : inverse[c];
            bias[c] = bias_at ? bias_at[k] : 0;
        }
    }

    // The same to the bit in both directions, so that backward finds what forward has cut off.
    __device__ __forceinline__ float of(float x, int c) const { return fmaf(x - mean[c], scale[c], bias[c]); }
};

// Rows are taken from the last, which the moments have left in the cache.
template <typename T, int n, int inputs>
__device__ __forceinline__ void apply(const From<T, inputs>& from, const Affine<n>& affine, bool relu, const Tiling& t,
                                      const Place& at, T* y) {
    each_row<n, inputs>(at, t, from, [&](int64 where, const float (&values)[inputs][n]) {
        float out[n];
#pragma unroll
        for (int c = 0; c < n; ++c) {
            out[c] = affine.of(values[0][c], c);
            if (inputs == 2) out[c] += values[inputs - 1][c];
            if (relu && out[c] <= 0) out[c] = 0;  // a NaN stays
        }
        store<T, n>(y + where, out);
    });
}

template <typename T, int n>
__device__ __forceinline__ void apply(const void* x, const void* added, const float* moments, const float* weight,
                                      const float* bias, float eps, bool relu, const Tiling& t, void* y) {
    const Place at = place(t, n, gridDim.x - 1 - blockIdx.x);
    const Affine<n> affine(moments, weight, bias, eps, at.channel, t.channels);
    const T *const xs = static_cast<const T*>(x), *const more = static_cast<const T*>(added);
    if (added)
        apply<T, n, 2>(From<T, 2>{{xs, more}}, affine, relu, t, at, static_cast<T*>(y));
    else
        apply<T, n, 1>(From<T, 1>{{xs}}, affine, relu, t, at, static_cast<T*>(y));
}

// ----------------------------------------------------------------------------------------------------------- backward

// A block's part of the sums over rows, [2, channels]: of g * x^ and of g. What ReLU has cut off it leaves out, and
// knows it from x; or, where something had been added, from y, and then `kept`, the gradient of what was added, is g.
template <typename T, int n, int inputs>
__device__ __forceinline__ void sums(const From<T, inputs>& from, const Affine<n>& affine, bool relu, const Tiling& t,
                                     const Place& at, T* kept, float* parts, float* shared) {
    float along[n] = {}, sum[n] = {};
    each_row<n, inputs>(at, t, from, [&](int64 where, const float (&values)[inputs][n]) {
        float g[n];
#pragma unroll
        for (int c = 0; c < n; ++c) {
            const float x = values[1][c];
            const float before = inputs == 3 ? values[inputs - 1][c] : relu ? affine.of(x, c) : 1;
            g[c] = before <= 0 ? 0 : values[0][c];
            along[c] += g[c] * (x - affine.mean[c]);
            sum[c] += g[c];
        }
        if (inputs == 3) store<T, n>(kept + where, g);
    });
    float *const alongs = shared, *const others = shared + n * THREADS;
    const auto keep = [&] {
#pragma unroll
        for (int c = 0; c < n; ++c) {
            alongs[c * THREADS + threadIdx.x] = along[c];
            others[c * THREADS + threadIdx.x] = sum[c];
        }
    };
    keep();
    in_a_tree(at, t.across, [&](int other) {
#pragma unroll
        for (int c = 0; c < n; ++c) along[c] += alongs[c * THREADS + other], sum[c] += others[c * THREADS + other];
        keep();
    });
    float* const part = parts + static_cast<int64>(blockIdx.x / t.tiles) * 2 * t.channels;
    if (at.lane == 0 && at.channel < t.channels)
        for (int c = 0; c < n; ++c) {
            part[at.channel + c] = along[c] * affine.inverse[c];
            part[t.channels + at.channel + c] = sum[c];
        }
}

template <typename T, int n>
__device__ __forceinline__ void sums(const void* grad, const void* x, const void* y, const float* moments,
                                     const float* weight, const float* bias, float eps, bool relu, const Tiling& t,
                                     void* kept, float* parts, float* shared) {
    const Place at = place(t, n, blockIdx.x);
    const Affine<n> affine(moments, weight, bias, eps, at.channel, t.channels);
    const T *const gs = static_cast<const T*>(grad), *const xs = static_cast<const T*>(x);
    if (y)
        sums<T, n, 3>(From<T, 3>{{gs, xs, static_cast<const T*>(y)}}, affine, relu, t, at, static_cast<T*>(kept), parts,
                      shared);
    else
        sums<T, n, 2>(From<T, 2>{{gs, xs}}, affine, relu, t, at, static_cast<T*>(kept), parts, shared);
}

// Sums over parts [count, width].
extern "C" __global__ void __launch_bounds__(512) norm_total(const float* parts, int count, int width, float* out) {
    DYNAMIC_SHARED(float, shared);
    const int channel = blockIdx.x * CHANNELS + threadIdx.x % CHANNELS;
    const int64 to = channel < width ? count : 0;
    float total = 0;
#pragma unroll 4
    for (int64 i = threadIdx.x / CHANNELS; i < to; i += MERGING / CHANNELS) total += parts[i * width + channel];
    total = strand_sum(total, shared);
    if (threadIdx.x < CHANNELS && channel < width) out[channel] = total;
}

// scale * (g - mean(g) - x^ mean(g x^)), from the last rows on, which the sums have left in the cache.
template <typename T, int n>
__device__ __forceinline__ void gradient(const void* grad, const void* x, const float* moments, const float* sums,
                                         const float* weight, const float* bias, float eps, bool relu, const Tiling& t,
                                         void* out) {
    const Place at = place(t, n, gridDim.x - 1 - blockIdx.x);
    const Affine<n> affine(moments, weight, bias, eps, at.channel, t.channels);
    const float count = moments[2 * t.channels];
    float slope[n], shift[n];
#pragma unroll
    for (int c = 0; c < n; ++c) {
        const int k = at.channel + c < t.channels ? at.channel + c : 0;
        slope[c] = affine.scale[c] * affine.inverse[c] * (sums[k] / count);
        shift[c] = affine.scale[c] * (sums[t.channels + k] / count);
    }
    const From<T, 2> from = {{static_cast<const T*>(grad), static_cast<const T*>(x)}};
    each_row<n, 2>(at, t, from, [&](int64 where, const float (&values)[2][n]) {
        float made[n];
#pragma unroll
        for (int c = 0; c < n; ++c) {
            const float g = relu && affine.of(values[1][c], c) <= 0 ? 0 : values[0][c];
            made[c] = affine.scale[c] * g - ((values[1][c] - affine.mean[c]) * slope[c] + shift[c]);
        }
        store<T, n>(static_cast<T*>(out) + where, made);
    });
}

// ----------------------------------------------------------------------------------------------------------- launches
//
// parts: of each run of rows. Without weight or bias their address is 0; without anything added, that of `added`, of y
// and of `kept`.

extern "C" __global__ void __launch_bounds__(256, 3) norm_moments(const void* x, float* parts, Tiling t) {
    DYNAMIC_SHARED(float, shared);
    const float* const wide = static_cast<const float*>(x);
    const uint16* const half = static_cast<const uint16*>(x);
    if (t.bf16)
        t.wide ? moments<uint16, 8>(half, parts, t, shared) : moments<uint16, 1>(half, parts, t, shared);
    else
        t.wide ? moments<float, 4>(wide, parts, t, shared) : moments<float, 1>(wide, parts, t, shared);
}

extern "C" __global__ void __launch_bounds__(256)
norm_apply(const void* x, const void* added, const float* moments, const float* weight, const float* bias, float eps,
           int relu, void* y, Tiling t) {
    if (t.bf16)
        t.wide ? apply<uint16, 8>(x, added, moments, weight, bias, eps, relu, t, y)
               : apply<uint16, 1>(x, added, moments, weight, bias, eps, relu, t, y);
    else
        t.wide ? apply<float, 4>(x, added, moments, weight, bias, eps, relu, t, y)
               : apply<float, 1>(x, added, moments, weight, bias, eps, relu, t, y);
}

extern "C" __global__ void __launch_bounds__(256)
norm_sums(const void* grad, const void* x, const void* y, const float* moments, const float* weight, const float* bias,
          float eps, int relu, void* kept, float* parts, Tiling t) {
    DYNAMIC_SHARED(float, shared);
    if (t.bf16)
        t.wide ? sums<uint16, 8>(grad, x, y, moments, weight, bias, eps, relu, t, kept, parts, shared)
               : sums<uint16, 1>(grad, x, y, moments, weight, bias, eps, relu, t, kept, parts, shared);
    else
        t.wide ? sums<float, 4>(grad, x, y, moments, weight, bias, eps, relu, t, kept, parts, shared)
               : sums<float, 1>(grad, x, y, moments, weight, bias, eps, relu, t, kept, parts, shared);
}

extern "C" __global__ void __launch_bounds__(256)
norm_gradient(const void* grad, const void* x, const float* moments, const float* sums, const float* weight,
              const float* bias, float eps, int relu, void* out, Tiling t) {
    if (t.bf16)
        t.wide ? gradient<uint16, 8>(grad, x, moments, sums, weight, bias, eps, relu, t, out)
               : gradient<uint16, 1>(grad, x, moments, sums, weight, bias, eps, relu, t, out);
    else
        t.wide ? gradient<float, 4>(grad, x, moments, sums, weight, bias, eps, relu, t, out)
               : gradient<float, 1>(grad, x, moments, sums, weight, bias, eps, relu, t, out);
}
