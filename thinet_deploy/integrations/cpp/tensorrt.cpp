// TensorRT 8.5 or later on an NVIDIA GPU: an engine that was built on this very device.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <fstream>
#include <iterator>

#include "engine.h"

namespace thinet {
namespace {

void check(cudaError_t code) {
    if (code != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(code));
}

class Logger final : public nvinfer1::ILogger {
    void log(Severity severity, const char* words) noexcept override {
        if (severity <= Severity::kERROR) std::fprintf(stderr, "TensorRT: %s\n", words);
    }
};

/// Memory of the GPU for one tensor.
class Buffer {
public:
    explicit Buffer(size_t count) : count_(count) { check(cudaMalloc(&data_, count * sizeof(float))); }
    ~Buffer() { cudaFree(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    void* data() const { return data_; }
    size_t count() const { return count_; }
    size_t bytes() const { return count_ * sizeof(float); }

private:
    void* data_ = nullptr;
    size_t count_;
};

template <class T>
T* checked(T* made, const char* what) {
    if (made == nullptr) throw std::runtime_error(what);
    return made;
}

size_t count_of(const nvinfer1::Dims& shape) {
    size_t count = 1;
    for (int i = 0; i < shape.nbDims; ++i) {
        if (shape.d[i] < 0) throw std::runtime_error("TensorRT does not know the size of an output before it runs");
        count *= static_cast<size_t>(shape.d[i]);
    }
    return count;
}

nvinfer1::Dims shape_of(const Preprocess& how) {
    nvinfer1::Dims shape{};  // its numbers have 32 bits in TensorRT 8, later 64
    shape.nbDims = 4;
    shape.d[0] = 1;
    shape.d[1] = how.channels();
    shape.d[2] = how.height;
    shape.d[3] = how.width;
    return shape;
}

class TensorRt final : public Engine {
public:
    TensorRt(const Model& model, const EngineFile& file)
        : input_(model.input()), output_(model.output()),
          runtime_(checked(nvinfer1::createInferRuntime(logger_), "there is no TensorRT runtime")) {
        std::ifstream stream(file.path, std::ios::binary);
        const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
        if (bytes.empty()) throw std::runtime_error(file.path + " is missing: build the engine on this device first");
        if (model.dla() >= 0) runtime_->setDLACore(model.dla());  // the engine does not keep which one it is for
        engine_.reset(checked(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()),
                              "TensorRT refuses the engine: it runs on the device and version it was built with only"));
        for (const std::string& name : {input_, output_})
            if (engine_->getTensorDataType(name.c_str()) != nvinfer1::DataType::kFLOAT)
                throw std::runtime_error("the engine's inputs and outputs have to be float32");
        context_.reset(checked(engine_->createExecutionContext(), "too little GPU memory for the engine"));
        if (!context_->setInputShape(input_.c_str(), shape_of(model.preprocess())))
            throw std::runtime_error("the engine takes no single image of this size");
        for (const std::string& name : {input_, output_}) {
            buffers_.push_back(std::make_unique<Buffer>(count_of(context_->getTensorShape(name.c_str()))));
            context_->setTensorAddress(name.c_str(), buffers_.back()->data());
        }
        check(cudaStreamCreate(&stream_));
    }

    ~TensorRt() override { cudaStreamDestroy(stream_); }

    std::vector<float> run(const std::vector<float>& input) override {
        std::vector<float> result(buffers_[1]->count());
        check(cudaMemcpyAsync(buffers_[0]->data(), input.data(), buffers_[0]->bytes(), cudaMemcpyHostToDevice, stream_));
        if (!context_->enqueueV3(stream_)) throw std::runtime_error("TensorRT cannot run the engine");
        check(cudaMemcpyAsync(result.data(), buffers_[1]->data(), buffers_[1]->bytes(), cudaMemcpyDeviceToHost, stream_));
        check(cudaStreamSynchronize(stream_));  // enqueueV3 returns when the work is queued, not when it is done
        return result;
    }

private:
    std::string input_, output_;
    Logger logger_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;  // freed last, since members go in reverse order
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    std::vector<std::unique_ptr<Buffer>> buffers_;
    cudaStream_t stream_ = nullptr;
};

}  // namespace

const char* const kRuntime = "tensorrt";

std::string runtime_version() { return std::to_string(getInferLibVersion()); }

std::unique_ptr<Engine> open_engine(const Model& model, const EngineFile& file, int) {
    return std::make_unique<TensorRt>(model, file);
}

}  // namespace thinet
