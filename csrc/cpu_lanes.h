// Sixteen fp32 lanes on every instruction set, so that operations, the order of sums, and therefore the bits do not depend on the CPU.
// Included by one source file per instruction set, which defines ADEPT_FAST_VECTOR, the bytes of its vectors.
#pragma once

#include <cstdint>
#include <cstring>

#include "number_formats.h"

namespace adept_fast {
namespace {

constexpr std::int64_t kLanes = 16;
constexpr int kParts = 64 / ADEPT_FAST_VECTOR;

typedef float Floats __attribute__((vector_size(ADEPT_FAST_VECTOR)));
typedef std::int32_t Integers __attribute__((vector_size(ADEPT_FAST_VECTOR)));
typedef std::uint32_t Words __attribute__((vector_size(ADEPT_FAST_VECTOR)));
typedef std::uint16_t Halves __attribute__((vector_size(ADEPT_FAST_VECTOR / 2)));

struct Lanes {
    Floats part[kParts];
};

#define ADEPT_FAST_EACH(expression)                          \
    Lanes result;                                            \
    for (int i = 0; i < kParts; ++i) result.part[i] = expression; \
    return result

ADEPT_FAST_INLINE Lanes all(float x) { ADEPT_FAST_EACH(x - Floats{}); }  // x - 0 compiles to nothing; x + 0 would not, because of the sign of -0
ADEPT_FAST_INLINE Lanes operator+(const Lanes& a, const Lanes& b) { ADEPT_FAST_EACH(a.part[i] + b.part[i]); }
ADEPT_FAST_INLINE Lanes operator-(const Lanes& a, const Lanes& b) { ADEPT_FAST_EACH(a.part[i] - b.part[i]); }
ADEPT_FAST_INLINE Lanes operator*(const Lanes& a, const Lanes& b) { ADEPT_FAST_EACH(a.part[i] * b.part[i]); }
ADEPT_FAST_INLINE Lanes operator/(const Lanes& a, const Lanes& b) { ADEPT_FAST_EACH(a.part[i] / b.part[i]); }
// a * b + c, rounded once if the CPU has fma. Only for matrix products, whose bits may depend on the instruction set.
ADEPT_FAST_INLINE Lanes multiplied_added(const Lanes& a, const Lanes& b, const Lanes& c) {
#if ADEPT_FAST_VECTOR == 64
    ADEPT_FAST_EACH((Floats)_mm512_fmadd_ps((__m512)a.part[i], (__m512)b.part[i], (__m512)c.part[i]));
#elif ADEPT_FAST_VECTOR == 32
    ADEPT_FAST_EACH((Floats)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]));
#else
    ADEPT_FAST_EACH(a.part[i] * b.part[i] + c.part[i]);
#endif
}
ADEPT_FAST_INLINE Lanes larger(const Lanes& a, const Lanes& b) { ADEPT_FAST_EACH(a.part[i] > b.part[i] ? a.part[i] : b.part[i]); }
ADEPT_FAST_INLINE Lanes absolute(const Lanes& a) { ADEPT_FAST_EACH((Floats)((Words)a.part[i] & 0x7fffffffu)); }
// x where a < b, else y
ADEPT_FAST_INLINE Lanes where_less(const Lanes& a, const Lanes& b, const Lanes& x, const Lanes& y) {
    ADEPT_FAST_EACH(a.part[i] < b.part[i] ? x.part[i] : y.part[i]);
}
ADEPT_FAST_INLINE Lanes with_sign_of(const Lanes& a, const Lanes& sign) {
    ADEPT_FAST_EACH((Floats)(((Words)a.part[i] & 0x7fffffffu) | ((Words)sign.part[i] & 0x80000000u)));
}

ADEPT_FAST_INLINE Lanes load(const float* from) {
    Lanes result;
    std::memcpy(&result, from, sizeof result);
    return result;
}

