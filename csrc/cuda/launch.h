// Launches a kernel on a GPU. emulate/launch.h has the same function for the emulated one.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "plan.h"

namespace dev {

using Stream = void*;

inline const char* said(cudaError_t error) {
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline prefix_attn::Machine machine(int device) {
    prefix_attn::Machine found;
    cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device);
    return found;
}

// Null, or what went wrong.
template <auto kernel, typename Argument>
const char* launch(int64_t blocks, int threads, int shared, Stream stream, const Argument& argument) {
    if (const char* wrong = said(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)))
        return wrong;
    kernel<<<dim3(static_cast<unsigned>(blocks)), threads, shared, static_cast<cudaStream_t>(stream)>>>(argument);
    return said(cudaGetLastError());
}

inline const char* zero(void* p, size_t bytes, Stream stream) {
    return said(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace dev
