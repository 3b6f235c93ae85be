// Stands in for CUDA's runtime: its names and signatures, and work in a stream that is done when one waits for it.

#pragma once

#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

struct CUstream_st {
    std::vector<std::function<void()>> work;
};
using cudaStream_t = CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }

inline cudaError_t cudaMalloc(void** data, size_t bytes) {
    *data = std::calloc(bytes, 1);
    return std::getenv("NO_GPU_MEMORY") ? cudaErrorMemoryAllocation : cudaSuccess;
}

inline cudaError_t cudaFree(void* data) {
    std::free(data);
    return cudaSuccess;
}

inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    *stream = new CUstream_st;
    return cudaSuccess;
}

inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    delete stream;
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
    stream->work.push_back([=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    for (auto& step : stream->work) step();
    stream->work.clear();
    return cudaSuccess;
}
