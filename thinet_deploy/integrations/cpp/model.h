// What an app has to know about a bundle: app/model.properties and labels.txt, read when the app starts.

#pragma once

#include <fstream>
#include <iterator>
#include <locale>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "preprocess.h"

namespace thinet {

/// An engine of the bundle: its file, and how far its outputs may be off, relative to the largest.
struct EngineFile {
    std::string path, precision;
    double tolerance = 0.0;
};

/// A bundle, as an app sees it.
class Model {
public:
    /// Read a bundle; throws std::runtime_error where something is missing.
    explicit Model(std::string folder) : folder_(std::move(folder)) {
        std::ifstream stream = open("app/model.properties");
        for (std::string line; std::getline(stream, line);) {
            const size_t sign = line.find(" = ");
            if (line.empty() || line[0] == '#' || sign == std::string::npos) continue;
            values_[line.substr(0, sign)] = line.substr(sign + 3);
        }
        std::ifstream labels = open("labels.txt");
        for (std::string line; std::getline(labels, line);) labels_.push_back(line);
        read_preprocess();
    }

    const Preprocess& preprocess() const { return preprocess_; }
    const std::vector<std::string>& labels() const { return labels_; }
    const std::string& input() const { return text("input"); }
    const std::string& output() const { return text("output"); }

    /// The engine of a runtime in a precision; with "", of those that are there, the first by name.
    EngineFile engine(const std::string& runtime, const std::string& precision = "") const {
        const std::string start = "engine." + runtime + "." + precision;
        EngineFile first;
        for (auto each = values_.lower_bound(start);
             each != values_.end() && each->first.compare(0, start.size(), start) == 0; ++each) {
            const std::string which = each->first.substr(7);
            const EngineFile file{path(each->second), which.substr(which.find('.') + 1),
                                  numbers("tolerance." + which).at(0)};
            if (std::ifstream(file.path).good()) return file;  // others may have to be built on the device first
            if (first.path.empty()) first = file;
        }
        if (first.path.empty()) throw std::runtime_error("the bundle has no engine for " + runtime + " " + precision);
        return first;
    }

    /// The DLA that TensorRT's engine is for; -1: none.
    int dla() const { return values_.count("dla") ? static_cast<int>(numbers("dla").at(0)) : -1; }

    /// Path of a file of the bundle.
    std::string path(const std::string& name) const { return folder_ + "/" + name; }

    /// A file of float32 numbers in little-endian order, which is that of every machine this is built for.
    std::vector<float> floats(const std::string& name) const {
        std::ifstream stream = open(name);
        const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
        std::vector<float> values(bytes.size() / sizeof(float));
        std::copy(bytes.begin(), bytes.begin() + values.size() * sizeof(float), reinterpret_cast<char*>(values.data()));
        return values;
    }

private:
    std::ifstream open(const std::string& name) const {
        std::ifstream stream(path(name), std::ios::binary);
        if (!stream) throw std::runtime_error(path(name) + " cannot be read: copy the whole bundle");
        return stream;
    }

    const std::string& text(const std::string& key) const {
        const auto found = values_.find(key);
        if (found == values_.end()) throw std::runtime_error("app/model.properties has no " + key);
        return found->second;
    }

    std::vector<double> numbers(const std::string& key) const {
        std::istringstream stream(text(key));
        stream.imbue(std::locale::classic());  // a German phone would read 0,485
        return {std::istream_iterator<double>(stream), {}};
    }

    std::vector<float> floats_of(const std::string& key) const {
        const std::vector<double> wide = numbers(key);
        return {wide.begin(), wide.end()};
    }

    void read_preprocess() {
        Preprocess& to = preprocess_;
        const std::string& colour = text("colour");
        to.colour = colour == "GRAY" ? Colour::kGrey : colour == "BGR" ? Colour::kBgr : Colour::kRgb;
        to.divide = static_cast<float>(numbers("divide").at(0));
        to.mean = floats_of("mean");
        to.std = floats_of("std");
        to.keep_aspect = text("resize") == "shorter side";
        to.filter = text("interpolation") == "bicubic" ? Filter::kBicubic : Filter::kBilinear;
        const auto canvas = numbers("canvas"), crop = numbers("crop");
        to.canvas_height = static_cast<int>(canvas.at(0));
        to.canvas_width = static_cast<int>(canvas.at(1));
        to.height = static_cast<int>(crop.at(0));
        to.width = static_cast<int>(crop.at(1));
        if (static_cast<int>(to.mean.size()) != to.channels() || static_cast<int>(to.std.size()) != to.channels())
            throw std::runtime_error("app/model.properties: mean and std have to be given per channel");
    }

    std::string folder_;
    std::map<std::string, std::string> values_;
    std::vector<std::string> labels_;
    Preprocess preprocess_;
};

}  // namespace thinet
