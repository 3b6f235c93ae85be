// For each folder that is given: how many values of the golden picture's input differ; then what Classifier finds.

import android.graphics.Bitmap
import java.io.File
import thinet.Classifier
import thinet.readPpm
import thinet.valuesThatDiffer

fun main(folders: Array<String>) {
    folders.forEach { println(valuesThatDiffer(File(it))) }
    val picture = readPpm(File(folders[0], "app/golden/picture.ppm"))
    Classifier(File(folders[0])).use { classifier ->
        classifier.classify(Bitmap(picture.width, picture.height, picture.argb)).forEach { println("${it.label} ${it.probability}") }
    }
}
