#define ADEPT_FAST_ROWS kGenericRows
#define ADEPT_FAST_VECTOR 16
#include "cpu_rows_body.h"
