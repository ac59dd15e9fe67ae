// views_draw: what is random in the views of a batch. views_apply: all operations of all views, in one launch.
//
// barlow/data/draw.py and augment.py define both: the same parameters to the bit, the same pixels but for the rounding
// of float32. Every view is made of its own row of parameters alone.

const int BRIGHTNESS = 0, CONTRAST = 1, SATURATION = 2, HUE = 3;
const int ATTEMPTS = 10, SWITCHES = 10, FACTORS = 11, OTHERS = 12;  // slots of random words
const int RADIUS = 8;                                               // of the blur
const float RED = 0.2989f, GREEN = 0.587f, BLUE = 0.114f;           // weights in a gray value

// All that makes one view: Params of draw.py.
struct Row {
    int top, left, height, width;
    int order[4];
    int flip, gray, solarize;
    float factor[4];
    float sigma;
};

// ------------------------------------------------------------------------------------------------------------- draw

// What a kind of view is drawn from; a span is high - low, a chance the number of 32-bit words of which it happens.
struct Range {
    double area, area_span, ratio, ratio_span, halvings;  // of the ratio, the logarithm
    double factor[4], factor_span[4];
    double sigma, sigma_span;
    double flip, jitter, gray, blur, solarize;
    double fallback[4];  // the box where no attempt fits
};

struct Drawing {
    uint32 seed_low, seed_high, epoch, use;
    int images, views, height, width;
};

struct Words { uint32 w[4]; };

