// Launches a kernel on the emulated GPU. cuda/launch.h has the same function for a real one.
#pragma once
#include "../cuda/plan.h"
#include "emulate.h"

namespace dev {

using Stream = void*;

// What the next launches run under, but for the sizes that they bring themselves.
inline emulate::Config settings;
inline bool runs = true;  // false: launches do nothing, to time the host

// So small that calls with few keys are split and folded too.
inline prefix_attn::Machine small = {4, 1 << 14, 64};
inline prefix_attn::Machine machine(int) {
    return small;
}

// Null, or what went wrong.
template <auto kernel, typename Argument>
const char* launch(int64_t blocks, int threads, int shared, Stream, const Argument& argument) {
    emulate::Config config = settings;
    config.grid = static_cast<int>(blocks);
    config.threads = threads;
    config.shared = shared;
    const auto run = [](const void* p) { kernel(*static_cast<const Argument*>(p)); };
    if (runs) emulate::launch(config, run, &argument);
    return nullptr;
}

inline const char* zero(void* p, size_t bytes, Stream) {
    __builtin_memset(p, 0, bytes);
    return nullptr;
}

}  // namespace dev