ADEPT_FAST_INLINE void store(float* to, const Lanes& a) { std::memcpy(to, &a, sizeof a); }

#if ADEPT_FAST_VECTOR == 64 && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define ADEPT_FAST_TURNED(v, n)                                                                                                    \
    __builtin_shufflevector(v, v, n, 1 + n, 2 + n, 3 + n, 4 + n, 5 + n, 6 + n, 7 + n, (8 + n) % 16, (9 + n) % 16, (10 + n) % 16, \
                            (11 + n) % 16, (12 + n) % 16, (13 + n) % 16, (14 + n) % 16, (15 + n) % 16)
#endif
#endif

// Reduces by halves: lane i with lane i + 8, then with i + 4, i + 2 and i + 1.
template <class F>
ADEPT_FAST_INLINE float folded(const Lanes& a, const F& combine) {
#ifdef ADEPT_FAST_TURNED
    Floats v = a.part[0];
    v = combine(v, ADEPT_FAST_TURNED(v, 8));
    v = combine(v, ADEPT_FAST_TURNED(v, 4));
    v = combine(v, ADEPT_FAST_TURNED(v, 2));
    return combine(v, ADEPT_FAST_TURNED(v, 1))[0];
#else
    float x[kLanes];
    store(x, a);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) x[i] = combine(x[i], x[i + width]);
    }
    return x[0];
#endif
}

ADEPT_FAST_INLINE float sum_of(const Lanes& a) {
    return folded(a, [](const auto& x, const auto& y) { return x + y; });
}

ADEPT_FAST_INLINE float largest_of(const Lanes& a) {
    return folded(a, [](const auto& x, const auto& y) { return y > x ? y : x; });
}

// e^x for x <= 0, to 2 units in the last place; 0 instead of denormals. Coefficients: minimax on [-ln 2 / 2, ln 2 / 2] (Cephes expf).
// kFused: uses multiplied_added.
template <bool kFused = false>
ADEPT_FAST_INLINE Lanes exponential(const Lanes& x) {
    const auto muladd = [](const Lanes& a, const Lanes& b, const Lanes& c) { return kFused ? multiplied_added(a, b, c) : a * b + c; };
    const float kTurn = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
    const Lanes shifted = muladd(x, all(1.44269504f), all(kTurn));
    const Lanes n = shifted - all(kTurn);
    const Lanes r = muladd(n, all(2.12194440e-4f), muladd(n, all(-0.693359375f), x));
    Lanes p = all(1.9875691500e-4f);
    p = muladd(p, r, all(1.3981999507e-3f));
    p = muladd(p, r, all(8.3334519073e-3f));
    p = muladd(p, r, all(4.1665795894e-2f));
    p = muladd(p, r, all(1.6666665459e-1f));
    p = muladd(p, r, all(5.0000001201e-1f));
    p = muladd(p, r * r, r) + all(1.0f);
    Lanes power;
    for (int i = 0; i < kParts; ++i) power.part[i] = (Floats)(((Words)shifted.part[i] << 23) + 0x3f800000u);
    return where_less(x, all(-87.0f), all(0.0f), p * power);
}

// A polynomial near 0 (Cephes tanhf), where 1 - e^-2|x| would lose precision.
ADEPT_FAST_INLINE Lanes hyperbolic_tangent(const Lanes& x) {
    const Lanes magnitude = absolute(x), square = x * x;
    Lanes p = all(-5.70498872745e-3f);
    p = p * square + all(2.06390887954e-2f);
    p = p * square + all(-5.37397155531e-2f);
    p = p * square + all(1.33314422036e-1f);
    p = p * square + all(-3.33332819422e-1f);
    const Lanes near = p * square * x + x;
    const Lanes e = exponential(all(-2.0f) * magnitude);
    const Lanes far = with_sign_of((all(1.0f) - e) / (all(1.0f) + e), x);
    return where_less(magnitude, all(0.625f), near, far);
}

}  // namespace
}  // namespace adept_fast