// Philox4x32-10, as chance.philox.
__device__ __forceinline__ Words random_words(const Drawing& from, int64 id, uint32 lane, uint32 slot) {
    uint32 c0 = static_cast<uint32>(id), c1 = from.epoch, c2 = (lane << 16) + slot, c3 = from.use;
    uint32 k0 = from.seed_low, k1 = from.seed_high;
    for (int round = 0; round < 10; ++round) {
        const uint32 high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        const uint32 high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// float64 operations one at a time, as torch has them: the compiler makes no fused one of these.
__device__ __forceinline__ double between(uint32 word, double low, double span) {
    return __dadd_rn(__dmul_rn(__dmul_rn(word, 1.0 / 4294967296.0), span), low);
}

__device__ __forceinline__ int below(uint32 word, int n) {
    return static_cast<int>(static_cast<int64>(word) * n >> 32);
}

__device__ __forceinline__ double exponential(double x, int halvings) {
    double y = 1;
    for (int i = 0; i < halvings; ++i) x = __dmul_rn(x, 0.5);
    for (int k = 11; k > 0; --k) y = __dadd_rn(__dmul_rn(__dmul_rn(y, x), __ddiv_rn(1, k)), 1);
    for (int i = 0; i < halvings; ++i) y = __dmul_rn(y, y);
    return y;
}

__device__ void draw_box(const Drawing& from, const Range& range, int64 id, uint32 lane, Row& row) {
    for (int attempt = 0; attempt < ATTEMPTS; ++attempt) {
        const Words word = random_words(from, id, lane, attempt);
        const double pixels = static_cast<double>(static_cast<int64>(from.height) * from.width);
        const double area = __dmul_rn(between(word.w[0], range.area, range.area_span), pixels);
        const int halvings = static_cast<int>(range.halvings);
        const double aspect = exponential(between(word.w[1], range.ratio, range.ratio_span), halvings);
        const double width = rint(__dsqrt_rn(__dmul_rn(area, aspect)));
        const double height = rint(__dsqrt_rn(__ddiv_rn(area, aspect)));
        if (width > 0 && width <= from.width && height > 0 && height <= from.height) {
            row.height = static_cast<int>(height), row.width = static_cast<int>(width);
            row.top = below(word.w[2], from.height - row.height + 1);
            row.left = below(word.w[3], from.width - row.width + 1);
            return;
        }
    }
    row.top = static_cast<int>(range.fallback[0]), row.left = static_cast<int>(range.fallback[1]);
    row.height = static_cast<int>(range.fallback[2]), row.width = static_cast<int>(range.fallback[3]);
}

// The `rank`-th order of four operations, in the dictionary's sequence.
__device__ void draw_order(int rank, int* order) {
    uint32 left = 0x3210;  // four bits for each operation that is left
    for (int k = 0, orders = 6; k < 4; ++k) {
        const int shift = 4 * (rank / orders);
        order[k] = left >> shift & 15;
        left = (left & ((1u << shift) - 1)) | (left >> 4 & ~((1u << shift) - 1));
        rank %= orders;
        orders /= max(3 - k, 1);
    }
}

// A thread is a view of an image. Lane: `lanes` [views] tells the views of a sample apart.
extern "C" __global__ void views_draw(const int64* ids, const Range* ranges, const int64* lanes, Row* rows,
                                      Drawing from) {
    const int64 at = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= static_cast<int64>(from.images) * from.views) return;
    const int view = static_cast<int>(at / from.images);
    const int64 id = __ldg(ids + at % from.images);
    const uint32 lane = static_cast<uint32>(__ldg(lanes + view));
    const Range& range = ranges[view];
    const Words switches = random_words(from, id, lane, SWITCHES), factors = random_words(from, id, lane, FACTORS);
    const Words others = random_words(from, id, lane, OTHERS);
    Row& row = rows[at];
    draw_box(from, range, id, lane, row);
    draw_order(below(others.w[0], 24), row.order);
    row.flip = switches.w[0] < range.flip;
    row.gray = switches.w[2] < range.gray;
    row.solarize = others.w[2] < range.solarize;
    const bool jitter = switches.w[1] < range.jitter, blur = switches.w[3] < range.blur;
    for (int j = 0; j < 4; ++j) {
        const double factor = between(factors.w[j], range.factor[j], range.factor_span[j]);
        row.factor[j] = jitter ? static_cast<float>(factor) : j == HUE ? 0.0f : 1.0f;
    }
    row.sigma = blur ? static_cast<float>(between(others.w[1], range.sigma, range.sigma_span)) : 0.0f;
}

// ------------------------------------------------------------------------------------------------------------ apply

struct Making {
    int images, views, height, width;  // of a sample, in pixels
    int size, row_taps, column_taps;   // of a view; most weights that one of its rows or columns can have, at least 4
    int wide;                          // float32 out, else bfloat16
    float scale[3], shift[3];          // of each channel, to normalise it
};

struct Pixel { float r, g, b; };

// What one view needs besides its row: made once, read by all threads.
struct Plan {
    int before, steps;  // colours are changed by `steps` steps; those `before` need no mean of the image
    int kind[5];
    float kept[5];
    float gauss[RADIUS + 1];
    int head[2 * RADIUS];  // which pixels of a line are the first 16 that its blur meets
};

// Weights of the lines (rows or columns) of a view: how each is made of the source's.
struct Lines {
    float* weights;  // weight k of line i is at [i * line + k * tap]
    int* first;      // the first pixel that line i is made of, from the box's edge on
    int line, tap, count;
};

__device__ __forceinline__ float gray_of(const Pixel& p) { return RED * p.r + GREEN * p.g + BLUE * p.b; }

__device__ __forceinline__ double cubic(double x) {
    x = fabs(x);
    if (x >= 2) return 0;
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((-0.5 * x + 2.5) * x - 4) * x + 2;
}

// How many of `length` pixels a line can be made of, for `size` lines.
__device__ __forceinline__ int taps(int length, int size) {
    return min(length, max(4, (4 * length + size - 1) / size));
}

// Line i of `size`, whose weights are those of place `from`: antialiased bicubic, over no pixel outside the box. The
// taps all lie inside, and there are at least four, the last of them 0 where the box is smaller.
__device__ __forceinline__ void weigh(const Lines& lines, int i, int from, int size, int length, double factor) {
    const double scale = static_cast<double>(length) / size, widen = fmax(scale, 1.0), centre = (from + 0.5) * scale;
    const int first = max(0, min(static_cast<int>(floor(centre - 2 * widen + 0.5)), length - lines.count));
    const double start = first + 0.5 - centre, narrow = 1 / widen;
    float* weights = lines.weights + i * lines.line;
    double sum = 0;
#pragma unroll 1
    for (int k = 0; k < lines.count; ++k) sum += cubic((start + k) * narrow);
    const double scaled = factor / sum;
#pragma unroll 1
    for (int k = 0; k < max(lines.count, 4); ++k) {
        const double weight = k < lines.count ? cubic((start + k) * narrow) * scaled : 0;
        weights[k * lines.tap] = static_cast<float>(weight);
    }
    lines.first[i] = first;
}

// The steps that change something, in their order; contrast and what follows it need the mean.
__device__ __forceinline__ void plan_colours(const Row& row, Plan& plan) {
    int at = 0, before = -1;
    for (int k = 0; k < 4; ++k) {
        const int kind = row.order[k];
        const float factor = row.factor[kind];
        if (factor == (kind == HUE ? 0 : 1)) continue;
        if (kind == CONTRAST) before = at;
        plan.kind[at] = kind, plan.kept[at] = factor;
        ++at;
    }
    if (row.gray) {  // as nothing is left but each pixel's own gray
        plan.kind[at] = SATURATION, plan.kept[at] = 0;
        ++at;
    }
    plan.steps = at, plan.before = before < 0 ? at : before;
}

// Where in a line of n, which is taken in eights up to its end, the first eight begin.
__device__ __forceinline__ int first_eight(int n) { return n % 8 ? n % 8 - 8 : 0; }

// One of the Gaussian's weights, not yet normalised, and one of the pixels that it meets first: a line is mirrored at
// its ends, without doubling them.
__device__ __forceinline__ void plan_blur(int i, float sigma, int size, Plan& plan) {
    const float distance = i / fmaxf(sigma, 1e-3f);
    if (i <= RADIUS) plan.gauss[i] = expf(-0.5f * distance * distance);
    const int period = max(2 * (size - 1), 1), at = abs(first_eight(size) - RADIUS + i) % period;
    plan.head[i] = min(at, period - at);
}

// As augment.turn_hue: hue in sixths of the circle.
__device__ __forceinline__ Pixel turn_hue(const Pixel& p, float shift) {
    const float low = fminf(p.r, fminf(p.g, p.b)), high = fmaxf(p.r, fmaxf(p.g, p.b)), chroma = high - low;
    const bool red = p.r == high, green = p.g == high;
    const float ahead = red ? p.g - p.b : green ? p.b - p.r : p.r - p.g;
    float hue = __fdividef(ahead, fmaxf(chroma, 1e-12f)) + (red ? 0 : green ? 2 : 4) + 6 * shift;
    hue -= 6 * floorf(hue * (1.0f / 6));
    return {high - chroma * __saturatef(2 - fabsf(hue - 3)), high - chroma * __saturatef(fabsf(hue - 2) - 1),
            high - chroma * __saturatef(fabsf(hue - 4) - 1)};
}

__device__ __forceinline__ Pixel recolour(Pixel p, const Plan& plan, int from, int to, float mean) {
    for (int k = from; k < to; ++k) {
        const int kind = plan.kind[k];
        const float kept = plan.kept[k];
        if (kind == HUE) {
            p = turn_hue(p, kept);
        } else {  // blended with 0, with the mean gray or with its own
            const float other = (1 - kept) * (kind == CONTRAST ? mean : kind == SATURATION ? gray_of(p) : 0.0f);
            p = {__saturatef(kept * p.r + other), __saturatef(kept * p.g + other), __saturatef(kept * p.b + other)};
        }
    }
    return p;
}

// A column of the view, seen from the source: where it begins in the box's first row, and its first four weights.
struct Column {
    const uint8* start;
    float near[4];
    const float* weights;
    int tap, count;
};

__device__ __forceinline__ void add(Pixel& sum, float weight, const uint8* pixel) {
    sum.r += weight * __ldg(pixel), sum.g += weight * __ldg(pixel + 1), sum.b += weight * __ldg(pixel + 2);
}

// A row of the source, scaled to the view's width, at one column.
__device__ __forceinline__ Pixel across(const Column& column, int64 offset) {
    const uint8* pixels = column.start + offset;
    Pixel sum = {0, 0, 0};
#pragma unroll
    for (int k = 0; k < 4; ++k) add(sum, column.near[k], pixels + 3 * min(k, column.count - 1));
#pragma unroll 1
    for (int k = 4; k < column.count; ++k) add(sum, column.weights[k * column.tap], pixels + 3 * k);
    return sum;
}

// The canvas is [y][channel][x], its rows of an odd length: in a warp whose threads have a column, or a row each, no
// two hit the same bank of shared memory.
__device__ __forceinline__ int pitch_of(int size) { return 3 * size | 1; }

// Crop, flip, and the colours that need no mean; the thread's part of the sum of grays. A thread goes down its column,
// with the last four rows of the source in registers: where the crop is enlarged, each of them is scaled once.
__device__ __forceinline__ float crop(const uint8* box, const Making& make, const Lines& rows, const Lines& columns,
                                      const Row& row, const Plan& plan, float* canvas) {
    const int size = make.size, pitch = pitch_of(size), warps = blockDim.x / WARP;
    const int groups = (size + WARP - 1) / WARP, parts = max(warps / groups, 1), part = (size + parts - 1) / parts;
    const int bottom = row.height - 1;
    const int64 stride = 3 * make.width;
    float grays = 0;
    for (int task = threadIdx.x / WARP; task < groups * parts; task += warps) {
        const int x = task % groups * WARP + threadIdx.x % WARP, from = task / groups * part;
        const int to = min(from + part, size), here = min(x, size - 1);
        if (from >= to) continue;
        Column column = {box + 3 * columns.first[here], {}, columns.weights + here, columns.tap, columns.count};
#pragma unroll
        for (int k = 0; k < 4; ++k) column.near[k] = column.weights[k * column.tap];
        Pixel window[4] = {};
        int next = rows.first[from];
        for (int y = from; y < to; ++y) {
            const float* weights = rows.weights + y * rows.line;
            const int first = rows.first[y];
            Pixel p = {0, 0, 0};
            if (rows.count <= 4) {
                for (; next < first + 4; ++next) {
                    window[0] = window[1], window[1] = window[2], window[2] = window[3];
                    window[3] = across(column, min(next, bottom) * stride);
                }
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    p.r += weights[k] * window[k].r, p.g += weights[k] * window[k].g, p.b += weights[k] * window[k].b;
                }
            } else {
                for (int k = 0; k < rows.count; ++k) {
                    const Pixel q = across(column, (first + k) * stride);
                    p.r += weights[k] * q.r, p.g += weights[k] * q.g, p.b += weights[k] * q.b;
                }
            }
            p = recolour({__saturatef(p.r), __saturatef(p.g), __saturatef(p.b)}, plan, 0, plan.before, 0);
            if (x < size) {
                float* pixel = canvas + y * pitch + x;
                pixel[0] = p.r, pixel[size] = p.g, pixel[2 * size] = p.b;
                grays += gray_of(p);
            }
        }
    }
    return grays;
}

