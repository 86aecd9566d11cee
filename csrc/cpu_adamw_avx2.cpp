// Standard headers come before the change of target, because the linker may share their functions with code for older CPUs.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif
#define ADEPT_FAST_SET kAvx2
#define ADEPT_FAST_SET_NAME "avx2"
#include "cpu_adamw_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
