// Stands in for LiteRT: the names and signatures that Classifier.kt uses, as google-ai-edge/LiteRT has them in
// litert/kotlin/src/main/kotlin (Model.kt, TensorBuffer.kt, Common.kt). Its network sums each third of its input.

package com.google.ai.edge.litert

enum class Accelerator private constructor(val value: Int) { NONE(0), CPU(1), GPU(2), NPU(3) }

abstract class JniHandle internal constructor(internal val handle: Long) : AutoCloseable {
    final override fun close() {}
}

class TensorBuffer internal constructor(handle: Long) : JniHandle(handle) {
    internal var values = FloatArray(0)

    fun writeFloat(data: FloatArray) {
        values = data
    }

    fun readFloat(): FloatArray = values
}

class CompiledModel private constructor(handle: Long) : JniHandle(handle) {
    data class CpuOptions constructor(
        val numThreads: Int? = null,
        val xnnPackFlags: Int? = null,
        val xnnPackWeightCachePath: String? = null,
    )

    class Options constructor(internal vararg val accelerators: Accelerator) {
        var cpuOptions: CpuOptions? = null
    }

    @JvmOverloads
    fun createInputBuffers(signatureIndex: Int = 0): List<TensorBuffer> = listOf(TensorBuffer(1))

    @JvmOverloads
    fun createOutputBuffers(signatureIndex: Int = 0): List<TensorBuffer> = listOf(TensorBuffer(2))

    @JvmOverloads
    fun run(inputs: List<TensorBuffer>, outputs: List<TensorBuffer>, signatureIndex: Int = 0) {
        val third = inputs[0].values.size / 3
        outputs[0].values = FloatArray(3) { inputs[0].values.slice(it * third until (it + 1) * third).sum() }
    }

    companion object {
        @JvmOverloads
        @JvmStatic
        fun create(filePath: String, options: Options = Options(Accelerator.CPU), optionalEnv: Any? = null): CompiledModel {
            require(java.io.File(filePath).exists()) { "no model at $filePath" }
            return CompiledModel(3)
        }
    }
}
