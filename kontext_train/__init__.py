"""kontext_train: from a FLUX.1 text-to-image checkpoint to a fast, evaluated image editor.

How to read it: `train.py` assembles one run from top to bottom, `trainer.py` is the loop, `objectives/` holds one
file a stage, `models/flux.py` is the network. Layers, low to high (a file imports its own room or lower ones):

    randomness, errors < flow | models | distributed < data < generate < objectives < training < trainer
        < evaluation < config < entries (train, sample, export)
"""
