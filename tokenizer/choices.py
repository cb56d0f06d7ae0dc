"""What flags may choose among by name, without what the names stand for. No torch, see runtime/command.py."""

# The keys of provq.QUANTIZERS and provq.SCHEDULES: that file stands alone, and tests compare. Whoever adds one of their
# own adds its name here as well, before the flags are made.
QUANTIZERS = ["vq", "simvq", "aminoaseed", "ema"]
TRANSITIONS = ["cosine", "linear", "exp", "hard"]
GRIDS = ("fsq", "lfq")                                     # see grid_quantizers.py
AUGMENTATIONS = {                                          # see data.py
    "crop-flip": "random crop of 0.8 to 1.0 of the shorter side, random mirror (ImageNet, as LlamaGen trains)",
    "flip": "center crop, random mirror (pictures that are no larger than the image size, such as CIFAR-10)",
    "none": "center crop (evaluation; digits, whose mirror image is no digit)",
}
RECONSTRUCTION_LOSSES = ("l1", "l2")                       # see losses.py
ADVERSARIAL_LOSSES = ("hinge", "vanilla", "non-saturating")
