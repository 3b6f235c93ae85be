// A network of this bundle in an Android app, by LiteRT on the processor.
//
// In build.gradle.kts: implementation("com.google.ai.edge.litert:litert:2.1.0") or later, and
// androidResources { noCompress += "tflite" } if the bundle goes with the app. Copy Classifier.kt and Preprocess.kt into
// the app (Check.kt into its tests), and into its files: app/model.properties, labels.txt and the engine's folder.
//
//     Classifier(File(context.filesDir, "bundle")).use { println(it.classify(bitmap).first()) }

package thinet

import android.graphics.Bitmap
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel
import java.io.File
import kotlin.math.exp

/** A class and its probability. */
data class Finding(val label: String, val probability: Double)

/** An engine that takes one image at a time; use one per thread. */
class Classifier(bundle: File, threads: Int = 1) : AutoCloseable {
    private val properties = Properties.of(bundle)
    private val preprocess = Preprocess(properties)
    private val labels = File(bundle, "labels.txt").readLines()
    private val model = CompiledModel.create(engine(bundle), options(threads))
    private val inputs = model.createInputBuffers()
    private val outputs = model.createOutputBuffers()

    /** The classes of an image, the likeliest first. */
    fun classify(bitmap: Bitmap): List<Finding> {
        val argb = IntArray(bitmap.width * bitmap.height)
        bitmap.getPixels(argb, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
        return ranked(scores(preprocess.input(Picture(bitmap.width, bitmap.height, argb))))
    }

    /** The network's output for an input of Preprocess. */
    fun scores(input: FloatArray): FloatArray {
        inputs[0].writeFloat(input)
        model.run(inputs, outputs)
        return outputs[0].readFloat()
    }

    override fun close() {
        (inputs + outputs).forEach { it.close() }
        model.close()
    }

    private fun ranked(scores: FloatArray): List<Finding> {
        val highest = scores.max()
        val shares = scores.map { exp((it - highest).toDouble()) }
        val sum = shares.sum()
        return shares.mapIndexed { index, share -> Finding(labels[index], share / sum) }.sortedByDescending { it.probability }
    }

    private fun engine(bundle: File): String {
        val name = properties.names.firstOrNull { it.startsWith("engine.litert.") }
            ?: throw IllegalArgumentException("the bundle has no engine for LiteRT")
        return File(bundle, properties.text(name)).path
    }

    private fun options(threads: Int) =
        CompiledModel.Options(Accelerator.CPU).apply { cpuOptions = CompiledModel.CpuOptions(numThreads = threads) }
}
