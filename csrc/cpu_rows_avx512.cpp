// Standard headers come before the change of target, because the linker may share their functions with code for older CPUs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define ADEPT_FAST_ROWS kAvx512Rows
#define ADEPT_FAST_VECTOR 64
#include "cpu_rows_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
