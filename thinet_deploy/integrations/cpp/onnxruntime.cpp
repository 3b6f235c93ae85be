// ONNX Runtime on the CPU: an .onnx or .ort file. Needs the C++ headers of ONNX Runtime 1.17 or later.

#include <onnxruntime_cxx_api.h>

#include <array>
#include <filesystem>

#include "engine.h"

namespace thinet {
namespace {

Ort::Env& environment() {
    static Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "thinet");
    return env;
}

Ort::SessionOptions options_for(int threads) {
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(threads);
    options.SetInterOpNumThreads(1);
    options.SetGraphOptimizationLevel(GraphOptimizationLevel::ORT_ENABLE_ALL);
    options.AddConfigEntry("session.force_spinning_stop", "1");  // threads spin inside a run, not after it
    return options;
}

class OnnxRuntime final : public Engine {
public:
    OnnxRuntime(const Model& model, const EngineFile& file, int threads)
        : session_(environment(), std::filesystem::path(file.path).c_str(), options_for(threads)),
          memory_(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault)),
          shape_{1, model.preprocess().channels(), model.preprocess().height, model.preprocess().width},
          input_(model.input()), output_(model.output()) {}

    std::vector<float> run(const std::vector<float>& input) override {
        const Ort::Value tensor = Ort::Value::CreateTensor<float>(memory_, const_cast<float*>(input.data()),
                                                                  input.size(), shape_.data(), shape_.size());
        const char* const inputs[] = {input_.c_str()};
        const char* const outputs[] = {output_.c_str()};
        const auto results = session_.Run(Ort::RunOptions{nullptr}, inputs, &tensor, 1, outputs, 1);
        const float* values = results[0].GetTensorData<float>();
        return {values, values + results[0].GetTensorTypeAndShapeInfo().GetElementCount()};
    }

private:
    Ort::Session session_;
    Ort::MemoryInfo memory_;
    std::array<int64_t, 4> shape_;
    std::string input_, output_;
};

}  // namespace

const char* const kRuntime = "onnxruntime";

std::string runtime_version() { return OrtGetApiBase()->GetVersionString(); }

std::unique_ptr<Engine> open_engine(const Model& model, const EngineFile& file, int threads) {
    return std::make_unique<OnnxRuntime>(model, file, threads);
}

}  // namespace thinet
