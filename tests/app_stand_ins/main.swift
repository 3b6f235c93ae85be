// For each folder that is given: how many values of the golden picture's input differ.

import Foundation

for folder in CommandLine.arguments.dropFirst() {
    print(try valuesThatDiffer(bundle: URL(fileURLWithPath: folder)))
}
