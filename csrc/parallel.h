// Threads under torch's own OpenMP runtime: a second pool beside torch's spinning one would cost more than it brings.
#pragma once

namespace adept_fast {

// Calls body(data) once on each of up to `threads` threads, the calling one included, and returns when all are done. `body` must not throw.
void run_on_threads(int threads, void (*body)(void*), void* data);

// The file of the OpenMP runtime that is used, or "" where none was found and threads are started for each call.
const char* openmp_runtime();

}  // namespace adept_fast
