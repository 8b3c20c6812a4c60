// The decode kernels for the emulated GPU.
#include "../cuda/decode.cu"