__device__ __forceinline__ void recolour_rest(int size, const Plan& plan, float mean, float* canvas) {
    for (int y = threadIdx.x / WARP; y < size; y += blockDim.x / WARP) {
        for (int x = threadIdx.x % WARP; x < size; x += WARP) {
            float* pixel = canvas + y * pitch_of(size) + x;
            const Pixel p = recolour({pixel[0], pixel[size], pixel[2 * size]}, plan, plan.before, plan.steps, mean);
            pixel[0] = p.r, pixel[size] = p.g, pixel[2 * size] = p.b;
        }
    }
}

// One line of values, `step` apart, in its place, by one thread: eight at a time, with the 24 around them in registers.
// The eights end where the line does, and what lies beyond its end is then among the 24: it is a mirror.
__device__ __forceinline__ void blur_line(float* line, int step, int n, const float* weights, const Plan& plan) {
    float seen[8 + 2 * RADIUS];
#pragma unroll
    for (int k = 0; k < 2 * RADIUS; ++k) seen[k] = line[plan.head[k] * step];
#pragma unroll 1
    for (int at = first_eight(n); at < n; at += 8) {
        const bool last = at + 8 >= n;
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            seen[2 * RADIUS + k] = last ? seen[2 * RADIUS - 2 - k] : line[(at + RADIUS + k) * step];
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            float sum = weights[0] * seen[RADIUS + k];
#pragma unroll
            for (int t = 1; t <= RADIUS; ++t) sum += weights[t] * (seen[RADIUS + k - t] + seen[RADIUS + k + t]);
            if (at + k >= 0) line[(at + k) * step] = sum;
        }
#pragma unroll
        for (int k = 0; k < 2 * RADIUS; ++k) seen[k] = seen[k + 8];
    }
}

