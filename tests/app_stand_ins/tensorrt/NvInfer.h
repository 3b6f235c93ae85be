// Stands in for TensorRT's NvInfer.h: the names and signatures that tensorrt.cpp uses, as NVIDIA/TensorRT has them in
// include/NvInferRuntime.h (read in the headers of 8 and 10). Its one network sums every channel of "x" into "y".

#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1 };

struct Dims64 {
    static constexpr int32_t MAX_DIMS{8};
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};
using Dims = Dims64;

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, char const* msg) noexcept = 0;
    virtual ~ILogger() = default;
};

class IExecutionContext {
public:
    virtual ~IExecutionContext() noexcept = default;

    bool setInputShape(char const* tensorName, Dims const& dims) noexcept {
        shape_ = dims;
        return std::string(tensorName) == "x" && dims.nbDims == 4 && dims.d[0] == 1;
    }

    Dims getTensorShape(char const* tensorName) const noexcept {
        if (std::string(tensorName) == "x") return shape_;
        Dims result{2, {1, shape_.nbDims == 4 ? shape_.d[1] : -1}};
        return result;
    }

    bool setTensorAddress(char const* tensorName, void* data) noexcept {
        addresses_[tensorName] = static_cast<float*>(data);
        return true;
    }

    bool enqueueV3(cudaStream_t stream) noexcept {
        if (addresses_.size() != 2) return false;
        stream->work.push_back([this] {
            const int64_t area = shape_.d[2] * shape_.d[3];
            for (int64_t c = 0; c < shape_.d[1]; ++c) {
                double sum = 0;
                for (int64_t i = 0; i < area; ++i) sum += addresses_["x"][c * area + i];
                addresses_["y"][c] = static_cast<float>(sum);
            }
        });
        return true;
    }

private:
    Dims shape_{};
    std::map<std::string, float*> addresses_;
};

class ICudaEngine {
public:
    explicit ICudaEngine(DataType type) : type_(type) {}
    virtual ~ICudaEngine() noexcept = default;
    IExecutionContext* createExecutionContext() noexcept { return new IExecutionContext; }
    DataType getTensorDataType(char const*) const noexcept { return type_; }

private:
    DataType type_;
};

class IRuntime {
public:
    explicit IRuntime(ILogger& logger) : logger_(logger) {}
    virtual ~IRuntime() noexcept = default;

    void setDLACore(int32_t dlaCore) noexcept { dla_ = dlaCore; }

    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept {
        const std::string bytes(static_cast<const char*>(blob), size);
        if (bytes == "sums") return new ICudaEngine(DataType::kFLOAT);
        if (bytes == "sums on DLA 1" && dla_ == 1) return new ICudaEngine(DataType::kFLOAT);
        if (bytes == "sums in half") return new ICudaEngine(DataType::kHALF);
        logger_.log(ILogger::Severity::kERROR, "the engine was built with another version");
        return nullptr;
    }

private:
    ILogger& logger_;
    int32_t dla_ = -1;
};

inline IRuntime* createInferRuntime(ILogger& logger) noexcept { return new IRuntime(logger); }

}  // namespace nvinfer1

extern "C" inline int32_t getInferLibVersion() noexcept { return 101600; }
