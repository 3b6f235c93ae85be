// One interface for all runtimes. Each has a file that implements it: openvino.cpp, onnxruntime.cpp, ncnn.cpp,
// tensorrt.cpp; CMakeLists.txt compiles the one that is asked for.

#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model.h"

namespace thinet {

/// An engine that is loaded and takes one image at a time; use one per thread.
class Engine {
public:
    virtual ~Engine() = default;
    Engine() = default;
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    /// From the output of preprocess() to the network's output.
    virtual std::vector<float> run(const std::vector<float>& input) = 0;
};

/// What the runtime that this was compiled with is called in a bundle.
extern const char* const kRuntime;

/// Its version.
std::string runtime_version();

/// Load an engine; throws std::exception where the runtime refuses it.
std::unique_ptr<Engine> open_engine(const Model& model, const EngineFile& file, int threads);

}  // namespace thinet
