// Standard headers come before the change of target, because the linker may share their functions with code for older CPUs.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define ADEPT_FAST_SET kAvx512
#define ADEPT_FAST_SET_NAME "avx512"
#include "cpu_adamw_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
