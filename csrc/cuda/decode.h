// The launch of the decode kernel, for host code without CUDA's headers.
#pragma once
#include "plan.h"

namespace prefix_attn {

Machine machine(int device);

// Clears ``arrived`` and launches, both on ``stream``. Null, or what went wrong.
const char* launch_decode(const Decode& p, void* stream);

}  // namespace prefix_attn
