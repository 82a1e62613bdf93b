// One denoising step with one function of a bundle's Core ML package (macOS 15, iOS 18).
//
// Not compiled by the project's checks: they run on Linux without a Swift toolchain. On a Mac:
//
//     xcrun coremlcompiler compile bundle/coreml/denoiser.mlpackage .
//     swiftc -O DenoiseStep.swift -o denoise-step
//     ./denoise-step bundle/elastic.json denoiser.mlmodelc 64

import CoreML
import Foundation

struct Manifest: Decodable {
    struct Model: Decodable { let sample_shape: [Int] }
    struct Axis: Decodable { let name: String; let unit: Int }
    struct Call: Decodable { let function: String; let budget: [String: Int]; let sizes: [String: Int] }
    struct Conditions: Decodable { let path: String }
    struct Artifact: Decodable {
        let target: String
        let package: String?
        let shapes: String?
        let calls: [Call]?
        let conditions: Conditions?
    }
    struct Graph: Decodable { let artifacts: [Artifact] }
    let model: Model
    let axes: [Axis]
    let graphs: [String: Graph]
}

struct Problem: Error, CustomStringConvertible { let description: String }

func array(_ values: [Float], _ shape: [Int]) throws -> MLMultiArray {
    let made = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .float32)
    for (index, value) in values.enumerated() { made[index] = NSNumber(value: value) }
    return made
}

func array(_ values: [Int32], _ shape: [Int]) throws -> MLMultiArray {
    let made = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .int32)
    for (index, value) in values.enumerated() { made[index] = NSNumber(value: value) }
    return made
}

func main() throws {
    let arguments = CommandLine.arguments
    guard arguments.count == 4, let latents = Int(arguments[3]) else {
        throw Problem(description: "usage: denoise-step elastic.json denoiser.mlmodelc LATENTS")
    }
    let manifest = try JSONDecoder().decode(Manifest.self, from: Data(contentsOf: URL(fileURLWithPath: arguments[1])))
    // A bundle may hold several packages: the one that was compiled has its name.
    let stem = { (path: String) in URL(fileURLWithPath: path).deletingPathExtension().lastPathComponent }
    let packages = manifest.graphs["denoiser"]!.artifacts.filter { $0.target == "coreml" }
    guard let artifact = packages.first(where: { stem($0.package ?? "") == stem(arguments[2]) }) else {
        let offered = packages.map { stem($0.package ?? "") }.joined(separator: ", ")
        throw Problem(description: "the manifest has no package \(stem(arguments[2])); it has \(offered)")
    }
    guard artifact.conditions == nil else {
        throw Problem(
            description: "\(stem(arguments[2])) computes time and class in a function of its own, once a picture, and this sample takes one "
                + "step of a package that is whole: export it without --conditions-apart, too"
        )
    }
    let calls = artifact.calls ?? []
    // The manifest says which function serves a budget. There is no padding: a budget without a function is an error.
    guard let call = calls.first(where: { $0.budget["latents"] == latents || $0.budget.isEmpty }) else {
        let offered = calls.compactMap { $0.budget["latents"] }.map(String.init).joined(separator: ", ")
        throw Problem(description: "this package was not compiled for latents \(latents); it offers \(offered)")
    }
    let configuration = MLModelConfiguration()
    configuration.computeUnits = .all
    if call.function != "main" { configuration.functionName = call.function }
    let model = try MLModel(contentsOf: URL(fileURLWithPath: arguments[2]), configuration: configuration)

    let shape = [1] + manifest.model.sample_shape
    let kept = latents / manifest.axes.first { $0.name == "latents" }!.unit
    // Noise by Box-Muller. Time runs from 1 (noise) to 0 (picture); a step of Euler's method is x + (t' - t) v.
    var x = (0 ..< shape.reduce(1, *)).map { _ -> Float in
        (-2 * log(Float.random(in: 1e-7 ..< 1))).squareRoot() * cos(2 * .pi * Float.random(in: 0 ..< 1))
    }
    let (time, next): (Float, Float) = (1, 0.95)
    let inputs = try MLDictionaryFeatureProvider(dictionary: [
        "sample": array(x, shape),
        "timestep": array([time], [1]),
        "class_labels": array([Int32(7)], [1]),
        "latent_ids": array((0 ..< Int32(kept)).map { $0 }, [kept]),
    ])
    guard let velocity = try model.prediction(from: inputs).featureValue(for: "prediction")?.multiArrayValue else {
        throw Problem(description: "the package has no output named prediction")
    }
    for index in x.indices { x[index] += (next - time) * velocity[index].floatValue }
    print("\(call.function): one step from \(time) to \(next), first values \(x.prefix(4))")
}

do {
    try main()
} catch {
    FileHandle.standardError.write(Data("error: \(error)\n".utf8))
    exit(1)
}