__device__ __forceinline__ void blur(int size, const Plan& plan, float* canvas) {
    float weights[RADIUS + 1], sum = 0;
#pragma unroll
    for (int t = RADIUS; t >= 0; --t) sum += (t ? 2 : 1) * plan.gauss[t];
#pragma unroll
    for (int t = 0; t <= RADIUS; ++t) weights[t] = plan.gauss[t] * (1 / sum);
    const int pitch = pitch_of(size);
    for (int i = threadIdx.x; i < 3 * size; i += blockDim.x) {
        blur_line(canvas + i % size * pitch + i / size * size, 1, size, weights, plan);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 3 * size; i += blockDim.x) blur_line(canvas + i, pitch, size, weights, plan);
    __syncthreads();
}

// Element e of a row of the view, as pixels lie in it: solarized, normalised.
__device__ __forceinline__ float finished(const float* line, int e, const Making& make, float solarize) {
    const int x = e / 3, channel = e - 3 * x;
    float value = line[channel * make.size + x];
    value = fminf(value, fabsf(solarize - value));  // 0: unchanged
    const float scale = channel == 0 ? make.scale[0] : channel == 1 ? make.scale[1] : make.scale[2];
    const float shift = channel == 0 ? make.shift[0] : channel == 1 ? make.shift[1] : make.shift[2];
    return value * scale + shift;
}

