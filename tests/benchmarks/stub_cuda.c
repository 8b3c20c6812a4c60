/* A libcuda without a device: as much of the driver's interface as Triton's host code calls, for an sm_90.
 *
 * Every call succeeds. A launch runs nothing; it is written as one line to the file that STUB_CUDA_LOG names.
 */
#include <stdio.h>
#include <stdlib.h>

#include "cuda.h"

/* What is asked for, and a handle that is not NULL. */
#define GIVES(name, value, ...) \
    CUresult name(__VA_ARGS__) { *out = (value); return CUDA_SUCCESS; }
#define DOES_NOTHING(name, ...) \
    CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }

static int attribute(CUdevice_attribute which) {
    switch (which) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return 9;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return 0;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return 232448;
        default: return 65536; /* registers of a processor, clocks: nothing depends on them */
    }
}

GIVES(cuGetErrorString, "an error of the stub", CUresult error, const char **out)
GIVES(cuDriverGetVersion, 13000, int *out)
GIVES(cuDeviceGetCount, 1, int *out)
GIVES(cuDeviceGet, index, CUdevice *out, int index)
GIVES(cuDeviceGetAttribute, attribute(which), int *out, CUdevice_attribute which, CUdevice device)
GIVES(cuDevicePrimaryCtxRetain, (CUcontext)1, CUcontext *out, CUdevice device)
GIVES(cuCtxGetCurrent, (CUcontext)1, CUcontext *out)
GIVES(cuCtxGetDevice, 0, CUdevice *out)
GIVES(cuCtxGetLimit, 0, size_t *out, CUlimit limit)
GIVES(cuModuleLoadData, (CUmodule)1, CUmodule *out, const void *image)
GIVES(cuModuleGetFunction, (CUfunction)1, CUfunction *out, CUmodule module, const char *name)
GIVES(cuFuncGetAttribute, which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, int *out,
      CUfunction_attribute which, CUfunction function)
GIVES(cuOccupancyMaxActiveClusters, 1, int *out, CUfunction function, const CUlaunchConfig *config)
GIVES(cuStreamIsCapturing, CU_STREAM_CAPTURE_STATUS_NONE, CUstream stream, CUstreamCaptureStatus *out)
/* The address by which the device knows a pointer. */
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute which, CUdeviceptr pointer) {
    *(CUdeviceptr *)out = pointer;
    return CUDA_SUCCESS;
}

DOES_NOTHING(cuInit, unsigned flags)
DOES_NOTHING(cuCtxSetCurrent, CUcontext context)
DOES_NOTHING(cuCtxSetLimit, CUlimit limit, size_t value)
DOES_NOTHING(cuModuleUnload, CUmodule module)
DOES_NOTHING(cuFuncSetAttribute, CUfunction function, CUfunction_attribute which, int value)
DOES_NOTHING(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    const char *path = getenv("STUB_CUDA_LOG");
    FILE *log = path ? fopen(path, "a") : NULL;
    if (!log) return CUDA_SUCCESS;
    int early = 0; /* programmatic dependent launch */
    for (unsigned i = 0; i < config->numAttrs; i++)
        early |= config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    fprintf(log, "programs %u threads %u early %d\n", config->gridDimX, config->blockDimX, early);
    fclose(log);
    return CUDA_SUCCESS;
}
