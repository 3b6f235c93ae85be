// A network of this bundle in an app for iOS or macOS, by Core ML.
//
// Add Classifier.swift and Preprocess.swift to the app (Check.swift to its tests), and the bundle's folder as a folder
// reference. The .mlpackage is compiled on the device, each time that a Classifier is made.
//
//     let classifier = try Classifier(bundle: Bundle.main.url(forResource: "bundle", withExtension: nil)!)
//     print(try classifier.classify(image).first!)

import CoreGraphics
import CoreML
import Foundation

/// An engine that takes one image at a time; use one per thread.
public final class Classifier {
    private let properties: Properties, preprocess: Preprocess, model: MLModel, labels: [String]

    public init(bundle: URL, units: MLComputeUnits = .all) throws {
        properties = try Properties(bundle: bundle)
        preprocess = try Preprocess(properties)
        let text = try String(contentsOf: bundle.appendingPathComponent("labels.txt"), encoding: .utf8)
        labels = text.split(separator: "\n").map { String($0) }
        guard let name = properties.values.keys.sorted().first(where: { $0.hasPrefix("engine.coreml.") }) else {
            throw BundleError(description: "the bundle has no engine for Core ML")
        }
        let package = bundle.appendingPathComponent(try properties.text(name))
        let configuration = MLModelConfiguration()
        configuration.computeUnits = units
        let compiled = try MLModel.compileModel(at: package)
        defer { try? FileManager.default.removeItem(at: compiled) }
        model = try MLModel(contentsOf: compiled, configuration: configuration)
    }

    /// The classes of an image with their probabilities, the likeliest first.
    public func classify(_ image: CGImage) throws -> [(label: String, probability: Double)] {
        let scores = try scores(preprocess.input(picture(of: image))).map { Double($0) }
        let highest = scores.max() ?? 0
        let shares = scores.map { exp($0 - highest) }
        let sum = shares.reduce(0, +)
        return zip(labels, shares).map { ($0, $1 / sum) }.sorted { $0.1 > $1.1 }
    }

    /// The network's output for an input of Preprocess.
    public func scores(_ input: [Float]) throws -> [Float] {
        let shape = [1, preprocess.channels, preprocess.height, preprocess.width].map { NSNumber(value: $0) }
        let array = try MLMultiArray(shape: shape, dataType: .float32)
        let values = array.dataPointer.bindMemory(to: Float.self, capacity: input.count)
        for (index, value) in input.enumerated() { values[index] = value }
        let features = try MLDictionaryFeatureProvider(dictionary: [try properties.text("input"): array])
        let result = try model.prediction(from: features)
        guard let output = result.featureValue(for: try properties.text("output"))?.multiArrayValue else {
            throw BundleError(description: "the network has no output of that name")
        }
        return (0..<output.count).map { output[$0].floatValue }
    }

    /// The pixels of an image in sRGB.
    private func picture(of image: CGImage) throws -> Picture {
        var bytes = [UInt8](repeating: 0, count: image.width * image.height * 4)
        let drawn = bytes.withUnsafeMutableBytes { memory -> Bool in
            guard let space = CGColorSpace(name: CGColorSpace.sRGB), let context = CGContext(
                data: memory.baseAddress, width: image.width, height: image.height, bitsPerComponent: 8,
                bytesPerRow: image.width * 4, space: space, bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)
            else { return false }
            context.draw(image, in: CGRect(x: 0, y: 0, width: image.width, height: image.height))
            return true
        }
        guard drawn else { throw BundleError(description: "the image cannot be drawn in sRGB") }
        return Picture(width: image.width, height: image.height, channels: 4, bytes: bytes)
    }
}