// To [y, x, channel] from element `start` of `out` on: a warp a row, in words of four bytes.
__device__ __forceinline__ void store(const float* canvas, const Making& make, float solarize, void* out,
                                      int64 start) {
    const int length = 3 * make.size, lane = threadIdx.x % WARP;
    for (int y = threadIdx.x / WARP; y < make.size; y += blockDim.x / WARP) {
        const float* line = canvas + y * pitch_of(make.size);
        const int64 row = start + static_cast<int64>(y) * length;
        if (make.wide) {
            float* to = static_cast<float*>(out) + row;
            for (int e = lane; e < length; e += WARP) to[e] = finished(line, e, make, solarize);
        } else if (length % 2 == 0) {
            uint32* to = reinterpret_cast<uint32*>(static_cast<uint16*>(out) + row);
            for (int e = 2 * lane; e < length; e += 2 * WARP) {
                const uint32 one = narrow(finished(line, e, make, solarize));
                const uint32 other = narrow(finished(line, e + 1, make, solarize));
                to[e / 2] = one | other << 16;
            }
        } else {
            uint16* to = static_cast<uint16*>(out) + row;
            for (int e = lane; e < length; e += WARP) to[e] = narrow(finished(line, e, make, solarize));
        }
    }
}

// A block makes one view of one image at a time. images uint8 [images, height, width, 3]; parameters [views, images];
// out [views, images, size, size, 3].
__device__ __forceinline__ void make_views(const uint8* images, const Row* parameters, void* out, const Making& make,
                                           float* canvas, float* tables) {
    __shared__ Plan plan;
    const int size = make.size;
    float* const behind = tables + size * make.row_taps;
    int* const first = reinterpret_cast<int*>(behind + size * make.column_taps);
    const int64 count = static_cast<int64>(make.images) * make.views;
    for (int64 turn = blockIdx.x; turn < count; turn += gridDim.x) {  // the views of an image follow one another
        const int64 image = turn / make.views, place = turn % make.views * make.images + image;
        const Row& row = parameters[place];
        const Lines rows = {tables, first, make.row_taps, 1, taps(row.height, size)};
        const Lines columns = {behind, first + size, 1, size, taps(row.width, size)};
        for (int i = threadIdx.x; i < 2 * size; i += blockDim.x) {
            const int x = i - size;
            if (x < 0) weigh(rows, i, i, size, row.height, 1);
            else weigh(columns, x, row.flip ? size - 1 - x : x, size, row.width, 1.0 / 255);
        }
        if (threadIdx.x == 0) plan_colours(row, plan);
        if (threadIdx.x < 2 * RADIUS) plan_blur(threadIdx.x, row.sigma, size, plan);
        __syncthreads();

        const int64 corner = (image * make.height + row.top) * make.width + row.left;
        const float grays = crop(images + 3 * corner, make, rows, columns, row, plan, canvas);
        if (plan.before < plan.steps) recolour_rest(size, plan, block_sum(grays) / (size * size), canvas);
        __syncthreads();
        if (row.sigma != 0) blur(size, plan, canvas);
        store(canvas, make, row.solarize, out, place * size * size * 3);  // the next view has a barrier first
    }
}

// The canvas in shared memory, and the tables of weights behind it. 640: so that at 96 pixels two blocks share an SM's
// registers.
extern "C" __global__ void __launch_bounds__(640)
views_apply(const uint8* images, const Row* parameters, void* out, Making make) {
    DYNAMIC_SHARED(float, shared);
    make_views(images, parameters, out, make, shared, shared + make.size * pitch_of(make.size));
}

// The canvas in global memory, for views that are too large for the other: a canvas a block.
extern "C" __global__ void __launch_bounds__(672)
views_apply_large(const uint8* images, const Row* parameters, void* out, Making make, float* scratch) {
    DYNAMIC_SHARED(float, shared);
    float* canvas = scratch + static_cast<int64>(blockIdx.x) * make.size * pitch_of(make.size);
    make_views(images, parameters, out, make, canvas, shared);
}
