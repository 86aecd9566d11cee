#define ADEPT_FAST_SET kGeneric
#define ADEPT_FAST_SET_NAME "generic"
#include "cpu_adamw_body.h"
