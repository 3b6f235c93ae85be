"""The papers' tables and figure: our columns measured, theirs beside them and marked as theirs (thinet.md, section 4).

vgg16, resnet50   weights, FLOPs, forward / backward time at 224×224, and the accuracy of whole recipes
criteria          the figure of the criteria at each share of filters, and the comparison of filter pruning
transfer          prune and fine-tune to other images, the other way round, from scratch; AlexNet and SqueezeNet

With --data IMAGENET (folders train/ and val/) the accuracies of vgg16 and resnet50 are the papers' own experiment.
Without it they are of networks for CIFAR-10 that stand for them, and the tables say so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _paper_accuracy import accuracies
from _paper_costs import costs
from _paper_criteria import criteria
from _paper_transfer import transfers
from _papers import COSTS
from _trained import cifar10, few, missing

from thinet_deploy.timing.torch_modes import MODES


def main() -> None:
    """One table, or all."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("--quick", action="store_true", help="small images, no training: shows that it works")
    parser.add_argument("--table", choices=[*COSTS, "criteria", "transfer"], help="one of them")
    parser.add_argument("--only", choices=["costs", "accuracy"], help="of vgg16 and resnet50, one half")
    parser.add_argument("--data", type=Path, help="ImageNet: train/ and val/ with a folder for each class")
    parser.add_argument("--weights", default="default", help="of the dense network on ImageNet; torchvision's")
    parser.add_argument("--batch", type=int, default=32, help="images per pass")
    parser.add_argument("--rounds", type=int, default=7, help="passes of each network that count")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--mode", choices=MODES, default="eager", help="how torch runs the networks that are timed")
    given = parser.parse_args()
    absent = missing()
    for name in [given.table] if given.table else [*COSTS, "criteria", "transfer"]:
        if name in COSTS and given.only != "accuracy":
            costs(name, 2 if given.quick else given.batch, given.rounds, given.device, given.mode, quick=given.quick)
        if given.only == "costs":
            continue
        if absent and not (name in COSTS and given.data):
            print(f"{name}: accuracies skipped, {absent}")
        elif name in COSTS:
            accuracies(name, given.data, given.weights, quick=given.quick)
        elif name == "criteria":
            criteria(few(cifar10(), 1000) if given.quick else cifar10(), quick=given.quick)
        else:
            transfers(quick=given.quick)


if __name__ == "__main__":
    main()
