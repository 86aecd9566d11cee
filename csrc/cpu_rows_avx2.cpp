// Standard headers come before the target changes: what they define may be shared with code for older CPUs.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define ADEPT_FAST_ROWS kAvx2Rows
#define ADEPT_FAST_VECTOR 32
#include "cpu_rows_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
