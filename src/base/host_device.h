#pragma once

/// Before a function that the CPU and a GPU run alike, so that both reckon the same: nothing but a mark for the CUDA compiler.
#ifdef __CUDACC__
#define ROTUNDA_HOST_DEVICE __host__ __device__
#else
#define ROTUNDA_HOST_DEVICE
#endif
